"""A guest moves a device's memory: the register's handler runs a transaction."""

import trio

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs, kvm
from memlistener.testing import FakeKvm, GuestScript, Halt, Read, Write

# 32-bit: mov dword [0xfe000010], 0x80000000; mov eax, [0x80000000]; mov [0x3000], eax; hlt
CODE = bytes.fromhex("c705 100000fe 00000080  a1 00000080  a3 00300000  f4")


def script(vcpu_id: int) -> GuestScript:
    """The same for FakeKvm, which executes scripts."""
    yield Write(0xFE000010, 4, 0x80000000)
    word = yield Read(0x80000000, 4)
    yield Write(0x3000, 4, word)
    yield Halt()


class Display(MemoryRegionOps):
    """A configuration space whose BAR 0, at 0x10, says where the frame buffer is."""

    def __init__(self, memory: MemorySystem, framebuffer: MemoryRegion) -> None:
        self.memory = memory
        self.framebuffer = framebuffer

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """BAR 0; all other registers are 0."""
        return self.framebuffer.addr if offset == 0x10 else 0

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """Map the frame buffer where the guest wants it, while the guest waits."""
        if offset == 0x10:
            async with self.memory.transaction():
                self.framebuffer.set_address(value)
                self.framebuffer.set_enabled(True)


async def main() -> None:
    """Let the guest program the BAR and read through it at once."""
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    framebuffer = MemoryRegion.ram("framebuffer", 1 << 20)
    framebuffer.block.view[:4] = b"RGBA"
    framebuffer.set_enabled(False)
    system.add_subregion_overlap(0, framebuffer, 1)
    memory = MemorySystem()
    config = MemoryRegion.io("config", 0x100, Display(memory, framebuffer))
    system.add_subregion(0xFE000000, config)
    space = memory.create_address_space("memory", system)
    await space.write(0x1000, CODE)

    backend = None if kvm.available() else FakeKvm(script=script)
    async with kvm.open_vm(space, backend=backend) as vm:
        vcpu = await vm.create_vcpu()
        kvm.x86.protected_mode(vcpu, entry=0x1000)
        reason = await vcpu.run()
        print(reason, *vm.memslots, sep="\n")
        print("the guest read", await space.read(0x3000, 4))
        assert reason == kvm.Hlt()
        assert [hex(slot.guest_phys_addr) for slot in vm.memslots] == ["0x0", "0x80000000"]
        # The write of the BAR exited; the read went to a memslot that is its own.
        assert vm.statistics().vcpus[0].exits["Mmio"] == 1
        assert await space.read(0x3000, 4) == b"RGBA"


trio.run(main)
