"""What the mirror says while it is getting on."""

from __future__ import annotations

from rich.console import Console

from memlistener.mirror.guest import PAGE
from memlistener.mirror.report import Result
from memlistener.mirror.scenario import Options
from memlistener.rig.display import Display


def display(console: Console, options: Options) -> Display[Result]:
    """Shows each interim result of a run."""
    return Display(console, line, seconds=options.seconds, transactions=options.transactions)


def line(result: Result) -> str:
    """How things stand."""
    return (
        f"round {result.rounds:,}: {result.dirty_last:,} pages, "
        f"{result.copied * PAGE / 1e6:,.0f} MB copied, "
        f"{result.transactions:,} transactions ({result.rate(result.transactions):,.0f}/s)"
    )
