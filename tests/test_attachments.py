"""ioeventfds, coalesced ranges and logged ranges: rules T4 to T6, T8, T9, T13 and F7."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest

from memlistener import (
    BrokenMemoryError,
    DirtyClient,
    FlatView,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
)
from memlistener.testing import RecordingListener
from memlistener.testing.assertions import assert_trace
from memlistener.testing.recording import Heard

from .trees import snapshot


class Machine:
    """A device with an ioeventfd and a coalesced range, and memory that VGA logs."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 0x10000)
        self.device = MemoryRegion.io("device", 0x1000, None)
        self.ram = MemoryRegion.ram("ram", 0x1000)
        self.rom = MemoryRegion.rom("rom", 0x1000)
        self.device.add_eventfd(0x10, 4, 7)
        self.device.add_coalescing(0x40, 8)
        self.ram.set_log(True, DirtyClient.VGA)
        self.root.add_subregion(0, self.device)
        self.root.add_subregion(0x4000, self.ram)
        self.root.add_subregion(0xF000, self.rom)
        self.space = self.memory.create_address_space("memory", self.root)
        self.log: list[Heard] = []

    async def listen(
        self, name: str = "", priority: int = 0, *, clear: bool = True, nops: bool = False
    ) -> RecordingListener:
        listener = RecordingListener(
            name,
            priority=priority,
            log=self.log,
            nops=nops,
            eventfds=True,
            coalesced=True,
            logs=True,
        )
        await self.memory.register(listener, self.space)
        if clear:
            self.log.clear()
        return listener


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- T8: replays ---------------------------------------------------------------------


async def test_registering_replays_all_of_it(machine: Machine) -> None:
    """T8: coalesced_io_add and log_start(0, mask) behind their range, eventfd_add last."""
    await machine.listen(clear=False)
    assert_trace(
        machine.log,
        """
        begin
        region_add [0x0, 0x1000) device+0x0
        coalesced_io_add [0x0, 0x1000) device+0x0 coalesced [0x40, 0x48)
        region_add [0x4000, 0x5000) ram+0x0
        log_start [0x4000, 0x5000) ram+0x0 0x0 -> 0x1
        region_add [0xf000, 0x10000) rom+0x0
        eventfd_add [0x10, 0x14) device+0x10 -> 7
        commit
        """,
    )


async def test_unregistering_replays_it_away(machine: Machine) -> None:
    """T8: log_stop(mask, 0), coalesced_io_del, region_del for each range; eventfd_del last."""
    listener = await machine.listen()
    await machine.memory.unregister(listener)
    assert_trace(
        machine.log,
        """
        begin
        coalesced_io_del [0x0, 0x1000) device+0x0 coalesced [0x40, 0x48)
        region_del [0x0, 0x1000) device+0x0
        log_stop [0x4000, 0x5000) ram+0x0 0x1 -> 0x0
        region_del [0x4000, 0x5000) ram+0x0
        region_del [0xf000, 0x10000) rom+0x0
        eventfd_del [0x10, 0x14) device+0x10 -> 7
        commit
        """,
    )
    assert listener.ranges == {}
    assert listener.eventfds == {}
    assert not listener.coalesced
    assert listener.logged == {}


async def test_registering_while_all_memory_logs(machine: Machine) -> None:
    """T8: log_global_start behind begin, and the mask has the migration's bit."""
    await machine.memory.dirty_log_start()
    listener = await machine.listen(clear=False)
    assert listener.trace[:2] == ["begin", "log_global_start"]
    assert "log_start [0x4000, 0x5000) ram+0x0 0x0 -> 0x5" in listener.trace
    assert "log_start [0xf000, 0x10000) rom+0x0 0x0 -> 0x4" in listener.trace


# ---- T9: eventfds --------------------------------------------------------------------


async def test_only_eventfds(machine: Machine) -> None:
    """T9: a transaction that changes only these sends no begin, no commit and no region_nop."""
    view = machine.space.view
    await machine.listen(nops=True)
    async with machine.memory.transaction():
        machine.device.add_eventfd(0x20, 0, 7, data=0x1F)
        machine.device.del_eventfd(0x10, 4, 7)
        machine.device.add_eventfd(0, 2, 8)
    assert_trace(
        machine.log,
        """
        eventfd_add [0x0, 0x2) device+0x0 -> 8
        eventfd_del [0x10, 0x14) device+0x10 -> 7
        eventfd_add [0x20, 0x20) device+0x20 data 0x1f -> 7
        """,
    )
    assert machine.space.view is view


async def test_there_and_back(machine: Machine) -> None:
    """T9, T10: what is deleted and added again is nothing."""
    await machine.listen()
    async with machine.memory.transaction():
        machine.device.del_eventfd(0x10, 4, 7)
        machine.device.add_eventfd(0x10, 4, 7)
        machine.device.clear_coalescing()
        machine.device.add_coalescing(0x40, 8)
    async with machine.memory.transaction():
        machine.device.set_address(0x1000)
        machine.device.set_address(0)
        machine.ram.set_log(False, DirtyClient.VGA)
        machine.ram.set_log(True, DirtyClient.VGA)
    assert machine.log == []


async def test_the_same_eventfd_on_another_region(machine: Machine) -> None:
    """T9: only address, size, match, data and eventfd count."""
    other = MemoryRegion.io("other", 0x1000, None)
    other.add_eventfd(0x10, 4, 7)
    await machine.listen()
    async with machine.memory.transaction():
        machine.root.del_subregion(machine.device)
        machine.root.add_subregion(0, other)
    assert not [each for each in machine.log if each.hook.startswith("eventfd")]


async def test_a_region_that_moves(machine: Machine) -> None:
    """T6, T9: its coalesced ranges go and come with it, its eventfds after both passes."""
    listener = await machine.listen()
    async with machine.memory.transaction():
        machine.device.set_address(0x2000)
    assert_trace(
        machine.log,
        """
        begin
        coalesced_io_del [0x0, 0x1000) device+0x0 coalesced [0x40, 0x48)
        region_del [0x0, 0x1000) device+0x0
        region_add [0x2000, 0x3000) device+0x0
        coalesced_io_add [0x2000, 0x3000) device+0x0 coalesced [0x2040, 0x2048)
        eventfd_del [0x10, 0x14) device+0x10 -> 7
        eventfd_add [0x2010, 0x2014) device+0x10 -> 7
        commit
        """,
    )
    assert [fd.addr for fd in listener.eventfds] == [0x2010]


async def test_a_region_that_moves_and_changes(machine: Machine) -> None:
    """T6, T9: what goes is what hung there before, in whatever order it was changed."""
    for late in (False, True):
        machine = Machine()
        listener = await machine.listen()
        async with machine.memory.transaction():
            if late:
                machine.device.set_address(0x2000)
            machine.device.del_eventfd(0x10, 4, 7)
            machine.device.add_eventfd(0x20, 4, 7)
            machine.device.clear_coalescing()
            machine.device.add_coalescing(0x80, 8)
            machine.device.set_address(0x2000)
        assert [fd.addr for fd in listener.eventfds] == [0x2020]
        assert list(listener.coalesced) == [(0x2080, 8)]


async def test_a_region_that_changes_while_it_is_out(machine: Machine) -> None:
    """T9: taken out of the tree, changed, and put back where it was, or not."""
    for back in (False, True):
        machine = Machine()
        listener = await machine.listen()
        async with machine.memory.transaction():
            machine.root.del_subregion(machine.device)
            machine.device.del_eventfd(0x10, 4, 7)
            machine.device.add_coalescing(0x80, 8)
            if back:
                machine.root.add_subregion(0, machine.device)
        assert listener.eventfds == {}
        assert sorted(listener.coalesced) == ([(0x40, 8), (0x80, 8)] if back else [])
        assert ("begin" in listener.trace) is not back


@pytest.mark.parametrize("back", [False, True])
async def test_a_region_that_changes_while_it_is_disabled(machine: Machine, back: bool) -> None:
    """T9: the same for one that is hidden, changed, and shown again, or not."""
    listener = await machine.listen()
    async with machine.memory.transaction():
        machine.device.set_enabled(False)
        machine.device.del_eventfd(0x10, 4, 7)
        machine.device.set_enabled(back)
    assert listener.eventfds == {}


async def test_with_nops_and_with_logs(machine: Machine) -> None:
    """T9, T7: a range that is heard of for another reason is not forgotten."""
    await machine.listen(nops=True)
    async with machine.memory.transaction():
        machine.ram.set_address(0x6000)
        machine.device.add_eventfd(0x20, 4, 7)
    assert "region_nop [0x0, 0x1000) device+0x0" in [str(each) for each in machine.log]
    assert "eventfd_add [0x20, 0x24) device+0x20 -> 7" in [str(each) for each in machine.log]
    machine.log.clear()
    async with machine.memory.transaction():
        machine.ram.add_eventfd(0, 4, 9)
        machine.ram.set_log(True, DirtyClient.CODE)
    assert "eventfd_add [0x6000, 0x6004) ram+0x0 -> 9" in [str(each) for each in machine.log]


async def test_partially_hidden(machine: Machine) -> None:
    """T9: an eventfd goes with the last byte of it that shows, a coalesced range is cut."""
    listener = await machine.listen()
    cover = MemoryRegion.io("cover", 0x12, None)
    async with machine.memory.transaction():
        machine.root.add_subregion_overlap(0, cover, 1)
    assert [fd.addr for fd in listener.eventfds] == [0x10]
    async with machine.memory.transaction():
        cover.set_size(0x14)
    assert listener.eventfds == {}
    async with machine.memory.transaction():
        cover.set_size(0x44)
    assert list(listener.coalesced) == [(0x44, 4)]
    async with machine.memory.transaction():
        cover.set_enabled(False)
    assert [fd.addr for fd in listener.eventfds] == [0x10]
    assert list(listener.coalesced) == [(0x40, 8)]


async def test_shown_twice(machine: Machine) -> None:
    """T9: a region behind two windows has its eventfds and coalesced ranges in both."""
    window = MemoryRegion.alias("window", machine.device, offset=0, size=0x44)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x8000, window)
    listener = await machine.listen()
    assert [fd.addr for fd in listener.eventfds] == [0x10, 0x8010]
    assert list(listener.coalesced) == [(0x40, 8), (0x8040, 4)]
    async with machine.memory.transaction():
        machine.device.add_eventfd(0, 1, 7)
        machine.device.clear_coalescing()
    assert_trace(
        machine.log,
        """
        coalesced_io_del [0x0, 0x1000) device+0x0 coalesced [0x40, 0x48)
        coalesced_io_del [0x8000, 0x8044) device+0x0 coalesced [0x8040, 0x8044)
        eventfd_add [0x0, 0x1) device+0x0 -> 7
        eventfd_add [0x8000, 0x8001) device+0x0 -> 7
        """,
    )


async def test_taken_back_with_the_transaction(machine: Machine) -> None:
    """T13: a body that raises leaves nothing hanging that was not."""
    await machine.listen()
    before = machine.device.eventfds, machine.device.coalesced, machine.ram.dirty_log_mask

    async def fail() -> None:
        async with machine.memory.transaction():
            machine.device.add_eventfd(0, 1, 7)
            machine.device.clear_coalescing()
            machine.ram.set_log(True, DirtyClient.CODE)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert (machine.device.eventfds, machine.device.coalesced, machine.ram.dirty_log_mask) == before
    assert machine.log == []


# ---- T4 and T5: order, and masks --------------------------------------------------------


async def everything(machine: Machine) -> None:
    """A transaction in which every hook with a range is called."""
    async with machine.memory.transaction():
        machine.device.set_address(0x1000)
        machine.ram.set_log(False, DirtyClient.VGA)
        machine.ram.set_log(True, DirtyClient.CODE)


@pytest.mark.parametrize(
    ("hook", "downwards"),
    [
        ("begin", False),
        ("region_add", False),
        ("region_del", True),
        ("region_nop", False),
        ("coalesced_io_add", False),
        ("coalesced_io_del", True),
        ("log_start", False),
        ("log_stop", True),
        ("eventfd_add", True),
        ("eventfd_del", False),
        ("commit", False),
    ],
)
async def test_priorities(machine: Machine, hook: str, downwards: bool) -> None:
    """T4: of every hook; of equals the earlier-registered first, or last where reversed."""
    for name, priority in (("e1", 10), ("low", -5), ("e2", 10), ("high", 20), ("e3", 10)):
        await machine.listen(name, priority, nops=True)
    await everything(machine)
    upwards = ["low", "e1", "e2", "e3", "high"]
    who = [each.listener for each in machine.log if each.hook == hook]
    assert who[:5] == (upwards[::-1] if downwards else upwards)


async def test_only_the_mask_differs(machine: Machine) -> None:
    """T5: region_nop, then log_start for bits gained, then log_stop for bits lost."""
    listener = await machine.listen(nops=True)
    async with machine.memory.transaction():
        machine.ram.set_log(False, DirtyClient.VGA)
        machine.ram.set_log(True, DirtyClient.CODE)
        machine.ram.set_log(True, DirtyClient.MIGRATION)
    assert_trace(
        machine.log,
        """
        begin
        region_nop [0x0, 0x1000) device+0x0
        region_nop [0x4000, 0x5000) ram+0x0
        log_start [0x4000, 0x5000) ram+0x0 0x1 -> 0x6
        log_stop [0x4000, 0x5000) ram+0x0 0x1 -> 0x6
        region_nop [0xf000, 0x10000) rom+0x0
        commit
        """,
    )
    assert listener.logged == {0x4000: 6}


async def test_added_with_logging_on(machine: Machine) -> None:
    """T6: no log_start for it in a transaction, nor log_stop for what goes."""
    await machine.listen()
    async with machine.memory.transaction():
        machine.ram.set_address(0x6000)
    assert [each.hook for each in machine.log] == ["begin", "region_del", "region_add", "commit"]


async def test_only_coalescing(machine: Machine) -> None:
    """T6, T10: no view changed, so no begin and commit; and only the difference is told."""
    await machine.listen()
    async with machine.memory.transaction():
        machine.device.add_coalescing(0x80, 8)
    assert_trace(machine.log, "coalesced_io_add [0x0, 0x1000) device+0x0 coalesced [0x80, 0x88)")


# ---- T13: failing -----------------------------------------------------------------------


class Boom(Exception):
    """What a failing hook raises."""


class Fuse:
    def __init__(self) -> None:
        self.calls = 0
        self.fatal: set[int] = set()

    def set(self, *fatal: int) -> None:
        self.calls, self.fatal = 0, set(fatal)

    def burn(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.fatal:
            raise Boom(self.calls - 1)


class Fragile(RecordingListener):
    """Hears everything, or raises and has heard nothing."""

    def __init__(self, name: str, priority: int, fuse: Fuse) -> None:
        super().__init__(
            name, priority=priority, nops=True, eventfds=True, coalesced=True, logs=True
        )
        self.fuse = fuse

    def _hear(
        self, hook: str, section: MemoryRegionSection | None = None, *arguments: object
    ) -> None:
        self.fuse.burn()
        super()._hear(hook, section, *arguments)

    @property
    def believed(self) -> tuple[object, ...]:
        return (
            dict(self.ranges),
            dict(self.eventfds),
            dict(self.coalesced),
            dict(self.logged),
            self.logging,
        )


class FragileMachine(Machine):
    """The same with a second space over a part, and three fragile listeners."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse()
        part = MemoryRegion.alias("part", self.root, offset=0, size=0x8000)
        self.dma = self.memory.create_address_space("dma", part)
        self.listeners = [Fragile(name, at, self.fuse) for at, name in enumerate(("a", "b", "c"))]

    async def start(self) -> None:
        for listener, space in zip(self.listeners, (self.space, self.space, self.dma), strict=True):
            await self.memory.register(listener, space)
            listener.clear()

    def state(self) -> list[object]:
        regions = [self.root, self.device, self.ram, self.rom]
        return [
            snapshot(regions),
            [(each.eventfds, each.coalesced, each.dirty_log_mask) for each in regions],
            [each.believed for each in self.listeners],
            [self.space.view, self.dma.view],
        ]


async def attach_only(machine: Machine) -> None:
    """A transaction without begin and commit."""
    async with machine.memory.transaction():
        machine.device.add_eventfd(0, 1, 7)
        machine.device.del_eventfd(0x10, 4, 7)
        machine.device.add_coalescing(0x80, 8)


async def start_logging(machine: Machine) -> None:
    await machine.memory.dirty_log_start()


async def stop_logging(machine: Machine) -> None:
    await machine.memory.dirty_log_stop()


Change: TypeAlias = Callable[[Machine], Awaitable[None]]
INVERSE = {
    "region_add": "region_del",
    "coalesced_io_add": "coalesced_io_del",
    "eventfd_add": "eventfd_del",
    "log_start": "log_stop",
    "log_global_start": "log_global_stop",
}
INVERSE |= {two: one for one, two in INVERSE.items()}


@pytest.mark.parametrize("change", [everything, attach_only, start_logging, stop_logging])
async def test_failing_at_every_position(change: Change) -> None:
    """T13: in each hook, whatever it was told is taken back, last first; nothing else."""
    failures = fatal = 0
    while True:
        machine = FragileMachine()
        await machine.start()
        if change is stop_logging:
            await machine.memory.dirty_log_start()
            for each in machine.listeners:
                each.clear()
        before = machine.state()
        machine.fuse.set(fatal)
        try:
            await change(machine)
        except Boom:
            failures += 1
        else:
            break
        assert machine.state() == before
        assert machine.memory.broken is None
        for listener in machine.listeners:
            told = [each for each in listener.heard if each.hook in INVERSE]
            half = len(told) // 2
            undone = [(each.hook, each.section) for each in told[half:]]
            inverse = [(INVERSE[each.hook], each.section) for each in reversed(told[:half])]
            if change is stop_logging:  # logging is switched on again, as at first
                undone.sort(key=repr)
                inverse.sort(key=repr)
            assert undone == inverse
        machine.fuse.set()
        await change(machine)
        fatal += 1
    assert failures == fatal >= 6


@pytest.mark.parametrize("change", [everything, attach_only, start_logging])
async def test_failing_while_undoing(change: Change) -> None:
    """T13: breaks the system, whichever hook it is in."""
    fatal, broken = 1, 0
    while True:
        machine = FragileMachine()
        await machine.start()
        machine.fuse.set(fatal, fatal + 1)
        try:
            await change(machine)
        except BrokenMemoryError:
            assert isinstance(machine.memory.broken, Boom)
            broken += 1
        except Boom:
            pytest.fail(f"nothing was undone after call {fatal}")
        else:
            break
        fatal += 1
    assert broken


async def test_quiet_changes_are_undone_quietly() -> None:
    """T13, T9: who heard no begin hears none when it is taken back."""
    fragile = FragileMachine()
    await fragile.start()
    fragile.fuse.set(3)
    with pytest.raises(Boom):
        await attach_only(fragile)
    heard = [each.hook for listener in fragile.listeners for each in listener.heard]
    assert heard
    assert not {"begin", "commit"} & set(heard)


# ---- F7: one view for many --------------------------------------------------------------


def whole(target: MemoryRegion) -> MemoryRegion:
    return MemoryRegion.alias("whole", target, offset=0, size=target.size)


class Shared:
    """Three address spaces over one tree: itself, an alias of it, a container of one."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 0x10000)
        self.ram = MemoryRegion.ram("ram", 0x1000)
        self.other = MemoryRegion.io("other", 0x1000, None)
        self.root.add_subregion(0, self.ram)
        self.root.add_subregion(0x4000, self.other)
        self.window = whole(self.root)
        self.holder = MemoryRegion.container("holder", 0x10000)
        self.holder.add_subregion_overlap(0, self.window, 0)
        self.private = MemoryRegion.io("private", 0x100, None)
        self.private.set_enabled(False)
        self.holder.add_subregion_overlap(0x8000, self.private, 1)
        self.spaces = [
            self.memory.create_address_space(name, root)
            for name, root in (("a", self.root), ("b", whole(self.root)), ("c", self.holder))
        ]

    def views(self) -> list[FlatView]:
        return [space.view for space in self.spaces]

    @property
    def is_one(self) -> bool:
        return len({id(view) for view in self.views()}) == 1

    def check(self) -> None:
        for space in self.spaces:
            space.view.check()
            assert space.view == FlatView.render(space.root)

    async def listen(self) -> list[RecordingListener]:
        listeners = []
        for space in self.spaces:
            listener = RecordingListener()
            await self.memory.register(listener, space)
            listener.clear()
            listeners.append(listener)
        return listeners


async def test_one_view_from_the_beginning() -> None:
    """F7: one object, and no copy, whatever the roots add."""
    shared = Shared()
    assert shared.is_one
    late = shared.memory.create_address_space("late", whole(whole(shared.root)))
    assert late.view is shared.spaces[0].view
    apart = shared.memory.create_address_space(
        "apart", MemoryRegion.alias("apart", shared.root, offset=0, size=0x8000)
    )
    assert apart.view is not late.view


async def test_one_view_after_changes() -> None:
    """F7, T10: and all the listeners hear the same, each of its own space."""
    shared = Shared()
    listeners = await shared.listen()
    for address in (0x2000, 0x3000):
        async with shared.memory.transaction():
            shared.ram.set_address(address)
        assert shared.is_one
        shared.check()
    assert listeners[0].trace
    assert all(each.trace == listeners[0].trace for each in listeners)
    for listener, space in zip(listeners, shared.spaces, strict=True):
        assert {each.section.address_space for each in listener.heard if each.section} == {space}


async def test_roots_that_part_and_meet() -> None:
    """F7: a view of its own while it shows something else, and then the common one again."""
    shared = Shared()
    listeners = await shared.listen()
    async with shared.memory.transaction():
        shared.private.set_enabled(True)
    assert shared.spaces[0].view is shared.spaces[1].view
    assert shared.spaces[2].view is not shared.spaces[0].view
    assert [len(each.heard) for each in listeners] == [0, 0, 3]
    async with shared.memory.transaction():
        shared.ram.set_address(0x1000)
    shared.check()
    assert [len(each.heard) for each in listeners] == [4, 4, 7]
    async with shared.memory.transaction():
        shared.private.set_enabled(False)
    assert shared.is_one
    shared.check()
    assert [len(each.heard) for each in listeners] == [4, 4, 10]


async def test_parting_and_changing_at_once() -> None:
    """F7: each space hears its own difference."""
    shared = Shared()
    listeners = await shared.listen()
    async with shared.memory.transaction():
        shared.private.set_enabled(True)
        shared.ram.set_address(0x1000)
    shared.check()
    assert listeners[0].trace == listeners[1].trace
    assert "region_add [0x8000, 0x8100) private+0x0" in listeners[2].trace
    async with shared.memory.transaction():
        shared.private.set_enabled(False)
        shared.ram.set_address(0)
    shared.check()
    assert shared.is_one


async def test_a_change_that_one_does_not_see() -> None:
    """F7, T10: its view stays the very object, and its listener hears nothing."""
    shared = Shared()
    async with shared.memory.transaction():
        shared.window.set_size(0x2000)
    listeners = await shared.listen()
    views = shared.views()
    async with shared.memory.transaction():
        shared.other.set_address(0x5000)
    shared.check()
    assert [bool(each.heard) for each in listeners] == [True, True, False]
    assert shared.views()[2] is views[2]
    assert shared.views()[0] is shared.views()[1]
    async with shared.memory.transaction():
        shared.window.set_size(0x10000)
    assert shared.is_one
    shared.check()


async def test_the_one_empty_view() -> None:
    """F7: nothing enabled is the same nothing for all."""
    shared = Shared()
    empty = shared.memory.create_address_space("empty", MemoryRegion.container("empty", 0x1000))
    async with shared.memory.transaction():
        shared.root.set_enabled(False)
        shared.window.set_enabled(False)
    assert len(empty.view) == 0
    assert all(view is empty.view for view in shared.views())
    later = shared.memory.create_address_space("later", MemoryRegion.container("later", 0x1000))
    assert later.view is empty.view
    async with shared.memory.transaction():
        shared.root.set_enabled(True)
        shared.window.set_enabled(True)
    assert shared.is_one
    shared.check()


async def test_a_shared_view_that_becomes_empty() -> None:
    """F7: a root with nothing to show, which is not the same as nothing enabled."""
    shared = Shared()
    listeners = await shared.listen()
    async with shared.memory.transaction():
        shared.ram.set_address(0x20000)
        shared.other.set_address(0x20000)
    assert [len(view) for view in shared.views()] == [0, 0, 0]
    assert shared.is_one
    assert [each.ranges for each in listeners] == [{}, {}, {}]


async def test_taken_back_they_share_as_before() -> None:
    """F7, T13: a listener that fails leaves the very views that were there."""
    shared = Shared()

    class Failing(RecordingListener):
        armed = False

        def commit(self) -> None:
            if self.armed:
                self.armed = False
                raise Boom
            super().commit()

    failing = Failing()
    await shared.memory.register(failing, shared.spaces[2])
    views = shared.views()
    failing.armed = True

    async def fail() -> None:
        async with shared.memory.transaction():
            shared.private.set_enabled(True)
            shared.ram.set_address(0x1000)

    with pytest.raises(Boom):
        await fail()
    assert all(one is two for one, two in zip(shared.views(), views, strict=True))
    async with shared.memory.transaction():
        shared.ram.set_address(0x2000)
    assert shared.is_one
    shared.check()


async def test_a_root_that_comes_down_to_another_unseen() -> None:
    """F7: the second child lies past the end; without it the root comes down to the first."""
    memory = MemorySystem()
    ram = MemoryRegion.ram("ram", 0x1000)
    holder = MemoryRegion.container("holder", 0x1000)
    past = MemoryRegion.io("past", 0x1000, None)
    holder.add_subregion(0, whole(ram))
    holder.add_subregion(0x4000, past)
    one = memory.create_address_space("one", ram)
    two = memory.create_address_space("two", holder)
    async with memory.transaction():
        holder.del_subregion(past)
    assert one.view is two.view
