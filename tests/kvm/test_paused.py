"""`Vm.paused`: whole instructions, registers of vCPUs that a task runs, and whom it waits for.

Most bodies run on both kernels; see `tests.kvm.rig`.
"""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
import trio
import trio.testing

from memlistener import (
    ListenerPriority,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemTxAttrs,
    bracket,
)
from memlistener.errors import BrokenMemoryError, KvmError, VcpuBusyError
from memlistener.kvm import Hlt, Vcpu, Vm, open_vm, x86
from memlistener.testing import FakeKvm, Read, Spin
from tests.kvm.rig import LONG_ENOUGH, SLOT_IOCTL, Rig, until

DEVICE = 0x10000000
WINDOW = 0x20000000


class OnThread(MemoryRegionOps):
    """Reads on the vCPU's thread, which wait until they are let go."""

    thread_safe = True

    def __init__(self, value: int = 0x42) -> None:
        self.value = value
        self.entered = threading.Event()
        self.go = threading.Event()
        self.calls = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.calls += 1
        self.entered.set()
        assert self.go.wait(LONG_ENOUGH)
        return self.value


class InTrio(MemoryRegionOps):
    """The same in the task that runs the vCPU."""

    def __init__(self, value: int = 0x42) -> None:
        self.value = value
        self.entered = trio.Event()
        self.go = trio.Event()
        self.calls = 0

    async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.calls += 1
        self.entered.set()
        await self.go.wait()
        return self.value


class Held(MemoryListener):
    """Stays in its commit, so that vCPUs stay held, until it is let go."""

    priority = ListenerPriority.MIN

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.go = trio.Event()
        self.armed = False

    async def commit(self) -> None:
        if self.armed:
            self.entered.set()
            await self.go.wait()


def add_device(rig: Rig, ops: MemoryRegionOps, at: int = DEVICE) -> None:
    rig.system.add_subregion(at, MemoryRegion.io(f"device {at:#x}", 0x1000, ops))


def add_window(rig: Rig) -> MemoryRegion:
    """RAM that can be switched on and off."""
    window = MemoryRegion.ram("window", 0x8000)
    rig.system.add_subregion(WINDOW, window)
    return window


async def toggle(rig: Rig, region: MemoryRegion) -> None:
    async with rig.memory.transaction():
        region.set_enabled(not region.enabled)


async def wait(event: threading.Event) -> None:
    assert await trio.to_thread.run_sync(event.wait, LONG_ENOUGH)


def at_first(rig: Rig, vcpu: Vcpu) -> bool:
    """Whether the guest has yet to complete its first instruction. Looks at registers."""
    regs = vcpu.get_regs()
    if rig.fake is not None:
        return rig.fake_vcpu(vcpu).statistics().instructions == 0
    return regs["rip"] == rig.guests[vcpu.id].entry


# ---- whole instructions ----------------------------------------------------------------------


class Counting(MemoryRegionOps):
    """Answers with how often it was read."""

    def __init__(self, *, thread_safe: bool) -> None:
        self.thread_safe = thread_safe
        self.reads = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.reads += 1
        return self.reads


@pytest.mark.kvm
@pytest.mark.parametrize("thread_safe", [True, False])
async def test_what_was_served_is_complete(thread_safe: bool) -> None:
    """Inside paused() the registers have all that the device has answered."""
    ops = Counting(thread_safe=thread_safe)
    rig = Rig(None)
    add_device(rig, ops, 0x8000 + DEVICE)
    window = MemoryRegion.alias("low window", rig.system, offset=0x8000 + DEVICE, size=0x1000)
    rig.system.add_subregion_overlap(0x8000, window, 1)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        # mov ax, 0x800; mov ds, ax; at 1005: mov ax, [0]; inc dx; jmp 1005
        vcpu.write_guest_memory(0x1000, bytes.fromhex("b80008 8ed8 a10000 42 ebfa"))
        x86.real_mode(vcpu, 0x1000)
        vcpu.regs.rdx = 0
        behind = {0x1005: 0, 0x1008: 1, 0x1009: 0}  # whether DX is yet to count the last one
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            for _ in range(50):
                before = ops.reads
                await until(lambda before=before: ops.reads > before)  # type: ignore[misc]
                async with vm.paused():
                    regs = vcpu.get_regs()
                    assert ops.reads & 0xFFFF == (regs["rdx"] + behind[regs["rip"]]) & 0xFFFF
                    assert regs["rax"] & 0xFFFF in (ops.reads & 0xFFFF, 0x800)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("thread_safe", [True, False])
async def test_what_was_served_is_complete_for_the_kernel(thread_safe: bool) -> None:
    """Inside paused() the fake kernel has completed each access that was served."""
    ops = Counting(thread_safe=thread_safe)
    rig = Rig(FakeKvm())
    add_device(rig, ops)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        fake = rig.fake_vcpu(vcpu)
        fake.load(Read(DEVICE, 4) for _ in iter(int, 1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            for _ in range(50):
                before = ops.reads
                await until(lambda before=before: ops.reads > before)  # type: ignore[misc]
                async with vm.paused():
                    assert fake.statistics().instructions == ops.reads
            nursery.cancel_scope.cancel()


async def test_a_handler_on_the_vcpus_thread_is_waited_for(rig: Rig) -> None:
    """paused() waits for an access that is being served on the vCPU's thread, and ends it."""
    ops = OnThread()
    add_device(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        paused = trio.Event()

        async def pause() -> None:
            async with vm.paused():
                paused.set()
                assert not at_first(rig, vcpu)
                assert vcpu.running

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(ops.entered)
                async with trio.open_nursery() as inner:
                    inner.start_soon(pause)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not paused.is_set()
                    assert vm.statistics().gate.vcpus_inside == 0
                    with pytest.raises(VcpuBusyError, match="vcpu 0 runs"):
                        vcpu.get_regs()
                    ops.go.set()
    assert ops.calls == 1
    assert rig.results(vcpu) == [0x42]


async def test_b6_a_handler_in_trio_is_not_waited_for(rig: Rig) -> None:
    """B6: paused() is entered while a task serves an access; what it looks like is said."""
    ops = InTrio()
    add_device(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await ops.entered.wait()
                async with vm.paused():
                    assert at_first(rig, vcpu)  # the registers before the instruction
                    with pytest.raises(VcpuBusyError, match="being served"):
                        vcpu.regs.rax = 1
                    ops.go.set()
                    await until(lambda: readable(vcpu) and not at_first(rig, vcpu))
                    assert vm.statistics().gate.vcpus_inside == 0
    assert rig.results(vcpu) == [0x42]


def readable(vcpu: Vcpu) -> bool:
    """Whether registers can be read now."""
    try:
        vcpu.get_regs()
    except VcpuBusyError:
        return False
    return True


@pytest.mark.parametrize("raising", [True, False])
async def test_the_instruction_goes_on_during_the_pause(rig: Rig, raising: bool) -> None:
    """The pause finds the next access of an instruction; its error is run()'s, not the pause's."""
    first, second = OnThread(0x11223344), InTrio(0x55667788)
    second.go.set()

    class Fails(MemoryRegionOps):
        thread_safe = True
        calls = 0

        def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            self.calls += 1
            if self.calls == 1:
                raise LookupError("first")
            return 0x55667788

    fails = Fails()
    add_device(rig, first)
    add_device(rig, fails if raising else second, DEVICE + 0x1000)
    raised: list[LookupError] = []
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE + 0xFFC, 8))

        async def run() -> None:
            try:
                await vcpu.run()
            except LookupError as error:
                raised.append(error)
                assert await vcpu.run() == Hlt()

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await wait(first.entered)
                async with trio.open_nursery() as inner:
                    inner.start_soon(let_go_when_held, vm, first)
                    async with vm.paused():
                        assert at_first(rig, vcpu)  # it is not whole yet
                        assert second.calls == 0
                        assert fails.calls == int(raising)
                        assert raised == []
    assert rig.results(vcpu) == [0x5566778811223344]
    assert (first.calls, second.calls, fails.calls) == (1, not raising, 2 * raising)
    assert len(raised) == int(raising)


async def let_go_when_held(vm: Vm, ops: OnThread) -> None:
    """Let a handler go on, once the gate is held: its thread ends at the gate."""
    await until(lambda: vm._gate.held)
    ops.go.set()


async def test_cancelled_in_a_pause(rig: Rig) -> None:
    """A run that is cancelled in a pause with half an instruction goes on with the other half."""
    first, second = OnThread(0x11223344), InTrio(0x55667788)
    second.go.set()
    add_device(rig, first)
    add_device(rig, second, DEVICE + 0x1000)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE + 0xFFC, 8))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(first.entered)
                async with trio.open_nursery() as inner:
                    inner.start_soon(let_go_when_held, vm, first)
                    async with vm.paused():
                        nursery.cancel_scope.cancel()
            assert not vcpu.running
            assert second.calls == 0
            assert await vcpu.run() == Hlt()
    assert (first.calls, second.calls) == (1, 1)
    assert rig.results(vcpu) == [0x5566778811223344]


# ---- registers ---------------------------------------------------------------------------------


async def test_registers_of_all(rig: Rig) -> None:
    """In a pause the registers of every vCPU can be read: in the guest, idle, or not yet run."""
    async with rig.open() as vm:
        running = [await rig.boot(vm, Spin()) for _ in range(3)]
        fresh = await vm.create_vcpu()
        async with trio.open_nursery() as nursery:
            for vcpu in running:
                nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm, 3)
            async with vm.paused():
                for vcpu in (*running, fresh):
                    assert vcpu.regs.rip == vcpu.regs.snapshot()["rip"]
                    assert vcpu.sregs.cr0 == vcpu.sregs.snapshot()["cr0"]
            for vcpu in running:
                with pytest.raises(VcpuBusyError, match="paused"):
                    _ = vcpu.regs.rip
            nursery.cancel_scope.cancel()


async def test_registers_are_set_in_a_pause(rig: Rig) -> None:
    """What is set in a pause is what the guest goes on with."""
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        ended: list[Any] = []

        async def run() -> None:
            ended.append(await vcpu.run())

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await rig.wait_inside(vm)
                async with vm.paused():
                    vcpu.regs.update(rip=vcpu.regs.rip + 2, rbx=0x1234)  # behind the jmp: HLT
                    vcpu.sregs.cr2 = 0x5678
                    if rig.fake is not None:  # whose guests do not look at registers
                        rig.fake_vcpu(vcpu).load([])
        assert ended == [Hlt()]
        assert (vcpu.regs.rbx, vcpu.sregs.cr2) == (0x1234, 0x5678)


async def test_setting_gives_up_half_an_instruction(rig: Rig) -> None:
    """Registers that are set in a pause are not overwritten by what was under way."""
    first, second = OnThread(0x11223344), InTrio(0x55667788)
    second.go.set()
    add_device(rig, first)
    add_device(rig, second, DEVICE + 0x1000)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE + 0xFFC, 8), Spin())
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(first.entered)
                async with trio.open_nursery() as inner:
                    inner.start_soon(let_go_when_held, vm, first)
                    async with vm.paused():
                        vcpu.regs.update(rip=0x2000, rax=0x77)
                        assert (vcpu.regs.rip, vcpu.regs.rax) == (0x2000, 0x77)
                        vcpu.write_guest_memory(0x2000, b"\xf4")
                        if rig.fake is not None:
                            rig.fake_vcpu(vcpu).load([])
        assert (vcpu.regs.rax, second.calls) == (0x77, 0)
        assert rig.fake is not None or vcpu.regs.rip == 0x2001


async def test_outside_trio(rig: Rig) -> None:
    """B5: registers are for trio's thread, where no ioctl falls between two of a commit."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        for call in (vcpu.get_regs, vcpu.get_sregs, lambda: vcpu.set_sregs({})):
            with pytest.raises(RuntimeError, match="outside trio's thread"):
                await trio.to_thread.run_sync(call)
        assert await trio.to_thread.run_sync(trio.from_thread.run_sync, vcpu.get_regs)


# ---- whom it waits for ---------------------------------------------------------------------------


async def test_paused_waits_for_a_commit(rig: Rig) -> None:
    """B5: paused() is entered when another task's commit is over, with all instructions ended."""
    ops, listener = OnThread(), Held()
    add_device(rig, ops)
    window = add_window(rig)
    async with rig.open() as vm:
        await rig.memory.register(listener, rig.space)
        listener.armed = True
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        order: list[str] = []

        async def commit() -> None:
            await toggle(rig, window)
            order.append("committed")

        async def pause() -> None:
            async with vm.paused():
                order.append("paused")
                assert not at_first(rig, vcpu)

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(ops.entered)
                nursery.start_soon(commit)
                await listener.entered.wait()
                ops.go.set()  # which ends at the gate
                nursery.start_soon(pause)
                nursery.start_soon(pause)  # and they do not wait for each other
                try:
                    await trio.testing.wait_all_tasks_blocked()
                    assert order == []
                    with pytest.raises(VcpuBusyError):
                        vcpu.get_regs()
                finally:
                    listener.go.set()  # what is committed cannot be cancelled
        listener.armed = False
        await rig.memory.unregister(listener, rig.space)
    assert order == ["committed", "paused", "paused"]
    assert rig.results(vcpu) == [0x42]


@pytest.mark.parametrize("nested", [False, True])
async def test_paused_in_a_hook(rig: Rig, nested: bool) -> None:
    """A listener's hook, or a task that it waits for, may pause the VM that its bracket holds."""
    window = add_window(rig)

    class Pausing(MemoryListener):
        vm: Vm | None = None
        pauses = 0

        async def commit(self) -> None:
            if self.vm is None:
                return
            if nested:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.pause, self.vm)
            else:
                await self.pause(self.vm)

        async def pause(self, vm: Vm) -> None:
            async with vm.paused():
                self.pauses += 1
                assert vm.statistics().gate.vcpus_inside == 0

    listener = Pausing()
    async with rig.open() as vm:
        await rig.memory.register(listener, rig.space)
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            listener.vm = vm
            with trio.fail_after(LONG_ENOUGH):
                await toggle(rig, window)
            await rig.wait_inside(vm)
            nursery.cancel_scope.cancel()
        listener.vm = None
        await rig.memory.unregister(listener, rig.space)
    assert listener.pauses == 1


@pytest.mark.parametrize("when", ["before", "while"])
async def test_paused_on_a_torn_map(when: str) -> None:
    """T13: the hold of a broken memory system does not end; a pause does not wait for it."""
    fake = FakeKvm()
    rig = Rig(fake)
    window, listener = add_window(rig), Held()
    other = MemoryRegion.ram("other", 0x1000)
    other.set_enabled(False)
    rig.system.add_subregion(DEVICE, other)
    async with rig.open() as vm:
        await rig.memory.register(listener, rig.space)
        listener.armed = True
        entered = trio.Event()

        async def tear() -> None:
            for nth in (2, 3):
                fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
            with pytest.raises(BrokenMemoryError):
                await change()

        async def change() -> None:
            async with rig.memory.transaction():
                window.set_enabled(False)
                other.set_enabled(True)

        async def pause() -> None:
            async with vm.paused():
                entered.set()

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tear)
                await listener.entered.wait()
                if when == "while":
                    nursery.start_soon(pause)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not entered.is_set()
                listener.go.set()
            if when == "before":
                await pause()
            assert entered.is_set()


async def test_a_cancelled_pause_holds_nobody(rig: Rig) -> None:
    """B9: a pause that is cancelled while it waits for a commit, or a handler, is taken back."""
    ops, listener = OnThread(), Held()
    add_device(rig, ops)
    window = add_window(rig)
    async with rig.open() as vm:
        await rig.memory.register(listener, rig.space)
        vcpu = await rig.boot(vm, Read(DEVICE, 4))

        async def cancelled_pause() -> None:
            async with trio.open_nursery() as inner:
                inner.start_soon(vm._gate.pause)
                await trio.testing.wait_all_tasks_blocked()
                assert vm._gate.held
                inner.cancel_scope.cancel()

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(ops.entered)
                await cancelled_pause()
                assert not vm._gate.held
                listener.armed = True
                nursery.start_soon(toggle, rig, window)
                await listener.entered.wait()
                await cancelled_pause()
                assert vm._gate.changing
                listener.go.set()
                ops.go.set()
        assert not vm._gate.held
        listener.armed = False
        await rig.memory.unregister(listener, rig.space)
    assert rig.results(vcpu) == [0x42]


async def test_b8_a_handler_that_keeps_a_pause_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B8: a handler on the vCPU's thread that keeps a pause waiting is said."""
    monkeypatch.setattr(bracket, "_KICK_AGAIN", 0.001)
    defaults = bracket.Gate.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "deadline", 0.001)
    ops = OnThread()
    rig = Rig(FakeKvm())
    add_device(rig, ops)
    async with open_vm(rig.space, rig.io, backend=rig.fake) as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await wait(ops.entered)
                async with trio.open_nursery() as inner:
                    inner.start_soon(vm._gate.pause)
                    await until(lambda: bool(caplog.records))
                    ops.go.set()
                vm._gate.unpause()
    assert "waiting for vcpu 0 (in a device handler) to come to the gate" in caplog.text


async def test_b4_pauses_and_transactions(rig: Rig) -> None:
    """B4: within a pause a transaction is a bracket, in which registers are not for reading."""
    window = add_window(rig)

    class Looks(MemoryListener):
        vcpu: Vcpu | None = None
        refused = 0

        async def commit(self) -> None:
            if self.vcpu is not None:
                with pytest.raises(VcpuBusyError):
                    self.vcpu.get_regs()
                self.refused += 1

    listener = Looks()
    async with rig.open() as vm:
        await rig.memory.register(listener, rig.space)
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            async with vm.paused():
                vcpu.get_regs()
                listener.vcpu = vcpu
                await toggle(rig, window)
                listener.vcpu = None
                vcpu.get_regs()
            nursery.cancel_scope.cancel()
    assert listener.refused == 1


async def test_registers_of_a_closed_vcpu() -> None:
    """A vCPU that is closed in a pause is waited for by nobody."""
    rig = Rig(FakeKvm())
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await vcpu.run()

            nursery.start_soon(run)
            await rig.wait_inside(vm)
            with trio.fail_after(LONG_ENOUGH):
                async with vm.paused():
                    await vcpu.aclose()
                    async with vm.paused():
                        assert vm.vcpus == ()


async def test_finishing_fails() -> None:
    """An error of the KVM_RUN that ends an instruction is run()'s, not the pause's."""
    fake = FakeKvm()
    rig = Rig(fake)
    ops = OnThread()
    add_device(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))

        async def run() -> None:
            with pytest.raises(KvmError, match="KVM_RUN of vcpu 0"):
                await vcpu.run()
            assert await vcpu.run() == Hlt()

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await wait(ops.entered)
                fake.fail("KVM_RUN", errno=errno.EFAULT)
                async with trio.open_nursery() as inner:
                    inner.start_soon(let_go_when_held, vm, ops)
                    async with vm.paused():
                        assert fake.pending_failures() == 0
    assert rig.results(vcpu) == [0x42]
