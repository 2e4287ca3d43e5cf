"""Memory-wide dirty logging: who hears what, in which order, and what is taken back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

from memlistener import (
    AddressSpace,
    DirtyClient,
    FlatRange,
    FlatView,
    ListenerError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RegionError,
    RegionTypeError,
    TransactionError,
)
from memlistener.testing import RecordingListener
from memlistener.testing.assertions import assert_trace
from memlistener.testing.recording import Heard


class Machine:
    """RAM at 0 with a window onto it, ROM and a device; and a second space."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 0x10000)
        self.ram = MemoryRegion.ram("ram", 0x2000)
        self.rom = MemoryRegion.rom("rom", 0x1000)
        self.root.add_subregion(0, self.ram)
        self.root.add_subregion(
            0x4000, MemoryRegion.alias("window", self.ram, offset=0x800, size=0x1000)
        )
        self.root.add_subregion(0x8000, MemoryRegion.io("device", 0x1000, None))
        self.root.add_subregion(0xF000, self.rom)
        self.space = self.memory.create_address_space("memory", self.root)
        part = MemoryRegion.alias("part", self.root, offset=0, size=0x1000)
        self.dma = self.memory.create_address_space("dma", part)
        self.log: list[Heard] = []

    async def listen(
        self, name: str = "", priority: int = 0, space: AddressSpace | None = None
    ) -> RecordingListener:
        listener = RecordingListener(name, priority=priority, log=self.log, logs=True)
        await self.memory.register(listener, space or self.space)
        self.log.clear()
        return listener

    def who(self, hook: str) -> list[str]:
        return [each.listener for each in self.log if each.hook == hook]


@pytest.fixture
def machine() -> Machine:
    return Machine()


class Boom(Exception):
    """What a failing hook raises."""


async def test_start_and_stop(machine: Machine) -> None:
    """log_global_start, then a transaction; the transaction, then log_global_stop; memory only."""
    listener = await machine.listen()
    await machine.memory.dirty_log_start()
    assert_trace(
        machine.log,
        """
        log_global_start
        begin
        log_start [0x0, 0x2000) ram+0x0 0x0 -> 0x4
        log_start [0x4000, 0x5000) ram+0x800 0x0 -> 0x4
        log_start [0xf000, 0x10000) rom+0x0 0x0 -> 0x4
        commit
        """,
    )
    assert listener.logging
    machine.log.clear()
    await machine.memory.dirty_log_stop()
    assert_trace(
        machine.log,
        """
        begin
        log_stop [0x0, 0x2000) ram+0x0 0x4 -> 0x0
        log_stop [0x4000, 0x5000) ram+0x800 0x4 -> 0x0
        log_stop [0xf000, 0x10000) rom+0x0 0x4 -> 0x0
        commit
        log_global_stop
        """,
    )
    assert listener.logged == {}


async def test_several_clients(machine: Machine) -> None:
    """Several clients: clearing one leaves the others."""
    listener = await machine.listen()
    await machine.memory.dirty_log_start()
    async with machine.memory.transaction():
        machine.rom.set_log(True, DirtyClient.VGA)
    await machine.memory.dirty_log_stop()
    assert listener.logged == {0xF000: 1 << DirtyClient.VGA}
    assert "log_stop [0xf000, 0x10000) rom+0x0 0x5 -> 0x1" in listener.trace


async def test_what_is_added_meanwhile_logs_too(machine: Machine) -> None:
    """T6: without a log_start, but log_stop when it ends."""
    listener = await machine.listen()
    await machine.memory.dirty_log_start()
    async with machine.memory.transaction():
        machine.root.add_subregion(0x6000, MemoryRegion.ram("late", 0x1000))
    machine.log.clear()
    await machine.memory.dirty_log_stop()
    assert "log_stop [0x6000, 0x7000) late+0x0 0x4 -> 0x0" in listener.trace


async def test_order_of_listeners(machine: Machine) -> None:
    """T4: log_global_start and log_global_after_sync ascend, log_global_stop descends."""
    for name, priority, space in (
        ("e1", 10, machine.space),
        ("low", -1, machine.dma),
        ("e2", 10, machine.space),
        ("high", 20, machine.space),
    ):
        await machine.listen(name, priority, space)
    await machine.memory.dirty_log_start()
    await machine.memory.dirty_log_sync()
    await machine.memory.dirty_log_stop()
    upwards = ["low", "e1", "e2", "high"]
    assert machine.who("log_global_start") == upwards
    assert machine.who("log_global_after_sync") == upwards
    assert machine.who("log_global_stop") == upwards[::-1]


async def test_equals_of_two_spaces(machine: Machine) -> None:
    """T4: of equal priority the earlier-registered first, whichever space it is of."""
    await machine.listen("first", 0, machine.dma)
    await machine.listen("second", 0, machine.space)
    await machine.memory.dirty_log_start()
    assert machine.who("log_global_start") == ["first", "second"]


@pytest.mark.parametrize("fails", ["log_global_start", "log_start", "commit"])
async def test_failing_to_start(machine: Machine, fails: str) -> None:
    """One that fails stops those before it, in reverse, and nothing has changed."""
    await machine.listen("one", 0)
    await machine.listen("two", 1)

    armed = False
    failing = RecordingListener("failing", priority=2, log=machine.log, logs=True)
    real = getattr(failing, fails)

    def fail_once(*args: object) -> None:
        nonlocal armed
        if armed:
            armed = False  # undoing it does not fail
            raise Boom
        real(*args)

    setattr(failing, fails, fail_once)
    await machine.memory.register(failing, machine.space)
    await machine.listen("after", 3)
    armed = True
    views = machine.space.view, machine.dma.view
    with pytest.raises(Boom):
        await machine.memory.dirty_log_start()
    expected = ["two", "one"]
    if fails != "log_global_start":
        expected = ["after", "failing", *expected]
    assert machine.who("log_global_stop") == expected
    if fails == "log_global_start":
        assert {each.hook for each in machine.log} == {"log_global_start", "log_global_stop"}
        assert (machine.space.view, machine.dma.view) == views
    assert not any(each.dirty_log_mask for each in machine.space.view)
    assert machine.memory.broken is None
    machine.log.clear()
    await machine.memory.dirty_log_start()
    assert machine.who("log_global_start") == ["one", "two", "failing", "after"]


async def test_failing_to_stop(machine: Machine) -> None:
    """T13: those who heard log_global_stop start again, and memory is still logged."""
    listeners = [await machine.listen(name, at) for at, name in enumerate(("low", "high"))]

    class Failing(MemoryListener):
        priority = -1
        armed = True

        def log_global_stop(self) -> None:
            if self.armed:
                raise Boom

    failing = Failing()
    await machine.memory.register(failing, machine.space)
    await machine.memory.dirty_log_start()
    logged = dict(listeners[0].logged)
    assert logged
    machine.log.clear()
    with pytest.raises(Boom):
        await machine.memory.dirty_log_stop()
    assert machine.who("log_global_stop") == ["high", "low"]
    assert machine.who("log_global_start") == ["low", "high"]
    assert [each.logged for each in listeners] == [logged] * 2
    with pytest.raises(TransactionError, match="on already"):
        await machine.memory.dirty_log_start()
    failing.armed = False
    await machine.memory.dirty_log_stop()
    assert [each.logged for each in listeners] == [{}] * 2


async def test_twice(machine: Machine) -> None:
    """What is on cannot start, what is off cannot stop; nobody hears of it."""
    await machine.listen()
    with pytest.raises(TransactionError, match="not on"):
        await machine.memory.dirty_log_stop()
    assert machine.log == []
    await machine.memory.dirty_log_start()
    machine.log.clear()
    with pytest.raises(TransactionError, match="on already"):
        await machine.memory.dirty_log_start()
    assert machine.log == []


async def test_sync(machine: Machine) -> None:
    """log_sync goes to ranges that log, and then log_global_after_sync to all."""
    async with machine.memory.transaction():
        machine.ram.set_log(True, DirtyClient.VGA)
    await machine.listen()
    await machine.memory.dirty_log_sync()
    assert_trace(
        machine.log,
        """
        log_sync [0x0, 0x2000) ram+0x0
        log_sync [0x4000, 0x5000) ram+0x800
        log_global_after_sync
        """,
    )


async def test_sync_of_one_region(machine: Machine) -> None:
    """log_sync for its ranges only, and no log_global_after_sync."""
    await machine.memory.dirty_log_start()
    await machine.listen()
    await machine.memory.dirty_log_sync(machine.rom)
    assert_trace(machine.log, "log_sync [0xf000, 0x10000) rom+0x0")


async def test_sync_global(machine: Machine) -> None:
    """log_sync_global once per listener, however many ranges and spaces it has."""
    calls: list[str] = []

    class Global(MemoryListener):
        def log_sync_global(self) -> None:
            calls.append("sync")

    listener = Global()
    await machine.memory.register(listener, machine.space)
    await machine.memory.register(listener, machine.dma)
    await machine.memory.dirty_log_sync()
    assert calls == ["sync"]
    await machine.memory.dirty_log_sync(machine.ram)
    assert calls == ["sync", "sync"]


async def test_one_or_the_other(machine: Machine) -> None:
    """A listener implements one of log_sync and log_sync_global."""
    listener = RecordingListener(logs=True, hooks={"log_sync_global"})
    with pytest.raises(ListenerError, match="both"):
        await machine.memory.register(listener, machine.space)
    assert machine.space.listeners == ()
    assert listener.heard == []


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 0x2000, "log_clear [0x0, 0x2000) ram+0x0 | log_clear [0x4000, 0x5000) ram+0x800"),
        (0x400, 0x800, "log_clear [0x400, 0xc00) ram+0x400 | log_clear [0x4000, 0x4400) ram+0x800"),
        (0x1800, 0x4000, "log_clear [0x1800, 0x2000) ram+0x1800"),
        (
            0x1000,
            1,
            "log_clear [0x1000, 0x1001) ram+0x1000 | log_clear [0x4800, 0x4801) ram+0x1000",
        ),
        (0x1000, 0, ""),
        (0x2000, 0x1000, ""),
    ],
)
async def test_clear_is_clipped(machine: Machine, offset: int, size: int, expected: str) -> None:
    """log_clear is clipped to the cleared range, in every place that shows it."""
    async with machine.memory.transaction():
        machine.ram.set_log(True, DirtyClient.VGA)
    await machine.listen()
    await machine.memory.dirty_log_clear(machine.ram, offset, size)
    assert_trace(machine.log, expected.replace(" | ", "\n"))


async def start(memory: MemorySystem, _: MemoryRegion) -> None:
    await memory.dirty_log_start()


async def stop(memory: MemorySystem, _: MemoryRegion) -> None:
    await memory.dirty_log_stop()


async def sync(memory: MemorySystem, _: MemoryRegion) -> None:
    await memory.dirty_log_sync()


async def clear(memory: MemorySystem, region: MemoryRegion) -> None:
    await memory.dirty_log_clear(region, 0, 0x1000)


@pytest.mark.parametrize("call", [start, stop, sync, clear])
async def test_inside_a_transaction(
    machine: Machine, call: Callable[[MemorySystem, MemoryRegion], Awaitable[None]]
) -> None:
    """T14: it would wait for itself."""
    async with machine.memory.transaction():
        with pytest.raises(TransactionError, match="inside"):
            await call(machine.memory, machine.ram)
    assert not any(each.dirty_log_mask for each in machine.space.view)


@pytest.mark.parametrize(
    "hook",
    [
        *("log_global_start", "log_start", "log_sync", "log_global_after_sync"),
        *("log_sync_global", "log_clear", "log_stop", "log_global_stop"),
    ],
)
async def test_no_transaction_in_hooks(machine: Machine, hook: str) -> None:
    """T12: none can be opened, and nothing changed, in the hooks of logging."""
    seen: list[str] = []

    class Meddling(MemoryListener):
        pass

    async def meddle(*_: object) -> None:
        with pytest.raises(TransactionError):
            async with machine.memory.transaction():
                raise AssertionError("a hook got into a transaction")
        with pytest.raises(TransactionError):
            machine.ram.set_size(0x1000)
        seen.append(hook)

    listener = Meddling()
    setattr(listener, hook, meddle)
    await machine.memory.register(listener, machine.space)
    await machine.memory.dirty_log_start()
    await machine.memory.dirty_log_sync()
    await machine.memory.dirty_log_clear(machine.ram, 0, 0x1000)
    await machine.memory.dirty_log_stop()
    assert seen
    async with machine.memory.transaction():
        machine.ram.set_size(0x1000)
    assert len(machine.dma.view) == 1


async def test_a_listener_of_two_spaces_is_one(machine: Machine) -> None:
    """T4: the global hooks are about all memory, so each listener is called once."""
    calls: list[str] = []

    class Global(MemoryListener):
        def log_global_start(self) -> None:
            calls.append("start")

        def log_global_stop(self) -> None:
            calls.append("stop")

        def log_global_after_sync(self) -> None:
            calls.append("after sync")

    listener = Global()
    await machine.memory.register(listener, machine.space)
    await machine.memory.dirty_log_start()
    await machine.memory.register(listener, machine.dma)
    await machine.memory.dirty_log_sync()
    await machine.memory.dirty_log_stop()
    await machine.memory.dirty_log_start()
    assert calls == ["start", "after sync", "stop", "start"]


async def test_who_fails_is_told_once(machine: Machine) -> None:
    """A start that is taken back stops each listener once, whatever spaces it has."""
    calls: list[str] = []

    class Global(MemoryListener):
        def log_global_start(self) -> None:
            calls.append("start")

        def log_global_stop(self) -> None:
            calls.append("stop")

    class Failing(MemoryListener):
        priority = 1

        def log_global_start(self) -> None:
            raise OSError("refused")

    listener = Global()
    for space in (machine.space, machine.dma):
        await machine.memory.register(listener, space)
    await machine.memory.register(Failing(), machine.space)
    with pytest.raises(OSError, match="refused"):
        await machine.memory.dirty_log_start()
    assert calls == ["start", "stop"]


WRONG: Any = "0"


@pytest.mark.parametrize(
    ("error", "region", "offset", "size"),
    [
        (RegionTypeError, None, 0, 1),
        (RegionTypeError, "ram", 0, 1),
        (RegionError, MemoryRegion.io("io", 0x1000, None), 0, 1),
        (RegionError, MemoryRegion.container("box", 0x1000), 0, 1),
        (RegionTypeError, MemoryRegion.ram("ram", 0x1000), WRONG, 1),
        (RegionTypeError, MemoryRegion.ram("ram", 0x1000), 0, True),
        (RegionTypeError, MemoryRegion.ram("ram", 0x1000), 0, None),
        (RegionError, MemoryRegion.ram("ram", 0x1000), -1, 1),
        (RegionError, MemoryRegion.ram("ram", 0x1000), 0, -5),
    ],
)
async def test_arguments_of_clear(
    machine: Machine, error: type[Exception], region: Any, offset: int, size: int
) -> None:
    """Refused, and no listener hears of it."""
    await machine.listen()
    with pytest.raises(error):
        await machine.memory.dirty_log_clear(region, offset, size)
    assert machine.log == []


@pytest.mark.parametrize("region", ["ram", 0, MemoryRegion.io("io", 0x1000, None)])
async def test_arguments_of_sync(machine: Machine, region: Any) -> None:
    """Refused, and no listener hears of it."""
    await machine.listen()
    with pytest.raises(RegionError):
        await machine.memory.dirty_log_sync(region)
    assert machine.log == []


async def test_one_region_costs_its_own_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """log_sync and log_clear of one region look at no other's ranges."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 1 << 32)
    ram = MemoryRegion.ram("ram", 0x1000)
    ram.set_log(True, DirtyClient.VGA)
    root.add_subregion(0, ram)
    for number in range(1, 500):
        root.add_subregion(number * 0x2000, MemoryRegion.io("io", 0x1000, None))
    space = memory.create_address_space("space", root)
    listener = RecordingListener(logs=True)
    await memory.register(listener, space)
    listener.clear()
    looked: list[FlatRange] = []

    def overlapping(view: FlatView, low: int, high: int) -> Iterator[FlatRange]:
        for each in found(view, low, high):
            looked.append(each)
            yield each

    found = FlatView.overlapping
    monkeypatch.setattr(FlatView, "overlapping", overlapping)
    monkeypatch.setattr(FlatView, "__iter__", None)
    await memory.dirty_log_sync(ram)
    await memory.dirty_log_clear(ram, 0, 0x800)
    assert [each.region for each in looked] == [ram, ram]
    assert listener.trace == ["log_sync [0x0, 0x1000) ram+0x0", "log_clear [0x0, 0x800) ram+0x0"]


async def test_a_write_that_logging_overtakes() -> None:
    """B12: a write that began before anybody logged is told to who began meanwhile."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x10000)
    ram = MemoryRegion.ram("ram", 0x4000)

    class Slow(MemoryRegionOps):
        async def write(
            self, offset: int, value: int, size: int, attrs: MemTxAttrs
        ) -> MemTxResult | None:
            reached.set()
            await go_on.wait()
            return MemTxResult.OK

    reached, go_on = trio.Event(), trio.Event()
    root.add_subregion(0, ram)
    root.add_subregion_overlap(0, MemoryRegion.io("slow", 0xFF8, Slow()), 1)
    space = memory.create_address_space("space", root)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.write, 0xFF0, b"\1" * 0x1010)  # begins with the device's
        await reached.wait()
        async with memory.transaction():
            ram.set_log(True, DirtyClient.VGA)
        await memory.dirty_log_start()
        go_on.set()
    assert ram.block.take_dirty(DirtyClient.VGA) == [(0, 0x2000)]
    assert ram.block.take_dirty(DirtyClient.MIGRATION) == [(0, 0x2000)]
    assert ram.block.take_dirty(DirtyClient.CODE) == []
    # And one in a view of before, on a thread that has not seen the new one.
    before = space.view
    await memory.dirty_log_stop()
    await space.write_in(before, 0x3000, b"\1")
    assert ram.block.take_dirty(DirtyClient.VGA) == [(0x3000, 0x1000)]
