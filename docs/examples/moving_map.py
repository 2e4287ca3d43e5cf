"""A guest reads and executes RAM whose memslots are replaced under it."""

import trio

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, kvm
from memlistener.testing import FakeKvm, GuestScript, Read, Write

# 32-bit: read a word of RAM at 0x10000; if it is wrong, halt; else count, again.
CODE = bytes.fromhex("a1 00000100  3d dec00d60  75 08  ff05 00300000  eb ec  f4")
WORD = 0x600DC0DE


def script(vcpu_id: int) -> GuestScript:
    """The same for FakeKvm, which executes scripts."""
    count = 0
    while (yield Read(0x10000, 4)) == WORD:
        count += 1
        yield Write(0x3000, 4, count)


async def main() -> None:
    """Put a device over the middle of the RAM, take it away, again and again."""
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    window = MemoryRegion.io("window", 0x1000, MemoryRegionOps())
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    await space.write(0x1000, CODE)
    await space.write(0x10000, WORD.to_bytes(4, "little"))

    backend = None if kvm.available() else FakeKvm(script=script, log_limit=0)
    async with kvm.open_vm(space, backend=backend) as vm, trio.open_nursery() as nursery:
        vcpu = await vm.create_vcpu()
        kvm.x86.protected_mode(vcpu, entry=0x1000)
        nursery.start_soon(vcpu.run)
        for _ in range(100):
            async with memory.transaction():  # one memslot becomes two
                system.add_subregion_overlap(0x80000, window, 1)
            async with memory.transaction():  # and one again
                system.del_subregion(window)
            await trio.sleep(0.001)
        assert vcpu.running  # it would have halted at a wrong word
        nursery.cancel_scope.cancel()

    seen = vm.statistics()
    count = int.from_bytes(space.map(0x3000, 4), "little")
    print(f"{seen.memslot_ioctls} memslot ioctls, {seen.holes} holes, {count} words read")
    assert seen.holes == 0
    assert count > 0


trio.run(main)
