"""What the demo says while it is getting on."""

from __future__ import annotations

from rich.console import Console

from memlistener.demo.report import Result
from memlistener.demo.scenario import Options
from memlistener.rig.display import Display


def display(console: Console, options: Options) -> Display[Result]:
    """Shows each interim result of a run."""
    return Display(console, line, seconds=options.seconds, transactions=options.transactions)


def line(result: Result) -> str:
    """How things stand; red if they are bad."""
    text = (
        f"{result.transactions:,} transactions ({result.rate(result.transactions):,.0f}/s), "
        f"{result.holes:,} holes, {result.wrong_values:,} wrong, "
        f"{result.internal_errors:,} internal errors"
    )
    return f"[red]{text}[/red]" if result.torn else text
