from __future__ import annotations

import io

import attrs
from rich.console import Console

from memlistener.demo.progress import Display
from memlistener.demo.scenario import Options

from .test_report import GOOD


def test_lines_are_occasional_without_a_terminal() -> None:
    """One every two seconds, plain."""
    output = io.StringIO()
    with Display(Console(file=output), Options()) as display:
        for tenths in range(45):
            display.update(attrs.evolve(GOOD, seconds=tenths / 10))
    lines = output.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("2 s: 20,000 transactions (10,000/s), 0 holes")


def test_bar_in_a_terminal() -> None:
    """How much is done, and what it found."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Display(console, Options(seconds=None, transactions=40_000)) as display:
        display.update(attrs.evolve(GOOD, holes=7))
    assert "50 %" in output.getvalue()
    assert "7 holes" in output.getvalue()
