"""B8: a vCPU that does not come out is named: what it is at, for how long, how often kicked."""

from __future__ import annotations

import logging
import re
import threading

import pytest
import trio

from memlistener import MemoryRegion, MemoryRegionOps, bracket
from memlistener.bracket import Gate
from memlistener.testing import Deaf, FakeKvm, In, Instruction, LoseSignals, Out, Read, Spin, Write
from tests.kvm.rig import LONG_ENOUGH, Rig, until

DEVICE = 0x10000000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that kick again and complain at once."""
    monkeypatch.setattr(bracket, "_KICK_AGAIN", 0.001)
    defaults = Gate.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "deadline", 0.001)


class Ops(MemoryRegionOps):
    thread_safe = True


WARNING = re.compile(
    r"after [\d.]+ s still waiting for vcpu 0 \(in KVM_RUN, (.*); "
    r"inside for (\d+\.\d+) s, kicked (\d+) times?\) to leave the guest"
)


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ([], "for the first time"),
        ([Read(DEVICE + 8, 4)], "after an MMIO read of 0x4 bytes at 0x10000008"),
        ([Write(DEVICE, 2, 1)], "after an MMIO write of 0x2 bytes at 0x10000000"),
        ([In(0x3F8, 1)], "after IN of 0x1 bytes at port 0x3f8"),
        ([Out(0x3F8, 2, count=3, value=0)], "after OUT of 0x2 bytes 3 times at port 0x3f8"),
    ],
    ids=["nothing", "read", "write", "in", "outs"],
)
async def test_b8_a_deaf_vcpu(
    before: list[Instruction], last: str, caplog: pytest.LogCaptureFixture
) -> None:
    """B8: it is named, again and again, until it comes out; the bracket waits for it."""
    rig = Rig(FakeKvm())
    rig.system.add_subregion(DEVICE, MemoryRegion.io("device", 0x1000, Ops()))
    leave = threading.Event()
    try:
        async with rig.open() as vm:
            vcpu = await rig.boot(vm, *before, Deaf(leave), Spin())
            fake = rig.fake_vcpu(vcpu)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await trio.to_thread.run_sync(fake.wait_for, lambda now: now.blocked)
                with trio.fail_after(LONG_ENOUGH):
                    async with trio.open_nursery() as inner:
                        inner.start_soon(_leave_after, 3, caplog, leave)
                        async with vm.paused():
                            assert leave.is_set()
                            assert vm.statistics().gate.vcpus_inside == 0
                        late = vm.statistics().gate.late
                nursery.cancel_scope.cancel()
    finally:
        leave.set()
    matches = warnings(caplog)
    assert len(matches) >= 3
    assert late >= 3
    assert {each[1] for each in matches} == {last}
    times, kicks = [float(each[2]) for each in matches], [int(each[3]) for each in matches]
    assert times == sorted(times)
    assert kicks == sorted(set(kicks))  # kicked again between any two
    assert {each.levelno for each in caplog.records} == {logging.WARNING}


def warnings(caplog: pytest.LogCaptureFixture) -> list[re.Match[str]]:
    """Those about a vCPU in the guest: so impatient a gate complains of all sorts of things."""
    found = (WARNING.fullmatch(each.getMessage()) for each in caplog.records)
    return [each for each in found if each is not None]


async def _leave_after(
    count: int, caplog: pytest.LogCaptureFixture, leave: threading.Event
) -> None:
    await until(lambda: len(warnings(caplog)) >= count)
    leave.set()


async def test_b8_signals_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    """B2, B8: a vCPU that hears no signal is kicked and named until it hears one."""
    rig = Rig(FakeKvm())
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, LoseSignals(30), Spin())
        fake = rig.fake_vcpu(vcpu)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await trio.to_thread.run_sync(fake.wait_for, lambda now: now.blocked)
            with trio.fail_after(LONG_ENOUGH):
                async with vm.paused():
                    assert fake.statistics().signals_lost == 30
                    assert fake.statistics().kicks > 30
            nursery.cancel_scope.cancel()
    last = warnings(caplog)[-1]
    assert last[1] == "for the first time"
    assert 1 <= int(last[3]) <= 31


async def test_b8_kicks_are_those_of_this_time(caplog: pytest.LogCaptureFixture) -> None:
    """B8: what is said of a vCPU is of this stay in the guest, not of all that were before."""
    gate = Gate()
    mine = gate.add("a", lambda: None, lambda: None)
    for _ in range(5):
        assert gate.enter(mine)
        mine.kick()
        gate.leave(mine)
    assert gate.enter(mine)
    assert re.fullmatch(
        r"a \(in guest code; inside for 0\.\d+ s, kicked 0 times\)", mine.describe()
    )
    mine.kick()
    assert "kicked 1 time)" in mine.describe()
    gate.leave(mine)
    gate.remove(mine)
    assert caplog.records == []
