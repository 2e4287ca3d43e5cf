"""Events: the hook each one calls, and the one that takes it back."""

from __future__ import annotations

import typing

import pytest

from memlistener import FlatRange, MemoryListener, MemoryRegion
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
from memlistener.core.ioeventfd import IoEventFd
from memlistener.core.kinds import ROMD_MODE

RANGE = FlatRange(0x1000, 0x1000, MemoryRegion.io("io", 0x1000, None), 0, ROMD_MODE)
FD = IoEventFd(0x1010, 4, 7, "fd")
EVENTS: list[Event] = [
    RegionDel(RANGE),
    RegionAdd(RANGE),
    RegionNop(RANGE),
    LogStart(RANGE, 1, 3),
    LogStop(RANGE, 3, 1),
    CoalescedAdd(RANGE, 0x1000, 0x10),
    CoalescedDel(RANGE, 0x1000, 0x10),
    EventfdAdd(RANGE, FD),
    EventfdDel(RANGE, FD),
]
each_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)


def test_every_event_is_here() -> None:
    """T13: an event that is added to the union has to be added above."""
    assert {type(each) for each in EVENTS} == set(typing.get_args(Event))


@each_event
def test_hooks_are_those_of_a_listener(event: Event) -> None:
    """T4: ``hook`` names a method of MemoryListener, and is no other event's."""
    assert callable(getattr(MemoryListener, event.hook))
    assert [each for each in EVENTS if each.hook == event.hook] == [event]


@each_event
def test_the_inverse_of_the_inverse(event: Event) -> None:
    """T13: is the event itself; only what changed nothing has no inverse."""
    inverse = event.inverse()
    if isinstance(event, RegionNop):
        assert inverse is None
        return
    assert inverse is not None
    assert inverse != event
    assert inverse.inverse() == event
    assert inverse.range == event.range
    assert inverse.descending is not event.descending


@each_event
def test_directions(event: Event) -> None:
    """T4: which hooks are heard in descending priority."""
    downwards = {"region_del", "log_stop", "coalesced_io_del", "eventfd_add"}
    assert event.descending is (event.hook in downwards)


@each_event
def test_passes(event: Event) -> None:
    """T6: what goes in the delete pass is what takes something away; logs are in the other."""
    assert event.is_delete is event.hook.endswith("_del")


def test_masks_are_taken_back() -> None:
    """T13: log_start from 1 to 3 is taken back by log_stop from 3 to 1."""
    assert LogStart(RANGE, 1, 3).inverse() == LogStop(RANGE, 3, 1)
