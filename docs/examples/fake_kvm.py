"""The race that the bracket closes, shown step by step on a kernel made of Python."""

import trio

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, kvm
from memlistener.testing import FakeKvm, GuestScript, Ioctl, Read


def script(vcpu_id: int) -> GuestScript:
    """A guest that reads the same word of RAM for ever."""
    while True:
        yield Read(0x1000, 4)


async def holes(policy: kvm.KickPolicy) -> int:
    """How often the guest misses its RAM while a window is put over other RAM."""
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    fake = FakeKvm(script=script)

    async with (
        kvm.open_vm(space, policy=policy, backend=fake) as vm,
        trio.open_nursery() as nursery,
    ):
        vcpu = await vm.create_vcpu()
        nursery.start_soon(vcpu.run)
        guest = fake.vms[0].vcpus[0]
        await trio.to_thread.run_sync(guest.wait_inside)

        # After each ioctl, before it returns: is the guest inside, and what does it do?
        def after(ioctl: Ioctl) -> None:
            inside = bool(fake.vms[0].inside)
            slot, size = ioctl.args["slot"], ioctl.args["memory_size"]
            what = f"slot {slot}: {size:#x} bytes" if size else f"slot {slot}: deleted"
            print(f"  {what}; the guest is {'inside' if inside else 'outside'}")
            if inside:
                done = guest.statistics().runs + guest.statistics().instructions
                guest.wait_for(lambda now: now.runs + now.instructions > done + 2)

        fake.on_ioctl = after
        async with memory.transaction():
            window = MemoryRegion.io("window", 0x1000, MemoryRegionOps())
            system.add_subregion_overlap(0x80000, window, 1)
        fake.on_ioctl = None
        nursery.cancel_scope.cancel()
    return vm.statistics().holes


async def main() -> None:
    """Once without the bracket, once with it."""
    print("without a bracket")
    without = await holes(kvm.KickPolicy.NEVER)
    print("with it")
    bracketed = await holes(kvm.KickPolicy.EVERY_COMMIT)
    print(f"accesses that found a hole: {without} without, {bracketed} with")
    assert without > 0
    assert bracketed == 0


trio.run(main)
