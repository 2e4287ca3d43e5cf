"""RAM that comes and goes under a guest: memslots stay, and what was discarded is zeros."""

from __future__ import annotations

import pytest
import trio

from memlistener import (
    DirtyClient,
    MemoryRegion,
    MemoryRegionOps,
    MemTxAttrs,
    RamBlock,
    RamDiscardManager,
)
from memlistener.testing import Halt, Read, Write
from tests.kvm.rig import LONG_ENOUGH, PAGE, Rig

BASE = 0x200000
SIZE = 16 * PAGE


@pytest.fixture(params=["anonymous", "memfd"])
def manager(rig: Rig, request: pytest.FixtureRequest) -> RamDiscardManager:
    """Sixteen granules of a page each at BASE, none of them populated."""
    block = getattr(RamBlock, request.param)(SIZE, name="dimm")
    ram = MemoryRegion.ram("dimm", SIZE, block=block)
    manager = RamDiscardManager(ram, granularity=PAGE)
    rig.system.add_subregion(BASE, ram)
    return manager


async def test_zeros_and_data(rig: Rig, manager: RamDiscardManager) -> None:
    """Zeros after a discard, its data after populate and write; next to it nothing changes."""
    places = [BASE + page * PAGE for page in (1, 2, 3)]
    reads = [Read(addr, 4) for addr in places]
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        slots = vm.memslots
        await manager.populate(0, SIZE)
        rig.load(vcpu, *(Write(addr, 4, 0x600DC0DE) for addr in places), *reads, Halt())
        await vcpu.run()
        assert rig.results(vcpu) == [0x600DC0DE] * 3

        await manager.discard(2 * PAGE, PAGE)
        rig.load(vcpu, *reads, Halt())
        await vcpu.run()
        assert rig.results(vcpu) == [0x600DC0DE, 0, 0x600DC0DE]

        await manager.populate(2 * PAGE, PAGE)
        rig.load(vcpu, Write(places[1], 4, 0xFEED), *reads, Halt())
        await vcpu.run()
        assert rig.results(vcpu) == [0x600DC0DE, 0xFEED, 0x600DC0DE]
        assert manager.region.block.view[2 * PAGE : 2 * PAGE + 2] == b"\xed\xfe"
        assert vm.memslots == slots
        seen = vm.statistics()
        assert (seen.brackets, seen.holes, seen.unassigned) == (1, 0, 0)


async def test_under_a_running_guest(rig: Rig, manager: RamDiscardManager) -> None:
    """Nobody is stopped, no ioctl is made, and a guest that writes all the time goes on."""
    page = BASE + 5 * PAGE
    async with rig.open() as vm, trio.open_nursery() as nursery:
        await manager.populate(0, SIZE)
        vcpu = await rig.boot(vm, Write(page, 4, 0x5A), Read(BASE, 4), loop=True)
        manager.region.block.view[0] = 1
        nursery.start_soon(vcpu.run)
        await rig.wait_rounds(vcpu)
        assert rig.results(vcpu) == [1]
        before = vm.statistics()
        for _ in range(20):
            await manager.discard(0, SIZE)
            await manager.populate(0, SIZE)
            await rig.wait_rounds(vcpu, 2)  # one of them began after the discard
            assert manager.region.block.view[5 * PAGE] == 0x5A
            assert rig.results(vcpu) == [0]
        after = vm.statistics()
        assert (after.brackets, after.memslot_ioctls) == (before.brackets, before.memslot_ioctls)
        assert after.holes == after.unassigned == 0
        nursery.cancel_scope.cancel()


async def test_b6_the_guest_asks_for_it(rig: Rig, manager: RamDiscardManager) -> None:
    """B6: a device's handler populates and discards, while another task's transactions run."""

    class Device(MemoryRegionOps):
        async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
            await (manager.populate if value else manager.discard)(PAGE, PAGE)

    device = MemoryRegion.io("device", PAGE, Device())
    window = MemoryRegion.io("window", PAGE, None)
    window.set_enabled(False)
    rig.system.add_subregion(BASE + SIZE, device)
    rig.system.add_subregion_overlap(BASE + 8 * PAGE, window, 1)

    async def churn() -> None:
        while True:
            async with rig.memory.transaction():
                window.set_enabled(not window.enabled)
            await trio.sleep(0)

    plug, unplug = (Write(BASE + SIZE, 4, value) for value in (1, 0))
    look, use = Read(BASE + PAGE, 4), Write(BASE + PAGE, 4, 0x600DC0DE)
    again = Read(BASE + PAGE, 2)
    async with rig.open() as vm, trio.open_nursery() as nursery:
        vcpu = await rig.boot(vm, plug, use, look, unplug, again, Halt())
        nursery.start_soon(churn)
        with trio.fail_after(LONG_ENOUGH):
            await vcpu.run()
        nursery.cancel_scope.cancel()
        assert rig.results(vcpu) == [0x600DC0DE, 0]
        assert manager.populated() == []
        assert vm.statistics().holes == 0


async def test_b12_zeros_are_copied(rig: Rig, manager: RamDiscardManager) -> None:
    """B12: no log of the kernel's has a page that the host discarded, and it is not missed."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await manager.populate(0, SIZE)
        rig.load(vcpu, Write(BASE + PAGE, 1, 1), Halt())
        await vcpu.run()
        block = manager.region.block
        await rig.memory.dirty_log_start()
        copy = bytearray(block.view)
        await manager.discard(PAGE, PAGE)
        await rig.memory.dirty_log_sync()
        for offset, size in block.take_dirty(DirtyClient.MIGRATION):
            copy[offset : offset + size] = block.view[offset : offset + size]
        assert copy == block.view == bytes(SIZE)
        rig.load(vcpu, Write(BASE + PAGE, 1, 2), Halt())
        await vcpu.run()
        await rig.memory.dirty_log_sync()
        assert block.take_dirty(DirtyClient.MIGRATION) == [(PAGE, PAGE)]


async def test_a_transaction_moves_it(rig: Rig, manager: RamDiscardManager) -> None:
    """The slot moves with what is there, and a discard finds it where it is."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await manager.populate(0, SIZE)
        manager.region.block.view[0] = 7
        async with rig.memory.transaction():
            manager.region.set_address(BASE + 0x100000)
        for expected in (7, 0):
            rig.load(vcpu, Read(BASE + 0x100000, 1), Halt())
            await vcpu.run()
            assert rig.results(vcpu) == [expected]
            await manager.discard(0, PAGE)
        assert [each.mapping.name for each in vm.memslots] == ["low", "dimm"]
