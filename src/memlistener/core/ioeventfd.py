"""What can hang on a region besides its ops: ioeventfds and coalesced ranges.

Both are kept on the region, in its own offsets, and appear in an address space
wherever the part of the region that carries them shows. Neither is part of a
view, so a change of them alone is no change of the map: listeners hear of it
without begin and commit (rule T9).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    from memlistener.core.flatview import FlatRange
    from memlistener.core.region import MemoryRegion


@attrs.frozen
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
                dels.extend(_coalesced_dels(each, self._old(each.region)))
                dels.append(event)
            else:
                adds.append(event)
                if isinstance(event, RegionAdd):
                    adds.extend(_coalesced_adds(each, each.region._attached))
        for each in stayed:
            old, new = self._old(each.region), each.region._attached
            if old.coalesced != new.coalesced:
                dels.extend(_coalesced_dels(each, old))
                adds.extend(_coalesced_adds(each, new))
        dels.sort(key=_start)  # stable: what stands beside a range stays there
        adds.sort(key=_start)
        return dels + adds

    def eventfds(self, events: Iterable[Event], stayed: Iterable[FlatRange]) -> list[Event]:
        """Rule T9: the symmetric difference, in order."""
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
            (fd, EventfdDel(each, fd)) for fd, each in old.items() if fd not in new
        ]
        changes += [(fd, EventfdAdd(each, fd)) for fd, each in new.items() if fd not in old]
        changes.sort(key=lambda change: change[0].order())
        return [event for _, event in changes]


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


def _coalesced_dels(each: FlatRange, attached: Attached) -> Iterator[Event]:
    return (CoalescedDel(each, addr, size) for addr, size in coalesced_of(each, attached))


def _coalesced_adds(each: FlatRange, attached: Attached) -> Iterator[Event]:
    return (CoalescedAdd(each, addr, size) for addr, size in coalesced_of(each, attached))


def _start(event: Event) -> int:
    return event.range.start
