"""What coalesced writes, pauses, brackets, kicks and closing do to each other."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
import trio
import trio.testing

from memlistener import (
    BrokenMemoryError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemTxAttrs,
    TransactionError,
    VcpuBusyError,
)
from memlistener.kvm import DirtyLogMethod, Hlt, Vcpu, Vm
from memlistener.testing import FakeKvm, Instruction, Read, Spin, Write
from tests.kvm.rig import LONG_ENOUGH, Rig, until

DEVICE = 0x10000000
OTHER = 0x10001000
FLAG = 0x70000


class Device(MemoryRegionOps):
    """Reads give ``value``; a write waits while there is something to wait for, and may raise."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.seen: list[int] = []
        self.entered = trio.Event()
        self.go: trio.Event | None = None
        self.raising = False

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return self.value

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.entered.set()
        if self.go is not None:
            await self.go.wait()
        if self.raising:
            raise ZeroDivisionError(value)
        self.seen.append(value)


def add(rig: Rig, ops: Device, at: int = DEVICE, *, coalesced: bool = True) -> MemoryRegion:
    """A device; of a coalesced one, all of it is."""
    region = MemoryRegion.io("device", 0x20, ops)
    if coalesced:
        region.add_coalescing(0, 0x20)
    rig.system.add_subregion(at, region)
    return region


# ---- an exit that waits behind coalesced writes ---------------------------------------------


@pytest.mark.parametrize("how", ["raises", "cancelled"])
async def test_registers_are_set_when_an_exit_waits_behind_the_ring(rig: Rig, how: str) -> None:
    """K6: an exit that nobody came to is given up: it does not end on top of new registers."""
    ops, other = Device(), Device(0x55667788)
    add(rig, ops)
    add(rig, other, OTHER, coalesced=False)
    ops.raising = how == "raises"
    ops.go = None if ops.raising else trio.Event()
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1), Read(OTHER, 4))
        if ops.raising:
            with pytest.raises(ZeroDivisionError):
                await vcpu.run()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await ops.entered.wait()
                nursery.cancel_scope.cancel()
        ops.raising, ops.go = False, None
        runs = rig.fake_vcpu(vcpu).statistics().runs if rig.fake is not None else 0
        vcpu.regs.update(rip=0x2000, rax=0x77)
        assert (vcpu.regs.rip, vcpu.regs.rax) == (0x2000, 0x77)
        vcpu.write_guest_memory(0x2000, b"\xf4")
        if rig.fake is not None:  # whose guests do not look at registers
            assert rig.fake_vcpu(vcpu).statistics().runs == runs + 1
            rig.fake_vcpu(vcpu).load([])
        assert await vcpu.run() == Hlt()
        assert vcpu.regs.rax == 0x77
        assert rig.fake is not None or vcpu.regs.rip == 0x2001
        assert ops.seen == [1]


# ---- who waits for whom ---------------------------------------------------------------------


async def test_flush_in_a_task_that_a_transaction_waits_for(rig: Rig) -> None:
    """K6: refused like in the transaction's own task: a handler may be waiting for its end."""
    ops = Device()
    add(rig, ops)
    ops.go = trio.Event()
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1), Write(FLAG, 1, 1), Spin())
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await until(lambda: rig.low.block.view[FLAG] == 1)
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.flush_coalesced)
                await ops.entered.wait()
                async with rig.memory.transaction():
                    nursery.start_soon(vm.flush_coalesced)  # for which nobody waits
                    async with trio.open_nursery() as inner:
                        inner.start_soon(expect_refused, vm)
                ops.go.set()
    assert ops.seen == [1]


async def expect_refused(vm: Vm) -> None:
    with pytest.raises(TransactionError, match="of one that waits"):
        await vm.flush_coalesced()


class Late(MemoryListener):
    """Its begin, behind that of the VM's, waits for a word, and may then raise."""

    priority = 100

    def __init__(self, *, raising: bool) -> None:
        self.raising = raising
        self.entered, self.go = trio.Event(), trio.Event()

    async def begin(self) -> None:
        if self.go.is_set() or not self.armed:
            return
        self.entered.set()
        await self.go.wait()
        if self.raising:
            raise ZeroDivisionError

    armed = False


@pytest.mark.parametrize("raising", [True, False])
async def test_b9_closed_while_a_commit_is_under_way(rig: Rig, raising: bool) -> None:
    """B9: the bracket of a VM that is closed meanwhile ends, and with it a pause's wait."""
    listener = Late(raising=raising)
    window = MemoryRegion.ram("window", 0x1000)
    rig.system.add_subregion(DEVICE, window)
    paused = trio.Event()
    raised: list[BaseException] = []

    async def change() -> None:
        try:
            async with rig.memory.transaction():
                window.set_enabled(False)
        except ZeroDivisionError as error:
            raised.append(error)

    async def pause(vm: Vm) -> None:
        async with vm.paused():
            paused.set()

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            async with rig.open() as vm:
                await rig.memory.register(listener, rig.space)
                listener.armed = True
                nursery.start_soon(change)
                await listener.entered.wait()
                nursery.start_soon(pause, vm)
                await trio.testing.wait_all_tasks_blocked()
                assert not paused.is_set()
            listener.go.set()
            await paused.wait()
    assert len(raised) == raising
    assert rig.memory.broken is None
    assert window.enabled == raising


async def test_unpaused_when_closed(caplog: pytest.LogCaptureFixture) -> None:
    """B15: a pause that ends when its VM is closed has nothing to resume, and no complaints."""
    fake = FakeKvm(kick_ioctls=True)
    rig = Rig(fake)
    paused, closed = trio.Event(), trio.Event()

    async def pause(vm: Vm) -> None:
        async with vm.paused():
            paused.set()
            await closed.wait()

    async def run(vcpu: Vcpu) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await vcpu.run()

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            async with rig.open() as vm:
                nursery.start_soon(run, await rig.boot(vm, Spin()))
                await rig.wait_inside(vm)
                nursery.start_soon(pause, vm)
                await paused.wait()
                await until(lambda: fake.vms[0]._state.kicked)
            closed.set()
    assert caplog.records == []
    assert not [each for each in fake.log if each.errno == errno.EBADF]


async def test_t13_registers_of_a_torn_machine() -> None:
    """T13, B5: what is refused says that memory is broken, and what can be done about it."""
    fake = FakeKvm()
    rig = Rig(fake)
    window, other = MemoryRegion.ram("window", 0x1000), MemoryRegion.ram("other", 0x1000)
    rig.system.add_subregion(DEVICE, window)
    other.set_enabled(False)
    rig.system.add_subregion_overlap(DEVICE, other, 1)

    async def change() -> None:
        async with rig.memory.transaction():
            window.set_enabled(False)
            other.set_enabled(True)

    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm)
                for nth in (2, 3):
                    fake.fail("KVM_SET_USER_MEMORY_REGION", nth=nth, errno=errno.ENOMEM)
                with pytest.raises(BrokenMemoryError):
                    await change()
                async with vm.paused():
                    with pytest.raises(VcpuBusyError, match=r"broken.* cancel its run"):
                        _ = vcpu.regs.rip
                nursery.cancel_scope.cancel()
        assert vcpu.regs.rip == 0xFFF0


async def test_t13_coalesced_writes_of_a_torn_machine() -> None:
    """T13, K6: a pause does not wait for what never ends, and what was written is not lost."""
    fake = FakeKvm()
    rig = Rig(fake)
    ops = Device()
    add(rig, ops)
    window, other = MemoryRegion.ram("window", 0x1000), MemoryRegion.ram("other", 0x1000)
    other.set_enabled(False)
    rig.system.add_subregion(OTHER, window)
    rig.system.add_subregion_overlap(OTHER, other, 1)

    async def tear() -> None:
        async with rig.memory.transaction():
            await until(lambda: rig.low.block.view[FLAG] == 1)  # behind its beginning
            for nth in (2, 3):
                fake.fail("KVM_SET_USER_MEMORY_REGION", nth=nth, errno=errno.ENOMEM)
            window.set_enabled(False)
            other.set_enabled(True)

    with trio.fail_after(LONG_ENOUGH):
        async with rig.open() as vm:
            vcpu = await rig.boot(vm, Spin(1), Write(DEVICE, 4, 7), Write(FLAG, 1, 1), Spin())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm)
                async with vm.paused():
                    pass  # the kick that ends the first Spin
                with pytest.raises(BrokenMemoryError):
                    await tear()
                assert ops.seen == []
                async with vm.paused():
                    await vm.flush_coalesced()
                    assert ops.seen == [7]
                nursery.cancel_scope.cancel()


async def test_b13_two_machines_and_a_zone_that_goes() -> None:
    """K6, B13: the writes in either ring are for the map that their guest saw."""
    fake = FakeKvm()
    rig = Rig(fake)
    ops = Device()
    region = add(rig, ops)
    with trio.fail_after(LONG_ENOUGH):
        async with rig.open() as one, rig.open() as two, trio.open_nursery() as nursery:
            for number, vm in enumerate((one, two)):
                vcpu = await vm.create_vcpu()
                fake.vms[number].vcpus[0].load(
                    [Write(DEVICE, 4, number), Write(FLAG + number, 1, 1), Spin()]
                )
                nursery.start_soon(vcpu.run)
            async with rig.memory.transaction():
                await until(lambda: bytes(rig.low.block.view[FLAG : FLAG + 2]) == b"\1\1")
                rig.system.del_subregion(region)
            assert sorted(ops.seen) == [0, 1]
            assert [vm.coalesced_zones for vm in fake.vms] == [(), ()]
            nursery.cancel_scope.cancel()


# ---- the end ----------------------------------------------------------------------------------


async def test_k6_a_handler_that_raises_at_the_end(rig: Rig) -> None:
    """K6: its error leaves the block; the writes behind it are served all the same."""
    ops = Device()
    other = Device()
    add(rig, ops)
    add(rig, other, OTHER)
    ops.raising = True

    async def run(*last: Instruction) -> None:
        rig.low.block.view[FLAG] = 0
        async with rig.open() as vm:
            vcpu = await rig.boot(
                vm, Write(DEVICE, 4, 1), Write(OTHER, 4, 2), *last, Write(FLAG, 1, 1), Spin()
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await until(lambda: rig.low.block.view[FLAG] == 1)
                nursery.cancel_scope.cancel()

    with pytest.raises(ZeroDivisionError):
        await run()
    assert (ops.seen, other.seen) == ([], [2])
    with pytest.raises(ExceptionGroup) as group:
        await run(Write(DEVICE, 4, 3))
    assert [str(each) for each in group.value.exceptions] == ["1", "3"]
    assert (ops.seen, other.seen) == ([], [2, 2])


async def test_a_vcpu_whose_thread_does_not_start_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks a handle for dirty pages that was closed because there was no thread."""
    fake = FakeKvm()
    rig = Rig(fake)

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with rig.open(dirty_log=DirtyLogMethod.RING) as vm:
        log = vm._listeners[0].dirty_log
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start"):
                await vm.create_vcpu()
        assert not log._rings  # type: ignore[attr-defined]
