"""The dirty ring: full, too full, and of which kernels."""

from __future__ import annotations

import pytest

from memlistener import KvmUnavailableError, MemoryRegion
from memlistener.kvm import DirtyLogMethod
from memlistener.kvm import backend as kernel
from memlistener.testing import FakeKvm, Halt, Write
from tests.kvm.dirty import (
    BASE,
    MIGRATION,
    sixteen_pages,
    write,
    written,
)
from tests.kvm.rig import PAGE, Rig


@pytest.fixture
def ram(rig: Rig) -> MemoryRegion:
    """Sixteen pages that a test moves about."""
    return sixteen_pages(rig)


async def test_b12_full(rig: Rig) -> None:
    """B12: a vCPU whose ring is full goes on when it has been emptied."""
    pages = 5000
    ram = MemoryRegion.ram("ram", pages * PAGE)
    rig.system.add_subregion(BASE * 4, ram)
    async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        for first in range(0, pages, 200):  # so many fit into a page of code
            await write(rig, vcpu, *(BASE * 4 + page * PAGE for page in range(first, first + 200)))
        assert vcpu.statistics().exits["DirtyRingFull"] > 1
        assert set(await written(rig, ram.block)) == set(range(pages))


async def test_b12_overflow() -> None:
    """B12: of a ring that is noticed to be full too late, no page is lost; it works again."""
    pages = 3000
    ram = MemoryRegion.ram("ram", pages * PAGE)
    rig = Rig(FakeKvm(dirty_rings_overflow=True, log_limit=0))
    rig.system.add_subregion(BASE * 4, ram)
    async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        for count in (900, 1024, 1025, 3000, 1980, 2047, 2048, 5, 963, 959):
            wrote = range(pages)[:count]
            for _ in range(3):
                await write(rig, vcpu, *(BASE * 4 + page * PAGE for page in wrote))
                found = await written(rig, ram.block)
                assert set(found) >= set(wrote)
        for _ in range(20):  # it finds its place again
            await write(rig, vcpu, BASE * 4)
            if await written(rig, ram.block) == [0]:
                break
        else:
            pytest.fail("pages that were not written are taken for ever")
        await write(rig, vcpu, BASE * 4 + PAGE, BASE * 4 + 2 * PAGE)
        assert await written(rig, ram.block) == [1, 2]
        assert vm.statistics().dirty_ring_overflows > 3


async def test_b12_overflow_while_the_guest_writes(rig: Rig) -> None:
    """B12: whatever this kernel does, a small ring ends in an equal copy."""
    pages = 2500
    ram = MemoryRegion.ram("ram", pages * PAGE)
    rig.system.add_subregion(BASE * 4, ram)
    copy = bytearray(pages * PAGE)
    async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        copy[:] = ram.block.view
        for number in range(6):
            for first in range(0, pages, 250):  # so many fit into the guest's code
                stores = [
                    Write(BASE * 4 + page * PAGE, 1, number + 1)
                    for page in range(first, first + 250)
                ]
                rig.load(vcpu, *stores, Halt())
                await vcpu.run()
            if number % 2:
                await rig.memory.dirty_log_sync()
                for offset, size in ram.block.take_dirty(MIGRATION):
                    copy[offset : offset + size] = ram.block.view[offset : offset + size]
    for offset, size in ram.block.take_dirty(MIGRATION):
        copy[offset : offset + size] = ram.block.view[offset : offset + size]
    assert copy == ram.block.view


@pytest.mark.parametrize("entries", [3, 1000, 1 << 20])
async def test_sizes_that_there_are_not(rig: Rig, entries: int) -> None:
    """The error says which there are."""
    with pytest.raises(KvmUnavailableError, match=r"power of two from 1,024 to 65,536"):
        async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=entries):
            pass


async def test_kernels_without() -> None:
    """The error says which kernels have it, and what else there is."""
    absent = {kernel.CAP_DIRTY_LOG_RING: 0, kernel.CAP_DIRTY_LOG_RING_ACQ_REL: 0}
    rig = Rig(FakeKvm(capabilities=absent))
    with pytest.raises(KvmUnavailableError, match="no dirty ring: use Linux"):
        async with rig.open(dirty_log=DirtyLogMethod.RING):
            pass


async def test_older_kernels() -> None:
    """KVM_CAP_DIRTY_LOG_RING will do."""
    rig = Rig(FakeKvm(capabilities={kernel.CAP_DIRTY_LOG_RING_ACQ_REL: 0}))
    async with rig.open(dirty_log=DirtyLogMethod.RING) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, 0x9000)
        assert 9 in await written(rig, rig.low.block)
