"""Figures for people: a table of what, how many, of which unit."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

Row = tuple[str, str, str, bool]
"""What, how many, the unit, and whether it is bad."""


def as_table(sections: Iterable[Iterable[Row]]) -> Table:
    """Sections of rows, with a line between; what is bad is red."""
    table = Table(show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how many", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for section in sections:
        for name, value, unit, bad in section:
            table.add_row(name, value, unit, style="bold red" if bad else None)
        table.add_section()
    return table


def microseconds(seconds: float) -> str:
    """A time that is short."""
    return f"{seconds * 1e6:,.1f}"


def count(number: int, what: str) -> str:
    """How many of what: ``1 page``, ``2,000 pages``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def vcpus(numbers: tuple[int, ...]) -> str:
    """Some vCPUs by their numbers: ``vCPU 1``, ``vCPUs 0, 1``."""
    return f"vCPU{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
