"""What can hang on a region besides its ops: ioeventfds and coalesced ranges.

Both are kept on the region, in its own offsets, and appear in an address space
wherever the part of the region that carries them shows. Neither is part of a
view, so a change of them alone is no change of the map: listeners hear of it
without begin and commit (rule T9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from memlistener.core.events import (
    CoalescedAdd,
    CoalescedDel,
    Event,
    EventfdAdd,
    EventfdDel,
    RegionAdd,
    RegionDel,
)

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange, FlatView
    from memlistener.core.region import MemoryRegion


@attrs.frozen(repr=False)
class IoEventFd:
    """A write that signals an eventfd instead of reaching the ops.

    Attributes:
        addr: Where, in the region or in the address space.
        size: Width of the write in bytes: 1, 2, 4, 8, or 0 for any.
        data: The value that has to be written; None for any.
        eventfd: What is signalled: a file descriptor, or an object with one.
    """

    addr: int
    size: int
    data: int | None
    eventfd: Any

    @property
    def match_data(self) -> bool:
        """Whether only one value signals."""
        return self.data is not None

    def order(self) -> tuple[int, int, bool, int]:
        """Rule T9: by address, size, match, data."""
        return self.addr, self.size, self.match_data, self.data or 0

    def __repr__(self) -> str:
        value = "" if self.data is None else f" data {self.data:#x}"
        return f"<IoEventFd [{self.addr:#x}, {self.addr + self.size:#x}){value} -> {self.eventfd}>"


# What a region carries: its ioeventfds and its coalesced (offset, size) pairs.
@attrs.frozen
class Attached:
    """What hangs on one region."""

    eventfds: tuple[IoEventFd, ...] = ()
    coalesced: tuple[tuple[int, int], ...] = ()


NOTHING = Attached()


class AttachedDiff:
    """What of it differs in one address space, between two states.

    Args:
        before: For regions where it changed, what was attached to them before.
    """

    def __init__(self, before: dict[MemoryRegion, Attached]) -> None:
        self._before = before

    def _old(self, region: MemoryRegion) -> Attached:
        return self._before.get(region, region._attached)

    def coalesced(self, events: Iterable[Event], stayed: Iterable[FlatRange]) -> list[Event]:
        """``events`` with the coalesced ranges of each range put beside it (rule T6).

        Args:
            events: Deletes, then adds, each ascending.
            stayed: Ranges in both views whose region's coalesced ranges changed.
        """
        dels: list[Event] = []
        adds: list[Event] = []
        for event in events:
            each = event.range
            if isinstance(event, RegionDel):
                spans = coalesced_of(each, self._old(each.region))
                dels.extend(CoalescedDel(each, *span) for span in spans)
                dels.append(event)
            else:
                adds.append(event)
                if isinstance(event, RegionAdd):
                    spans = coalesced_of(each, each.region._attached)
                    adds.extend(CoalescedAdd(each, *span) for span in spans)
        for each in stayed:
            old = list(coalesced_of(each, self._old(each.region)))
            new = list(coalesced_of(each, each.region._attached))
            dels.extend(
                CoalescedDel(each, *span) for span in (Counter(old) - Counter(new)).elements()
            )
            adds.extend(
                CoalescedAdd(each, *span) for span in (Counter(new) - Counter(old)).elements()
            )
        dels.sort(key=_start)  # stable: what stands beside a range stays there
        adds.sort(key=_start)
        return dels + adds

    def eventfds(
        self,
        before: FlatView,
        after: FlatView,
        events: Iterable[Event],
        stayed: Iterable[FlatRange],
    ) -> list[Event]:
        """Rule T9: the symmetric difference, in order.

        Args:
            before: The old view.
            after: The new one.
            events: How they differ.
            stayed: Ranges in both views whose region's ioeventfds changed.
        """
        old: dict[IoEventFd, FlatRange] = {}
        new: dict[IoEventFd, FlatRange] = {}
        for event in events:
            each = event.range
            if isinstance(event, RegionDel):
                old.update((fd, each) for fd in eventfds_of(each, self._old(each.region)))
            elif isinstance(event, RegionAdd):
                new.update((fd, each) for fd in eventfds_of(each, each.region._attached))
        for each in stayed:
            old.update((fd, each) for fd in eventfds_of(each, self._old(each.region)))
            new.update((fd, each) for fd in eventfds_of(each, each.region._attached))
        changes: list[tuple[IoEventFd, Event]] = [
            (fd, EventfdDel(each, fd))
            for fd, each in old.items()
            if fd not in new and not _shows(after, fd, lambda region: region._attached)
        ]
        changes += [
            (fd, EventfdAdd(each, fd))
            for fd, each in new.items()
            if fd not in old and not _shows(before, fd, self._old)
        ]
        changes.sort(key=lambda change: change[0].order())
        return [event for _, event in changes]


def _shows(view: FlatView, fd: IoEventFd, attached: Callable[[MemoryRegion], Attached]) -> bool:
    """Whether some range shows ``fd``: one that straddles ranges is there until the last goes."""
    return any(
        fd in eventfds_of(each, attached(each.region))
        for each in view.overlapping(max(fd.addr, 0), fd.addr + max(fd.size, 1))
    )


def eventfds_of(each: FlatRange, attached: Attached) -> Iterator[IoEventFd]:
    """The ioeventfds that show in a range, at absolute addresses."""
    shift = each.start - each.offset
    for fd in attached.eventfds:
        addr = fd.addr + shift
        if addr < each.end and addr + max(fd.size, 1) > each.start:
            yield attrs.evolve(fd, addr=addr)


def coalesced_of(each: FlatRange, attached: Attached) -> Iterator[tuple[int, int]]:
    """The coalesced ranges that show in a range: (absolute address, size)."""
    shift = each.start - each.offset
    for offset, size in attached.coalesced:
        low = max(offset + shift, each.start)
        high = min(offset + shift + size, each.end)
        if low < high:
            yield low, high - low


def _start(event: Event) -> int:
    return event.range.start
