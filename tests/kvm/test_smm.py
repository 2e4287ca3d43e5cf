"""A second KVM address space: what vCPUs see in system management mode, on FakeKvm."""

from __future__ import annotations

import errno

import pytest

from memlistener import (
    AddressSpace,
    DirtyClient,
    KvmUnavailableError,
    MemoryRegion,
    MemorySystem,
    MemslotError,
    RegionError,
)
from memlistener.kvm import DirtyLogMethod, open_vm
from memlistener.kvm.backend import CAP_MULTI_ADDRESS_SPACE
from memlistener.testing import FakeKvm, GuestScript, Halt, Read, Write
from tests.kvm.rig import PAGE, SLOT_IOCTL

SMRAM = 0xA0000


class Machine:
    """A PC's: memory with a device at `SMRAM`, which in SMM is RAM."""

    def __init__(self) -> None:
        self.fake = FakeKvm(capabilities={CAP_MULTI_ADDRESS_SPACE: 2})
        self.memory = MemorySystem()
        self.ram = MemoryRegion.ram("ram", 0x100000)
        self.system = MemoryRegion.container("system", 1 << 32)
        self.system.add_subregion(0, self.ram)
        self.system.add_subregion_overlap(SMRAM, MemoryRegion.io("vga", 0x10000, None), 1)
        self.smram = MemoryRegion.alias("smram", self.ram, offset=SMRAM, size=0x10000)
        self.inside = MemoryRegion.container("smm", 1 << 32)
        self.inside.add_subregion_overlap(SMRAM, self.smram, 1)
        self.inside.add_subregion(
            0, MemoryRegion.alias("the rest", self.system, offset=0, size=1 << 32)
        )
        self.space = self.memory.create_address_space("memory", self.system)
        self.smm = self.memory.create_address_space("smm", self.inside)

    def slots(self, as_id: int) -> list[tuple[int, int]]:
        """What the kernel has in an address space: (address, size)."""
        return [
            (each.guest_phys_addr, each.memory_size)
            for each in self.fake.vms[0].memslots
            if each.slot >> 16 == as_id
        ]


async def test_each_address_space_has_its_own_slots() -> None:
    """K1, K3: planned per as_id, from slot 0 on in each; a change of both trees changes both."""
    machine = Machine()
    async with open_vm(machine.space, smm=machine.smm, backend=machine.fake) as vm:
        assert vm.smm is machine.smm
        assert machine.slots(0) == [(0, SMRAM), (SMRAM + 0x10000, 0x50000)]
        assert sum(size for _, size in machine.slots(1)) == 0x100000
        assert {each.slot & 0xFFFF for each in vm.memslots} == {0, 1}
        async with machine.memory.transaction():
            machine.ram.set_size(0x80000)
        assert machine.slots(0) == machine.slots(1) == [(0, 0x80000)]
        assert vm.statistics().memslots == 2
        assert vm.statistics().brackets == 4  # two to begin with
        async with machine.memory.transaction():
            machine.smram.set_enabled(False)  # nothing of which shows now
        assert vm.statistics().brackets == 4
    assert machine.fake.vms[0].memslots != ()  # they go with the descriptor


async def test_accesses_go_where_the_vcpu_is() -> None:
    """What exits in SMM is looked up there, and is no hole where RAM is elsewhere only."""
    machine = Machine()
    async with open_vm(machine.space, smm=machine.smm, backend=machine.fake) as vm:
        vcpu = await vm.create_vcpu()
        fake = machine.fake.vms[0].vcpus[0]
        seen: list[int] = []

        def look() -> GuestScript:
            found = yield Read(SMRAM, 4)
            seen.append(found)
            yield Halt()

        machine.ram.block.view[SMRAM : SMRAM + 4] = b"smm!"
        fake.load(look())
        await vcpu.run()
        fake.address_space_id = 1
        fake.load(look())
        await vcpu.run()
        assert seen == [0xFFFFFFFF, int.from_bytes(b"smm!", "little")]
        assert vm.statistics().holes == 0
        async with machine.memory.transaction():
            machine.smram.set_enabled(False)
        fake.load(look())
        await vcpu.run()
        assert seen[2] == 0xFFFFFFFF


@pytest.mark.parametrize("method", DirtyLogMethod)
async def test_b12_both_are_logged(method: DirtyLogMethod) -> None:
    """B12: pages written in either mode are pages of the one memory."""
    machine = Machine()
    async with open_vm(
        machine.space, smm=machine.smm, dirty_log=method, backend=machine.fake
    ) as vm:
        vcpu = await vm.create_vcpu()
        fake = machine.fake.vms[0].vcpus[0]
        await machine.memory.dirty_log_start()
        for as_id, addr in enumerate((0x3000, SMRAM + PAGE)):
            fake.address_space_id = as_id
            fake.load([Write(addr, 1, 1), Halt()])
            await vcpu.run()
        async with machine.memory.transaction():
            machine.ram.set_address(0x200000)
        assert machine.ram.block.take_dirty(DirtyClient.MIGRATION) == [
            (0x3000, PAGE),
            (SMRAM + PAGE, PAGE),
        ]


@pytest.mark.parametrize("nth", range(1, 6))
async def test_t13_a_failure_in_either(nth: int) -> None:
    """T13: where the second address space refuses, the first one is as before, too."""
    machine = Machine()
    async with open_vm(machine.space, smm=machine.smm, backend=machine.fake):
        before = machine.slots(0), machine.slots(1)
        machine.fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
        with pytest.raises(MemslotError):
            async with machine.memory.transaction():
                machine.ram.set_size(0x80000)
        assert (machine.slots(0), machine.slots(1)) == before


async def test_kernels_without() -> None:
    """The error says what is missing, and what becomes of SMM without it."""
    machine = Machine()
    with pytest.raises(KvmUnavailableError, match=r"no second address space.*leave smm out"):
        async with open_vm(machine.space, smm=machine.smm, backend=FakeKvm()):
            pass
    assert machine.space.listeners == ()


async def test_of_another_memory_system() -> None:
    """As for I/O ports."""
    machine = Machine()
    other: AddressSpace = MemorySystem().create_address_space(
        "other", MemoryRegion.container("other", 1)
    )
    with pytest.raises(RegionError, match="different memory systems"):
        async with open_vm(machine.space, smm=other, backend=machine.fake):
            pass
