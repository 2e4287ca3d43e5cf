from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

from memlistener import Instrument, kvm
from memlistener.demo import scenario
from memlistener.demo.guest import CPUS, Cpu, word
from memlistener.demo.report import Result, WrongValue
from memlistener.demo.scenario import Options
from memlistener.demo.windows import KINDS, Rom

LONG_ENOUGH = 60.0

MODES = pytest.mark.parametrize("mode", KINDS)


async def run(options: Options) -> Result:
    before = threading.active_count()
    with trio.fail_after(LONG_ENOUGH):
        result = await scenario.run(options)
    assert threading.active_count() == before
    return result


def assert_untorn(result: Result, transactions: int) -> None:
    assert result.transactions == transactions
    assert result.brackets == transactions
    assert (result.holes, result.wrong_values, result.internal_errors) == (0, 0, 0)
    assert result.exit_status == 0, result.verdict


@pytest.mark.kvm
@MODES
async def test_guest_sees_no_change(mode: str) -> None:
    """Every mode, two vCPUs: no hole, no wrong value, no internal error."""
    result = await run(Options(seconds=None, transactions=100, changes=(mode,)))
    assert_untorn(result, 100)
    assert result.memslot_ioctls >= 100


@pytest.mark.kvm
@MODES
async def test_without_brackets_the_guest_sees_the_map_torn(mode: str) -> None:
    """The failure is real, in every mode, and the vCPUs go on after it."""
    result = await run(
        Options(seconds=5, transactions=500, changes=(mode,), policy=kvm.KickPolicy.NEVER)
    )
    assert result.brackets == 0
    assert result.holes + result.internal_errors > 0
    assert result.exit_status == 1
    assert not result.stuck


@pytest.mark.kvm
@pytest.mark.parametrize("cpu", CPUS)
async def test_processor_modes(cpu: str) -> None:
    """The guest runs in each of them, through all kinds of change."""
    assert_untorn(await run(Options(seconds=None, transactions=100, cpu=cpu)), 100)


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 4])
async def test_vcpu_counts(vcpus: int) -> None:
    """Each vCPU gets through its table, however many there are."""
    result = await run(Options(seconds=None, transactions=100, vcpus=vcpus))
    assert_untorn(result, 100)
    assert len(result.passes) == vcpus


class Corrupt(Rom):
    """A ROM with one wrong bit."""

    name = "corrupt"

    def build(self, cpu: Cpu) -> None:
        super().build(cpu)
        self.rom.block.view[0x400] ^= 1


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param({"cpu": cpu}, marks=pytest.mark.kvm, id=cpu) for cpu in CPUS),
        pytest.param({"fake": True}, id="scripted"),
    ],
)
async def test_guest_notices_a_wrong_value(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checker that never complains would prove nothing: one wrong bit is found."""
    monkeypatch.setitem(KINDS, "corrupt", Corrupt)
    result = await run(Options(seconds=None, transactions=20, changes=("corrupt",), **options))
    assert result.wrong_values >= result.passes[0] + result.passes[1]
    at = Corrupt.base + 0x400
    assert result.first_wrong == (WrongValue(0, at, word(at) ^ 1), WrongValue(1, at, word(at) ^ 1))
    assert result.holes == 0
    assert result.exit_status == 1


async def test_scripted_guest_sees_no_change() -> None:
    """The same scenario on the fake kernel."""
    assert_untorn(await run(Options(seconds=None, transactions=50, fake=True)), 50)


async def test_scripted_guest_sees_the_map_torn_without_brackets() -> None:
    """The fake kernel has the same holes."""
    result = await run(
        Options(
            seconds=10,
            transactions=200,
            changes=("split", "device", "rom"),
            policy=kvm.KickPolicy.NEVER,
            fake=True,
        )
    )
    assert result.holes > 0
    assert result.exit_status == 1


async def test_instruments_are_told() -> None:
    """From the first map on."""

    class Count(Instrument):
        brackets = 0

        def resumed(self, at: int) -> None:
            self.brackets += 1

    count = Count()
    result = await run(Options(seconds=None, transactions=5, fake=True, instruments=(count,)))
    assert count.brackets == result.brackets + 1


async def test_time_limit() -> None:
    """It ends when its time is up, with what was done by then."""
    result = await run(Options(seconds=0.3, fake=True))
    assert result.transactions > 0
    assert not result.interrupted


async def test_stopping_early() -> None:
    """Setting the event ends it at once, with what was done by then."""
    stop = trio.Event()

    def progress(result: Result) -> None:
        if result.transactions:
            stop.set()

    with trio.fail_after(LONG_ENOUGH):
        result = await scenario.run(Options(seconds=None, fake=True), progress, stop)
    assert result.interrupted
    assert result.transactions > 0
    assert result.exit_status == 130


async def test_a_failure_inside_ends_everything() -> None:
    """What the progress callback raises leaves `run`; no vCPU runs on."""

    def progress(result: Result) -> None:
        raise OSError("the terminal is gone")

    before = threading.active_count()
    with trio.fail_after(LONG_ENOUGH), pytest.raises(ExceptionGroup) as caught:
        await scenario.run(Options(seconds=None, fake=True), progress)
    assert caught.group_contains(OSError, match="the terminal is gone")
    assert threading.active_count() == before


async def test_cancelling_ends_everything() -> None:
    """Cancelled from outside, it leaves no thread behind."""
    before = threading.active_count()
    with trio.move_on_after(0.2) as scope:
        await scenario.run(Options(seconds=None, fake=True))
    assert scope.cancelled_caught
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "wrong",
    [{"vcpus": 0}, {"vcpus": 65}, {"changes": ()}, {"changes": ("teleport",)}, {"cpu": "6502"}],
    ids=str,
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    """Nonsense is refused before anything is made, and named."""
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Options(**wrong)
