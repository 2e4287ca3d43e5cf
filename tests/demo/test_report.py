from __future__ import annotations

import io
import json
from typing import Any

import attrs
import pytest
from rich.console import Console

from memlistener.demo.report import Result, WrongValue

GOOD = Result(
    backend="kvm",
    cpu="protected",
    policy="every-commit",
    changes=("split",),
    seconds=2.0,
    transactions=20_000,
    memslot_ioctls=60_000,
    brackets=20_000,
    kicks=40_000,
    holes=0,
    wrong_values=0,
    first_wrong=(),
    internal_errors=0,
    other_exits={},
    wait_median=50e-6,
    wait_p99=100e-6,
    wait_max=1e-3,
    held_median=300e-6,
    held_max=2e-3,
    passes=(1_000, 2_000),
    interrupted=False,
)


def rendered(result: Result) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(result.as_table())
    return output.getvalue()


def test_good_run_exits_0() -> None:
    """Nothing torn and everybody getting on is what 0 means."""
    assert not GOOD.torn
    assert GOOD.exit_status == 0
    assert "no change at all" in GOOD.verdict


@pytest.mark.parametrize(
    "bad",
    [
        {"holes": 1},
        {"wrong_values": 1, "first_wrong": (WrongValue(0, 0x4000, 7),)},
        {"internal_errors": 1},
        {"other_exits": {"Shutdown": 1}},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_each_kind_of_failure_exits_1(bad: dict[str, Any]) -> None:
    """Any of them is a torn map."""
    result = attrs.evolve(GOOD, **bad)
    assert result.torn
    assert result.exit_status == 1
    assert "torn" in result.verdict


def test_a_guest_that_got_nowhere_proves_nothing() -> None:
    """0 passes is no success, and the vCPU is named."""
    result = attrs.evolve(GOOD, passes=(5, 0))
    assert result.stuck == (1,)
    assert result.exit_status == 1
    assert "vCPU 1" in result.verdict


def test_interrupted_run_exits_130() -> None:
    """Whatever it had found by then, which it still says."""
    result = attrs.evolve(GOOD, interrupted=True, holes=3)
    assert result.exit_status == 130
    assert result.verdict.startswith("Interrupted. The guest saw the map torn.")


def test_no_transaction_is_no_success_to_boast_of() -> None:
    """Stopped at once, it says so."""
    assert "no transaction" in attrs.evolve(GOOD, transactions=0, seconds=0.0).verdict


def test_luck_without_brackets_is_called_luck() -> None:
    """Under policy never, nothing found does not mean that all was well."""
    assert "happened to" in attrs.evolve(GOOD, policy="never", brackets=0).verdict


def test_heading_says_what_was_run() -> None:
    """A figure is worth nothing without it."""
    assert GOOD.heading == "2 vCPUs on KVM in protected mode, policy every-commit: split"
    fake = attrs.evolve(GOOD, backend="fake", cpu="scripted", passes=(1,))
    assert fake.heading == "1 vCPU, scripted, on a fake kernel, policy every-commit: split"


def test_table_has_every_figure_with_its_unit() -> None:
    """Counts have thousands separators, waits are in microseconds."""
    text = rendered(GOOD)
    for figure in ("20,000", "10,000", "60,000", "3.00 a transaction", "50.0", "µs median"):
        assert figure in text
    assert "1,000.0" in text
    assert "500 per second" in text


def test_table_shows_the_first_wrong_value() -> None:
    """With the vCPU, what it found and where."""
    wrong = WrongValue(1, 0x4200, 0xFF)
    text = rendered(attrs.evolve(GOOD, wrong_values=2, first_wrong=(wrong,)))
    assert "vCPU 1 found 0x000000ff at 0x4200" in text


def test_table_without_brackets_shows_no_waits() -> None:
    """Nobody waited: no figure is better than 0."""
    text = rendered(attrs.evolve(GOOD, brackets=0))
    assert "nobody waited" in text
    assert "median" not in text


def test_json_holds_everything() -> None:
    """It survives a round trip, and has the rates and the exit status."""
    data = json.loads(json.dumps(GOOD.as_json()))
    assert data["transactions"] == 20_000
    assert data["transactions_per_second"] == 10_000
    assert data["passes_per_second"] == [500, 1_000]
    assert data["exit_status"] == 0
    assert {field.name for field in attrs.fields(Result)} <= data.keys()
