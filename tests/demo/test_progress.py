from __future__ import annotations

import io

import attrs
from rich.console import Console

from memlistener.demo.progress import display, line
from memlistener.demo.scenario import Options

from .test_report import GOOD


def test_line_says_what_was_done_and_found() -> None:
    """Red as soon as something is torn."""
    assert line(GOOD) == ("20,000 transactions (10,000/s), 0 holes, 0 wrong, 0 internal errors")
    assert line(attrs.evolve(GOOD, holes=7)).startswith("[red]20,000")


def test_limits_are_the_options() -> None:
    """The bar knows how much is done."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with display(console, Options(seconds=None, transactions=40_000)) as shown:
        shown.update(attrs.evolve(GOOD, holes=7))
    assert "50 %" in output.getvalue()
    assert "7 holes" in output.getvalue()
