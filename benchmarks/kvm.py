"""Real vCPUs: what brackets, kicks and exits cost, beside the same in C.

``race.c`` is compiled when it is needed. Its guest and its memslots are those
of this module, and rounds of the two take turns.

One thing differs, and is why C is measured in three forms. In a tight loop a C
program gets the gate back before the vCPUs that it stopped have entered the
guest again: it is fast because nobody runs. Our gate lets every vCPU in between
two brackets, and for a moment (rule B14). C that waits for its vCPUs to enter,
``entered``, is what a tight loop of ours is to be compared with; with a pause
between transactions, ``spaced``, nobody has to wait for anything.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from benchmarks.measure import (
    Benchmarks,
    Figure,
    Settings,
    Skipped,
    figure,
    p99,
    ratio,
)
from memlistener import Instrument, MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs, kvm
from memlistener.trace import TraceInstrument

_HALF = 0x8000
_SPLIT_AT = 0x10000  # the slot that is split and merged: two halves from here
_CODE = 0x1000
_PORT = 0x3F8
_PAUSE = 0.0003  # seconds between spaced brackets, as in race.c

# Real mode. Reads the upper half of the memory that changes through ds, and
# counts at 0x2000 through cs, for ever.
_READING = bytes.fromhex("a0 00 80  66 2e ff 06 00 20  eb f5")
_WRITING = bytes.fromhex("ba f8 03  ee  eb fd")  # out dx, al for ever
_SPINNING = bytes.fromhex("eb fe")

Ns = list[float]


# ---- the C side --------------------------------------------------------------------


@functools.cache
def _compiled() -> Path:
    """``race.c``, compiled into a directory that goes away with the process."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Skipped("there is no C compiler to build race.c with: install cc")
    where = tempfile.TemporaryDirectory(prefix="memlistener-race-")
    _keep.append(where)
    program = Path(where.name) / "race"
    source = Path(__file__).with_name("race.c")
    subprocess.run([compiler, "-O2", "-pthread", "-o", program, source], check=True)
    return program


_keep: list[tempfile.TemporaryDirectory[str]] = []


def _c(*arguments: object) -> Ns:
    """What ``race`` prints, in nanoseconds."""
    done = subprocess.run(
        [_compiled(), *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return [float(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def _need_kvm() -> None:
    available = kvm.available()
    if not available:
        raise Skipped(available.reason)
    _compiled()


# ---- our side ----------------------------------------------------------------------


class Rig:
    """A VM with vCPUs that run, and the region whose toggling takes three ioctls."""

    def __init__(self, io: MemoryRegion | None = None) -> None:
        self.memory = MemorySystem()
        system = MemoryRegion.container("system", 1 << 32)
        self.fixed = MemoryRegion.ram("fixed", _SPLIT_AT)
        changing = MemoryRegion.ram("changing", 2 * _HALF)
        # Over one half, and the same memory: two slots instead of one.
        self.half = MemoryRegion.alias("half", changing, offset=0, size=_HALF)
        self.half.set_unmergeable(True)
        self.half.set_enabled(False)
        system.add_subregion(0, self.fixed)
        system.add_subregion(_SPLIT_AT, changing)
        system.add_subregion_overlap(_SPLIT_AT, self.half, 1)
        self.space = self.memory.create_address_space("memory", system)
        self.io = None if io is None else self.memory.create_address_space("io", io)

    @asynccontextmanager
    async def running(
        self, count: int, program: bytes, instruments: Sequence[Instrument] = ()
    ) -> AsyncIterator[kvm.Vm]:
        """``count`` vCPUs in the guest."""
        code = self.fixed.block.view
        code[_CODE : _CODE + len(program)] = program
        async with (
            kvm.open_vm(self.space, self.io, instruments=instruments) as vm,
            trio.open_nursery() as nursery,
        ):
            for _ in range(count):
                vcpu = await vm.create_vcpu()
                start_guest(vcpu)
                nursery.start_soon(vcpu.run)
            await trio.sleep(0.05)  # as race.c does
            yield vm
            nursery.cancel_scope.cancel()


def start_guest(vcpu: kvm.Vcpu) -> None:
    """Put a vCPU at the guest's start, with ds where the memory changes."""
    kvm.x86.real_mode(vcpu, entry=_CODE)
    special = vcpu.get_sregs()
    special["ds"].update(base=_SPLIT_AT, selector=_SPLIT_AT >> 4)
    vcpu.set_sregs(special)


def _ours(vcpus: int, count: int, pause: float, instruments: Sequence[Instrument] = ()) -> Ns:
    """Transactions of three ioctls each."""
    taken: Ns = []

    async def main() -> None:
        rig = Rig()
        clock = time.perf_counter_ns
        async with rig.running(vcpus, _READING, instruments) as vm:
            ioctls, brackets = vm.statistics().memslot_ioctls, vm.statistics().brackets
            for index in range(count):
                began = clock()
                async with rig.memory.transaction():
                    rig.half.set_enabled(index % 2 == 0)
                taken.append(clock() - began)
                if pause:
                    time.sleep(pause)
            after = vm.statistics()
            assert after.memslot_ioctls - ioctls == 3 * count, "not three ioctls each"
            assert after.brackets - brackets == count

    trio.run(main)
    return taken


def bracket(settings: Settings) -> list[Figure]:
    """A bracketed transaction of three memslot ioctls."""
    _need_kvm()
    rounds = 2 if settings.quick else 6
    count = settings.samples(1_000)
    found = []
    for vcpus in (1, 2):
        taken: dict[str, Ns] = {}

        def add(name: str, samples: Ns, taken: dict[str, Ns] = taken) -> None:
            taken.setdefault(name, []).extend(samples)

        for _ in range(rounds):
            for form in ("tight", "entered", "spaced"):
                add(f"C, {form}", _c("bracket", vcpus, count, form))
            add("ours, tight", _ours(vcpus, count, 0))
            add("ours, spaced", _ours(vcpus, count, _PAUSE))
        found += [
            figure(f"bracket of 3 ioctls: {name}", samples, n=vcpus)
            for name, samples in taken.items()
        ]
        for this, that in (
            ("ours, tight", "C, entered"),
            ("ours, spaced", "C, spaced"),
            ("ours, tight", "C, tight"),
        ):
            for of, what, bar in ((statistics.median, "median", 1.5), (p99, "p99", 2.0)):
                found.append(
                    ratio(
                        f"bracket: {this} to {that}, {what}",
                        taken[this],
                        taken[that],
                        n=vcpus,
                        bar=bar,
                        of=of,
                        note="C's vCPUs hardly run, ours do" if that == "C, tight" else "",
                    )
                )
    return found


def kick(settings: Settings) -> list[Figure]:
    """From the kick until every vCPU is out; n is how many run."""
    _need_kvm()
    found = []
    for vcpus in (1, 2) if settings.quick else (1, 2, 8, 32):
        count = settings.samples(100)
        ours: Ns = []
        theirs: Ns = []

        async def main(vcpus: int = vcpus, count: int = count, ours: Ns = ours) -> None:
            rig = Rig()
            async with rig.running(vcpus, _READING) as vm:
                for _ in range(count):
                    began = time.perf_counter_ns()
                    async with vm._gate.holding():  # what a bracket does; a pause waits for more
                        ours.append(time.perf_counter_ns() - began)
                    time.sleep(0.001)

        for _ in range(1 if settings.quick else 3):
            theirs += _c("kick", vcpus, count)
            trio.run(main)
        found += [
            figure("kick to all stopped: C", theirs, n=vcpus),
            figure("kick to all stopped: ours", ours, n=vcpus),
        ]
    return found


# ---- exits -------------------------------------------------------------------------


class Port(MemoryRegionOps):
    """Counts what is written to it."""

    def __init__(self, *, thread_safe: bool) -> None:
        self.thread_safe = thread_safe
        self.count = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """Nothing of interest."""
        return 0

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """Count it."""
        self.count += 1


class AsyncPort(MemoryRegionOps):
    """The same with ``async def``."""

    def __init__(self) -> None:
        self.count = 0

    async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """Nothing of interest."""
        return 0

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """Count it."""
        self.count += 1


def _per_exit(port: Any, seconds: float, instruments: Sequence[Instrument] = ()) -> float:
    """Nanoseconds from one OUT to the next."""
    found: list[float] = []

    async def main() -> None:
        io = MemoryRegion.container("io", 0x10000)
        io.add_subregion(_PORT, MemoryRegion.io("port", 8, port))
        async with Rig(io).running(1, _WRITING, instruments):
            count, began = port.count, time.perf_counter_ns()
            await trio.sleep(seconds)
            took = time.perf_counter_ns() - began
            found.append(took / max(port.count - count, 1))

    trio.run(main)
    return found[0]


def pio(settings: Settings) -> list[Figure]:
    """From one OUT to the next, by who serves it."""
    _need_kvm()
    seconds = 0.05 if settings.quick else 0.3
    ports: dict[str, Callable[[], Any]] = {
        "thread-safe ops": lambda: Port(thread_safe=True),
        "plain ops": lambda: Port(thread_safe=False),
        "async ops": AsyncPort,
    }
    taken: dict[str, Ns] = {"C": [], **{name: [] for name in ports}}
    for _ in range(1 if settings.quick else 9):
        taken["C"] += _c("pio", seconds)
        for name, port in ports.items():
            taken[name].append(_per_exit(port(), seconds))
    return [
        *(figure(f"PIO exit: {name}", samples, n=1) for name, samples in taken.items()),
        *(ratio(f"PIO exit: {name} to C", taken[name], taken["C"], n=1) for name in ports),
    ]


# ---- instruments -------------------------------------------------------------------


def _listening() -> Instrument:
    """Overrides every hook, and does nothing in them: what the calls cost."""
    instrument = Instrument()
    for hook in ("begin", "kicked", "quiesced", "ioctl", "resumed", "exit", "served"):
        setattr(instrument, hook, lambda *_: None)
    return instrument


def instruments(settings: Settings) -> list[Figure]:
    """Exits and brackets unwatched, with all hooks overridden, and with a trace written."""
    _need_kvm()
    exits: dict[str, Ns] = {}
    brackets: dict[str, Ns] = {}
    for _ in range(1 if settings.quick else 7):
        with open(os.devnull, "w") as sink:
            watchers: dict[str, list[Instrument]] = {
                "none": [],
                "all hooks, empty": [_listening()],
                "TraceInstrument": [TraceInstrument(sink)],
            }
            for name, watching in watchers.items():
                exits.setdefault(name, []).append(
                    _per_exit(Port(thread_safe=True), 0.05 if settings.quick else 0.3, watching)
                )
                brackets.setdefault(name, []).extend(
                    _ours(1, settings.samples(300), _PAUSE, watching)
                )
    found = []
    for what, taken in (("PIO exit, thread-safe ops", exits), ("bracket, spaced", brackets)):
        found += [figure(f"{what}: {name}", samples, n=1) for name, samples in taken.items()]
        found += [
            ratio(f"{what}: {name} to none", samples, taken["none"], n=1)
            for name, samples in taken.items()
            if name != "none"
        ]
    return found


# ---- policies ----------------------------------------------------------------------


def _replay(policy: kvm.KickPolicy, states: Sequence[Any]) -> dict[str, float]:
    """A PC's boot under a running vCPU: what it took."""
    from tests.corpus import Regions

    found: dict[str, float] = {}

    async def main() -> None:
        regions = Regions(states[0])
        memory = MemorySystem()
        # The vCPU runs in a page of its own, which no state of the PC touches.
        top = MemoryRegion.container("top", 1 << 64)
        page = MemoryRegion.ram("page", 0x1000)
        page.block.view[: len(_SPINNING)] = _SPINNING
        top.add_subregion_overlap(0, regions[states[0]["address_spaces"][0]["root"]], 0)
        top.add_subregion_overlap(_CODE, page, 1)
        space = memory.create_address_space("memory", top)
        async with kvm.open_vm(space, policy=policy) as vm, trio.open_nursery() as nursery:
            vcpu = await vm.create_vcpu()
            kvm.x86.real_mode(vcpu, entry=_CODE)
            nursery.start_soon(vcpu.run)
            await trio.sleep(0.02)
            listener = next(
                each for each in space.listeners if isinstance(each, kvm.KvmMemoryListener)
            )
            before = vm.statistics()
            began = time.perf_counter_ns()
            for state in states[1:]:
                async with memory.transaction():
                    regions.become(state)
            took = time.perf_counter_ns() - began
            after = vm.statistics()
            found["brackets"] = after.brackets - before.brackets
            found["ioctls"] = after.memslot_ioctls - before.memslot_ioctls
            found["stopped"] = listener.stopped.total
            found["took"] = took
            nursery.cancel_scope.cancel()

    trio.run(main)
    return found


def policies(settings: Settings) -> list[Figure]:
    """The recorded boot of a PC, transaction by transaction, under each policy."""
    _need_kvm()
    try:
        from tests.corpus import sequence
    except ImportError as error:
        raise Skipped(f"the recorded boot is among the tests: {error}") from error
    states = sequence("seq_pc")
    taken: dict[kvm.KickPolicy, list[dict[str, float]]] = {each: [] for each in kvm.KickPolicy}
    for _, policy in itertools.product(range(1 if settings.quick else 9), kvm.KickPolicy):
        taken[policy].append(_replay(policy, states))
    found = []
    for policy, runs in taken.items():
        last = runs[-1]
        text = f"PC boot, {policy.value}"
        for what in ("brackets", "ioctls"):
            found.append(
                Figure(what=f"{text}: {what}", n=len(states) - 1, unit="", median=last[what])
            )
        found += [
            figure(f"{text}: vCPU time lost", [run["stopped"] for run in runs], n=1),
            figure(f"{text}: all transactions", [run["took"] for run in runs], n=1, unit="ms"),
        ]
    return found


BENCHMARKS: Benchmarks = {
    "bracket": bracket,
    "kick": kick,
    "pio": pio,
    "instruments": instruments,
    "policies": policies,
}
