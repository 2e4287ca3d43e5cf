"""The demo's machine: its memory, its vCPUs, and the transactions under them.

Nothing here is about printing, and nothing reaches behind the public API: read
it as an example of one.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import trio

from memlistener import AddressSpace, Instrument, MemoryRegion, MemorySystem, kvm
from memlistener.demo.guest import (
    CODE,
    CPUS,
    FIXED_SIZE,
    MAILBOXES,
    MAX_VCPUS,
    PAGE,
    PAGE_TABLES,
    PAGE_TABLES_SIZE,
    TABLE,
    WORD,
    Cpu,
    Mailbox,
    Work,
    table,
)
from memlistener.demo.report import Result, WrongValue
from memlistener.demo.scripted import guest as scripted
from memlistener.demo.windows import KINDS, Window
from memlistener.rig.machine import Machine, RealMachine, ScriptedMachine

_PROGRESS = 0.1  # seconds from one report of progress to the next
_LAST_PASSES = 2  # passes of each vCPU after the last transaction, so that all is checked once more
_PATIENCE = 2.0  # seconds that it may take for them


def _check_changes(_: object, attribute: attrs.Attribute[Any], names: tuple[str, ...]) -> None:
    if not names or any(name not in KINDS for name in names):
        raise ValueError(f"{attribute.name} are some of {', '.join(KINDS)}, not {names!r}")


@attrs.frozen(kw_only=True)
class Options:
    """What to run.

    Attributes:
        seconds: When to stop; None: never for that reason.
        transactions: After how many to stop; None: never for that reason.
        vcpus: How many.
        changes: Names of `KINDS`, made in turn.
        policy: When vCPUs are held.
        cpu: A name of `CPUS`.
        fake: Run the scripted vCPUs of `FakeKvm` instead of real ones.
        instruments: Who watches.
    """

    seconds: float | None = 5.0
    transactions: int | None = None
    vcpus: int = attrs.field(
        default=2, validator=[attrs.validators.ge(1), attrs.validators.le(MAX_VCPUS)]
    )
    changes: tuple[str, ...] = attrs.field(
        default=tuple(KINDS),
        validator=_check_changes,
    )
    policy: kvm.KickPolicy = kvm.KickPolicy.EVERY_COMMIT
    cpu: str = attrs.field(default="protected", validator=attrs.validators.in_(CPUS))
    fake: bool = False
    instruments: tuple[Instrument, ...] = ()


async def run(
    options: Options,
    progress: Callable[[Result], object] = lambda _: None,
    stop: trio.Event | None = None,
) -> Result:
    """Run guests under transactions until enough is done.

    Args:
        options: What to run.
        progress: Told ten times a second how things stand.
        stop: Set it to end the run early.

    Raises:
        KvmUnavailableError: There is no usable /dev/kvm, and `Options.fake` is not set.
    """
    cpu = CPUS[options.cpu]
    system = MemoryRegion.container("system", 1 << 32)
    windows = [KINDS[name](system, cpu) for name in options.changes]
    work = tuple(itertools.chain.from_iterable(window.work for window in windows))
    _map_fixed_memory(system, cpu, work)

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    machine: Machine = (
        ScriptedMachine(lambda vcpu_id: scripted(work, vcpu_id))
        if options.fake
        else RealMachine(cpu.start)
    )
    async with kvm.open_vm(
        space,
        policy=options.policy,
        backend=machine.backend,
        instruments=options.instruments,
    ) as vm:
        guests = [
            _Guest(await vm.create_vcpu(), machine, space, work) for _ in range(options.vcpus)
        ]
        tally = _Tally(options, vm, guests)
        async with trio.open_nursery() as nursery:
            # Should any of these fail, all of it ends, and the error leaves here.
            for guest in guests:
                nursery.start_soon(guest.run)
            nursery.start_soon(tally.report, progress)
            with trio.CancelScope() as enough:
                if stop is not None:
                    nursery.start_soon(tally.wait_for, stop, enough)
                if options.seconds is not None:
                    enough.deadline = trio.current_time() + options.seconds
                await _transactions(memory, windows, tally)
            tally.end()
            if not tally.interrupted:
                with trio.move_on_after(_PATIENCE):
                    await _last_passes(guests)
            result = tally.result()
            nursery.cancel_scope.cancel()
        return result


def _map_fixed_memory(system: MemoryRegion, cpu: Cpu, work: tuple[Work, ...]) -> None:
    """What never moves: the guest's code, table, mailboxes and stacks, and page tables."""
    fixed = MemoryRegion.ram("fixed", FIXED_SIZE)
    for addr, data in ((CODE, cpu.program), (TABLE, table(work))):
        fixed.block.view[addr : addr + len(data)] = data
    system.add_subregion(0, fixed)
    system.add_subregion(PAGE_TABLES, MemoryRegion.ram("page tables", PAGE_TABLES_SIZE))


async def _transactions(memory: MemorySystem, windows: list[Window], tally: _Tally) -> None:
    """Change one window after another, back to back, until cancelled or done."""
    for window in itertools.islice(itertools.cycle(windows), tally.options.transactions):
        async with memory.transaction():
            window.change()
        tally.transactions += 1


async def _last_passes(guests: list[_Guest]) -> None:
    """Wait until each guest has checked the final map."""
    goals = [guest.mailbox.passes + _LAST_PASSES for guest in guests]
    while any(guest.mailbox.passes < goal for guest, goal in zip(guests, goals, strict=True)):
        await trio.sleep(0.001)


class _Guest:
    """A vCPU, and what became of it."""

    def __init__(
        self, vcpu: kvm.Vcpu, machine: Machine, space: AddressSpace, work: tuple[Work, ...]
    ) -> None:
        self.vcpu = vcpu
        self.failures: Counter[str] = Counter()
        self._machine = machine
        self._space = space
        self._work = work
        self._mailboxes = space.map(MAILBOXES, PAGE)

    @property
    def mailbox(self) -> Mailbox:
        """What it tells us, at this moment."""
        return Mailbox.read(self._mailboxes, self.vcpu.id)

    async def run(self) -> None:
        """Run it until cancelled. Its program has no end: whatever ends it is a failure."""
        while True:
            await self._start()
            reason = await self.vcpu.run()
            self.failures[type(reason).__name__] += 1

    async def _start(self) -> None:
        """Put it at the start of a pass, with its own words as they are there."""
        passes = self.mailbox.passes.to_bytes(WORD, "little")
        for each in self._work:
            if each.own:
                await self._space.write(each.own + WORD * self.vcpu.id, passes)
        self._machine.start(self.vcpu)


class _Tally:
    """Keeps count, and makes a `Result` of it."""

    def __init__(self, options: Options, vm: kvm.Vm, guests: list[_Guest]) -> None:
        self.options = options
        self.transactions = 0
        self.interrupted = False
        self._vm = vm
        self._guests = guests
        # The VM's memory took some as well, when it was opened.
        self._before = vm.statistics()
        self._began = time.perf_counter()
        self._ended: float | None = None

    async def report(self, progress: Callable[[Result], object]) -> None:
        """Report progress until cancelled."""
        while True:
            progress(self.result())
            await trio.sleep(_PROGRESS)

    async def wait_for(self, stop: trio.Event, enough: trio.CancelScope) -> None:
        """End the transactions when ``stop`` is set."""
        await stop.wait()
        self.interrupted = True
        enough.cancel()

    def end(self) -> None:
        """There will be no more transactions."""
        self._ended = time.perf_counter()

    def result(self) -> Result:
        """How things stand."""
        options, before, now = self.options, self._before, self._vm.statistics()
        mailboxes = [(guest.vcpu.id, guest.mailbox) for guest in self._guests]
        failures = sum((guest.failures for guest in self._guests), Counter[str]())
        return Result(
            backend="fake" if options.fake else "kvm",
            cpu="scripted" if options.fake else options.cpu,
            policy=options.policy.value,
            changes=options.changes,
            seconds=(self._ended or time.perf_counter()) - self._began,
            transactions=self.transactions,
            memslot_ioctls=now.memslot_ioctls - before.memslot_ioctls,
            brackets=now.brackets - before.brackets,
            kicks=now.gate.kicks - before.gate.kicks,
            holes=now.holes,
            wrong_values=sum(mailbox.wrong for _, mailbox in mailboxes),
            first_wrong=tuple(
                WrongValue(number, mailbox.first_addr, mailbox.first_value)
                for number, mailbox in mailboxes
                if mailbox.wrong
            ),
            internal_errors=failures.pop(kvm.InternalError.__name__, 0),
            other_exits=dict(failures),
            wait_median=now.gate.wait_median,
            wait_p99=now.gate.wait_p99,
            wait_max=now.gate.wait_max,
            held_median=now.stopped_median,
            held_max=now.stopped_max,
            passes=tuple(mailbox.passes for _, mailbox in mailboxes),
            interrupted=self.interrupted,
        )
