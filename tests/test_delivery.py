"""What hooks are called with, and what a delivery remembers."""

from __future__ import annotations

import pytest

from memlistener import (
    FlatRange,
    FlatView,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
)
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
from memlistener.core.kinds import READONLY, ROMD_MODE
from memlistener.delivery import Delivery, arguments
from memlistener.pending import SpaceChange
from memlistener.testing import RecordingListener

ROOT = MemoryRegion.container("root", 0x10000)
RAM = MemoryRegion.ram("ram", 0x1000)
SPACE = MemorySystem().create_address_space("space", ROOT)
RANGE = FlatRange(0x4000, 0x800, RAM, 0x100, ROMD_MODE | READONLY)
SECTION = MemoryRegionSection(RAM, SPACE, 0x100, 0x4000, 0x800, readonly=True)
FD = IoEventFd(0x4010, 4, None, "fd")


def fd_section(fd: IoEventFd) -> MemoryRegionSection:
    return MemoryRegionSection(RAM, SPACE, fd.addr - 0x4000 + 0x100, fd.addr, fd.size)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (RegionDel(RANGE), (SECTION,)),
        (RegionAdd(RANGE), (SECTION,)),
        (RegionNop(RANGE), (SECTION,)),
        (LogStart(RANGE, 1, 3), (SECTION, 1, 3)),
        (LogStop(RANGE, 3, 1), (SECTION, 3, 1)),
        (CoalescedAdd(RANGE, 0x4010, 8), (SECTION, 0x4010, 8)),
        (CoalescedDel(RANGE, 0x4010, 8), (SECTION, 0x4010, 8)),
        (EventfdAdd(RANGE, FD), (fd_section(FD), False, 0, "fd")),
        (EventfdDel(RANGE, FD), (fd_section(FD), False, 0, "fd")),
        (
            EventfdAdd(RANGE, IoEventFd(0x4010, 0, 7, 5)),
            (fd_section(IoEventFd(0x4010, 0, 7, 5)), True, 7, 5),
        ),
    ],
)
def test_arguments(event: Event, expected: tuple[object, ...]) -> None:
    """T5, T9: the section, and behind it what MemoryListener's hook takes."""
    assert arguments(SPACE, event) == expected
    assert callable(getattr(MemoryListener, event.hook))


def a_change(*events: Event, eventfds: tuple[Event, ...] = ()) -> SpaceChange:
    view = FlatView([RANGE])
    return SpaceChange(SPACE, SPACE.view, None, ROOT, view, events, eventfds)


@pytest.mark.parametrize(
    ("change", "quiet"),
    [
        (a_change(), True),
        (a_change(eventfds=(EventfdAdd(RANGE, FD),)), True),
        (a_change(CoalescedAdd(RANGE, 0x4000, 8)), True),
        (a_change(RegionAdd(RANGE)), False),
        (a_change(RegionDel(RANGE)), False),
        (a_change(LogStart(RANGE, 0, 1)), False),
        (a_change(LogStop(RANGE, 1, 0)), False),
        (a_change(RegionDel(RANGE), eventfds=(EventfdDel(RANGE, FD),)), False),
    ],
)
def test_quiet(change: SpaceChange, quiet: bool) -> None:
    """T9, T10: begin and commit are for changes of the map."""
    assert change.quiet is quiet


async def test_nobody_to_tell() -> None:
    """T2: the view is published all the same, and taken back all the same."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x10000)
    space = memory.create_address_space("space", root)
    old, new = space.view, FlatView([RANGE])
    delivery = Delivery()
    await delivery.deliver(SpaceChange(space, old, None, root, new, [RegionAdd(RANGE)], []))
    assert space.view is new
    assert space._view_root is root
    await delivery.undo()
    assert space.view is old
    assert space._view_root is None


async def test_only_those_who_were_told_are_told_the_opposite() -> None:
    """T13: a listener without the hook hears neither; one without its inverse is not asked."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x10000)
    space = memory.create_address_space("space", root)
    log: list[str] = []

    class Adds(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            log.append("adds")

    class Eventfds(MemoryListener):
        def begin(self) -> None:
            log.append("begin")

        def eventfd_del(
            self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: object
        ) -> None:
            log.append("del")

    for listener in (Adds(), Eventfds()):
        await memory.register(listener, space)
    log.clear()
    delivery = Delivery()
    change = SpaceChange(
        *(space, space.view, None, root, FlatView([RANGE])),
        events=[RegionAdd(RANGE)],
        eventfds=[EventfdAdd(RANGE, FD)],
    )
    await delivery.deliver(change)
    assert log == ["begin", "adds"]
    await delivery.undo()
    assert log == ["begin", "adds", "begin"]


async def test_spaces_are_undone_last_first() -> None:
    """T13: and within each, what was told last."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x10000)
    delivery = Delivery()
    recorder = RecordingListener()
    for name in ("one", "two"):
        space = memory.create_address_space(name, root)
        listener = RecordingListener(name, log=recorder.heard)
        await memory.register(listener, space)
    recorder.clear()
    other = RANGE._replace(start=0x8000)
    for space in memory.address_spaces:
        events = [RegionAdd(RANGE), RegionAdd(other)]
        await delivery.deliver(
            SpaceChange(space, space.view, root, root, FlatView([RANGE, other]), events, [])
        )
    recorder.clear()
    await delivery.undo()
    assert [(each.listener, each.hook) for each in recorder.heard] == [
        (name, hook)
        for name in ("two", "one")
        for hook in ("begin", "region_del", "region_del", "commit")
    ]
    starts = [each.section.offset_within_address_space for each in recorder.heard if each.section]
    assert starts == [0x8000, 0x4000] * 2
