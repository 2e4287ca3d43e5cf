from __future__ import annotations

import io
import json
from typing import Any

import attrs
import pytest
from rich.console import Console

from memlistener.mirror.precopy import Comparison, Difference
from memlistener.mirror.report import Result

GOOD = Result(
    backend="kvm",
    cpu="long",
    policy="every-commit",
    dirty_log="ring",
    seed=1,
    pages=16_384,
    seconds=2.0,
    transactions=1_000,
    memslot_ioctls=4_000,
    brackets=1_000,
    held_median=300e-6,
    held_max=2e-3,
    rounds=50,
    dirty_median=1_234,
    dirty_max=5_678,
    dirty_last=90,
    copied=256_000,
    final_stop=7e-3,
    ring_overflows=0,
    holes=0,
    passes=(10, 20),
    host_writes=2_345,
    exits={},
    comparison=Comparison(0, ()),
    interrupted=False,
)
LOST = Comparison(2, (Difference(0x2004, 8, 7), Difference(0x3004, 8, 7)))


def rendered(result: Result) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(result.as_table())
    return output.getvalue()


def test_good_run_exits_0() -> None:
    """No page differs, and everybody got on."""
    assert GOOD.exit_status == 0
    assert GOOD.verdict == "0 of 16,384 pages differ."


def test_ring_overflows_are_shown_where_there_are_any() -> None:
    """They explain why there was so much to copy; they are no failure."""
    assert "ring overflows" not in rendered(GOOD)
    result = attrs.evolve(GOOD, ring_overflows=3)
    assert "ring overflows" in rendered(result)
    assert result.exit_status == 0


def test_a_page_that_differs_fails_and_is_named() -> None:
    """With its offset and both bytes; that there are more is said."""
    result = attrs.evolve(GOOD, comparison=LOST)
    assert result.exit_status == 1
    assert result.verdict == (
        "2 of 16,384 pages differ: at 0x2004 the RAM has 0x08 and the file 0x07; "
        "at 0x3004 the RAM has 0x08 and the file 0x07."
    )
    more = attrs.evolve(GOOD, comparison=attrs.evolve(LOST, differing=3))
    assert more.verdict.endswith("the file 0x07; ...")


def test_policy_never_says_what_was_lost() -> None:
    """It is what a bracket is for; and luck is called luck."""
    never = attrs.evolve(GOOD, policy="never", brackets=0)
    assert "happened to" in never.verdict
    assert never.exit_status == 0
    assert "in no log" in attrs.evolve(never, comparison=LOST).verdict


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"passes": (5, 0)}, "vCPU 1 did not write to all of the memory once"),
        ({"exits": {"Shutdown": 1}}, "Shutdown"),
        ({"comparison": None}, "not compared"),
    ],
)
def test_what_proves_nothing_fails(bad: dict[str, Any], text: str) -> None:
    """0 pages that differ are no success if nobody wrote, or nobody compared."""
    result = attrs.evolve(GOOD, **bad)
    assert result.exit_status == 1
    assert text in result.verdict


def test_interrupted_run_exits_130() -> None:
    """Whatever the comparison says, which it still says."""
    result = attrs.evolve(GOOD, interrupted=True, comparison=LOST)
    assert result.exit_status == 130
    assert result.verdict.startswith("Interrupted. 2 of 16,384 pages differ: at 0x2004")


def test_heading_says_what_was_run() -> None:
    """A figure is worth nothing without it."""
    assert GOOD.heading == "2 vCPUs on KVM in long mode, 64 MiB, policy every-commit, log ring"
    fake = attrs.evolve(GOOD, backend="fake", cpu="scripted", passes=(1,))
    assert fake.heading.startswith("1 vCPU, scripted, on a fake kernel, 64 MiB, policy")


def test_table_has_every_figure_with_its_unit() -> None:
    """Counts have thousands separators, times are in microseconds."""
    text = rendered(GOOD)
    for figure in (
        *("50", "1,234", "5,678", "90", "256,000", "1,000 MiB", "1,000", "500 per second"),
        *("4.00 a transaction", "300.0", "2,000.0", "7,000.0", "10.0 per second", "2,345"),
        "of 16,384 pages",
    ):
        assert figure in text


def test_table_without_brackets_shows_no_time_that_vcpus_were_held() -> None:
    """Nobody was: no figure is better than 0."""
    text = rendered(attrs.evolve(GOOD, brackets=0))
    assert "vCPUs held" not in text
    assert "final stop" in text


def test_table_shows_what_ended_a_run() -> None:
    """If anything did."""
    assert "exits" not in rendered(GOOD)
    assert "exits: Shutdown" in rendered(attrs.evolve(GOOD, exits={"Shutdown": 2}))


def test_json_holds_everything() -> None:
    """It survives a round trip, and has the rates and the exit status."""
    data = json.loads(json.dumps(attrs.evolve(GOOD, comparison=LOST).as_json()))
    assert data["comparison"]["first"][0] == {"offset": 0x2004, "ram": 8, "file": 7}
    assert data["differing"] == 2
    assert data["transactions_per_second"] == 500
    assert data["passes_per_second"] == [5, 10]
    assert data["exit_status"] == 1
    assert {field.name for field in attrs.fields(Result)} <= data.keys()
