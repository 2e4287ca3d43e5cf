from __future__ import annotations

import io

import attrs
from rich.console import Console

from memlistener.rig.display import Display


@attrs.frozen
class Interim:
    seconds: float
    transactions: int = 0


def line(interim: Interim) -> str:
    return f"[red]{interim.transactions} done[/red]"


def test_lines_are_occasional_without_a_terminal() -> None:
    """One every two seconds, plain."""
    output = io.StringIO()
    with Display(Console(file=output), line, seconds=5.0, transactions=None) as display:
        for tenths in range(45):
            display.update(Interim(tenths / 10))
    assert output.getvalue().splitlines() == ["2 s: 0 done", "4 s: 0 done"]


def test_bar_in_a_terminal() -> None:
    """How much is done, and what it found; the limit that is nearer counts."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Display(console, line, seconds=10.0, transactions=40) as display:
        display.update(Interim(2.0, 20))
        display.update(Interim(9.0, 20))
        display.update(Interim(20.0, 30))
    text = output.getvalue()
    for share in ("50 %", "90 %", "100 %"):
        assert share in text
    assert "30 done" in text
