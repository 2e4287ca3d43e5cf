"""What a listener hears, in which order: rules T3 to T8, and the hooks themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from memlistener import (
    ListenerError,
    ListenerPriority,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    TransactionError,
)
from memlistener.listener import HOOKS
from memlistener.testing import RecordingListener
from memlistener.testing.recording import Heard


class Machine:
    """One address space, and a log that its listeners share."""

    def __init__(self) -> None:
        self.root = MemoryRegion.container("root", 0x10000)
        self.memory = MemorySystem()
        self.space = self.memory.create_address_space("memory", self.root)
        self.log: list[Heard] = []

    async def listen(
        self, name: str, priority: int = ListenerPriority.MIN, *, nops: bool = False
    ) -> RecordingListener:
        """Register a recorder; what it hears of the map as it is, is forgotten."""
        listener = RecordingListener(name, priority=priority, log=self.log, nops=nops)
        await self.memory.register(listener, self.space)
        self.log.clear()
        return listener

    @property
    def trace(self) -> list[str]:
        return [str(each) for each in self.log]

    def who(self, hook: str) -> list[str]:
        return [each.listener for each in self.log if each.hook == hook]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def io(name: str, size: int = 0x1000) -> MemoryRegion:
    return MemoryRegion.io(name, size, None)


# ---- T3: by address, and for each range listener by listener ----------------------


async def test_passes_walk_addresses_upwards_and_listeners_within_a_range(
    machine: Machine,
) -> None:
    """T3: deletes ascend, then adds ascend; each range goes to all before the next one."""
    a, b, c, d = (io(name) for name in "abcd")
    async with machine.memory.transaction():
        machine.root.add_subregion(0x4000, b)
        machine.root.add_subregion(0x1000, a)
    await machine.listen("one", 1)
    await machine.listen("two", 2)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x5000, d)
        machine.root.del_subregion(b)
        machine.root.add_subregion(0x0, c)
        machine.root.del_subregion(a)
    assert machine.trace == [
        "one: begin",
        "two: begin",
        "two: region_del [0x1000, 0x2000) a+0x0",
        "one: region_del [0x1000, 0x2000) a+0x0",
        "two: region_del [0x4000, 0x5000) b+0x0",
        "one: region_del [0x4000, 0x5000) b+0x0",
        "one: region_add [0x0, 0x1000) c+0x0",
        "two: region_add [0x0, 0x1000) c+0x0",
        "one: region_add [0x5000, 0x6000) d+0x0",
        "two: region_add [0x5000, 0x6000) d+0x0",
        "one: commit",
        "two: commit",
    ]


async def test_splitting_memory_deletes_it_whole_and_adds_the_rest(machine: Machine) -> None:
    """T3, T5: a device over the middle of RAM, and away again."""
    ram = MemoryRegion.ram("ram", 0x4000)
    async with machine.memory.transaction():
        machine.root.add_subregion(0, ram)
    listener = await machine.listen("")
    device = io("device")
    async with machine.memory.transaction():
        machine.root.add_subregion_overlap(0x1000, device, 1)
    assert listener.trace == [
        "begin",
        "region_del [0x0, 0x4000) ram+0x0",
        "region_add [0x0, 0x1000) ram+0x0",
        "region_add [0x1000, 0x2000) device+0x0",
        "region_add [0x2000, 0x4000) ram+0x2000",
        "commit",
    ]
    listener.clear()
    async with machine.memory.transaction():
        machine.root.del_subregion(device)
    assert listener.trace == [
        "begin",
        "region_del [0x0, 0x1000) ram+0x0",
        "region_del [0x1000, 0x2000) device+0x0",
        "region_del [0x2000, 0x4000) ram+0x2000",
        "region_add [0x0, 0x4000) ram+0x0",
        "commit",
    ]


# ---- T4: priorities -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "order"),
    [
        ("begin", "upwards"),
        ("region_add", "upwards"),
        ("region_nop", "upwards"),
        ("commit", "upwards"),
        ("region_del", "downwards"),
    ],
)
async def test_priorities(machine: Machine, hook: str, order: str) -> None:
    """T4: ascending, but region_del descending; of equals the earlier-registered first."""
    old, new, kept = io("old"), io("new"), io("kept")
    async with machine.memory.transaction():
        machine.root.add_subregion(0, old)
        machine.root.add_subregion(0x4000, kept)
    for name, priority in (("e1", 10), ("low", -5), ("e2", 10), ("high", 20), ("e3", 10)):
        await machine.listen(name, priority, nops=True)
    async with machine.memory.transaction():
        machine.root.del_subregion(old)
        machine.root.add_subregion(0x1000, new)
    upwards = ["low", "e1", "e2", "e3", "high"]
    assert machine.who(hook) == (upwards if order == "upwards" else upwards[::-1])


async def test_registering_again_goes_behind_equals(machine: Machine) -> None:
    """T4: registration order is that of the registration that counts now."""
    one = await machine.listen("one")
    two = await machine.listen("two")
    await machine.memory.unregister(one)
    await machine.memory.register(one, machine.space)
    assert machine.space.listeners == (two, one)
    machine.log.clear()
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
    assert machine.who("begin") == ["two", "one"]


def test_usual_priorities() -> None:
    """T4: an accelerator hears of memory before the device back ends that use it."""
    assert ListenerPriority.MIN < ListenerPriority.ACCEL < ListenerPriority.DEV_BACKEND
    assert MemoryListener().priority == ListenerPriority.MIN


# ---- T5: what makes two ranges differ ------------------------------------------------


def _other_region(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    machine.root.del_subregion(window)
    machine.root.add_subregion(0x1000, MemoryRegion.ram("ram", 0x1000))


def _address(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_address(0x3000)


def _size(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_size(0x800)


def _offset(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_alias_offset(0x800)


def _romd_mode(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    ram.set_romd_mode(False)


def _readonly(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_readonly(True)


def _nonvolatile(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_nonvolatile(True)


def _unmergeable(machine: Machine, ram: MemoryRegion, window: MemoryRegion) -> None:
    window.set_unmergeable(True)


@pytest.mark.parametrize(
    "difference",
    [_other_region, _address, _size, _offset, _romd_mode, _readonly, _nonvolatile, _unmergeable],
)
async def test_any_difference_is_del_and_add(
    machine: Machine, difference: Callable[[Machine, MemoryRegion, MemoryRegion], None]
) -> None:
    """T5: del of the whole old range as it was, add of the whole new one as it is."""
    flash = MemoryRegion.rom_device("flash", 0x2000, None)
    window = MemoryRegion.alias("window", flash, offset=0, size=0x1000)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x1000, window)
    listener = await machine.listen("", nops=True)
    [old] = machine.space.view
    async with machine.memory.transaction():
        difference(machine, flash, window)
    [new] = machine.space.view
    assert old != new
    assert [each.hook for each in listener.heard] == ["begin", "region_del", "region_add", "commit"]
    assert [each.section for each in listener.heard[1:3]] == [
        MemoryRegionSection.of(machine.space, old),
        MemoryRegionSection.of(machine.space, new),
    ]


# ---- T6: parts of a range --------------------------------------------------------------


async def test_sections_say_what_was_and_what_is(machine: Machine) -> None:
    """T6: region_del has the flags of the old range, region_add those of the new."""
    ram = MemoryRegion.ram("ram", 0x2000)
    window = MemoryRegion.alias("window", ram, offset=0x400, size=0x1000)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x8000, window)
    listener = await machine.listen("")
    async with machine.memory.transaction():
        window.set_readonly(True)
        ram.set_nonvolatile(True)
        ram.set_unmergeable(True)
    deleted, added = (each.section for each in listener.heard[1:3])
    where: dict[str, Any] = {
        "region": ram,
        "address_space": machine.space,
        "offset_within_region": 0x400,
        "offset_within_address_space": 0x8000,
        "size": 0x1000,
    }
    assert deleted == MemoryRegionSection(**where)
    assert added == MemoryRegionSection(**where, readonly=True, nonvolatile=True, unmergeable=True)
    assert added is not None
    assert added.end == 0x9000


async def test_section_repr_is_in_hex(machine: Machine) -> None:
    """T6: a section names the space, the addresses, the region and the offset."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0x8000, MemoryRegion.rom("bios", 0x1000))
    [each] = machine.space.view
    assert repr(MemoryRegionSection.of(machine.space, each)) == (
        "<MemoryRegionSection 'memory' [0x8000, 0x9000) 'bios' +0x0 readonly>"
    )


# ---- T7: region_nop -------------------------------------------------------------------


async def test_nops_go_to_those_who_implement_them(machine: Machine) -> None:
    """T7: every unchanged range, among the adds, and to nobody who did not ask."""
    async with machine.memory.transaction():
        for number in range(3):
            machine.root.add_subregion(0x4000 * number, io(f"io{number}"))
    await machine.listen("plain", 1)
    await machine.listen("vhost", 2, nops=True)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x2000, io("new"))
    assert machine.trace == [
        "plain: begin",
        "vhost: begin",
        "vhost: region_nop [0x0, 0x1000) io0+0x0",
        "plain: region_add [0x2000, 0x3000) new+0x0",
        "vhost: region_add [0x2000, 0x3000) new+0x0",
        "vhost: region_nop [0x4000, 0x5000) io1+0x0",
        "vhost: region_nop [0x8000, 0x9000) io2+0x0",
        "plain: commit",
        "vhost: commit",
    ]


async def test_no_nops_where_nothing_changed(machine: Machine) -> None:
    """T7, T10: a listener takes no part in a transaction that leaves its space alone."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
    other_root = MemoryRegion.container("other", 0x1000)
    machine.memory.create_address_space("other", other_root)
    listener = await machine.listen("vhost", nops=True)
    async with machine.memory.transaction():
        other_root.add_subregion(0, io("other"))
    assert listener.heard == []


# ---- T8: registering and unregistering --------------------------------------------------


async def test_registering_replays_the_map(machine: Machine) -> None:
    """T8: begin, region_add for each range upwards, commit; and nobody else hears of it."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0x4000, io("b"))
        machine.root.add_subregion(0x1000, io("a"))
    await machine.listen("there")
    late = RecordingListener("late", log=machine.log, nops=True)
    await machine.memory.register(late, machine.space)
    assert machine.trace == [
        "late: begin",
        "late: region_add [0x1000, 0x2000) a+0x0",
        "late: region_add [0x4000, 0x5000) b+0x0",
        "late: commit",
    ]


async def test_unregistering_replays_the_map_away(machine: Machine) -> None:
    """T8: begin, region_del for each range upwards, commit; then nothing any more."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0x4000, io("b"))
        machine.root.add_subregion(0x1000, io("a"))
    await machine.listen("stays")
    leaving = await machine.listen("leaving")
    await machine.memory.unregister(leaving)
    assert machine.trace == [
        "leaving: begin",
        "leaving: region_del [0x1000, 0x2000) a+0x0",
        "leaving: region_del [0x4000, 0x5000) b+0x0",
        "leaving: commit",
    ]
    assert leaving.ranges == {}
    machine.log.clear()
    async with machine.memory.transaction():
        machine.root.add_subregion(0x8000, io("c"))
    assert {each.listener for each in machine.log} == {"stays"}


async def test_replay_of_an_empty_map(machine: Machine) -> None:
    """T8: begin and commit come even where nothing is mapped."""
    listener = RecordingListener()
    await machine.memory.register(listener, machine.space)
    await machine.memory.unregister(listener)
    assert listener.trace == ["begin", "commit"] * 2


class Boom(Exception):
    """What a failing listener raises."""


class Failing(RecordingListener):
    """Raises instead of hearing its nth hook from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse: int | None = None

    def _burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Boom

    def begin(self) -> None:
        self._burn()
        super().begin()

    def commit(self) -> None:
        self._burn()
        super().commit()

    def region_add(self, section: MemoryRegionSection) -> None:
        self._burn()
        super().region_add(section)

    def region_del(self, section: MemoryRegionSection) -> None:
        self._burn()
        super().region_del(section)


_ADD_A, _ADD_B = "region_add [0x0, 0x1000) a+0x0", "region_add [0x4000, 0x5000) b+0x0"
_DEL_A, _DEL_B = "region_del [0x0, 0x1000) a+0x0", "region_del [0x4000, 0x5000) b+0x0"


@pytest.mark.parametrize(
    ("fuse", "undone"),
    [
        (0, []),
        (1, ["begin", "commit"]),
        (2, ["begin", _DEL_A, "commit"]),
        (3, ["begin", _DEL_B, _DEL_A, "commit"]),
    ],
)
async def test_failing_to_register(machine: Machine, fuse: int, undone: list[str]) -> None:
    """T8, T13: what was told is taken back, and the listener is not registered."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("a"))
        machine.root.add_subregion(0x4000, io("b"))
    listener = Failing()
    listener.fuse = fuse
    with pytest.raises(Boom):
        await machine.memory.register(listener, machine.space)
    assert listener.trace == ["begin", _ADD_A, _ADD_B][:fuse] + undone
    assert listener.ranges == {}
    assert machine.space.listeners == ()
    listener.clear()
    async with machine.memory.transaction():
        machine.root.add_subregion(0x8000, io("c"))
    assert listener.heard == []
    await machine.memory.register(listener, machine.space)
    assert len(listener.ranges) == 3


async def test_failing_to_register_while_all_memory_logs(machine: Machine) -> None:
    """T8, T13: log_global_start is taken back like anything else that was told."""
    log: list[str] = []

    class Logging(MemoryListener):
        def log_global_start(self) -> None:
            log.append("log_global_start")

        def log_global_stop(self) -> None:
            log.append("log_global_stop")

        def commit(self) -> None:
            if len(log) == 1:
                raise Boom

    await machine.memory.dirty_log_start()
    with pytest.raises(Boom):
        await machine.memory.register(Logging(), machine.space)
    assert log == ["log_global_start", "log_global_stop"]


@pytest.mark.parametrize(
    ("fuse", "undone"),
    [
        (0, []),
        (1, ["begin", "commit"]),
        (2, ["begin", _ADD_A, "commit"]),
        (3, ["begin", _ADD_B, _ADD_A, "commit"]),
    ],
)
async def test_failing_to_unregister(machine: Machine, fuse: int, undone: list[str]) -> None:
    """T8, T13: what was told is taken back, and the listener stays registered."""
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("a"))
        machine.root.add_subregion(0x4000, io("b"))
    listener = Failing()
    await machine.memory.register(listener, machine.space)
    believed = dict(listener.ranges)
    listener.clear()
    listener.fuse = fuse
    with pytest.raises(Boom):
        await machine.memory.unregister(listener)
    assert listener.trace == ["begin", _DEL_A, _DEL_B][:fuse] + undone
    assert listener.ranges == believed
    assert machine.space.listeners == (listener,)
    await machine.memory.unregister(listener)
    assert listener.ranges == {}


async def test_one_listener_of_two_spaces(machine: Machine) -> None:
    """T8: a listener may hear of several spaces, and leaves each by itself."""
    second = machine.memory.create_address_space("second", machine.root)
    log: list[str] = []

    class Both(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            log.append(f"add {section.address_space.name}")

        def region_del(self, section: MemoryRegionSection) -> None:
            log.append(f"del {section.address_space.name}")

    listener = Both()
    await machine.memory.register(listener, machine.space)
    await machine.memory.register(listener, second)
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
    with pytest.raises(
        ListenerError, match=r"several address spaces: say which of .*memory.*second"
    ):
        await machine.memory.unregister(listener)
    await machine.memory.unregister(listener, machine.space)
    await machine.memory.unregister(listener)
    assert log == ["add memory", "add second", "del memory", "del second"]


async def test_registering_what_cannot_be(machine: Machine) -> None:
    """T8: twice, for a space of another system, or no listener at all: ListenerError."""
    listener = await machine.listen("")
    with pytest.raises(ListenerError, match="already"):
        await machine.memory.register(listener, machine.space)
    with pytest.raises(ListenerError, match="not an address space of this memory system"):
        await MemorySystem().register(RecordingListener(), machine.space)
    with pytest.raises(ListenerError, match="not a MemoryListener"):
        await machine.memory.register(object(), machine.space)  # type: ignore[arg-type]
    with pytest.raises(ListenerError, match="is not registered for any address space here"):
        await machine.memory.unregister(RecordingListener())
    assert machine.space.listeners == (listener,)
    assert listener.heard == []


async def test_registering_inside_a_transaction(machine: Machine) -> None:
    """T8: refused in the task that has one open, since its map is not final."""
    there = await machine.listen("")
    async with machine.memory.transaction():
        with pytest.raises(TransactionError, match="register inside an open transaction"):
            await machine.memory.register(RecordingListener(), machine.space)
        with pytest.raises(TransactionError, match="unregister inside an open transaction"):
            await machine.memory.unregister(there)
    assert machine.space.listeners == (there,)


async def test_registering_waits_for_a_transaction(machine: Machine) -> None:
    """T8, T14: another task's transaction ends first; the replay shows what it made."""
    listener = RecordingListener()
    async with trio.open_nursery() as nursery, machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
        nursery.start_soon(machine.memory.register, listener, machine.space)
        await trio.testing.wait_all_tasks_blocked()
        assert listener.heard == []
    assert listener.trace == ["begin", "region_add [0x0, 0x1000) io+0x0", "commit"]


# ---- the hooks themselves ---------------------------------------------------------------


async def test_plain_and_async_hooks_mix(machine: Machine) -> None:
    """T3: an async hook is awaited before anything else is told."""
    log: list[str] = []

    class Slow(MemoryListener):
        async def begin(self) -> None:
            await trio.lowlevel.checkpoint()
            log.append("slow begin")

        async def region_add(self, section: MemoryRegionSection) -> None:
            log.append("slow add starts")
            await trio.lowlevel.checkpoint()
            log.append("slow add ends")

        def commit(self) -> None:
            log.append("slow commit")

    class Quick(MemoryListener):
        priority = ListenerPriority.ACCEL

        def begin(self) -> None:
            log.append("quick begin")

        def region_add(self, section: MemoryRegionSection) -> None:
            log.append("quick add")

        async def commit(self) -> None:
            log.append("quick commit")

    await machine.memory.register(Slow(), machine.space)
    await machine.memory.register(Quick(), machine.space)
    log.clear()
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
    assert log == [
        "slow begin",
        "quick begin",
        "slow add starts",
        "slow add ends",
        "quick add",
        "slow commit",
        "quick commit",
    ]


async def test_plain_hook_that_returns_an_awaitable(machine: Machine) -> None:
    """T3: such as a wrapper around an async hook: awaited or refused, but never dropped."""
    done: list[str] = []

    class Work:
        def __await__(self) -> Generator[Any, Any, None]:
            yield from trio.lowlevel.checkpoint().__await__()
            done.append("commit")

    class Wrapped(MemoryListener):
        def commit(self) -> Awaitable[None]:
            return Work()

    try:
        await machine.memory.register(Wrapped(), machine.space)
    except ListenerError:
        assert machine.space.listeners == ()
    else:
        assert done == ["commit"]


async def test_a_listener_that_overrides_nothing(machine: Machine) -> None:
    """T7: what is not overridden is not called, and nothing else is needed."""

    class Counting(MemoryListener):
        pass

    calls: list[str] = []
    listener = Counting()
    await machine.memory.register(listener, machine.space)
    # Found out once, when it registered: what is put there later is not called.
    for name in HOOKS:
        setattr(listener, name, lambda *_, name=name: calls.append(name))
    async with machine.memory.transaction():
        machine.root.add_subregion(0, io("io"))
    assert len(machine.space.view) == 1
    assert calls == []


def test_hooks_of_the_base_class_are_all_dispatched() -> None:
    """T3: every public method of MemoryListener is a hook, and does nothing by itself."""
    public = {name for name in vars(MemoryListener) if not name.startswith("_")}
    assert public - {"priority"} == set(HOOKS)


async def test_equal_listeners_are_two(machine: Machine) -> None:
    """T8: a listener is itself, whatever it says it equals."""

    @attrs.define
    class Equal(MemoryListener):
        number: int = 0

    one, two = Equal(), Equal()
    assert one == two
    await machine.memory.register(one, machine.space)
    await machine.memory.register(two, machine.space)
    with pytest.raises(ListenerError, match=r"registered for .* already"):
        await machine.memory.register(two, machine.space)
    assert len(machine.space.listeners) == 2
    await machine.memory.unregister(two)
    assert [each is one for each in machine.space.listeners] == [True]


@pytest.mark.parametrize("priority", ["7", None, 1.5, True])
async def test_priorities_are_ints(machine: Machine, priority: Any) -> None:
    """T4: what cannot be ordered is refused, before the listener hears of anything."""
    listener = RecordingListener(priority=priority)
    with pytest.raises(ListenerError, match=r"priority of .* is an int, not"):
        await machine.memory.register(listener, machine.space)
    assert listener.heard == []
    assert machine.space.listeners == ()
