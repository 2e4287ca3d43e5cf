"""The mirror's machine, all that writes to its RAM, and the transactions under them.

Nothing here is about printing, and nothing reaches behind the public API: read
it as an example of one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import attrs
import trio

from memlistener import AddressSpace, MemoryRegion, MemorySystem, kvm
from memlistener.histogram import Histogram
from memlistener.mirror.guest import (
    CPUS,
    DMA,
    MAX_VCPUS,
    PAGE,
    WINDOW,
    Geometry,
    load,
    passes,
    start,
)
from memlistener.mirror.layout import Layout, RamMap
from memlistener.mirror.precopy import Comparison, Mirror
from memlistener.mirror.report import Result
from memlistener.mirror.scripted import guest as scripted
from memlistener.rig.machine import Machine, RealMachine, ScriptedMachine

MAX_RAM = 2048  # MiB

_PROGRESS = 0.1  # seconds from one report of progress to the next
_BETWEEN_ROUNDS = 0.01  # seconds, so that there is something to copy
_BETWEEN_DMA = 0.001  # seconds from one write of the host to the next
_PATIENCE = 5.0  # seconds that each vCPU may take to write to all of its memory once


@attrs.frozen(kw_only=True)
class Options:
    """What to run.

    Attributes:
        seconds: When to stop; None: never for that reason.
        transactions: After how many to stop; None: never for that reason.
        vcpus: How many.
        ram: MiB of memory.
        dirty_log: How to learn of dirty pages.
        policy: When vCPUs are held.
        cpu: A name of `CPUS`.
        output: The file to copy to; it is overwritten. None: a temporary one.
        seed: Of the changes: the same makes the same ones, in the same order.
        fake: Run the scripted vCPUs of `FakeKvm` instead of real ones.
    """

    seconds: float | None = 10.0
    transactions: int | None = None
    vcpus: int = attrs.field(
        default=2, validator=[attrs.validators.ge(1), attrs.validators.le(MAX_VCPUS)]
    )
    ram: int = attrs.field(
        default=64, validator=[attrs.validators.ge(1), attrs.validators.le(MAX_RAM)]
    )
    dirty_log: kvm.DirtyLogMethod = kvm.DirtyLogMethod.MANUAL_PROTECT
    policy: kvm.KickPolicy = kvm.KickPolicy.EVERY_COMMIT
    cpu: str = attrs.field(default="long", validator=attrs.validators.in_(CPUS))
    output: Path | None = None
    seed: int = 1
    fake: bool = False


async def run(
    options: Options,
    progress: Callable[[Result], object] = lambda _: None,
    stop: trio.Event | None = None,
) -> Result:
    """Copy the RAM of running guests, under transactions, until enough is done; compare.

    Args:
        options: What to run.
        progress: Told ten times a second how things stand.
        stop: Set it to end the run early: the guests are stopped, the rest is copied and
            compared.

    Raises:
        KvmUnavailableError: There is no usable /dev/kvm, or it has no such dirty log, and
            `Options.fake` is not set.
        OSError: The file cannot be written.
    """
    geometry = Geometry(options.ram << 20)
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", geometry.size)
    load(ram.block.view)
    ram_map = RamMap(system, ram, geometry)

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    machine: Machine = (
        ScriptedMachine(lambda vcpu_id: scripted(geometry, vcpu_id))
        if options.fake
        else RealMachine(lambda vcpu: start(vcpu, options.cpu, geometry))
    )
    async with contextlib.AsyncExitStack() as stack:
        file = stack.enter_context(_open(options.output))
        vm = await stack.enter_async_context(
            kvm.open_vm(
                space,
                policy=options.policy,
                dirty_log=options.dirty_log,
                backend=machine.backend,
            )
        )
        writers = _Writers(vm, space, geometry)
        for _ in range(options.vcpus):
            machine.start(await vm.create_vcpu())
        tally = _Tally(options, vm, ram.block.view, writers)
        async with trio.open_nursery() as nursery:
            # Should any of these fail, all of it ends, and the error leaves here.
            nursery.start_soon(writers.run)
            await memory.dirty_log_start()
            mirror = Mirror(memory, ram.block, file.fileno(), str(options.output or file.name))
            tally.begin()
            nursery.start_soon(tally.report, progress)
            nursery.start_soon(_transactions, memory, ram_map, geometry, tally, stop)
            while not tally.over.is_set():
                tally.add_round(await mirror.round())
                with trio.move_on_after(_BETWEEN_ROUNDS):
                    await tally.over.wait()
            began = time.perf_counter()
            async with vm.paused():
                # Out of the guest is not enough: the host writes too, and a device
                # that a vCPU's own thread is in.
                await writers.stop()
                tally.add_round(await mirror.round())
                tally.final_stop = time.perf_counter() - began
                tally.comparison = await mirror.compare()
            nursery.cancel_scope.cancel()
        await memory.dirty_log_stop()
        return tally.result()


@contextlib.contextmanager
def _open(output: Path | None) -> Iterator[IO[bytes]]:
    """The file to copy to; a temporary one is gone afterwards."""
    if output is None:
        with tempfile.NamedTemporaryFile(prefix="memlistener-mirror-", buffering=0) as file:
            yield file
    else:
        with output.open("w+b", buffering=0) as given:
            yield given


async def _transactions(
    memory: MemorySystem,
    ram_map: RamMap,
    geometry: Geometry,
    tally: _Tally,
    stop: trio.Event | None,
) -> None:
    """Change the map again and again until enough is done, or ``stop`` is set."""
    options = tally.options
    rng = random.Random(options.seed)
    layout = Layout()
    async with trio.open_nursery() as nursery:

        async def watch(event: trio.Event) -> None:
            await event.wait()
            tally.interrupted = True
            nursery.cancel_scope.cancel()

        if stop is not None:
            nursery.start_soon(watch, stop)
        if options.seconds is not None:
            nursery.cancel_scope.deadline = trio.current_time() + options.seconds
        for _ in itertools.count() if options.transactions is None else range(options.transactions):
            layout = layout.changed(rng, geometry)
            async with memory.transaction():
                ram_map.show(layout)
            tally.transactions += 1
        nursery.cancel_scope.cancel()
    tally.end()
    if not tally.interrupted:
        with trio.move_on_after(_PATIENCE):
            await tally.first_passes()
    tally.over.set()


class _Writers:
    """All that writes to the RAM: the guests, and a device of the host."""

    def __init__(self, vm: kvm.Vm, space: AddressSpace, geometry: Geometry) -> None:
        self.exits: Counter[str] = Counter()
        self.host_writes = 0
        self._vm = vm
        self._space = space
        self._geometry = geometry
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def run(self) -> None:
        """Run them until `stop`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for vcpu in self._vm.vcpus:
                    nursery.start_soon(self._guest, vcpu)
                nursery.start_soon(self._device)
        self._stopped.set()

    async def stop(self) -> None:
        """When this returns, nobody writes any more."""
        self._scope.cancel()
        await self._stopped.wait()

    async def _guest(self, vcpu: kvm.Vcpu) -> None:
        """Run a vCPU. Its program has no end: whatever ends it is a failure."""
        reason = await vcpu.run()
        self.exits[type(reason).__name__] += 1

    async def _device(self) -> None:
        """What a disk or a network card does: it puts data into the guest's memory."""
        rng = random.Random(0)
        for number in itertools.count(1):
            page = WINDOW + rng.randrange(self._geometry.window) * PAGE
            await self._space.write(page + DMA, number.to_bytes(8, "little"))
            self.host_writes = number
            await trio.sleep(_BETWEEN_DMA)


class _Tally:
    """Keeps count, and makes a `Result` of it."""

    def __init__(self, options: Options, vm: kvm.Vm, ram: memoryview, writers: _Writers) -> None:
        self.options = options
        self.transactions = 0
        self.interrupted = False
        self.over = trio.Event()  # what is left is for the last round
        self.final_stop = 0.0
        self.comparison: Comparison | None = None
        self._vm = vm
        self._ram = ram
        self._writers = writers
        self._rounds = 0
        self._dirty = Histogram()
        self._dirty_last = 0
        self._copied = 0

    def begin(self) -> None:
        """Transactions begin. What came before, of opening the VM, does not count."""
        self._before = self._vm.statistics()
        self._began = time.perf_counter()
        self._ended: float | None = None

    def end(self) -> None:
        """There will be no more."""
        self._ended = time.perf_counter()

    def add_round(self, pages: int) -> None:
        """A round copied so many."""
        if self._rounds:  # the first copies all
            self._dirty.add(pages)
        self._rounds += 1
        self._dirty_last = pages
        self._copied += pages

    async def first_passes(self) -> None:
        """Wait until each vCPU has written to all of its memory."""
        while not all(self._passes()):
            await trio.sleep(0.001)

    async def report(self, progress: Callable[[Result], object]) -> None:
        """Report progress until cancelled."""
        while True:
            progress(self.result())
            await trio.sleep(_PROGRESS)

    def _passes(self) -> tuple[int, ...]:
        return tuple(passes(self._ram, number) for number in range(self.options.vcpus))

    def result(self) -> Result:
        """How things stand."""
        options, before, now = self.options, self._before, self._vm.statistics()
        return Result(
            backend="fake" if options.fake else "kvm",
            cpu="scripted" if options.fake else options.cpu,
            policy=options.policy.value,
            dirty_log=options.dirty_log.value,
            seed=options.seed,
            pages=len(self._ram) // PAGE,
            seconds=(self._ended or time.perf_counter()) - self._began,
            transactions=self.transactions,
            memslot_ioctls=now.memslot_ioctls - before.memslot_ioctls,
            brackets=now.brackets - before.brackets,
            held_median=now.stopped_median,
            held_max=now.stopped_max,
            rounds=self._rounds,
            dirty_median=self._dirty.quantile(0.5),
            dirty_max=self._dirty.maximum,
            dirty_last=self._dirty_last,
            copied=self._copied,
            final_stop=self.final_stop,
            ring_overflows=now.dirty_ring_overflows,
            holes=now.holes,
            passes=self._passes(),
            host_writes=self._writers.host_writes,
            exits=dict(self._writers.exits),
            comparison=self.comparison,
            interrupted=self.interrupted,
        )
