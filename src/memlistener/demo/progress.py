"""How the demo shows that it is getting on: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from memlistener.demo.report import Result
from memlistener.demo.scenario import Options

_PLAIN_EVERY = 2.0  # seconds from one line to the next


class Display:
    """A context manager in which `update` shows each interim result.

    Args:
        console: Where to; a bar if it is a terminal.
        options: What is run, for telling how much of it is done.
    """

    def __init__(self, console: Console, options: Options) -> None:
        self._console = console
        self._options = options
        self._next_line = _PLAIN_EVERY
        self._bar: Progress | None = None
        if console.is_terminal:
            # No thread of rich's: it is drawn when there is news.
            self._bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("[progress.percentage]{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, result: Result) -> None:
        """Show how things stand."""
        if self._bar is not None:
            text = f"[red]{_line(result)}[/red]" if result.torn else _line(result)
            self._bar.update(
                self._task, completed=_done(self._options, result), description=text, refresh=True
            )
        elif result.seconds >= self._next_line:
            self._next_line += _PLAIN_EVERY
            self._console.print(
                f"{result.seconds:.0f} s: {_line(result)}", highlight=False, soft_wrap=True
            )


def _line(result: Result) -> str:
    return (
        f"{result.transactions:,} transactions ({result.rate(result.transactions):,.0f}/s), "
        f"{result.holes:,} holes, {result.wrong_values:,} wrong, "
        f"{result.internal_errors:,} internal errors"
    )


def _done(options: Options, result: Result) -> float:
    """The share of the run that is behind us."""
    shares = [0.0]
    if options.seconds is not None:
        shares.append(result.seconds / options.seconds)
    if options.transactions is not None:
        shares.append(result.transactions / options.transactions)
    return min(max(shares), 1.0)
