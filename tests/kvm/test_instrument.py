"""Instruments of whole machines, on both kernels: what they hear, and what a trace proves.

A trace is an independent witness of the bracket: its times are taken by the threads
themselves, and neither the gate's state nor its counters go into it.
"""

from __future__ import annotations

import errno
import io
import re

import pytest
import trio

from memlistener import BrokenMemoryError, Instrument, MemoryRegion, MemoryRegionOps, MemTxAttrs
from memlistener.errors import MemslotError
from memlistener.kvm import Hlt, KickPolicy, open_vm
from memlistener.testing import FakeKvm, Halt, In, Out, Read, Spin, Write
from memlistener.trace import TraceInstrument
from tests.chrome_trace import Trace, torn
from tests.kvm.rig import LONG_ENOUGH, SLOT_IOCTL, Rig
from tests.test_instrument import Everything

WINDOW = 0x20000000
DEVICE = 0x10000000


def add_window(rig: Rig) -> MemoryRegion:
    """RAM at WINDOW, and a device that can be put over its middle: three ioctls a toggle."""
    device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
    device.set_enabled(False)
    rig.system.add_subregion(WINDOW, MemoryRegion.ram("window", 0x8000))
    rig.system.add_subregion_overlap(WINDOW + 0x4000, device, 1)
    return device


async def toggle(rig: Rig, region: MemoryRegion, times: int = 1) -> None:
    """So many transactions that put a region in or out."""
    for _ in range(times):
        async with rig.memory.transaction():
            region.set_enabled(not region.enabled)


class Port(MemoryRegionOps):
    """Answers 0x42, and takes anything."""

    def __init__(self, *, thread_safe: bool) -> None:
        self.thread_safe = thread_safe

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return 0x42

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        pass


# ---- the order of hooks ------------------------------------------------------------------------


async def test_b1_a_bracket_from_begin_to_resumed(rig: Rig) -> None:
    """B1, B3: begin, the kick, the exit it caused, quiesced, the ioctls, resumed."""
    device = add_window(rig)
    watch = Everything()
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            vm.add_instrument(watch)
            await toggle(rig, device)
            await rig.wait_rounds(vcpu)
            vm.remove_instrument(watch)
            heard = len(watch.heard)
            await toggle(rig, device)
            assert len(watch.heard) == heard
            nursery.cancel_scope.cancel()
    on_trio = [name for name, _, thread in watch.heard if not thread.startswith(("vcpu", "kick"))]
    assert on_trio in (
        ["begin", "kicked", "quiesced", "ioctl", "ioctl", "ioctl", "resumed"],
        ["begin", "quiesced", "ioctl", "ioctl", "ioctl", "resumed"],  # it was on its way back in
    )
    ((reason, began, _),) = watch.args("begin")
    ((quiet, waited),) = watch.args("quiesced")
    ((resumed,),) = watch.args("resumed")
    assert reason == "memory"
    assert (waited > 0) == ("kicked" in on_trio)
    assert began <= quiet - waited <= quiet <= resumed
    ioctls = watch.args("ioctl")
    assert [name for name, *_ in ioctls] == [SLOT_IOCTL] * 3
    assert quiet <= ioctls[0][2] <= ioctls[0][3] <= ioctls[1][2]
    assert ioctls[2][3] <= resumed
    assert [number for *_, number in ioctls] == [0, 0, 0]
    texts = [str(what) for _, what, *_ in ioctls]
    assert re.fullmatch(r"DELETE slot \d \[0x20000000, 0x20008000\) 'window'", texts[0])
    assert re.fullmatch(r"CREATE slot \d \[0x20000000, 0x20004000\) 'window'", texts[1])
    assert re.fullmatch(r"CREATE slot \d \[0x20005000, 0x20008000\) 'window'", texts[2])
    if "kicked" in on_trio:
        kicked = [each for each in watch.args("exit") if each[1] == "kicked"]
        assert kicked
        vcpu_name, _, addr, entered, left = kicked[0]
        assert (vcpu_name, addr) == ("vcpu 0", None)
        assert entered <= began
        assert watch.args("kicked")[0][1] <= left <= quiet


async def test_the_first_map_is_watched_too(rig: Rig) -> None:
    """B11: an instrument that open_vm is given hears of the very first bracket."""
    add_window(rig)
    watch = Everything()
    async with open_vm(rig.space, rig.io, backend=rig.fake, instruments=[watch]):
        assert watch.names == ["begin", "quiesced", "ioctl", "ioctl", "resumed"]
    assert watch.names == ["begin", "quiesced", "ioctl", "ioctl", "resumed"]


async def test_pauses_are_brackets(rig: Rig) -> None:
    """B4: with a reason of their own, around what changes meanwhile."""
    device = add_window(rig)
    watch = Everything()
    async with rig.open() as vm:
        vm.add_instrument(watch)
        async with vm.paused():
            await toggle(rig, device)
    assert watch.names == ["begin", "quiesced", *["ioctl"] * 3, "resumed"]
    assert watch.args("begin")[0][0] == "paused"


async def test_exits_say_where_and_who_served_them(rig: Rig) -> None:
    """MMIO and ports, on the vCPU's thread and in trio, and the HLT at the end."""
    for name, addr, region in (
        ("here", DEVICE, rig.system),
        ("there", DEVICE + 0x1000, rig.system),
        ("port here", 0x10, rig.ports),
        ("port there", 0x20, rig.ports),
    ):
        ops = Port(thread_safe="there" not in name)
        region.add_subregion(addr, MemoryRegion.io(name, 0x10, ops))
    watch = Everything()
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm,
            Read(DEVICE, 4),
            Write(DEVICE + 0x1000, 4, 1),
            In(0x10, 1),
            Out(0x20, 1, value=2),
            Halt(),
        )
        vm.add_instrument(watch)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        exits = vm.statistics().exits
    told = [(name, args) for name, args, _ in watch.heard if args[1] != "kicked"]
    assert [(name, *args[1:3]) if name == "exit" else (name, args[1]) for name, args in told] == [
        ("exit", "Mmio", DEVICE),
        ("served", "thread"),
        ("exit", "Mmio", DEVICE + 0x1000),
        ("served", "trio"),
        ("exit", "Io", 0x10),
        ("served", "thread"),
        ("exit", "Io", 0x20),
        ("served", "trio"),
        ("exit", "Hlt", None),
    ]
    times = [at for _, args in told for at in args[-2:]]
    assert times == sorted(times)
    assert watch.threads("exit") == {"vcpu 0"}
    assert exits == {"Mmio": 2, "Io": 2, "Hlt": 1}


async def test_an_access_that_failed_was_not_served(rig: Rig) -> None:
    """A device that raises: the exit is told once, served when the next run has served it."""

    class Flaky(MemoryRegionOps):
        fail = True

        def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
            if self.fail:
                self.fail = False
                raise KeyError("not today")
            return 0

    rig.system.add_subregion(DEVICE, MemoryRegion.io("flaky", 0x10, Flaky()))
    watch = Everything()
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        vm.add_instrument(watch)
        with trio.fail_after(LONG_ENOUGH), pytest.raises(KeyError):
            await vcpu.run()
        assert watch.names == ["exit"]
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    assert watch.names == ["exit", "served", "exit"]


async def test_a_failed_ioctl_says_why() -> None:
    """B9: with its errno; what was taken back is told like everything else."""
    fake = FakeKvm()
    rig = Rig(fake)
    device = add_window(rig)
    watch = Everything()
    async with rig.open() as vm:
        vm.add_instrument(watch)
        fake.fail(SLOT_IOCTL, nth=2, errno=errno.ENOMEM)
        with pytest.raises(MemslotError):
            await toggle(rig, device)
        assert watch.names.count("begin") == watch.names.count("resumed") == 1
    numbers = [number for *_, number in watch.args("ioctl")]
    assert numbers == [0, errno.ENOMEM, 0]
    assert [str(what).split()[0] for _, what, *_ in watch.args("ioctl")] == [
        "DELETE",
        "CREATE",
        "CREATE",
    ]


async def test_t13_broken_memory_is_told() -> None:
    """T13: where taking back fails too, the gate stays closed, and instruments know why."""
    fake = FakeKvm()
    rig = Rig(fake)
    device = add_window(rig)
    watch = Everything()
    file = io.StringIO()
    with TraceInstrument(file) as trace:
        async with rig.open(KickPolicy.NEVER) as vm:
            vm.add_instrument(watch)
            vm.add_instrument(trace)
            for nth in (2, 3):  # an ioctl, and taking back the one before it
                fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
            with pytest.raises(BrokenMemoryError):
                await toggle(rig, device)
    assert "resumed" not in watch.names
    assert watch.args("begin")[-1][0] == "broken"
    ((bracket),) = Trace(file.getvalue()).brackets()
    assert bracket.span.name == "bracket: broken"


async def test_b9_an_instrument_that_raises_everywhere(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """B9: each of its hooks costs it its place, and the machine nothing."""
    device = add_window(rig)
    rig.system.add_subregion(DEVICE, MemoryRegion.io("port", 0x10, Port(thread_safe=False)))

    def fails(hook: str) -> Instrument:
        def fail(*_: object) -> None:
            raise RuntimeError(hook)

        instrument = Instrument()
        setattr(instrument, hook, fail)
        return instrument

    hooks = ["begin", "kicked", "quiesced", "ioctl", "resumed", "exit", "served"]
    async with rig.open() as vm:
        for hook in hooks:
            vm.add_instrument(fails(hook))
        vcpus = [
            await rig.boot(vm, Read(DEVICE, 4), loop=True),
            await rig.boot(vm, Spin()),  # somebody to kick
        ]
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            await rig.wait_rounds(vcpus[0])
            await toggle(rig, device, 4)
            await rig.wait_rounds(vcpus[0])
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0
    assert {str(each.exc_info[1]) for each in caplog.records if each.exc_info} == set(hooks)


# ---- the trace as a witness --------------------------------------------------------------------


async def traced(rig: Rig, policy: KickPolicy, transactions: int = 60) -> Trace:
    """Three guests that read what changes, and a device in trio; what was seen of them."""
    device = add_window(rig)
    rig.system.add_subregion(DEVICE, MemoryRegion.io("slow", 0x10, Port(thread_safe=False)))
    file = io.StringIO()
    with TraceInstrument(file) as trace:
        async with rig.open(policy) as vm:
            vm.add_instrument(trace)
            vcpus = [
                await rig.boot(vm, Read(WINDOW, 4), Read(WINDOW + 0x4000, 4), loop=True),
                await rig.boot(vm, Read(WINDOW + 0x7000, 4), Read(DEVICE, 4), loop=True),
                await rig.boot(vm, Spin()),
            ]
            async with trio.open_nursery() as nursery:
                for vcpu in vcpus:
                    nursery.start_soon(vcpu.run)
                await rig.wait_inside(vm, len(vcpus))
                await toggle(rig, device, transactions)
                for vcpu in vcpus[:2]:
                    await rig.wait_rounds(vcpu)
                nursery.cancel_scope.cancel()
    return Trace(file.getvalue())


async def test_b1_no_guest_runs_while_its_bracket_is_quiet(rig: Rig) -> None:
    """B1, B3, B4: of 60 brackets, each has its ioctls inside, and no vCPU in the guest."""
    with trio.fail_after(LONG_ENOUGH):
        trace = await traced(rig, KickPolicy.EVERY_COMMIT)
    trace.check()
    brackets = trace.brackets()
    assert len(brackets) == 60
    assert [len(each.ioctls) for each in brackets] == [3] * 60
    assert sum(len(each.ioctls) for each in brackets) == len(trace.ioctls)
    assert sorted(trace.vcpus) == ["vcpu 0", "vcpu 1", "vcpu 2"]
    assert all(len(trace.of(name, "guest")) > 1 for name in trace.vcpus)
    assert trace.of("vcpu 1", "Mmio")
    for each in brackets:
        for one in each.ioctls:
            assert each.quiet.contains(one)
    assert torn(trace, [each.quiet for each in brackets]) == []
    assert torn(trace, trace.ioctls) == []


async def test_without_brackets_the_trace_shows_it(rig: Rig) -> None:
    """B16: the same machine, nobody held: ioctls fall into the guests' time, and it is seen."""
    with trio.fail_after(LONG_ENOUGH):
        trace = await traced(rig, KickPolicy.NEVER)
    trace.check()
    assert trace.brackets() == []
    assert len(trace.ioctls) == 180
    assert {name for name, _, _ in torn(trace, trace.ioctls)} >= {"vcpu 2"}
