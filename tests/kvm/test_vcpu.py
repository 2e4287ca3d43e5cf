"""One vCPU: handlers that fail, cancellation, registers.

Most bodies run on both kernels; see `tests.kvm.rig`.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs
from memlistener.errors import RegionError, VcpuBusyError
from memlistener.kvm import Hlt
from memlistener.testing import FakeKvm, In, Instruction, Out, Read, Spin
from tests.kvm.rig import LONG_ENOUGH, RAM_SIZE, Rig

DEVICE = 0x10000000
PORT = 0x100


# ---- handlers that raise, and cancellation ------------------------------------------------------


class FailsOnce(MemoryRegionOps):
    """The first access raises."""

    def __init__(self) -> None:
        self.calls = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise LookupError("first")
        return 0x42

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.read(offset, size, attrs)


class FailsOnceOnThread(FailsOnce):
    """The same on the vCPU's thread."""

    thread_safe = True


@pytest.mark.parametrize("ops_class", [FailsOnce, FailsOnceOnThread])
@pytest.mark.parametrize("where", ["mmio", "pio"])
async def test_handler_raises(rig: Rig, ops_class: type[FailsOnce], where: str) -> None:
    """A handler's error leaves run(); the next run serves the same access again."""
    ops = ops_class()
    region = MemoryRegion.io("dev", 0x1000, ops)
    access: Instruction
    if where == "mmio":
        rig.system.add_subregion(DEVICE, region)
        access = Read(DEVICE, 4)
    else:
        rig.ports.add_subregion(0x1000, region)
        access = In(0x1000, 4)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, access)
        with trio.fail_after(LONG_ENOUGH):
            with pytest.raises(LookupError, match="first"):
                await vcpu.run()
            assert not vcpu.running
            assert await vcpu.run() == Hlt()
    assert ops.calls == 2
    assert rig.results(vcpu) == [0x42]


class Slow(MemoryRegionOps):
    """Reads wait until they are allowed to answer."""

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.go = trio.Event()
        self.calls = 0

    async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.calls += 1
        self.entered.set()
        await self.go.wait()
        return 0x42


async def test_cancelled_in_handler(rig: Rig) -> None:
    """A run that is cancelled in a handler serves the access again when it is run again."""
    ops = Slow()
    rig.system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, ops))
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await ops.entered.wait()
                nursery.cancel_scope.cancel()
            ops.go.set()
            assert await vcpu.run() == Hlt()
    assert ops.calls == 2
    assert rig.results(vcpu) == [0x42]


async def test_string_pio_cancelled_in_the_middle() -> None:
    """A string write that is cancelled at its third byte goes on there: nothing is sent twice."""
    rig = Rig(FakeKvm())  # the real kernel makes an exit of each
    seen: list[int] = []
    third = trio.Event()

    class Stalls(MemoryRegionOps):
        async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
            if value == 2 and not third.is_set():
                third.set()
                await trio.sleep_forever()
            seen.append(value)

    rig.ports.add_subregion(PORT, MemoryRegion.io("fifo", 1, Stalls()))
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Out(PORT, 1, count=4, value=0x03020100))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await third.wait()
                nursery.cancel_scope.cancel()
            assert await vcpu.run() == Hlt()
    assert seen == [0, 1, 2, 3]


async def test_b9_cancelled_in_guest(rig: Rig) -> None:
    """B9: cancelling run() takes the guest out of KVM_RUN; it can go on later."""
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(0x8000, 4), loop=True)
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_rounds(vcpu)
                nursery.cancel_scope.cancel()
            assert not vcpu.running
            assert vm.statistics().gate.vcpus_inside == 0
            stopped_at = rig.rounds(vcpu)
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            assert rig.rounds(vcpu) == stopped_at
        assert vm.statistics().vcpus[0].holes == 0


async def test_cancelled_spinning(rig: Rig) -> None:
    """A guest in ``jmp .`` is cancelled as well."""
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm)
                nursery.cancel_scope.cancel()
        assert vm.statistics().vcpus[0].exits == {}


async def test_run_twice(rig: Rig) -> None:
    """A second task cannot run a running vCPU."""
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            assert "running" in repr(vcpu)
            with pytest.raises(VcpuBusyError, match="another task"):
                await vcpu.run()
            nursery.cancel_scope.cancel()


# ---- registers and memory ------------------------------------------------------------------------


async def test_registers_between_runs(rig: Rig) -> None:
    """Registers can be read and written while the vCPU does not run."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        vcpu.regs.update(rax=7, rip=0x1000)
        assert (vcpu.regs.rax, vcpu.regs.rip) == (7, 0x1000)
        vcpu.sregs.cs.selector = 0
        assert vcpu.sregs.cs.selector == 0


async def test_registers_while_running(rig: Rig) -> None:
    """Registers of a vCPU in the guest raise VcpuBusyError instead of waiting for ever."""
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            for touch in (
                lambda: vcpu.regs.rip,
                lambda: vcpu.regs.update(rax=1),
                lambda: vcpu.sregs.cr0,
                lambda: vcpu.sregs.update(cr2=0),
            ):
                with pytest.raises(VcpuBusyError, match="vcpu 0 runs"):
                    touch()
            async with vm.paused():  # and then there is nothing to wait for
                vcpu.get_regs()
            nursery.cancel_scope.cancel()
        vcpu.get_regs()


class Peeks(MemoryRegionOps):
    """A handler that reads its own vCPU's registers."""

    def __init__(self, *, thread_safe: bool) -> None:
        self.thread_safe = thread_safe
        self.vcpu: Any = None

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        assert "rip" in self.vcpu.get_regs()
        return 0x42


@pytest.mark.parametrize("thread_safe", [False, True])
async def test_registers_in_a_handler(rig: Rig, thread_safe: bool) -> None:
    """A device handler may look at the registers of the vCPU that called it."""
    ops = Peeks(thread_safe=thread_safe)
    rig.system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, ops))
    async with rig.open() as vm:
        vcpu = ops.vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    assert rig.results(vcpu) == [0x42]


async def test_registers_after_close() -> None:
    """A closed vCPU's registers raise ClosedResourceError."""
    rig = Rig(FakeKvm())
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await vcpu.aclose()
        await vcpu.aclose()
        with pytest.raises(trio.ClosedResourceError):
            _ = vcpu.regs.rip
        with pytest.raises(trio.ClosedResourceError):
            await vcpu.run()


async def test_write_guest_memory() -> None:
    """Set-up writes RAM and ROM, across regions; elsewhere it says what is there."""
    rig = Rig(FakeKvm())
    rom = MemoryRegion.rom("bios", 0x1000)
    rig.system.add_subregion(RAM_SIZE, rom)
    rig.system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, MemoryRegionOps()))
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        vcpu.write_guest_memory(RAM_SIZE - 2, b"abcd")
        assert rig.low.block.view[-2:] == b"ab"
        assert rom.block.view[:2] == b"cd"
        with pytest.raises(RegionError, match=f"{DEVICE:#x}"):
            vcpu.write_guest_memory(DEVICE, b"x")
        with pytest.raises(RegionError, match="there is nothing"):
            vcpu.write_guest_memory(DEVICE * 2, b"x")
