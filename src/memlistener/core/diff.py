"""Old ranges, new ranges -> the events that turn the one into the other (rule T5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from memlistener.core.events import (
    CoalescedAdd,
    CoalescedDel,
    Event,
    EventfdAdd,
    EventfdDel,
    LogStart,
    LogStop,
    RegionAdd,
    RegionDel,
    RegionNop,
)
from memlistener.core.ioeventfd import coalesced_of, eventfds_of
from memlistener.core.kinds import LOG_SHIFT

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange
    from memlistener.core.ioeventfd import IoEventFd

_FLAGS = (1 << LOG_SHIFT) - 1

__all__ = ["Event", "RegionAdd", "RegionDel", "RegionNop", "diff", "replay", "replay_reversed"]


def diff(old: Iterable[FlatRange], new: Iterable[FlatRange], *, nops: bool = False) -> list[Event]:
    """Compare two ascending sequences of ranges.

    Args:
        old: Before.
        new: After.
        nops: Whether ranges that stay are of interest too.

    Returns:
        All deletes, ascending, then all adds (and nops), ascending.
    """
    dels: list[Event] = []
    adds: list[Event] = []
    olds, news = iter(old), iter(new)
    one, two = next(olds, None), next(news, None)
    while one is not None or two is not None:
        if two is None or (one is not None and one[0] < two[0]):
            assert one is not None
            dels.append(RegionDel(one))
            one = next(olds, None)
        elif one is None or two[0] < one[0]:
            adds.append(RegionAdd(two))
            two = next(news, None)
        else:
            if not _same(one, two):
                dels.append(RegionDel(one))
                adds.append(RegionAdd(two))
            elif one is not two or nops:
                if nops:
                    adds.append(RegionNop(two))
                before, after = one[4] >> LOG_SHIFT, two[4] >> LOG_SHIFT
                if after & ~before:
                    adds.append(LogStart(two, before, after))
                if before & ~after:
                    adds.append(LogStop(two, before, after))
            one, two = next(olds, None), next(news, None)
    return dels + adds


def _same(one: FlatRange, two: FlatRange) -> bool:
    """Whether two ranges with one start differ at most in what is logged."""
    return one is two or (
        one[1] == two[1]
        and one[2] is two[2]
        and one[3] == two[3]
        and (one[4] ^ two[4]) & _FLAGS == 0
    )


def replay(view: Iterable[FlatRange]) -> list[Event]:
    """What a listener hears of a view when it registers (rule T8)."""
    events: list[Event] = []
    fds: dict[IoEventFd, EventfdAdd] = {}  # one that straddles two ranges is one
    for each in view:
        events.append(RegionAdd(each))
        attached = each.region._attached
        events.extend(CoalescedAdd(each, *span) for span in coalesced_of(each, attached))
        mask = each.dirty_log_mask
        if mask:
            events.append(LogStart(each, 0, mask))
        for fd in eventfds_of(each, attached):
            fds.setdefault(fd, EventfdAdd(each, fd))
    return [*events, *sorted(fds.values(), key=_fd_order)]


def replay_reversed(view: Iterable[FlatRange]) -> list[Event]:
    """What a listener hears of a view when it is unregistered (rule T8)."""
    events: list[Event] = []
    fds: dict[IoEventFd, EventfdDel] = {}
    for each in view:
        attached = each.region._attached
        mask = each.dirty_log_mask
        if mask:
            events.append(LogStop(each, mask, 0))
        events.extend(CoalescedDel(each, *span) for span in coalesced_of(each, attached))
        events.append(RegionDel(each))
        for fd in eventfds_of(each, attached):
            fds.setdefault(fd, EventfdDel(each, fd))
    return [*events, *sorted(fds.values(), key=_fd_order)]


def _fd_order(event: EventfdAdd | EventfdDel) -> tuple[int, int, bool, int]:
    return event.fd.order()
