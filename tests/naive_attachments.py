"""Rules T3 to T9 with all that hangs on regions, in the most obvious way.

Like `tests.naive`, and for every hook: written from the numbered rules alone, it
compares what one address space showed with what it shows now, both whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from memlistener import DirtyClient, FlatRange, MemoryRegion
from memlistener.core.kinds import RegionKind
from memlistener.testing.recording import Heard

MIGRATION = 1 << DirtyClient.MIGRATION
MEMORY = (RegionKind.RAM, RegionKind.ROM, RegionKind.ROM_DEVICE)
Fd: TypeAlias = tuple[int, int, bool, int, Any]  # address, size, match, data, eventfd
Span: TypeAlias = tuple[int, int]


@attrs.frozen
class Hung:
    """What hung on a region at some moment, as its attributes said."""

    eventfds: tuple[tuple[int, int, int | None, Any], ...] = ()
    coalesced: tuple[Span, ...] = ()
    mask: int = 0

    @classmethod
    def on(cls, region: MemoryRegion) -> Hung:
        return cls(
            tuple((fd.addr, fd.size, fd.data, fd.eventfd) for fd in region.eventfds),
            region.coalesced,
            region.dirty_log_mask,
        )


@attrs.frozen
class Shown:
    """One range, with all that shows in it."""

    address: int
    size: int
    region: MemoryRegion
    offset: int
    romd_mode: bool
    readonly: bool
    nonvolatile: bool
    unmergeable: bool
    mask: int = attrs.field(eq=False)
    coalesced: tuple[Span, ...] = attrs.field(eq=False)
    eventfds: tuple[Fd, ...] = attrs.field(eq=False)

    @classmethod
    def of(cls, each: FlatRange, hung: Hung, logging: bool) -> Shown:
        shift = each.start - each.offset
        end = each.start + each.size
        spans = []
        for offset, size in hung.coalesced:
            low, high = max(offset + shift, each.start), min(offset + size + shift, end)
            if low < high:
                spans.append((low, high - low))
        fds = []
        for offset, size, data, eventfd in hung.eventfds:
            written = range(offset + shift, offset + shift + max(size, 1))
            if any(each.start <= address < end for address in written):
                fds.append((offset + shift, size, data is not None, data or 0, eventfd))
        return cls(
            each.start,
            each.size,
            each.region,
            each.offset,
            each.romd_mode,
            each.readonly,
            each.nonvolatile,
            each.unmergeable,
            hung.mask | (MIGRATION if logging and each.region.kind in MEMORY else 0),
            tuple(spans),
            tuple(fds),
        )


@attrs.frozen
class State:
    """All that an address space shows."""

    ranges: tuple[Shown, ...]

    @classmethod
    def of(
        cls, view: Iterable[FlatRange], hung: Mapping[MemoryRegion, Hung], *, logging: bool
    ) -> State:
        shown = [Shown.of(each, hung.get(each.region, Hung()), logging) for each in view]
        return cls(tuple(sorted(shown, key=lambda each: each.address)))

    @property
    def eventfds(self) -> set[Fd]:
        return {fd for each in self.ranges for fd in each.eventfds}

    @property
    def coalesced(self) -> list[Span]:
        return sorted(span for each in self.ranges for span in each.coalesced)

    @property
    def logged(self) -> dict[int, int]:
        return {each.address: each.mask for each in self.ranges if each.mask}


@attrs.frozen
class Who:
    """A listener as the rules see it; ``registered`` counts registrations."""

    name: str
    priority: int
    registered: int
    nops: bool = False
    eventfds: bool = False
    coalesced: bool = False
    logs: bool = False


@attrs.frozen
class Call:
    """One hook called.

    Of eventfds only the address and the size of the section, since one that
    straddles two ranges may be told of by either.
    """

    listener: str
    hook: str
    section: tuple[object, ...] = ()
    arguments: tuple[object, ...] = ()

    @classmethod
    def heard(cls, heard: Heard) -> Call:
        section: tuple[object, ...] = ()
        if heard.section is not None:
            each = heard.section
            section = (each.offset_within_address_space, each.size)
            if not heard.hook.startswith("eventfd"):
                section += (each.region, each.offset_within_region)
                section += (each.readonly, each.nonvolatile, each.unmergeable)
        return cls(heard.listener, heard.hook, section, heard.arguments)


def about(who: Who, hook: str, each: Shown, *arguments: object) -> Call:
    section = (each.address, each.size, each.region, each.offset)
    flags = (each.readonly, each.nonvolatile, each.unmergeable)
    return Call(who.name, hook, (*section, *flags), arguments)


def ascending(listeners: Iterable[Who]) -> list[Who]:
    """Rule T4."""
    return sorted(listeners, key=lambda who: (who.priority, who.registered))


def delivery(old: State, new: State, listeners: Iterable[Who]) -> list[Call]:
    """What the listeners of one address space hear in one transaction."""
    up = ascending(listeners)
    down = up[::-1]
    before = {each.address: each for each in old.ranges}
    after = {each.address: each for each in new.ranges}
    changed = old.ranges != new.ranges or old.logged != new.logged
    calls: list[Call] = []
    for one in old.ranges:  # T3, T6: the delete pass
        two = after.get(one.address)
        stays = one == two
        left = list(two.coalesced) if two is not None and stays else []
        for span in one.coalesced:
            if span in left:
                left.remove(span)
            else:
                calls += [about(w, "coalesced_io_del", one, *span) for w in down if w.coalesced]
        if not stays:
            calls += [about(w, "region_del", one) for w in down]
    for two in new.ranges:  # the add pass
        was = before.get(two.address)
        left = []
        if was != two:
            calls += [about(w, "region_add", two) for w in up]
        else:
            assert was is not None
            left = list(was.coalesced)
            masks = was.mask, two.mask
            if changed:  # T7
                calls += [about(w, "region_nop", two) for w in up if w.nops]
            if two.mask & ~was.mask:  # T5
                calls += [about(w, "log_start", two, *masks) for w in up if w.logs]
            if was.mask & ~two.mask:
                calls += [about(w, "log_stop", two, *masks) for w in down if w.logs]
        for span in two.coalesced:
            if span in left:
                left.remove(span)
            else:
                calls += [about(w, "coalesced_io_add", two, *span) for w in up if w.coalesced]
    gone, come = old.eventfds - new.eventfds, new.eventfds - old.eventfds
    for fd in sorted(gone | come):  # T9
        name, who = ("eventfd_del", up) if fd in gone else ("eventfd_add", down)
        calls += [Call(w.name, name, fd[:2], fd[2:]) for w in who if w.eventfds]
    if not changed:  # T9, T10
        return calls
    begin, commit = ([Call(w.name, hook) for w in up] for hook in ("begin", "commit"))
    return begin + calls + commit


def register(state: State, who: Who, *, logging: bool) -> list[Call]:
    """Rule T8."""
    calls = [Call(who.name, "begin")]
    if logging and who.logs:
        calls.append(Call(who.name, "log_global_start"))
    for each in state.ranges:
        calls.append(about(who, "region_add", each))
        if who.coalesced:
            calls += [about(who, "coalesced_io_add", each, *span) for span in each.coalesced]
        if who.logs and each.mask:
            calls.append(about(who, "log_start", each, 0, each.mask))
    if who.eventfds:
        calls += [Call(who.name, "eventfd_add", fd[:2], fd[2:]) for fd in sorted(state.eventfds)]
    return [*calls, Call(who.name, "commit")]


def unregister(state: State, who: Who) -> list[Call]:
    """Rule T8."""
    calls = [Call(who.name, "begin")]
    for each in state.ranges:
        if who.logs and each.mask:
            calls.append(about(who, "log_stop", each, each.mask, 0))
        if who.coalesced:
            calls += [about(who, "coalesced_io_del", each, *span) for span in each.coalesced]
        calls.append(about(who, "region_del", each))
    if who.eventfds:
        calls += [Call(who.name, "eventfd_del", fd[:2], fd[2:]) for fd in sorted(state.eventfds)]
    return [*calls, Call(who.name, "commit")]


def everyone(listeners: Sequence[Who], hook: str, *, down: bool = False) -> list[Call]:
    """A hook for all memory, which listeners of all address spaces hear (T4)."""
    order = ascending(listeners)
    return [Call(who.name, hook) for who in (order[::-1] if down else order) if who.logs]


def comparable(calls: Sequence[Call]) -> list[Call]:
    """Without the order that no rule gives: eventfds alike but for the eventfd, and spans.

    Of coalesced ranges of one range, the order is the library's; so is that of two
    eventfds at one address with one match and one value.
    """
    result: list[Call] = []
    run: list[Call] = []

    def kind(call: Call) -> object:
        if call.hook.startswith("coalesced"):
            return call.hook, call.section
        if call.hook.startswith("eventfd"):
            return "eventfd", call.section, call.arguments[:2]
        return None

    for call in calls:
        if run and kind(call) != kind(run[0]):
            result += sorted(run, key=_order)
            run = []
        if kind(call) is None:
            result.append(call)
        else:
            run.append(call)
    return result + sorted(run, key=_order)


def _order(call: Call) -> str:
    # Stable: who hears first of one and the same thing still counts.
    return f"{call.hook} {call.arguments}"
