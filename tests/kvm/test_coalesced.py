"""K6: coalesced writes are served in the guest's order, before what comes after them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    KvmError,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    TransactionError,
)
from memlistener.kvm import Hlt, KickPolicy, Vm
from memlistener.kvm.coalesced import Coalesced, Zone
from memlistener.testing import (
    FakeKvm,
    FakeVcpu,
    FakeZone,
    GuestScript,
    In,
    Instruction,
    Out,
    Read,
    Spin,
    Write,
)
from memlistener.testing.fake_bus import RING_CAPACITY
from tests.kvm.rig import LONG_ENOUGH, Rig, until

DEVICE = 0x10000000
PORT = 0x100
FLAG = 0x70000  # in RAM, where a guest says how far it is


class Log(MemoryRegionOps):
    """Notes every access; `on_write` is called with the value first, and may raise."""

    def __init__(self) -> None:
        self.seen: list[int | str] = []
        self.on_write: Callable[[int], object] = lambda value: None
        self.threads: set[int] = set()

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> Any:
        self.seen.append("read")
        return len(self.seen)

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.on_write(value)
        self.threads.add(threading.get_ident())
        self.seen.append(value)
        return None


class ThreadSafeLog(Log):
    """On the vCPU's thread."""

    thread_safe = True


class AsyncLog(Log):
    """With a trip through trio in each write, or whatever `before` awaits."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[int], Awaitable[object]] = self._checkpoint

    @staticmethod
    async def _checkpoint(value: int) -> None:
        await trio.lowlevel.checkpoint()

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        await self.before(value)
        self.seen.append(value)


KINDS = [Log, ThreadSafeLog, AsyncLog]
kinds = pytest.mark.parametrize("kind", KINDS)


def coalescing(rig: Rig, ops: Log, *, pio: bool = False) -> MemoryRegion:
    """A device of 0x40 bytes, of which the first half coalesces."""
    region = MemoryRegion.io("device", 0x40, ops)
    region.add_coalescing(0, 0x20)
    if pio:
        rig.ports.add_subregion(PORT, region)
    else:
        rig.system.add_subregion(DEVICE, region)
    return region


def writes(*values: int) -> list[Instruction]:
    """Coalesced ones."""
    return [Write(DEVICE, 4, value) for value in values]


async def said_so(rig: Rig) -> None:
    """Wait for the guest's `Write(FLAG, 1, 1)`."""
    await until(lambda: rig.low.block.view[FLAG] == 1)


# ---- before any exit ------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("pio", [False, True], ids=["mmio", "pio"])
async def test_k6_order_with_other_exits(rig: Rig, kind: type[Log], pio: bool) -> None:
    """K6: what exits is served behind the writes that came before it; they do not exit."""
    ops = kind()
    coalescing(rig, ops, pio=pio)
    put: Callable[[int, int], Instruction] = (
        (lambda offset, value: Out(PORT + offset, 2, value=value))
        if pio
        else (lambda offset, value: Write(DEVICE + offset, 2, value))
    )
    get: Instruction = In(PORT, 2) if pio else Read(DEVICE, 2)
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm, put(0, 1), put(2, 2), get, put(0, 3), put(0x20, 4), put(0, 5), put(0, 6)
        )
        assert await vcpu.run() == Hlt()
        assert ops.seen == [1, 2, "read", 3, 4, 5, 6]
        assert rig.results(vcpu) == [3]
        assert vcpu.statistics().exits == {"Io" if pio else "Mmio": 2, "Hlt": 1}
        if kind is ThreadSafeLog:
            assert threading.get_ident() not in ops.threads


async def test_k6_one_ring_for_memory_and_ports(rig: Rig) -> None:
    """K6: writes to both are served in the one order in which they were made."""
    ops = Log()
    coalescing(rig, ops)
    coalescing(rig, ops, pio=True)
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm,
            *[
                Write(DEVICE, 4, n) if n % 2 else Out(PORT, 2, value=n)  # one, then the other
                for n in range(20)
            ],
        )
        assert await vcpu.run() == Hlt()
        assert ops.seen == list(range(20))
        assert vcpu.statistics().exits == {"Hlt": 1}


@kinds
async def test_k6_a_full_ring(rig: Rig, kind: type[Log]) -> None:
    """K6: what finds no room exits, and comes behind the ring; nothing is lost."""
    ops = kind()
    coalescing(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(*range(2 * RING_CAPACITY + 5)))
        assert await vcpu.run() == Hlt()
        assert ops.seen == list(range(2 * RING_CAPACITY + 5))
        assert vcpu.statistics().exits == {"Mmio": 2, "Hlt": 1}


@pytest.mark.parametrize("kind", [Log, ThreadSafeLog])
async def test_k6_a_handler_that_raises(rig: Rig, kind: type[Log]) -> None:
    """K6: its error leaves run(); its write, and those behind it, come first in the next."""
    ops = kind()
    region = coalescing(rig, ops)
    other = kind()
    rig.system.add_subregion(DEVICE + 0x1000, MemoryRegion.io("other", 0x10, other))

    def refuse(value: int) -> None:
        if value == 3:
            raise ZeroDivisionError

    ops.on_write = refuse
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3, 4), Write(DEVICE + 0x1000, 4, 5), *writes(6))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await vcpu.run()
            assert (ops.seen, other.seen) == ([1, 2], [])
        with pytest.raises(ZeroDivisionError):
            await vm.flush_coalesced()
        ops.on_write = lambda value: None
        assert await vcpu.run() == Hlt()
        assert (ops.seen, other.seen) == ([1, 2, 3, 4, 6], [5])
        assert vcpu.statistics().exits == {"Mmio": 1, "Hlt": 1}
        assert region.coalesced == ((0, 0x20),)


async def test_k6_a_handler_that_is_cancelled(rig: Rig) -> None:
    """K6: its write is served again, and the exit behind it once."""
    ops = AsyncLog()
    coalescing(rig, ops)
    blocked = trio.Event()

    async def block(value: int) -> None:
        if value == 2:
            blocked.set()
            await trio.sleep_forever()

    ops.before = block
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3), Read(DEVICE + 0x20, 4))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await blocked.wait()
            nursery.cancel_scope.cancel()
        assert ops.seen == [1]
        ops.before = ops._checkpoint
        assert await vcpu.run() == Hlt()
        assert ops.seen == [1, 2, 3, "read"]


async def test_k6_an_exit_that_fails_behind_them(rig: Rig) -> None:
    """K6: an exit's own handler is tried again, and they are not served again."""
    ops, other = Log(), ThreadSafeLog()
    coalescing(rig, ops)
    rig.system.add_subregion(DEVICE + 0x1000, MemoryRegion.io("other", 0x10, other))

    def refuse(value: int) -> None:
        raise ZeroDivisionError

    other.on_write = refuse
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2), Write(DEVICE + 0x1000, 4, 3), *writes(4))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await vcpu.run()
        other.on_write = lambda value: None
        assert await vcpu.run() == Hlt()
        assert (ops.seen, other.seen) == ([1, 2, 4], [3])


@kinds
async def test_k6_two_vcpus_do_not_interleave(rig: Rig, kind: type[Log]) -> None:
    """K6: handlers run one at a time, each guest's writes in its order, before its exits."""
    busy = threading.Lock()

    class Exclusive(kind):  # type: ignore[misc,valid-type]
        def on(self, value: int) -> None:
            assert busy.acquire(blocking=False), "two at once"
            busy.release()

    ops = Exclusive()
    ops.on_write = ops.on
    coalescing(rig, ops)
    async with rig.open() as vm:
        vcpus = []
        for number in range(2):
            base = number * 0x1000
            program: list[Instruction] = []
            for n in range(60):
                program += [
                    Write(DEVICE, 4, base + 2 * n),
                    Write(DEVICE + 0x20, 4, base + 2 * n + 1),
                ]
            vcpus.append(await rig.boot(vm, *program))
        async with trio.open_nursery() as nursery:
            for each in vcpus:
                nursery.start_soon(each.run)
        for number in range(2):
            mine = [value for value in ops.seen if value // 0x1000 == number]
            assert mine == [number * 0x1000 + n for n in range(120)]


async def test_k6_an_exit_waits_for_who_drains(rig: Rig) -> None:
    """K6: a vCPU whose write another drainer is still serving does not go on before that."""
    ops, other = AsyncLog(), ThreadSafeLog()
    other.seen = ops.seen
    coalescing(rig, ops)
    rig.system.add_subregion(DEVICE + 0x1000, MemoryRegion.io("other", 0x10, other))
    slow, go_on = trio.Event(), trio.Event()

    async def block(value: int) -> None:
        slow.set()
        await go_on.wait()

    ops.before = block
    async with rig.open() as vm:
        first = await rig.boot(vm, *writes(1))
        second = await rig.boot(vm, Write(FLAG, 1, 1), Write(DEVICE + 0x1000, 4, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            await slow.wait()
            nursery.start_soon(second.run)
            await said_so(rig)
            await until(lambda: not vm.statistics().gate.vcpus_inside)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert ops.seen == []
            go_on.set()
        assert ops.seen == [1, 2]


# ---- before a transaction, and for a zone that goes ---------------------------------------------


@kinds
async def test_k6_before_a_transaction_begins(rig: Rig, kind: type[Log]) -> None:
    """K6: what the guest has written is served before the first line of a transaction."""
    ops = kind()
    region = coalescing(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3), Write(FLAG, 1, 1), Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await said_so(rig)
            assert ops.seen == []
            async with rig.memory.transaction():
                assert ops.seen == [1, 2, 3]
                rig.system.del_subregion(region)
            assert ops.seen == [1, 2, 3]
            nursery.cancel_scope.cancel()
        assert rig.space.unassigned_accesses == 0


async def test_k6_a_handler_may_run_a_transaction(rig: Rig) -> None:
    """K6, B6: what follows the write that moves the device is for the map as it then is."""
    ops, elsewhere = AsyncLog(), Log()
    region = coalescing(rig, ops)
    below = MemoryRegion.io("below", 0x40, elsewhere)
    rig.system.add_subregion_overlap(DEVICE, below, -1)

    async def move(value: int) -> None:
        if value == 2:
            async with rig.memory.transaction():
                region.set_address(DEVICE + 0x1000)

    ops.before = move
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    assert (ops.seen, elsewhere.seen) == ([1, 2], [3])


async def test_k6_a_transaction_does_not_wait_for_a_handler(rig: Rig) -> None:
    """K6: what is left while a handler waits is bound to the old map, and served in its order."""
    ops, elsewhere = AsyncLog(), Log()
    region = coalescing(rig, ops)
    rig.system.add_subregion_overlap(DEVICE, MemoryRegion.io("below", 0x40, elsewhere), -1)
    slow, go_on = trio.Event(), trio.Event()

    async def block(value: int) -> None:
        if value == 1:
            slow.set()
            await go_on.wait()

    ops.before = block
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await slow.wait()
            async with rig.memory.transaction():
                rig.system.del_subregion(region)
            go_on.set()
    assert (ops.seen, elsewhere.seen) == ([1, 2, 3], [])


async def test_k6_a_handler_that_waits_for_the_open_transaction(rig: Rig) -> None:
    """K6: it waits for one that removes its device, which does not wait for it: no deadlock."""
    ops = AsyncLog()
    region = coalescing(rig, ops)
    ready, opened = trio.Event(), trio.Event()

    async def transact(value: int) -> None:
        if value == 1:
            ready.set()
            await opened.wait()
            async with rig.memory.transaction():
                pass

    ops.before = transact
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await ready.wait()
            with trio.fail_after(LONG_ENOUGH):
                async with rig.memory.transaction():
                    opened.set()
                    await trio.testing.wait_all_tasks_blocked()
                    rig.system.del_subregion(region)
    assert ops.seen == [1, 2]


class Stepped:
    """A fake guest that writes to a coalescing device when it is told to."""

    def __init__(self, ops: Log) -> None:
        self.fake = FakeKvm(script=lambda vcpu_id: self._script())
        self.rig = Rig(self.fake)
        self.region = coalescing(self.rig, ops)

    @staticmethod
    def _script() -> GuestScript:
        value = 0
        while True:
            value += 1
            yield Write(DEVICE, 4, value)

    @property
    def vcpu(self) -> FakeVcpu:
        return self.fake.vms[0].vcpus[0]

    async def step(self, count: int = 1) -> None:
        """So many writes."""
        await trio.to_thread.run_sync(self.vcpu.step, count)


@kinds
async def test_k6_for_a_zone_that_goes(kind: type[Log]) -> None:
    """K6, T6: what the guest writes while the transaction is open is for the map that it sees."""
    ops = kind()
    machine = Stepped(ops)
    async with machine.rig.open() as vm:
        vcpu = await vm.create_vcpu()
        machine.vcpu.stepping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            async with machine.rig.memory.transaction():
                await machine.step(3)
                machine.rig.system.del_subregion(machine.region)
                assert ops.seen == []
            assert ops.seen == [1, 2, 3]
            assert machine.fake.vms[0].coalesced_zones == ()
            nursery.cancel_scope.cancel()


async def test_k6_for_a_zone_that_goes_without_its_region(rig: Rig) -> None:
    """K6, T9: the map stays, nobody is held, and not a write is lost or out of order."""
    ops = ThreadSafeLog()
    region = coalescing(rig, ops)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *[Write(DEVICE, 4, n) for n in range(8)], loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            for _ in range(5):
                await rig.wait_rounds(vcpu)
                async with rig.memory.transaction():
                    region.clear_coalescing()
                assert vm._coalesced.zones == ()
                await rig.wait_rounds(vcpu)
                async with rig.memory.transaction():
                    region.add_coalescing(0, 0x20)
            nursery.cancel_scope.cancel()
        await vm.flush_coalesced()
        assert ops.seen == [n % 8 for n in range(len(ops.seen))]
        assert 0 <= len(ops.seen) - 8 * rig.rounds(vcpu) <= 8  # of the round that was cut off


@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])
async def test_k6_no_write_is_lost_while_the_map_changes(rig: Rig, policy: KickPolicy) -> None:
    """K6: moved to and fro under a running guest, each write is served once, in order."""
    ops = ThreadSafeLog()
    region = coalescing(rig, ops)
    second = MemoryRegion.io("second", 0x40, ops)
    second.add_coalescing(0, 0x40)
    rig.system.add_subregion_overlap(DEVICE, second, -1)
    async with rig.open(policy) as vm:
        vcpu = await rig.boot(vm, *[Write(DEVICE, 4, n) for n in range(8)], loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            for n in range(20):
                await rig.wait_rounds(vcpu)
                async with rig.memory.transaction():
                    region.set_address(DEVICE + (0x1000 if n % 2 else 0))
            nursery.cancel_scope.cancel()
        await vm.flush_coalesced()
        assert ops.seen == [n % 8 for n in range(len(ops.seen))]
        assert 0 <= len(ops.seen) - 8 * rig.rounds(vcpu) <= 8  # of the round that was cut off
        assert rig.space.unassigned_accesses == 0


async def test_t12_a_handler_that_wants_a_transaction_in_a_hook() -> None:
    """K6, T12: it cannot have one there, so its write waits, for the old map, and fails nothing."""
    ops = AsyncLog()
    machine = Stepped(ops)
    tried: list[int] = []

    async def transact(value: int) -> None:
        tried.append(value)
        async with machine.rig.memory.transaction():
            pass

    ops.before = transact
    async with machine.rig.open() as vm:
        vcpu = await vm.create_vcpu()
        machine.vcpu.stepping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            async with machine.rig.memory.transaction():
                await machine.step(2)
                machine.rig.system.del_subregion(machine.region)
            assert (tried, ops.seen) == ([1], [])
            nursery.cancel_scope.cancel()
        await vm.flush_coalesced()
        assert (tried, ops.seen) == ([1, 1, 2], [1, 2])
        assert machine.rig.space.unassigned_accesses == 0


@kinds
async def test_t13_a_handler_that_raises_in_a_hook(kind: type[Log]) -> None:
    """K6, T13: it fails no transaction; its write is served again, by somebody who is told."""
    ops = kind()
    machine = Stepped(ops)

    async def refuse(value: int) -> None:
        raise ZeroDivisionError

    def refuse_now(value: int) -> None:
        raise ZeroDivisionError

    ops.on_write = refuse_now
    if isinstance(ops, AsyncLog):
        ops.before = refuse
    async with machine.rig.open() as vm:
        vcpu = await vm.create_vcpu()
        machine.vcpu.stepping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            async with machine.rig.memory.transaction():
                await machine.step(2)
                machine.rig.system.del_subregion(machine.region)
            assert machine.region.container is None
            nursery.cancel_scope.cancel()
        transaction = machine.rig.memory.transaction()
        with pytest.raises(ZeroDivisionError):
            await transaction.__aenter__()  # nothing has begun
        with pytest.raises(ZeroDivisionError):
            await vm.flush_coalesced()
        assert ops.seen == []
        ops.on_write = lambda value: None
        if isinstance(ops, AsyncLog):
            ops.before = ops._checkpoint
        async with machine.rig.memory.transaction():
            assert ops.seen == [1, 2]
        assert machine.rig.space.unassigned_accesses == 0


@kinds
async def test_t13_a_handler_that_raises_while_undoing(kind: type[Log]) -> None:
    """K6, T13: a transaction is undone though a handler raises then; the write is not lost."""
    ops = kind()
    machine = Stepped(ops)
    other = MemoryRegion.io("other", 0x40, Log())
    other.add_coalescing(0, 0x20)

    def refuse(value: int) -> None:
        raise ZeroDivisionError

    async def fail() -> None:
        async with machine.rig.memory.transaction():
            machine.rig.system.add_subregion(DEVICE + 0x1000, other)
            machine.region.add_coalescing(0x20, 0x20)
            await machine.step()
            ops.on_write = refuse
            machine.fake.fail("KVM_REGISTER_COALESCED_MMIO", nth=2)

    async with machine.rig.open() as vm:
        vcpu = await vm.create_vcpu()
        machine.vcpu.stepping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            with pytest.raises(KvmError):
                await fail()
            assert machine.fake.vms[0].coalesced_zones == (FakeZone(DEVICE, 0x20, False),)
            nursery.cancel_scope.cancel()
        assert machine.rig.memory.broken is None
        ops.on_write = lambda value: None
        await vm.flush_coalesced()
        assert ops.seen == [1]


# ---- flush, and the end ------------------------------------------------------------------------


async def test_k6_flush(rig: Rig) -> None:
    """K6: what is in the ring now is served now; a checkpoint, and one that a closed VM refuses."""
    ops = Log()
    coalescing(rig, ops)
    async with rig.open() as vm:
        with trio.testing.assert_checkpoints():
            await vm.flush_coalesced()
        async with rig.memory.transaction():
            with pytest.raises(TransactionError, match="flush before it"):
                await vm.flush_coalesced()
        vcpu = await rig.boot(vm, *writes(1, 2), Write(FLAG, 1, 1), Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await said_so(rig)
            await vm.flush_coalesced()
            assert ops.seen == [1, 2]
            nursery.cancel_scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await vm.flush_coalesced()


async def test_k6_flush_in_a_handler(rig: Rig) -> None:
    """K6: in a handler of a coalesced write, or a task that it waits for, it does nothing."""
    ops = AsyncLog()
    coalescing(rig, ops)

    async def flush(value: int) -> None:
        await vm.flush_coalesced()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.flush_coalesced)

    ops.before = flush
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2, 3))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    assert ops.seen == [1, 2, 3]


async def test_k6_a_task_that_no_handler_waits_for(rig: Rig) -> None:
    """K6: a child of the draining task is no part of the handler: it waits, or binds."""
    ops, elsewhere = AsyncLog(), Log()
    region = coalescing(rig, ops)
    rig.system.add_subregion_overlap(DEVICE, MemoryRegion.io("below", 0x40, elsewhere), -1)
    slow, go_on = trio.Event(), trio.Event()

    async def block(value: int) -> None:
        if value == 1:
            slow.set()
            await go_on.wait()

    async def remove() -> None:
        await slow.wait()
        async with rig.memory.transaction():
            rig.system.del_subregion(region)
        go_on.set()
        await vm.flush_coalesced()
        assert ops.seen == [1, 2]

    ops.before = block
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove)
            with trio.fail_after(LONG_ENOUGH):
                assert await vcpu.run() == Hlt()  # in the task that has the nursery
    assert (ops.seen, elsewhere.seen) == ([1, 2], [])


async def test_k6_two_flushes(rig: Rig) -> None:
    """K6: the second waits for its turn: when it returns, all is served."""
    ops = AsyncLog()
    coalescing(rig, ops)
    slow, go_on = trio.Event(), trio.Event()

    async def block(value: int) -> None:
        slow.set()
        await go_on.wait()

    ops.before = block
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *writes(1), Write(FLAG, 1, 1), Spin())

        async def second() -> None:
            await vm.flush_coalesced()
            assert ops.seen == [1]

        async with trio.open_nursery() as running:
            running.start_soon(vcpu.run)
            await said_so(rig)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.flush_coalesced)
                await slow.wait()
                nursery.start_soon(second)
                await trio.testing.wait_all_tasks_blocked(0.01)
                with trio.move_on_after(0.001):
                    await vm.flush_coalesced()  # gives up waiting, and disturbs nobody
                go_on.set()
            running.cancel_scope.cancel()
        assert ops.seen == [1]


async def test_k6_tasks_come_before_threads() -> None:
    """K6: a vCPU's thread leaves the turn to a task that waits for it, or that might never come."""
    machine = Stepped(ops := ThreadSafeLog())
    async with machine.rig.open() as vm:
        vcpu = await vm.create_vcpu()
        machine.vcpu.stepping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await machine.step()
            coalesced = vm._coalesced
            assert coalesced._try_turn()
            nursery.start_soon(vm.flush_coalesced)
            await trio.testing.wait_all_tasks_blocked(0.01)
            coalesced._end_turn()
            assert not coalesced._turn.locked()
            assert not coalesced.drain_here()
            assert not coalesced._turn.locked()
            await until(lambda: ops.seen == [1])
            nursery.cancel_scope.cancel()


async def test_k6_the_end_of_the_machine(rig: Rig) -> None:
    """K6: what is left is served at the end of the block; but not where it raised."""
    ops = Log()
    coalescing(rig, ops)

    async def run(vm: Vm) -> None:
        rig.low.block.view[FLAG] = 0
        vcpu = await rig.boot(vm, *writes(1, 2), Write(FLAG, 1, 1), Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await said_so(rig)
            nursery.cancel_scope.cancel()
        assert ops.seen == []

    async def fail() -> None:
        async with rig.open() as vm:
            await run(vm)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert ops.seen == []
    async with rig.open() as vm:
        await run(vm)
    assert ops.seen == [1, 2]


async def test_k6_two_machines_have_a_ring_each(rig: Rig) -> None:
    """K6, B13: both VMs on one address space have their writes served."""
    ops = Log()
    coalescing(rig, ops)
    async with rig.open() as one:
        first = await rig.boot(one, *writes(1, 2))
        assert await first.run() == Hlt()
        async with rig.open() as two:
            second = await rig.boot(two, *writes(3, 4), Write(FLAG, 1, 1), Spin())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.run)
                await said_so(rig)
                async with rig.memory.transaction():
                    assert ops.seen == [1, 2, 3, 4]
                nursery.cancel_scope.cancel()
    assert ops.seen == [1, 2, 3, 4]


# ---- zones --------------------------------------------------------------------------------------

zones = st.builds(
    Zone,
    st.integers(0, 5).map(lambda n: n * 8),
    st.sampled_from([8, 16, 48, 1 << 31]),
    st.booleans(),
)


@given(st.lists(st.tuples(st.booleans(), zones, st.none() | st.integers(1, 3)), max_size=30))
def test_k6_zones_that_nest(plan: list[tuple[bool, Zone, int | None]]) -> None:
    """K6: the kernel has each zone that is wanted, once, though it takes those around away."""

    async def main() -> None:
        fake = FakeKvm()
        vm = fake.create_vm()
        memory = MemorySystem()
        space = memory.create_address_space("memory", MemoryRegion.container("root", 1 << 32))
        coalesced = Coalesced(vm, space)
        wanted: list[Zone] = []
        for add, zone, failing in plan:
            if failing is not None and not fake.pending_failures():
                fake.fail("KVM_REGISTER_COALESCED_MMIO", nth=failing, errno=errno.ENOMEM)
            before = fake.pending_failures()
            try:
                if add:
                    coalesced.add(zone)
                    wanted.append(zone)
                elif zone in wanted:
                    coalesced.remove(zone)
                    wanted.remove(zone)
            except KvmError:
                assert fake.pending_failures() < before
            there = [Zone(each.addr, each.size, each.pio) for each in vm.coalesced_zones]
            assert len(there) == len(set(there))
            assert set(there) == {each for each in wanted if each.possible()}
            assert set(coalesced.zones) == set(there)
            await coalesced.drain()
            assert coalesced.active == bool(there)

    trio.run(main)


async def test_k6_zones_that_cannot_come_back() -> None:
    """K6: where an outer one cannot be put back, the inner one stays, and all are there."""
    fake = FakeKvm()
    vm = fake.create_vm()
    coalesced = Coalesced(vm, Rig(fake).space)
    outer, inner = Zone(0, 48, False), Zone(8, 8, False)
    coalesced.add(outer)
    coalesced.add(inner)
    fake.fail("KVM_REGISTER_COALESCED_MMIO")
    with pytest.raises(KvmError):
        coalesced.remove(inner)
    assert set(vm.coalesced_zones) == {FakeZone(0, 48, False), FakeZone(8, 8, False)}
    coalesced.remove(inner)
    assert vm.coalesced_zones == (FakeZone(0, 48, False),)


async def test_k6_no_zone_no_cost() -> None:
    """K6: without a coalesced zone no exit asks for the ring; with one, and after it, right."""

    def looks(vm: Vm) -> bool:
        return vm._coalesced.active

    ops = ThreadSafeLog()
    rig = Rig(FakeKvm())
    region = MemoryRegion.io("device", 0x40, ops)
    rig.system.add_subregion(DEVICE, region)
    async with rig.open() as vm:
        assert not looks(vm)
        async with rig.memory.transaction():
            region.add_coalescing(0, 8)
        assert looks(vm)
        vcpu = await rig.boot(vm, *writes(1))
        assert await vcpu.run() == Hlt()
        async with rig.memory.transaction():
            region.clear_coalescing()
        assert not looks(vm)
    assert ops.seen == [1]


async def test_k6_the_kernel_refuses_a_zone() -> None:
    """T13: the error names section, range, ioctl and how many there are; nothing has changed."""
    rig = Rig(FakeKvm())
    region = coalescing(rig, Log())
    assert rig.fake is not None
    async with rig.open():
        vm = rig.fake.vms[0]
        rig.fake.fail("KVM_REGISTER_COALESCED_MMIO")

        async def change(what: Callable[[], None]) -> None:
            async with rig.memory.transaction():
                what()

        with pytest.raises(
            KvmError,
            match=r"KVM_REGISTER_COALESCED_MMIO: \[0x10000020, 0x10000028\) of "
            r"<MemoryRegionSection .*'device'.*: No space left on device; 1 zones",
        ) as caught:
            await change(lambda: region.add_coalescing(0x20, 8))
        assert caught.value.errno == errno.ENOSPC
        rig.fake.fail("KVM_UNREGISTER_COALESCED_MMIO", errno=errno.ENOMEM)
        with pytest.raises(KvmError, match="KVM_UNREGISTER_COALESCED_MMIO"):
            await change(region.clear_coalescing)
        assert vm.coalesced_zones == (FakeZone(DEVICE, 0x20, False),)
        assert rig.memory.broken is None
