"""Whole machines: the bracket over real and scripted guests, failures, and the end.

Most bodies run on both kernels; see `tests.kvm.rig`.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs, RamBlock
from memlistener.bracket import PATIENCE
from memlistener.errors import (
    BrokenMemoryError,
    KvmError,
    MemslotError,
    RamInUseError,
    TransactionError,
)
from memlistener.kvm import Hlt, KickPolicy, Vcpu, Vm, open_vm
from memlistener.kvm.backend import CAP_NR_MEMSLOTS
from memlistener.testing import FakeKvm, Halt, Read, Spin, Write
from tests.kvm.rig import LONG_ENOUGH, RAM_SIZE, SLOT_IOCTL, Rig, until, vcpu_threads

DEVICE = 0x10000000
WINDOW = 0x20000000


def add_window(rig: Rig) -> tuple[MemoryRegion, MemoryRegion]:
    """RAM at WINDOW, and a device that can be put over its middle."""
    ram = MemoryRegion.ram("window", 0x8000)
    device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
    device.set_enabled(False)
    rig.system.add_subregion(WINDOW, ram)
    rig.system.add_subregion_overlap(WINDOW + 0x4000, device, 1)
    return ram, device


async def toggle(rig: Rig, region: MemoryRegion, times: int = 1) -> None:
    """So many transactions that put a region in or out."""
    for _ in range(times):
        async with rig.memory.transaction():
            region.set_enabled(not region.enabled)


async def expect_closed(vcpu: Vcpu, started: Callable[[], object] = lambda: None) -> None:
    """Run a vCPU that will be closed meanwhile."""
    with pytest.raises(trio.ClosedResourceError):
        await vcpu.run()
    started()


# ---- B1, B4, B5: what the kernel sees ----------------------------------------------------------


async def test_b1_no_vcpu_inside_during_a_memslot_ioctl() -> None:
    """B1, B3: of 20 transactions under three guests, no ioctl finds one inside KVM_RUN."""
    fake = FakeKvm()
    rig = Rig(fake)
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpus = [await rig.boot(vm, Read(WINDOW, 4), loop=True) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm, 3)
            first = fake.log[-1].ended
            await toggle(rig, device, 20)
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0
    made = [each for each in fake.log if each.name == SLOT_IOCTL and each.began > first]
    assert len(made) == 60
    assert {each.inside for each in made} == {frozenset()}
    entered = [each for each in fake.log if each.name == "KVM_RUN" and each.ended > first]
    # Nor does one begin between the ioctls of a transaction.
    brackets = [(made[at].began, made[at + 2].ended) for at in range(0, 60, 3)]
    assert not [
        run
        for run in entered
        for began, ended in brackets
        if run.began < ended and began < run.ended
    ]


async def test_b4_paused_nests(rig: Rig) -> None:
    """B4: paused() holds nest with each other and with brackets; the last one resumes."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_rounds(vcpu)
            with trio.fail_after(LONG_ENOUGH):
                async with vm.paused():
                    stopped_at = rig.rounds(vcpu)
                    async with vm.paused():
                        assert vm.statistics().gate.vcpus_inside == 0
                    await toggle(rig, device, 4)
                    for _ in range(100):
                        await trio.lowlevel.checkpoint()
                    assert vm.statistics().gate.vcpus_inside == 0
                    assert rig.rounds(vcpu) == stopped_at
                    assert vcpu.running
            await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0


# ---- B6: handlers that change the map ----------------------------------------------------------


class Bar(MemoryRegionOps):
    """A base address register: writing it moves a window, in a transaction."""

    def __init__(self, rig: Rig, window: MemoryRegion) -> None:
        self.rig = rig
        self.window = window

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return self.window.addr

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        async with self.rig.memory.transaction():
            self.window.set_address(value)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])
async def test_b6_guests_program_bars(rig: Rig, count: int, policy: KickPolicy) -> None:
    """B6: each guest moves its window by its BAR and looks through it: no deadlock, no hole."""
    shared = MemoryRegion.ram("shared", 0x10000)
    programs = []
    for number in range(count):
        shared.block.view[0x1000 * number] = number + 1
        window = MemoryRegion.alias(f"bar {number}", shared, offset=0x1000 * number, size=0x1000)
        base = WINDOW + 0x100000 * number
        register = DEVICE + 0x1000 * number
        rig.system.add_subregion(base, window)
        rig.system.add_subregion(register, MemoryRegion.io("bar", 0x1000, Bar(rig, window)))
        program: list[Any] = []
        for step in range(1, 6):
            to = base + 0x1000 * step
            program += [Write(register, 4, to), Read(to, 1), Read(register, 4)]
        programs.append(program)
    async with rig.open(policy) as vm:
        vcpus = [await rig.boot(vm, *program) for program in programs]
        reasons: list[Any] = []

        async def run(vcpu: Vcpu) -> None:
            reasons.append(await vcpu.run())

        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                for vcpu in vcpus:
                    nursery.start_soon(run, vcpu)
        assert reasons == [Hlt()] * count
        assert vm.statistics().holes == 0
        assert vm.statistics().unassigned == 0
        assert len(vm.memslots) == 1 + count
    for number, vcpu in enumerate(vcpus):
        base = WINDOW + 0x100000 * number
        seen = rig.results(vcpu)
        assert seen[::2] == [number + 1] * 5
        assert seen[1::2] == [base + 0x1000 * step for step in range(1, 6)]


async def test_b6_a_handler_pauses_its_own_vm(rig: Rig) -> None:
    """B6: a device handler may pause the VM whose vCPU is in it."""

    class Pause(MemoryRegionOps):
        vm: Vm
        inside = -1

        async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            async with self.vm.paused():
                self.inside = self.vm.statistics().gate.vcpus_inside
            return 0x42

    ops = Pause()
    rig.system.add_subregion(DEVICE, MemoryRegion.io("pause", 0x1000, ops))
    async with rig.open() as vm:
        ops.vm = vm
        other = await rig.boot(vm, Spin())
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.run)
                await rig.wait_inside(vm)
                assert await vcpu.run() == Hlt()
                nursery.cancel_scope.cancel()
    assert ops.inside == 0
    assert rig.results(vcpu) == [0x42]


# ---- B9: whatever happens, vCPUs go on ---------------------------------------------------------


async def test_b9_the_body_raises(rig: Rig) -> None:
    """B9: a transaction whose body raises holds nobody and changes nothing."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            before = vm.memslots

            async def fail() -> None:
                async with rig.memory.transaction():
                    device.set_enabled(True)
                    raise KeyError

            with pytest.raises(KeyError):
                await fail()
            assert vm.memslots == before
            await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()


async def test_b9_a_nursery_dies_mid_transaction(rig: Rig) -> None:
    """B9: tasks cancelled inside their transactions leave the vCPUs running, on the old map."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            before = vm.memslots
            started = trio.Event()

            async def change() -> None:
                async with rig.memory.transaction():
                    device.set_enabled(True)
                    started.set()
                    await trio.sleep_forever()

            with trio.fail_after(LONG_ENOUGH):
                async with trio.open_nursery() as dying:
                    dying.start_soon(change)
                    dying.start_soon(change)  # waits for its turn
                    await started.wait()
                    dying.cancel_scope.cancel()
            assert vm.memslots == before
            assert not device.enabled
            await rig.wait_rounds(vcpu)
            await toggle(rig, device)
            assert len(vm.memslots) == len(before) + 1
            await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()


async def test_b9_cancelled_while_committing(rig: Rig) -> None:
    """B9, T14: a commit whose task is cancelled is carried through, and vCPUs go on."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_rounds(vcpu)
            with trio.CancelScope() as scope:
                async with rig.memory.transaction():
                    device.set_enabled(True)
                    scope.cancel()
            assert len(vm.memslots) == 3
            await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0


@pytest.mark.parametrize("policy", KickPolicy)
@pytest.mark.parametrize("position", [1, 2, 3])
async def test_b9_an_ioctl_fails(position: int, policy: KickPolicy) -> None:
    """B9, T13: when an ioctl fails the guest goes on on the map as it was."""
    fake = FakeKvm()
    rig = Rig(fake)
    _, device = add_window(rig)
    async with rig.open(policy) as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), Read(WINDOW + 0x4000, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_rounds(vcpu)
            fake.fail(SLOT_IOCTL, nth=position, errno=errno.ENOMEM)
            with pytest.raises(MemslotError):
                await toggle(rig, device)
            await rig.wait_rounds(vcpu, 3)
            assert len(vm.memslots) == 2
            if policy is not KickPolicy.NEVER:
                assert vm.statistics().holes == 0
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("policy", KickPolicy)
async def test_t13_undoing_fails(policy: KickPolicy) -> None:
    """T13: when undoing fails, no vCPU stays in the guest, and the VM can still be closed."""
    fake = FakeKvm()
    rig = Rig(fake)
    ram, _ = add_window(rig)
    other = MemoryRegion.ram("other", 0x1000)
    other.set_enabled(False)
    rig.system.add_subregion(DEVICE, other)
    with trio.fail_after(LONG_ENOUGH):
        async with rig.open(policy) as vm:
            vcpu = await rig.boot(vm, Spin())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm)
                for nth in (2, 3):
                    fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)

                async def change() -> None:  # which does not tear: ON_OVERLAP holds nobody
                    async with rig.memory.transaction():
                        ram.set_enabled(False)
                        other.set_enabled(True)

                with pytest.raises(BrokenMemoryError):
                    await change()
                with trio.move_on_after(5):
                    await until(lambda: fake.vms[0].inside == frozenset())
                assert fake.vms[0].inside == frozenset()
                for _ in range(100):
                    await trio.lowlevel.checkpoint()
                    assert vm.statistics().gate.vcpus_inside == 0
                nursery.cancel_scope.cancel()


# ---- B10, B11: coming and going ----------------------------------------------------------------


async def test_b10_created_while_paused(rig: Rig) -> None:
    """B10: a vCPU created while the VM is held does not run before the resume."""
    async with rig.open() as vm:
        async with trio.open_nursery() as nursery:
            async with vm.paused():
                vcpu = await rig.boot(vm, Write(0x70000, 4, 1))
                nursery.start_soon(vcpu.run)
                await trio.testing.wait_all_tasks_blocked()
                assert vcpu.running
                assert rig.low.block.view[0x70000] == 0
                async with vm.paused():
                    assert vm.statistics().gate.vcpus_inside == 0
            await until(lambda: not vcpu.running)
        assert rig.low.block.view[0x70000] == 1


async def test_b10_finishing_while_paused(rig: Rig) -> None:
    """B10: vCPUs that halt, are cancelled or closed during holds hang nothing."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                steady = await rig.boot(vm, Read(WINDOW, 4), loop=True)
                nursery.start_soon(steady.run)
                async with vm.paused():
                    closed = await rig.boot(vm, Spin())
                    nursery.start_soon(expect_closed, closed)
                    cancelled = await rig.boot(vm, Spin())
                    async with trio.open_nursery() as inner:
                        inner.start_soon(cancelled.run)
                        await trio.testing.wait_all_tasks_blocked()
                        inner.cancel_scope.cancel()
                    await closed.aclose()
                for _ in range(10):
                    halting = await rig.boot(vm, Read(WINDOW, 4))
                    async with trio.open_nursery() as inner:
                        inner.start_soon(halting.run)
                        await toggle(rig, device)
                    await halting.aclose()
                await rig.wait_rounds(steady)
                nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0


async def test_b11_memory_before_the_first_run() -> None:
    """B11: every slot is made before any vCPU can enter KVM_RUN."""
    fake = FakeKvm()
    rig = Rig(fake)
    add_window(rig)
    held: list[bool] = []
    fake.on_ioctl = lambda ioctl: held.append(ioctl.name == SLOT_IOCTL and not fake.vms[0].vcpus)
    async with rig.open() as vm:
        fake.on_ioctl = None
        vcpu = await rig.boot(vm, Read(WINDOW, 4))
        assert await vcpu.run() == Hlt()
        assert vm.statistics().holes == 0
    names = [each.name for each in fake.log]
    assert names.count(SLOT_IOCTL) == held.count(True) == 2
    last_slot = len(names) - 1 - names[::-1].index(SLOT_IOCTL)
    assert last_slot < names.index("KVM_RUN")


# ---- B13, B14 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["fake", pytest.param("real", marks=pytest.mark.kvm)])
async def test_b13_two_machines(kernel: str) -> None:
    """B13: a machine's transactions neither kick nor stop the other's vCPUs."""
    fake = FakeKvm() if kernel == "fake" else None
    first, second = Rig(fake), Rig(fake)
    _, device = add_window(first)
    async with first.open() as vm_1, second.open() as vm_2:
        busy = await first.boot(vm_1, Read(WINDOW, 4), loop=True)
        other = await second.boot(vm_2, Read(0x70000, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy.run)
            nursery.start_soon(other.run)
            await first.wait_rounds(busy)
            await second.wait_rounds(other)
            await toggle(first, device, 20)
            async with vm_1.paused():
                await second.wait_rounds(other)  # it goes on
            assert vm_1.statistics().gate.kicks >= 20 // (PATIENCE + 1)
            assert vm_2.statistics().gate.kicks == 0
            assert vm_2.statistics().vcpus[0].kicked == 0
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kernel", ["fake", pytest.param("real", marks=pytest.mark.kvm)])
async def test_b13_two_machines_of_one_memory_system(kernel: str) -> None:
    """B13, T10: of two address spaces in one system, a change to one stops its own VM only."""
    rig = Rig(FakeKvm() if kernel == "fake" else None)
    _, device = add_window(rig)
    root = MemoryRegion.ram("other", RAM_SIZE)
    space = rig.memory.create_address_space("other", root)
    async with rig.open() as vm, open_vm(space, backend=rig.fake) as other:
        for _ in range(2):
            await other.create_vcpu()
        before = other.statistics()
        await toggle(rig, device, 4)
        after = other.statistics()
        assert vm.statistics().brackets == 5
        assert (after.brackets, after.gate.holds) == (before.brackets, before.gate.holds)
        assert after.memslot_ioctls == 1


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_b14_guests_make_progress(rig: Rig, count: int) -> None:
    """B14: under transactions without a pause, every vCPU runs, again and again."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpus = [await rig.boot(vm, Read(WINDOW, 4), loop=True) for _ in range(count)]
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)
            for vcpu in vcpus:
                await rig.wait_rounds(vcpu)
            kicked = [each.kicked for each in vm.statistics().vcpus]
            rounds = [rig.rounds(vcpu) for vcpu in vcpus]
            turns = 8
            await toggle(rig, device, turns * (PATIENCE + 1))
            for number, each in enumerate(vm.statistics().vcpus):
                # Where CPUs are short it may miss a few turns, but never more in a row.
                # At the first it may have been on its way.
                assert each.kicked - kicked[number] >= turns - 1
                assert rig.rounds(vcpus[number]) > rounds[number]
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0


async def test_48_vcpus() -> None:
    """48 vCPUs run, are paused, are changed under, and stop: there is no thread limit."""
    rig = Rig(FakeKvm(script=lambda vcpu_id: [Spin()]))
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpus = [await vm.create_vcpu() for _ in range(48)]
        assert len(vcpu_threads()) == 48
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                for vcpu in vcpus:
                    nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm, 48)
                async with vm.paused():
                    assert vm.statistics().gate.vcpus_inside == 0
                await toggle(rig, device, 2)
                await rig.wait_inside(vm, 48)
                nursery.cancel_scope.cancel()
        assert [each.id for each in vm.statistics().vcpus] == list(range(48))


# ---- the end -----------------------------------------------------------------------------------


async def test_closed_while_vcpus_run_in_an_outer_nursery(rig: Rig) -> None:
    """Closing the VM stops its vCPUs; their run() raises ClosedResourceError; threads end."""
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            async with rig.open() as vm:
                for _ in range(3):
                    nursery.start_soon(expect_closed, await rig.boot(vm, Spin()))
                await rig.wait_inside(vm, 3)
            assert vcpu_threads() == []
    with pytest.raises(trio.ClosedResourceError):
        await vm.create_vcpu()


async def test_closed_while_a_handler_is_under_way(rig: Rig) -> None:
    """A handler that outlives its VM does no harm: run() raises ClosedResourceError after it."""
    entered, go = trio.Event(), trio.Event()

    class Slow(MemoryRegionOps):
        async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            entered.set()
            await go.wait()
            return 0x42

    rig.system.add_subregion(DEVICE, MemoryRegion.io("slow", 0x1000, Slow()))
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            async with rig.open() as vm:
                nursery.start_soon(expect_closed, await rig.boot(vm, Read(DEVICE, 4)))
                await entered.wait()
            go.set()


async def test_closed_in_a_cancelled_scope(rig: Rig) -> None:
    """A VM whose block is cancelled while everything runs is closed all the same."""
    _, device = add_window(rig)
    with trio.move_on_after(LONG_ENOUGH) as scope:
        async with rig.open() as vm, trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon((await rig.boot(vm, Read(WINDOW, 4), loop=True)).run)
            await rig.wait_inside(vm, 2)
            nursery.start_soon(toggle, rig, device, 1 << 30)
            await trio.lowlevel.checkpoint()
            scope.cancel()
    assert vcpu_threads() == []
    assert rig.space.listeners == ()
    await toggle(rig, device)  # the memory system lives on


async def test_closing_lets_the_memory_go(rig: Rig) -> None:
    """While a VM is open its memory cannot be unmapped; afterwards it can."""
    block = RamBlock.anonymous(0x1000)
    region = MemoryRegion.ram("block", 0x1000, block=block)
    rig.system.add_subregion(WINDOW, region)
    async with rig.open() as vm:
        with pytest.raises(RamInUseError):
            block.close()
    async with rig.memory.transaction():
        rig.system.del_subregion(region)
    del region
    gc.collect()  # the region has a hold of its own
    block.close()
    assert vm is not None  # it was here all the time, without a hold on the memory


async def test_reopened(rig: Rig) -> None:
    """One address space may be a machine again and again, with nothing left over."""
    _, device = add_window(rig)
    for _ in range(3):
        async with rig.open() as vm:
            vcpu = await rig.boot(vm, Read(WINDOW, 4))
            await toggle(rig, device)
            assert await vcpu.run() == Hlt()
    assert rig.space.listeners == ()
    assert rig.memory._on_broken == []


@pytest.mark.kvm
@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
async def test_no_descriptor_is_left() -> None:
    """Descriptors are as many after ten machines as before, failed ones included."""

    async def machine() -> None:
        rig = Rig(None)
        async with rig.open() as vm:
            for _ in range(2):
                vcpu = await rig.boot(vm, Read(0x70000, 4))
                assert await vcpu.run() == Hlt()
        crooked = RamBlock.from_buffer(RamBlock.anonymous(0x4000).view[0x10:0x2010])
        rig = Rig(None)
        rig.system.add_subregion(WINDOW, MemoryRegion.ram("crooked", 0x2000, block=crooked))
        with pytest.raises(MemslotError):
            async with rig.open():
                pass

    await machine()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await machine()
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---- the rest ----------------------------------------------------------------------------------


async def test_the_kernel_refuses_the_memory() -> None:
    """A machine that does not fit raises on opening, and leaves nothing behind."""
    fake = FakeKvm(capabilities={CAP_NR_MEMSLOTS: 1})
    rig = Rig(fake)
    add_window(rig)
    with pytest.raises(MemslotError, match="2 memslots are needed"):
        async with rig.open():
            pass
    assert rig.space.listeners == ()
    assert rig.memory._on_broken == []
    with pytest.raises(KvmError):  # its handle was closed
        fake.vms[0].create_vcpu(0)


async def test_opened_inside_a_transaction(rig: Rig) -> None:
    """A VM cannot be opened inside a transaction of the same task."""
    async with rig.open(), rig.memory.transaction():
        with pytest.raises(TransactionError):
            async with rig.open():
                pass


async def test_vcpu_ids(rig: Rig) -> None:
    """Ids count up from the highest; one in use is refused with the kernel's errno."""
    async with rig.open() as vm:
        assert (await vm.create_vcpu()).id == 0
        assert (await vm.create_vcpu(5)).id == 5
        assert (await vm.create_vcpu()).id == 6
        with pytest.raises(KvmError) as caught:
            await vm.create_vcpu(5)
        assert caught.value.errno == errno.EEXIST
        assert [each.id for each in vm.vcpus] == [0, 5, 6]
        assert len(vcpu_threads()) == 3


async def test_statistics(rig: Rig) -> None:
    """Brackets, ioctls, slots and times are counted, and times are in seconds."""
    _, device = add_window(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Halt())
        assert await vcpu.run() == Hlt()
        before = vm.statistics()
        assert (before.brackets, before.memslot_ioctls, before.memslots) == (1, 2, 2)
        await toggle(rig, device)
        after = vm.statistics()
        assert (after.brackets, after.memslot_ioctls, after.memslots) == (2, 5, 3)
        assert 0 < after.stopped_median <= after.stopped_max < LONG_ENOUGH
        assert after.vcpus[0].exits == after.exits == {"Hlt": 1}
        assert vm.space is rig.space
        assert vm.io is rig.io
