"""Dirty logging: a guest's RAM is copied while the guest writes to it and its slots move."""

import trio

from memlistener import DirtyClient, MemoryRegion, MemorySystem, kvm
from memlistener.testing import FakeKvm, GuestScript, Write

PAGE, PAGES = 0x1000, 64


def script(vcpu_id: int) -> GuestScript:
    """A guest that writes to each page of its RAM in turn, for ever."""
    count = 0
    while True:
        count += 1
        for page in range(PAGES):
            yield Write(0x10000 + page * PAGE, 4, count)


async def main() -> None:
    """Copy everything once, then what was written since, and the rest when it stands still."""
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", (PAGES + 1) * PAGE)
    system.add_subregion(0x10000, ram)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    copy = bytearray(ram.size)

    async def copy_round() -> None:
        await memory.dirty_log_sync()  # from the kernel to the block
        taken = ram.block.take_dirty(DirtyClient.MIGRATION)  # take, then read
        for offset, size in taken:
            copy[offset : offset + size] = ram.block.view[offset : offset + size]
        print(f"{taken.pages} pages in {len(taken)} ranges")

    async with kvm.open_vm(space, backend=FakeKvm(script=script)) as vm:
        vcpu = await vm.create_vcpu()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            ram.block.mark_dirty(0, ram.size)  # so that the first round copies all
            await memory.dirty_log_start()
            for number in range(6):
                await copy_round()
                async with memory.transaction():  # the slot goes, and comes back elsewhere
                    ram.set_address(0x10000 - PAGE * (number % 2))
                await trio.sleep(0.001)  # the guest writes
            async with vm.paused():
                await copy_round()
                differing = copy != ram.block.view
            nursery.cancel_scope.cancel()
        await memory.dirty_log_stop()
    print("the copy differs" if differing else "the copy is the same")
    assert not differing


trio.run(main)
