"""B5: what reads memslots is held back during a commit's ioctls, KVM_RUN and everything else."""

from __future__ import annotations

import errno
import random
import threading

import pytest
import trio
import trio.testing

from memlistener import ListenerPriority, MemoryListener, MemoryRegion, MemoryRegionOps, MemTxAttrs
from memlistener.errors import BrokenMemoryError, VcpuBusyError
from memlistener.kvm import Hlt, Vcpu, Vm, x86
from memlistener.testing import Deaf, FakeKvm, Ioctl, Read, Spin
from tests.kvm.rig import LONG_ENOUGH, SLOT_IOCTL, Rig, until

DEVICE = 0x10000000
WINDOW = 0x20000000
REFERENCE = "KVM_SET_SREGS"  # which loads PDPTRs from guest memory


class Yields(MemoryListener):
    """Gives way in each of its hooks, before the memslots' listener and after it."""

    def __init__(self, priority: int) -> None:
        self.priority = priority

    async def begin(self) -> None:
        await trio.lowlevel.checkpoint()

    async def commit(self) -> None:
        await trio.lowlevel.checkpoint()


def between(log: list[Ioctl], plans: list[tuple[int, int]]) -> list[Ioctl]:
    """What else is under way between the first and the last ioctl of a plan."""
    return [
        each
        for each in log
        for began, ended in plans
        if each.name != SLOT_IOCTL and each.began < ended and began < each.ended
    ]


@pytest.mark.parametrize("kick_ioctls", [False, True])
async def test_b5_no_ioctl_between_two_of_a_plan(kick_ioctls: bool) -> None:
    """B5: under runs, cancellations, pauses, new vCPUs and registers, each plan is alone."""
    fake = FakeKvm(kick_ioctls=kick_ioctls)
    rig = Rig(fake)
    device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
    device.set_enabled(False)
    rig.system.add_subregion(WINDOW, MemoryRegion.ram("window", 0x8000))
    rig.system.add_subregion_overlap(WINDOW + 0x4000, device, 1)
    threads: dict[str, set[int]] = {}

    def note(ioctl: Ioctl) -> None:
        threads.setdefault(ioctl.name, set()).add(threading.get_ident())

    fake.on_ioctl = note
    rounds = 30
    dice = random.Random(5)
    async with rig.open() as vm:
        for priority in (ListenerPriority.MIN, ListenerPriority.ACCEL + 1):
            await rig.memory.register(Yields(priority), rig.space)
        steady = await rig.boot(vm, Read(WINDOW, 4), Read(WINDOW + 0x4000, 4), loop=True)
        done = False

        async def start_over() -> None:
            vcpu = await vm.create_vcpu()
            while not done:
                rig.fake_vcpu(vcpu).load(Read(DEVICE, 4) for _ in iter(int, 1))
                try:
                    x86.real_mode(vcpu, 0x1000)
                except VcpuBusyError:  # in the middle of an instruction, in a bracket
                    await trio.lowlevel.checkpoint()
                    continue
                with trio.move_on_after(dice.random() * 0.002):
                    await vcpu.run()

        async def pause() -> None:
            while not done:
                async with vm.paused():
                    for vcpu in vm.vcpus:
                        vcpu.get_sregs()
                await trio.sleep(dice.random() * 0.002)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(steady.run)
            for _ in range(2):
                nursery.start_soon(start_over)
            nursery.start_soon(pause)
            await rig.wait_inside(vm)
            first = fake.log[-1].ended
            for _ in range(rounds):
                async with rig.memory.transaction():
                    device.set_enabled(not device.enabled)
                await rig.wait_rounds(steady)  # so the next one finds it inside
            done = True
            last = fake.log[-1].ended
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0
    log = [each for each in fake.log if each.ended > first and each.began < last]
    made = [each for each in log if each.name == SLOT_IOCTL]
    assert len(made) == 3 * rounds
    plans = [(made[at].began, made[at + 2].ended) for at in range(0, 3 * rounds, 3)]
    allowed = {"KVM_KICK_ALL_RUNNING_VCPUS"}  # which reads none
    assert [each for each in between(log, plans) if each.name not in allowed] == []
    # By construction: all of them are trio's thread's, and a plan is made without giving way.
    here = {threading.get_ident()}
    reading = ("KVM_CREATE_VCPU", "KVM_SET_SREGS", "KVM_GET_SREGS", SLOT_IOCTL)
    assert {name: threads[name] for name in reading} == dict.fromkeys(reading, here)
    assert sum(each.name == "KVM_RUN" for each in log) >= rounds - 1


class OnThread(MemoryRegionOps):
    """A read on the vCPU's thread, which waits until it is let go."""

    thread_safe = True

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.entered.set()
        assert self.go.wait(LONG_ENOUGH)
        return 0x42


class Held(MemoryListener):
    """Stays in its commit, so that vCPUs stay held, until it is let go."""

    priority = ListenerPriority.MIN

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.go = trio.Event()

    async def commit(self) -> None:
        self.entered.set()
        await self.go.wait()


async def cancelled_in_a_bracket(
    rig: Rig, ops: OnThread, listener: Held, window: MemoryRegion, vcpu: Vcpu
) -> None:
    """Cancel a run while another task's bracket is in force, its last access served just then."""
    async with trio.open_nursery() as running:
        running.start_soon(vcpu.run)
        assert await trio.to_thread.run_sync(ops.entered.wait, LONG_ENOUGH)
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                async with rig.memory.transaction():
                    window.set_enabled(not window.enabled)

            nursery.start_soon(change)
            await listener.entered.wait()
            ops.go.set()
            running.cancel_scope.cancel()
            try:
                with trio.CancelScope(shield=True):
                    await until(lambda: not vcpu.running)
                before = rig.fake_vcpu(vcpu).statistics() if rig.fake is not None else None
                for what in (vcpu.get_regs, vcpu.get_sregs, lambda: vcpu.regs.update(rax=1)):
                    with pytest.raises(VcpuBusyError, match="a transaction is being committed"):
                        what()
                if before is not None:
                    assert rig.fake_vcpu(vcpu).statistics() == before
            finally:
                listener.go.set()  # what is committed cannot be cancelled


@pytest.mark.parametrize("then", ["read", "set", "run", "pause"])
async def test_b5_settling_waits_for_a_bracket(rig: Rig, then: str) -> None:
    """B5: a run cancelled in a bracket makes no KVM_RUN; the instruction ends when next wanted."""
    ops, listener = OnThread(), Held()
    rig.system.add_subregion(DEVICE, MemoryRegion.io("device", 0x1000, ops))
    window = MemoryRegion.ram("window", 0x1000)
    rig.system.add_subregion(WINDOW, window)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        entry = rig.guests[vcpu.id].entry
        listener.go.set()
        await rig.memory.register(listener, rig.space)
        listener.go, listener.entered = trio.Event(), trio.Event()
        with trio.fail_after(LONG_ENOUGH):
            await cancelled_in_a_bracket(rig, ops, listener, window, vcpu)
            if then == "pause":
                async with vm.paused():
                    assert completed(rig, vcpu)
            elif then == "read":
                rip = vcpu.regs.rip
                assert completed(rig, vcpu)
                assert rig.fake is not None or rip > entry
            elif then == "set":
                vcpu.regs.rip = vcpu.regs.rip
            assert await vcpu.run() == Hlt()
        await rig.memory.unregister(listener, rig.space)
    assert rig.results(vcpu) == [0x42]


def completed(rig: Rig, vcpu: Vcpu) -> bool:
    """Whether the first instruction is complete for the kernel."""
    if rig.fake is not None:
        return rig.fake_vcpu(vcpu).statistics().instructions == 1
    return vcpu.regs.rip > rig.guests[vcpu.id].entry


async def test_b5_nothing_settles_on_a_torn_map() -> None:
    """B5, T13: on a map that could not be mended no vCPU enters KVM_RUN, not for a moment."""
    fake = FakeKvm()
    rig = Rig(fake)
    ops = OnThread()
    rig.system.add_subregion(DEVICE, MemoryRegion.io("device", 0x1000, ops))
    window = MemoryRegion.ram("window", 0x1000)
    other = MemoryRegion.ram("other", 0x1000)
    other.set_enabled(False)
    rig.system.add_subregion(WINDOW, window)
    rig.system.add_subregion(WINDOW + 0x10000, other)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                assert await trio.to_thread.run_sync(ops.entered.wait, LONG_ENOUGH)
                for nth in (2, 3):
                    fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
                with pytest.raises(BrokenMemoryError):
                    await tear(rig, window, other)
                runs = rig.fake_vcpu(vcpu).statistics().runs
                ops.go.set()
                async with vm.paused():
                    with pytest.raises(VcpuBusyError):
                        vcpu.get_regs()
                nursery.cancel_scope.cancel()
            with pytest.raises(VcpuBusyError, match="memory system is broken"):
                vcpu.get_regs()
        assert rig.fake_vcpu(vcpu).statistics().runs == runs


async def tear(rig: Rig, window: MemoryRegion, other: MemoryRegion) -> None:
    async with rig.memory.transaction():
        window.set_enabled(False)
        other.set_enabled(True)


async def test_b5_other_vcpus_in_a_bracket(rig: Rig) -> None:
    """B5: in a bracket that waits, vCPUs can be made and set up: no plan is under way then."""
    listener = Held()
    window = MemoryRegion.ram("window", 0x1000)
    rig.system.add_subregion(WINDOW, window)
    async with rig.open() as vm:
        listener.go.set()
        await rig.memory.register(listener, rig.space)
        listener.go, listener.entered = trio.Event(), trio.Event()
        vcpus: list[Vcpu] = []

        async def change() -> None:
            async with rig.memory.transaction():
                window.set_enabled(False)

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                await listener.entered.wait()
                vcpus.append(await rig.boot(vm, Read(0x8000, 4)))
                nursery.start_soon(vcpus[0].run)
                await trio.testing.wait_all_tasks_blocked()
                assert vm.statistics().gate.vcpus_inside == 0
                listener.go.set()
        await rig.memory.unregister(listener, rig.space)
    assert rig.results(vcpus[0]) == [0]


# ---- B10, B13: coming and going under brackets -------------------------------------------------


@pytest.mark.parametrize("kernel", ["fake", "kicking", pytest.param("real", marks=pytest.mark.kvm)])
async def test_b10_coming_and_going_under_brackets(kernel: str) -> None:
    """B10: vCPUs that are made, run, cancelled, halted and closed under brackets hang nothing."""
    fake = None if kernel == "real" else FakeKvm(kick_ioctls=kernel == "kicking")
    rig = Rig(fake)
    device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
    device.set_enabled(False)
    rig.system.add_subregion(WINDOW, MemoryRegion.ram("window", 0x8000))
    rig.system.add_subregion_overlap(WINDOW + 0x4000, device, 1)

    async def come_and_go(vm: Vm, number: int) -> None:
        vcpu = await vm.create_vcpu()
        rig.load(vcpu, Read(WINDOW, 4))
        assert await vcpu.run() == Hlt()
        assert rig.results(vcpu) == [0]
        rig.load(vcpu, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()
        if number % 2:
            await vcpu.aclose()

    async with rig.open() as vm:
        steady = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(steady.run)

                async def churn() -> None:
                    while True:
                        async with rig.memory.transaction():
                            device.set_enabled(not device.enabled)

                nursery.start_soon(churn)
                await rig.wait_rounds(steady)
                before = vm.statistics().brackets
                for number in range(6):
                    await come_and_go(vm, number)
                await rig.wait_rounds(steady)
                assert vm.statistics().brackets > before
                nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0
        assert len(vm.vcpus) == 4


async def test_b13_a_vcpu_that_cannot_be_kicked_stops_its_own_vm_only() -> None:
    """B13: while one VM's bracket waits for a vCPU, another VM's brackets come and go."""
    fake = FakeKvm()
    stuck, free = Rig(fake), Rig(fake)
    windows = []
    for rig in (stuck, free):
        window = MemoryRegion.ram("window", 0x1000)
        rig.system.add_subregion(WINDOW, window)
        windows.append(window)
    leave = threading.Event()
    ended = False

    async def change() -> None:
        nonlocal ended
        async with stuck.memory.transaction():
            windows[0].set_enabled(False)
        ended = True

    async with stuck.open() as vm_1, free.open() as vm_2:
        deaf = await stuck.boot(vm_1, Deaf(leave), Spin())
        spinning = await free.boot(vm_2, Spin())
        try:
            with trio.fail_after(LONG_ENOUGH):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(deaf.run)
                    await trio.to_thread.run_sync(stuck.fake_vcpu(deaf).wait_inside)
                    nursery.start_soon(spinning.run)
                    async with trio.open_nursery() as inner:
                        inner.start_soon(change)
                        await until(lambda: vm_1._gate.held)
                        for _ in range(5):
                            await free.wait_inside(vm_2)
                            async with free.memory.transaction():
                                windows[1].set_enabled(not windows[1].enabled)
                        assert not ended
                        assert vm_1.statistics().gate.vcpus_inside == 1
                        leave.set()
                    nursery.cancel_scope.cancel()
        finally:
            leave.set()
    assert ended
