from __future__ import annotations

import io

import attrs
from rich.console import Console

from memlistener.mirror.progress import display, line
from memlistener.mirror.scenario import Options

from .test_report import GOOD


def test_line_says_how_the_copy_gets_on() -> None:
    """The round, what it copied, what was copied in all, and the churn."""
    assert line(GOOD) == "round 50: 90 pages, 1,049 MB copied, 1,000 transactions (500/s)"


def test_limits_are_the_options() -> None:
    """The bar knows how much is done."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with display(console, Options(seconds=8.0)) as shown:
        shown.update(attrs.evolve(GOOD, rounds=51))
    assert "25 %" in output.getvalue()
    assert "round 51" in output.getvalue()
