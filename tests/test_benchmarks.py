"""The benchmarks run. What they measure is for `make bench`, not for a test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import GROUPS, main
from benchmarks.measure import Benchmark, Figure, Settings, Skipped, figure, in_turns, ratio
from benchmarks.report import print_group, rows

BENCHMARKS = [
    pytest.param(
        benchmark,
        id=f"{group}.{name}",
        marks=[pytest.mark.kvm] if group in ("kvm", "soak") or name == "fetch" else [],
    )
    for group, benchmarks in GROUPS.items()
    for name, benchmark in benchmarks.items()
]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_each_benchmark_gives_figures(benchmark: Benchmark) -> None:
    """Quickly, every benchmark runs and gives positive figures with different names."""
    try:
        found = benchmark(Settings(quick=True))
    except Skipped as reason:
        # Those that need KVM are not run without it; where it is required none is left out.
        if os.environ.get("MEMLISTENER_REQUIRE_KVM") == "1":
            pytest.fail(f"nothing is to be left out, but: {reason}", pytrace=False)
        pytest.skip(str(reason))
    assert found
    assert all(each.median >= 0 for each in found)
    assert any(each.median > 0 for each in found)
    names = [(each.what, each.n, each.unit) for each in found]
    assert len(set(names)) == len(names)


def test_figure_takes_median_and_p99_of_nanoseconds() -> None:
    """A figure is in its unit; of few samples there is no 99th percentile."""
    many = figure("it", [each * 1000.0 for each in range(1, 202)], bar=200)
    assert (many.median, many.p99, many.ratio, many.passed) == (101, 199, 0.505, True)
    few = figure("it", [3e6, 1e6, 2e6], unit="ms", bar=1.5)
    assert (few.median, few.p99, few.passed) == (2, None, False)
    assert ratio("it", [4, 6], [1, 3]).median == 2.5


def test_samples_are_taken_in_turns() -> None:
    """Alternatives are called block by block, after a block each that does not count."""
    called: list[str] = []
    taken = in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 4, block=2)
    assert "".join(called) == "aabb" * 3
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 4, "b": 4}


FIGURES = [
    Figure(what="good", n=1000, median=12.5, p99=1234.5, bar=40, note="read me"),
    Figure(what="bad", unit="x", median=2, bar=1.5),
    Figure(what="some", unit="", median=3),
]


def test_rows_show_figures_beside_their_bars() -> None:
    """A row says what, how many, the figures with units, and whether the bar is met."""
    assert rows(FIGURES) == [
        ("good", "1,000", "12.5 us", "1,234 us", "40.0 us", "0.31", "pass"),
        ("bad", "", "2.00 x", "", "1.50 x", "1.33", "MISS"),
        ("some", "", "3", "", "", "", ""),
    ]


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_is_printed_with_and_without_rich(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has every figure and note; rich only makes it prettier."""
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    print_group("some group", FIGURES)
    printed = capsys.readouterr().out
    for text in ("some group", "1,000", "12.5 us", "1.33", "MISS", "good: read me"):
        assert text in printed
    assert ("┃" in printed) == with_rich


def test_command_line_chooses_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--only takes a benchmark; --json writes what was printed."""
    path = tmp_path / "figures.json"
    assert main(["--quick", "--only", "engine.memory", "--json", str(path)]) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content["figures"]) == ["engine.memory"]
    (one,) = content["figures"]["engine.memory"]
    assert one["unit"] == "B"
    assert one["median"] > 0
    assert content["machine"]["python"]
    assert "engine.memory" in capsys.readouterr().out


def test_command_line_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no benchmark is named, with those that are."""
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_plot_is_drawn(tmp_path: Path) -> None:
    """The picture is an SVG with labelled axes and QEMU's figures in it."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / "cost.svg"
    assert main(["--quick", "--plot", str(path)]) == 0
    drawn = path.read_text(encoding="utf-8")
    for text in ("<svg", "I/O regions", "microseconds", "QEMU 10.0"):
        assert text in drawn
