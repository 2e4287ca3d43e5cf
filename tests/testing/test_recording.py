"""`RecordingListener`: what it notes, and what it insists on."""

from __future__ import annotations

import pytest

from memlistener import MemoryRegion, MemoryRegionSection, MemorySystem
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
