"""A machine where everything happens at once, in an order that a seed decides.

Two vCPUs or more go round a program of accesses; tasks change the map, pause, flush,
cancel, add instruments, make and close vCPUs. Devices wait, raise, and run transactions
and pauses of their own. What has to hold, whatever the order:

- each vCPU's accesses are served once each, in the order of its program;
- each write to the doorbell rings, or reaches the device where no ioeventfd is;
- in a pause no guest moves; no access finds a hole in the memslots;
- nothing but what devices raise comes out of anything;
- at the end the gate is open, every vCPU runs on, and no thread or descriptor is left.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from memlistener import (
    EventFd,
    Instrument,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemTxAttrs,
)
from memlistener.errors import MemslotError, TransactionError, VcpuBusyError
from memlistener.kvm import Hlt, KickPolicy, Vcpu, Vm
from memlistener.testing import Instruction, Read, Write
from tests.kvm.rig import LONG_ENOUGH, Rig, until

COALESCED = 0x10000000
PLAIN = 0x10001000
BELL = 0x10002000
WINDOW = 0x10100000
MOST_VCPUS = 6


class Refused(Exception):
    """What a device raises, or a body."""


class Device(MemoryRegionOps):
    """Notes what is served; before that it may do anything, and fail."""

    def __init__(self, stress: Stress) -> None:
        self.stress = stress

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        await self.stress.in_handler()
        self.stress.note(value)


class Plain(Device):
    """Does not await."""

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.stress.maybe_refuse()
        self.stress.note(value)


class Safe(Plain):
    """The same on the vCPU's thread."""

    thread_safe = True


class Raises(Instrument):
    """Watches, until it has had enough."""

    def __init__(self, left: int) -> None:
        self.left = left

    def exit(self, vcpu: str, reason: str, addr: int | None, entered: int, left: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Refused

    def quiesced(self, at: int, waited: int) -> None:
        self.exit("", "", None, 0, 0)


class Slow(MemoryListener):
    """Others get their turn in the middle of a commit, and now and then it fails there."""

    def __init__(self, stress: Stress, priority: int) -> None:
        self.stress = stress
        self.priority = priority
        self.armed = False

    async def begin(self) -> None:
        await self._take_long()

    async def commit(self) -> None:
        await self._take_long()

    async def _take_long(self) -> None:
        what = 1.0 if self.stress.calm else self.stress.random.random()
        if what < 0.1:
            await trio.sleep(what * 0.01)
        elif self.armed and what < 0.6:
            self.armed = False  # undoing has to succeed
            raise Refused


class Stress:
    """One such machine.

    Args:
        rig: On which kernel.
        seed: Of all that is random, but for who is quicker.
        steps: How many things happen.
    """

    def __init__(self, rig: Rig, seed: int, steps: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.steps = steps
        self.served: dict[int, list[int]] = {}
        self.calm = False
        self.refused = 0
        kind = self.random.choice([Device, Device, Plain, Safe])
        coalesced, other = kind(self), self.random.choice([Device, Plain, Safe])(self)
        self.front = MemoryRegion.io("front", 0x1000, coalesced)
        self.front.add_coalescing(0, 0x1000)
        back = MemoryRegion.io("back", 0x1000, coalesced)
        if self.random.random() < 0.5:
            back.add_coalescing(0, 0x800)
        rig.system.add_subregion(COALESCED, back)
        rig.system.add_subregion_overlap(COALESCED, self.front, 1)
        rig.system.add_subregion(PLAIN, MemoryRegion.io("plain", 0x1000, other))
        self.bell = MemoryRegion.io("bell", 0x1000, Safe(self))
        rig.system.add_subregion(BELL, self.bell)
        window = MemoryRegion.ram("window", 0x4000)
        self.windows = [
            MemoryRegion.alias(f"window {n}", window, offset=0, size=size)
            for n, size in enumerate((0x4000, 0x2000))
        ]
        rig.system.add_subregion(WINDOW, self.windows[0])
        rig.system.add_subregion_overlap(WINDOW, self.windows[1], 1)
        self.policy = self.random.choice(
            [KickPolicy.EVERY_COMMIT, KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP]
        )
        self.slow = [Slow(self, 5), Slow(self, 50)]
        self.vm: Vm
        self.vcpus: list[Vcpu] = []
        self.closing: set[int] = set()

    # ---- guests -------------------------------------------------------------------------

    @staticmethod
    def program(number: int) -> list[Instruction]:
        base = (number + 1) << 8
        return [
            Write(COALESCED + 4 * number, 4, base + 1),
            Write(COALESCED + 0x400 + 4 * number, 4, base + 2),
            Read(WINDOW + 8 * number, 4),
            Write(PLAIN + 4 * number, 4, base + 3),
            Write(BELL, 4, base + 0xB),
            Write(COALESCED + 4 * number, 4, base + 4),
            Write(WINDOW + 8 * number, 4, number),
            Write(PLAIN + 4 * number, 4, base + 5),
        ]

    def note(self, value: int) -> None:
        if value & 0xFF == 0xB:
            self.rung_in_device += 1
        else:
            self.served.setdefault((value >> 8) - 1, []).append(value & 0xFF)

    rung_in_device = 0
    rung = 0

    # ---- what devices do ----------------------------------------------------------------

    def maybe_refuse(self) -> None:
        if not self.calm and self.random.random() < 0.03:
            self.refused += 1
            raise Refused

    async def in_handler(self) -> None:
        if self.calm:
            return
        what = self.random.random()
        if what < 0.10:
            await trio.sleep(self.random.random() * 0.001)
        elif what < 0.14:
            with contextlib.suppress(TransactionError):  # rule T12: it may be in a hook
                await self.change()
        elif what < 0.17:
            async with self.vm.paused():
                await trio.lowlevel.checkpoint()
        elif what < 0.20:
            with contextlib.suppress(TransactionError):
                await self.vm.flush_coalesced()
        self.maybe_refuse()

    # ---- what tasks do ------------------------------------------------------------------

    async def change(self) -> None:
        """A transaction, which may fail."""
        try:
            await self.change_or_fail()
        except MemslotError as error:
            raise Refused from error

    async def change_or_fail(self) -> None:
        async with self.rig.memory.transaction():
            for _ in range(self.random.randint(1, 3)):
                match self.random.randrange(4):
                    case 0:
                        self.front.set_enabled(not self.front.enabled)
                    case 1:
                        self.windows[1].set_enabled(not self.windows[1].enabled)
                    case 2:
                        self.windows[0].set_unmergeable(not self.windows[0].unmergeable)
                    case _:
                        if self.bell.eventfds:
                            self.bell.del_eventfd(0, 4, self.doorbell)
                        else:
                            self.bell.add_eventfd(0, 4, self.doorbell)
            what = self.random.random()
            if what < 0.1:
                raise Refused
            if what < 0.2:
                await trio.sleep(self.random.random() * 0.001)
            self.fail_once(what)

    def fail_once(self, what: float) -> None:
        """Let one thing go wrong at most: where undoing fails, that is another test's."""
        for each in self.slow:
            each.armed = False
        fake = self.rig.fake
        if fake is not None and fake.pending_failures():
            return
        if 0.2 < what < 0.3:
            self.random.choice(self.slow).armed = True
        elif 0.3 < what < 0.4 and fake is not None:
            fake.fail("KVM_SET_USER_MEMORY_REGION")

    async def pause(self) -> None:
        """Where nothing is to move."""
        async with self.vm.paused():
            rounds = [self.rig.rounds(each) for each in self.vcpus]
            assert self.vm.statistics().gate.vcpus_inside == 0
            what = self.random.randrange(5)
            if what == 0:
                await trio.sleep(self.random.random() * 0.001)
            elif what == 1:
                await self.vm.flush_coalesced()
            elif what == 2:
                await self.change()
            elif what == 3:
                await self.pause()
            for each in list(self.vcpus):
                if each.id not in self.closing:
                    with contextlib.suppress(VcpuBusyError):
                        _ = each.regs.rip
            assert self.vm.statistics().gate.vcpus_inside == 0
            assert rounds == [self.rig.rounds(each) for each in self.vcpus[: len(rounds)]]

    async def flush(self) -> None:
        await self.vm.flush_coalesced()

    async def watch(self) -> None:
        instrument = Raises(self.random.randrange(20))
        self.vm.add_instrument(instrument)
        await trio.sleep(0.0005)
        with contextlib.suppress(KeyError):
            self.vm.remove_instrument(instrument)

    async def come_or_go(self) -> None:
        if len(self.vcpus) < MOST_VCPUS and self.random.random() < 0.5:
            await self.come()
        elif len(self.vcpus) - len(self.closing) > 2:
            vcpu = self.random.choice([v for v in self.vcpus if v.id not in self.closing])
            self.closing.add(vcpu.id)
            await vcpu.aclose()

    async def come(self) -> None:
        vcpu = await self.vm.create_vcpu()
        if vcpu.id >= MOST_VCPUS:
            await vcpu.aclose()
            return
        self.rig.load(vcpu, *self.program(vcpu.id), loop=True)
        self.vcpus.append(vcpu)
        self.nursery.start_soon(self.run, vcpu)

    async def run(self, vcpu: Vcpu) -> None:
        """Runs it, is cancelled now and then, and starts over."""
        while not self.calm and vcpu.id not in self.closing:
            with contextlib.suppress(Refused, trio.ClosedResourceError):
                with trio.move_on_after(self.random.choice([0.0002, 0.002, 0.02, LONG_ENOUGH])):
                    assert await vcpu.run() != Hlt()
            await trio.lowlevel.checkpoint()

    def closed_errors(self) -> tuple[type[Exception], ...]:
        """What is all right, too, when the VM may be closed."""
        return (trio.ClosedResourceError,) if self.closes else ()

    closes = False

    async def act(self, share: int) -> None:
        for _ in range(share):
            what: Callable[[], Awaitable[None]] = self.random.choice(
                [self.change] * 5
                + [self.pause] * 3
                + [self.flush] * 2
                + [self.watch, self.come_or_go]
            )
            with contextlib.suppress(Refused, *self.closed_errors()):
                if self.random.random() < 0.15:
                    with trio.move_on_after(self.random.random() * 0.001):
                        await what()
                else:
                    await what()
            await trio.sleep(self.random.choice([0, 0, 0.0003]))

    # ---- all of it ----------------------------------------------------------------------

    async def play(self) -> None:
        """Until all has happened; then stop, and see that all can go on."""
        with EventFd() as self.doorbell, trio.fail_after(LONG_ENOUGH):
            async with self.rig.open(self.policy) as self.vm:
                await self.listen()
                async with trio.open_nursery() as self.nursery:
                    await self.come()
                    await self.come()
                    async with trio.open_nursery() as acting:
                        for _ in range(3):
                            acting.start_soon(self.act, self.steps // 3)
                    self.calm = True
                    self.nursery.cancel_scope.cancel()
                await self.still_alive()
                statistics = self.vm.statistics()
                assert statistics.holes == 0
                assert statistics.unassigned == 0
            self.check()

    async def listen(self) -> None:
        for each in self.slow:
            await self.rig.memory.register(each, self.rig.space)

    async def play_and_close(self) -> None:
        """The same, but the VM closes when a third has happened."""
        self.closes = True
        with EventFd() as self.doorbell, trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as self.nursery:
                try:
                    async with self.rig.open(self.policy) as self.vm:
                        await self.listen()
                        await self.come()
                        await self.come()
                        for _ in range(2):
                            self.nursery.start_soon(self.act, self.steps // 3)
                        await self.act(self.steps // 3)
                        assert self.vm.statistics().holes == 0
                except* Refused:
                    pass  # by a device, at the end
                self.calm = True
            self.ring()
        self.check()

    async def still_alive(self) -> None:
        """Every vCPU that is left gets round once more (rule B14)."""
        async with trio.open_nursery() as nursery:
            for vcpu in self.vcpus:
                if vcpu.id not in self.closing:
                    nursery.start_soon(self.run_on, vcpu)
        self.ring()

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.rung += os.eventfd_read(self.doorbell.fileno())

    async def run_on(self, vcpu: Vcpu) -> None:
        goal = self.rig.rounds(vcpu) + 2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await until(lambda: self.rig.rounds(vcpu) >= goal)
            nursery.cancel_scope.cancel()

    def check(self) -> None:
        least = most = 0
        for number, values in self.served.items():
            cycle = self.cycle()
            for nth, value in enumerate(values):
                assert value == next(cycle), (number, nth, values[max(nth - 10, 0) : nth + 5])
            most += values.count(3)
            least += values.count(4)
        assert least <= self.rung + self.rung_in_device <= most
        assert self.rig.memory.broken is None

    @staticmethod
    def cycle() -> Iterator[int]:
        while True:
            yield from (1, 2, 3, 4, 5)
