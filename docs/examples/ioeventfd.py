"""A doorbell: a guest's write wakes a task, and the vCPU does not stop for it."""

import trio

from memlistener import EventFd, MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs, kvm
from memlistener.testing import FakeKvm, GuestScript, Halt, In, Out, Write

QUEUE, DOORBELL, STATUS = 0x2000, 0x510, 0x500
# Real mode: mov byte [0x2000], 'A'; mov dx, 0x510; out dx, al
#            mov dx, 0x500; wait: in al, dx; test al, al; jz wait; hlt
CODE = bytes.fromhex("c606002041 ba1005 ee ba0005 ec 84c0 74fb f4")


class Device(MemoryRegionOps):
    """Its status says how many jobs are done; its doorbell is not its business."""

    done = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """The number of jobs done."""
        return self.done


def script(vcpu_id: int) -> GuestScript:
    """What FakeKvm's vCPU does in place of CODE."""
    yield Write(QUEUE, 1, ord("A"))
    yield Out(DOORBELL, 1, value=0)
    while not (yield In(STATUS, 1)):
        pass
    yield Halt()


async def main() -> None:
    """Run the guest in one task and do its jobs in another."""
    device = Device()
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    ports = MemoryRegion.container("ports", 1 << 16)
    region = MemoryRegion.io("device", 0x20, device)
    ports.add_subregion(STATUS, region)

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    io = memory.create_address_space("I/O", ports)
    await space.write(0x1000, CODE)

    usable = kvm.available()
    print("running on", "/dev/kvm" if usable else f"FakeKvm: {usable}")
    backend = None if usable else FakeKvm(script=script)
    with EventFd() as doorbell:
        async with memory.transaction():
            region.add_eventfd(DOORBELL - STATUS, 0, doorbell)  # a write of any width
        async with kvm.open_vm(space, io, backend=backend) as vm, trio.open_nursery() as nursery:

            async def work() -> None:
                rung = await doorbell.wait()
                job = await space.read(QUEUE, 1)
                print(f"the doorbell rang {rung} time(s); the job is {job.decode()}")
                device.done += 1

            nursery.start_soon(work)
            vcpu = await vm.create_vcpu()
            kvm.x86.real_mode(vcpu, entry=0x1000)
            print(await vcpu.run())
    assert device.done == 1


trio.run(main)
