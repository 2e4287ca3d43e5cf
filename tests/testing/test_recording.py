"""`RecordingListener`: what it notes, and what it insists on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memlistener import DirtyClient, MemoryRegion, MemoryRegionSection, MemorySystem
from memlistener.core.ioeventfd import IoEventFd
from memlistener.listener import HOOKS
from memlistener.testing import RecordingListener
from memlistener.testing.recording import Heard


def small() -> tuple[MemorySystem, MemoryRegion, MemoryRegion]:
    system = MemoryRegion.container("system", 0x10000)
    ram = MemoryRegion.ram("ram", 0x1000)
    system.add_subregion(0x1000, ram)
    return MemorySystem(), system, ram


async def test_trace() -> None:
    """T2: what a listener hears, as text that can be compared with a literal."""
    memory, system, ram = small()
    space = memory.create_address_space("memory", system)
    listener = RecordingListener()
    await memory.register(listener, space)
    assert listener.trace == ["begin", "region_add [0x1000, 0x2000) ram+0x0", "commit"]
    listener.clear()
    assert listener.trace == []
    async with memory.transaction():
        ram.set_address(0x4000)
    assert listener.trace == [
        "begin",
        "region_del [0x1000, 0x2000) ram+0x0",
        "region_add [0x4000, 0x5000) ram+0x0",
        "commit",
    ]
    assert list(listener.ranges) == [0x4000]
    assert listener.ranges[0x4000].region is ram


async def test_a_shared_log() -> None:
    """T4: listeners with names, in one log, tell the order between them."""
    memory, system, ram = small()
    space = memory.create_address_space("memory", system)
    log: list[Heard] = []
    first = RecordingListener("first", priority=1, log=log)
    second = RecordingListener("second", priority=2, log=log)
    await memory.register(second, space)
    await memory.register(first, space)
    log.clear()
    async with memory.transaction():
        system.del_subregion(ram)
    assert [f"{each.listener} {each.hook}" for each in log] == [
        "first begin",
        "second begin",
        "second region_del",
        "first region_del",
        "first commit",
        "second commit",
    ]
    assert str(log[0]) == "first: begin"


@pytest.mark.parametrize("nops", [False, True])
async def test_nops(nops: bool) -> None:
    """T7: region_nop is heard by those who ask for it."""
    memory, system, _ = small()
    space = memory.create_address_space("memory", system)
    listener = RecordingListener(nops=nops)
    await memory.register(listener, space)
    listener.clear()
    async with memory.transaction():
        system.add_subregion(0x8000, MemoryRegion.io("io", 0x100, None))
    assert ("region_nop [0x1000, 0x2000) ram+0x0" in listener.trace) is nops
    assert "region_add [0x8000, 0x8100) io+0x0" in listener.trace


async def test_it_insists_on_order() -> None:
    """An add over what is there, or a del of what is not, fails the test that hears it."""
    memory, system, ram = small()
    space = memory.create_address_space("memory", system)
    listener = RecordingListener()
    section = MemoryRegionSection(ram, space, 0, 0x1000, 0x1000)
    with pytest.raises(AssertionError, match="is deleted"):
        listener.region_del(section)
    listener.region_add(section)
    with pytest.raises(AssertionError, match="is added over"):
        listener.region_add(section)
    other = MemoryRegionSection(ram, space, 0, 0x1000, 0x800)
    with pytest.raises(AssertionError, match="is deleted"):
        listener.region_del(other)


# ---- what is heard when asked for -------------------------------------------------------


def attached() -> tuple[MemorySystem, MemoryRegion, MemoryRegion]:
    memory, system, ram = small()
    device = MemoryRegion.io("device", 0x1000, None)
    device.add_eventfd(0x10, 4, 5, data=0xFF)
    device.add_eventfd(0x20, 0, 6)
    device.add_coalescing(0x40, 8)
    device.add_coalescing(0x40, 8)
    system.add_subregion(0x4000, device)
    ram.set_log(True, DirtyClient.VGA)
    return memory, system, ram


async def test_defaults_hear_no_more() -> None:
    """T7: what is not asked for is not overridden."""
    memory, system, _ = attached()
    space = memory.create_address_space("memory", system)
    listener = RecordingListener()
    await memory.register(listener, space)
    assert {each.hook for each in listener.heard} == {"begin", "region_add", "commit"}
    assert set(space._hooks) == {"begin", "region_add", "region_del", "commit"}


@pytest.mark.parametrize("as_names", [False, True])
async def test_all_of_it(as_names: bool) -> None:
    """T8: by option or by name, as text, and what it comes to."""
    memory, system, _ = attached()
    space = memory.create_address_space("memory", system)
    if as_names:
        names = {"eventfd_add", "eventfd_del", "coalesced_io_add", "coalesced_io_del", "log_start"}
        listener = RecordingListener(hooks=names | {"log_stop"})
    else:
        listener = RecordingListener(eventfds=True, coalesced=True, logs=True)
    await memory.register(listener, space)
    assert listener.trace == [
        "begin",
        "region_add [0x1000, 0x2000) ram+0x0",
        "log_start [0x1000, 0x2000) ram+0x0 0x0 -> 0x1",
        "region_add [0x4000, 0x5000) device+0x0",
        "coalesced_io_add [0x4000, 0x5000) device+0x0 coalesced [0x4040, 0x4048)",
        "coalesced_io_add [0x4000, 0x5000) device+0x0 coalesced [0x4040, 0x4048)",
        "eventfd_add [0x4010, 0x4014) device+0x10 data 0xff -> 5",
        "eventfd_add [0x4020, 0x4020) device+0x20 -> 6",
        "commit",
    ]
    assert list(listener.eventfds) == [
        IoEventFd(0x4010, 4, 0xFF, 5),
        IoEventFd(0x4020, 0, None, 6),
    ]
    assert dict(listener.coalesced) == {(0x4040, 8): 2}
    assert listener.logged == {0x1000: 1}
    await memory.unregister(listener)
    left = [listener.eventfds, listener.coalesced, listener.logged, listener.ranges]
    assert not any(left)


async def test_every_hook_can_be_asked_for() -> None:
    """T3: by name; and a name that is none is refused."""
    assert set(HOOKS) <= {name.removeprefix("_") for name in dir(RecordingListener)}
    for hook in HOOKS:
        memory, system, _ = small()
        space = memory.create_address_space("memory", system)
        await memory.register(RecordingListener(hooks={hook}), space)
        assert hook in space._hooks
    with pytest.raises(ValueError, match="region_mod"):
        RecordingListener(hooks={"region_mod"})


def test_it_insists_on_what_hangs_there() -> None:
    """Adding twice, or taking what is not there, fails the test that hears it."""
    memory, system, ram = small()
    space = memory.create_address_space("memory", system)
    section = MemoryRegionSection(ram, space, 0, 0x1000, 0x1000)
    other = MemoryRegionSection(ram, space, 0, 0x3000, 0x1000)
    listener = RecordingListener(eventfds=True, coalesced=True, logs=True)
    listener.region_add(section)
    listener.eventfd_add(section, False, 0, 5)
    listener.eventfd_add(section, True, 0, 5)
    wrong: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: listener.eventfd_add(section, True, 0, 5), "added twice"),
        (lambda: listener.eventfd_del(section, True, 1, 5), "was not there"),
        (lambda: listener.coalesced_io_del(section, 0x1000, 8), "and was not"),
        (lambda: listener.coalesced_io_add(section, 0xFFF, 8), "is not inside"),
        (lambda: listener.coalesced_io_add(other, 0x3000, 8), "not in the map"),
        (lambda: listener.log_start(other, 0, 1), "not in the map"),
        (lambda: listener.log_start(section, 1, 1), "gained no client"),
        (lambda: listener.log_stop(section, 1, 1), "lost no client"),
        (lambda: listener.log_sync(section), "does not log"),
        (lambda: listener.log_clear(other), "is not shown"),
        (listener.log_global_stop, "was not on"),
    )
    for call, message in wrong:
        with pytest.raises(AssertionError, match=message):
            call()
    listener.log_global_start()
    with pytest.raises(AssertionError, match="starts twice"):
        listener.log_global_start()
