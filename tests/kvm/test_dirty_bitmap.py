"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG: what is protected when."""

from __future__ import annotations

import errno

import pytest

from memlistener import KvmError, MemoryRegion
from memlistener.kvm import DirtyLogMethod
from memlistener.kvm import backend as kernel
from memlistener.testing import FakeKvm
from tests.kvm.dirty import (
    BASE,
    MIGRATION,
    PAGES,
    sixteen_pages,
    taken,
    write,
    written,
)
from tests.kvm.rig import PAGE, Rig


@pytest.fixture
def ram(rig: Rig) -> MemoryRegion:
    """Sixteen pages that a test moves about."""
    return sixteen_pages(rig)


async def test_manual_protection(rig: Rig, ram: MemoryRegion) -> None:
    """KVM_CLEAR_DIRTY_LOG: pages are protected when they are taken, and only those."""
    async with rig.open(dirty_log=DirtyLogMethod.MANUAL_PROTECT) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, *(BASE + page * PAGE for page in range(PAGES)))
        await rig.memory.dirty_log_sync()
        assert ram.block.take_dirty(MIGRATION, 3 * PAGE, 2 * PAGE) == [(3 * PAGE, 2 * PAGE)]
        if rig.fake is not None:
            asked = [each for each in rig.fake.log if each.name == "KVM_CLEAR_DIRTY_LOG"]
            assert [each.args["bitmap"] for each in asked] == [(3 << 3).to_bytes(8, "little")]
        await write(rig, vcpu, BASE + 3 * PAGE)
        assert await written(rig, ram.block) == [page for page in range(PAGES) if page != 4]
        # A client that did not take them yet still has its bits; they need no clearing again.
        await write(rig, vcpu, BASE + 4 * PAGE)
        await rig.memory.dirty_log_sync()
        await rig.memory.dirty_log_clear(ram, 0, PAGES * PAGE)
        await write(rig, vcpu, BASE + 6 * PAGE)
        assert await written(rig, ram.block) == [4, 6]


async def test_manual_protection_is_not_everywhere() -> None:
    """Where the kernel does not offer it, KVM_GET_DIRTY_LOG protects."""
    fake = FakeKvm(capabilities={kernel.CAP_MANUAL_DIRTY_LOG_PROTECT2: 0})
    rig = Rig(fake)
    async with rig.open(dirty_log=DirtyLogMethod.MANUAL_PROTECT) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, 0x9000)
        assert 9 in await written(rig, rig.low.block)
    assert not [each for each in fake.log if each.name == "KVM_CLEAR_DIRTY_LOG"]


async def test_clearing_fails() -> None:
    """The error leaves take_dirty, and the bits are there the next time."""
    fake = FakeKvm()
    rig = Rig(fake)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, 0x9000)
        await rig.memory.dirty_log_sync()
        fake.fail("KVM_CLEAR_DIRTY_LOG", errno=errno.ENOMEM)
        with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG: slot 0 .*'low' logged: "):
            rig.low.block.take_dirty(MIGRATION)
        assert 9 in taken(rig.low.block)
        await write(rig, vcpu, 0x9000)
        assert 9 in await written(rig, rig.low.block)
