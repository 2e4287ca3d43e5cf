"""An async device: a serial port that a guest writes to, and a task that reads."""

from collections.abc import Iterator

import trio

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs, kvm
from memlistener.testing import FakeKvm, Halt, Instruction, Out

TEXT = b"Hello from the guest\n"
# Real mode: mov si, 0x1100; mov dx, 0x3f8; mov cx, len; rep outsb; hlt
CODE = bytes.fromhex("be0011 baf803 b9") + len(TEXT).to_bytes(2, "little") + b"\xf3\x6e\xf4"


class Uart(MemoryRegionOps):
    """The transmit half of a 16550. The guest waits while the wire is busy."""

    def __init__(self, wire: trio.MemorySendChannel[int]) -> None:
        self.wire = wire

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """Line status, register 5: always ready to send."""
        return 0x60 if offset == 5 else 0

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """Register 0 sends one byte: the vCPU stands still until somebody takes it."""
        if offset == 0:
            await self.wire.send(value)


def script(vcpu_id: int) -> Iterator[Instruction]:
    """What FakeKvm's vCPU does in place of CODE."""
    yield Out(0x3F8, 1, count=len(TEXT), value=int.from_bytes(TEXT, "little"))
    yield Halt()


async def main() -> None:
    """Run the guest in one task and read the serial line in another."""
    send, receive = trio.open_memory_channel[int](0)
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    ports = MemoryRegion.container("ports", 1 << 16)
    ports.add_subregion(0x3F8, MemoryRegion.io("uart", 8, Uart(send)))

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    io = memory.create_address_space("I/O", ports)
    await space.write(0x1000, CODE)
    await space.write(0x1100, TEXT)

    usable = kvm.available()
    print("running on", "/dev/kvm" if usable else f"FakeKvm: {usable}")
    line = bytearray()
    backend = None if usable else FakeKvm(script=script)
    async with kvm.open_vm(space, io, backend=backend) as vm, trio.open_nursery() as nursery:

        async def listen() -> None:
            async for byte in receive:
                line.append(byte)

        nursery.start_soon(listen)
        vcpu = await vm.create_vcpu()
        kvm.x86.real_mode(vcpu, entry=0x1000)
        reason = await vcpu.run()
        await send.aclose()

    print(reason, line.decode())
    assert reason == kvm.Hlt()
    assert line == TEXT


trio.run(main)
