"""How a command shows that it is getting on: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_EVERY = 2.0  # seconds from one line to the next


class Interim(Protocol):
    """How things stand."""

    @property
    def seconds(self) -> float:
        """Since it began."""
        ...

    @property
    def transactions(self) -> int:
        """So far."""
        ...


T_contra = TypeVar("T_contra", bound=Interim, contravariant=True)


class Display(Generic[T_contra]):
    """A context manager in which `update` shows each interim result.

    Args:
        console: Where to; a bar if it is a terminal.
        line: What to say of an interim result, in rich's markup.
        seconds: After how many it is done; None: never for that reason.
        transactions: The same.
    """

    def __init__(
        self,
        console: Console,
        line: Callable[[T_contra], str],
        *,
        seconds: float | None,
        transactions: int | None,
    ) -> None:
        self._console = console
        self._line = line
        self._seconds = seconds
        self._transactions = transactions
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

    def update(self, result: T_contra) -> None:
        """Show how things stand."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done(result),
                description=self._line(result),
                refresh=True,
            )
        elif result.seconds >= self._next_line:
            self._next_line += _PLAIN_EVERY
            self._console.print(
                f"{result.seconds:.0f} s: {self._line(result)}", highlight=False, soft_wrap=True
            )

    def _done(self, result: T_contra) -> float:
        """The share of the run that is behind us."""
        shares = [0.0]
        if self._seconds is not None:
            shares.append(result.seconds / self._seconds)
        if self._transactions is not None:
            shares.append(result.transactions / self._transactions)
        return min(max(shares), 1.0)
