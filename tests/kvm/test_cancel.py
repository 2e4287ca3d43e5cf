"""What a cancelled, failed or closed run leaves behind: registers, accesses, memory."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import pytest
import trio

from memlistener import (
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    RegionError,
    VcpuBusyError,
    bracket,
)
from memlistener.bracket import Gate
from memlistener.kvm import Hlt, open_vm, x86
from memlistener.testing import FakeKvm, Halt, Read, Spin

LONG_ENOUGH = 30.0
DEVICE = 0x8000


class Counting(MemoryRegionOps):
    """Answers with how often it was read; from trio's thread, or the vCPU's own."""

    def __init__(self, *, thread_safe: bool) -> None:
        self.thread_safe = thread_safe
        self.reads = 0
        self.some = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.reads += 1
        if self.reads == 3:
            self._token.run_sync_soon(self.some.set)
        return self.reads


def machine(ops: Any = None) -> tuple[MemorySystem, Any, MemoryRegion]:
    """32 KiB of RAM, and a device behind it."""
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", 0x8000)
    system.add_subregion(0, ram)
    if ops is not None:
        system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, ops))
    memory = MemorySystem()
    return memory, memory.create_address_space("memory", system), ram


# mov ax, 0x800; mov ds, ax; 1000+5: mov ax, [0]; inc dx; jmp 1005
LOOP = bytes.fromhex("b80008 8ed8 a10000 42 ebfa")


@pytest.mark.kvm
@pytest.mark.parametrize("thread_safe", [True, False])
async def test_registers_are_those_after_what_was_served(thread_safe: bool) -> None:
    """A cancelled run leaves no access half done: DX counts what the device answered."""
    ops = Counting(thread_safe=thread_safe)
    _, space, _ = machine(ops)
    space.load(0x1000, LOOP)
    async with open_vm(space) as vm:
        vcpu = await vm.create_vcpu()
        for _ in range(20):
            x86.real_mode(vcpu, 0x1000)
            vcpu.regs.rdx = 0
            ops.reads, ops.some = 0, trio.Event()
            with trio.fail_after(LONG_ENOUGH):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(vcpu.run)
                    await ops.some.wait()
                    nursery.cancel_scope.cancel()
            # At the access, all that were served are counted; behind it, or behind
            # the count, the last one's DX is on its way.
            behind = {0x1005: 0, 0x1008: 1, 0x1009: 0}
            assert ops.reads == (vcpu.regs.rdx & 0xFFFF) + behind[vcpu.regs.rip]
            assert vcpu.regs.rax & 0xFFFF in (ops.reads, 0x800)


@pytest.mark.kvm
async def test_a_vcpu_can_be_started_over() -> None:
    """Setting it up again after a cancelled run gives up what it was at."""
    started = trio.Event()

    class Never(MemoryRegionOps):
        calls = 0

        async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            self.calls += 1
            started.set()
            await trio.sleep_forever()
            raise AssertionError

    ops = Never()
    _, space, _ = machine(ops)
    space.load(0x1000, LOOP)
    space.load(0x2000, b"\xf4")
    async with open_vm(space) as vm:
        vcpu = await vm.create_vcpu()
        x86.real_mode(vcpu, 0x1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await started.wait()
            with pytest.raises(VcpuBusyError, match="being served"):
                vcpu.regs.rip = 0
            assert vcpu.regs.rip == 0x1005  # reading is fine
            nursery.cancel_scope.cancel()
        x86.real_mode(vcpu, 0x2000)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        assert vcpu.regs.rip == 0x2001
        assert ops.calls == 1


async def test_deleted_ram_is_let_go_while_the_guest_runs() -> None:
    """T15: after the commit nothing of a VM keeps a deleted region, not even a vCPU inside."""
    memory, space, _ = machine()
    root = space.root
    fake = FakeKvm(script=lambda vcpu: [Spin()])
    async with open_vm(space, backend=fake) as vm:
        vcpu = await vm.create_vcpu()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await trio.to_thread.run_sync(fake.vms[0].vcpus[0].wait_inside)
            dimm = MemoryRegion.ram("dimm", 0x10000)
            async with memory.transaction():
                root.add_subregion(0x100000, dimm)
            gone = weakref.ref(dimm)
            async with memory.transaction():
                root.del_subregion(dimm)
            del dimm
            gc.collect()
            assert gone() is None
            nursery.cancel_scope.cancel()


async def test_no_thread_for_a_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host gives no thread, nothing is left behind and the next one works."""
    _, space, _ = machine()
    fake = FakeKvm(script=lambda vcpu: [Halt()])
    async with open_vm(space, backend=fake) as vm:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _no_thread)
            with pytest.raises(RuntimeError, match="can't start"):
                await vm.create_vcpu()
        assert vm.statistics().gate.vcpus == 0
        assert vm.vcpus == ()
        vcpu = await vm.create_vcpu()
        assert vcpu.id == 1
        assert await vcpu.run() == Hlt()
        await vcpu.aclose()
        assert vm.vcpus == ()
        assert [each.exits for each in vm.statistics().vcpus] == [{"Hlt": 1}]


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_ports_of_another_memory_system() -> None:
    """Memory and ports that one transaction cannot change together are refused."""
    _, space, _ = machine()
    ports = MemorySystem().create_address_space("I/O", MemoryRegion.container("io", 0x10000))
    with pytest.raises(RegionError, match="different memory systems"):
        async with open_vm(space, ports, backend=FakeKvm()):
            pass


async def test_closing_waits_for_no_transaction() -> None:
    """A VM closes while another task's transaction is open, and hears nothing of its end."""
    memory, space, ram = machine()
    fake = FakeKvm()
    opened, closed = trio.Event(), trio.Event()

    async def change() -> None:
        async with memory.transaction():
            ram.set_enabled(False)
            opened.set()
            await closed.wait()

    async with trio.open_nursery() as nursery:
        async with open_vm(space, backend=fake):
            nursery.start_soon(change)
            await opened.wait()
        assert space.listeners == ()
        before = len(fake.log)
        closed.set()
    assert len(fake.log) == before
    assert len(space.view) == 0


async def test_b8_a_handler_that_blocks_its_thread_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B8: a thread-safe handler that does not return keeps run() from ending; it is said."""
    inside, go = threading.Event(), threading.Event()

    class Slow(MemoryRegionOps):
        thread_safe = True

        def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            inside.set()
            assert go.wait(LONG_ENOUGH)
            return 0

    warned = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.set()

    monkeypatch.setattr(bracket, "_KICK_AGAIN", 0.001)
    defaults = Gate.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "deadline", 0.001)
    logger = logging.getLogger("memlistener.bracket")
    logger.addHandler(told := Told())
    _, space, _ = machine(Slow())
    try:
        async with open_vm(space, backend=FakeKvm(script=lambda _: [Read(DEVICE, 4)])) as vm:
            vcpu = await vm.create_vcpu()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _then, warned, go)
                with trio.CancelScope() as scope:
                    nursery.start_soon(_cancel_when, inside, scope)
                    await vcpu.run()
    finally:
        go.set()
        logger.removeHandler(told)
    assert "vcpu 0 (in a device handler)" in caplog.text


def _then(warned: threading.Event, go: threading.Event) -> None:
    assert warned.wait(LONG_ENOUGH)
    go.set()


async def _cancel_when(event: threading.Event, scope: trio.CancelScope) -> None:
    await trio.to_thread.run_sync(event.wait)
    scope.cancel()
