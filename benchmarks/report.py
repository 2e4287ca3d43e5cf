"""The figures as a table for people, and as JSON."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import attrs

from benchmarks.measure import Figure

_COLUMNS = ("what", "n", "median", "p99", "bar", "ratio", "")
_MARKS = {True: "pass", False: "MISS", None: ""}


def machine() -> dict[str, str]:
    """What the figures were taken on; the load says how much to trust them."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": str(os.cpu_count()),
        "load": " ".join(f"{each:.1f}" for each in os.getloadavg()),
    }


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """The cells of the table, a row for each figure."""
    return [
        (
            each.what,
            "" if each.n is None else f"{each.n:,}",
            _amount(each.median, each.unit),
            "" if each.p99 is None else _amount(each.p99, each.unit),
            "" if each.bar is None else _amount(each.bar, each.unit),
            "" if each.ratio is None else f"{each.ratio:.2f}",
            _MARKS[each.passed],
        )
        for each in figures
    ]


def print_group(group: str, figures: Sequence[Figure], out: TextIO | None = None) -> None:
    """Print a table: with rich where that is installed, else plainly."""
    out = out or sys.stdout
    try:
        _print_rich(group, figures, out)
    except ImportError:
        _print_plain(group, figures, out)
    for each in dict.fromkeys(f"{each.what}: {each.note}" for each in figures if each.note):
        print(f"  {each}", file=out)
    print(file=out, flush=True)


def write_json(path: str, groups: Mapping[str, Sequence[Figure]]) -> None:
    """Write all figures, by group, with the machine."""
    content = {
        "machine": machine(),
        "figures": {
            group: [
                {**attrs.asdict(each), "ratio": each.ratio, "passed": each.passed}
                for each in figures
            ]
            for group, figures in groups.items()
        },
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def _amount(value: float, unit: str) -> str:
    if not unit:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _print_rich(group: str, figures: Sequence[Figure], out: TextIO) -> None:
    # Not imported by name: it is an extra, and the types are not needed.
    console: Any = importlib.import_module("rich.console").Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = 120
    table: Any = importlib.import_module("rich.table").Table(title=group, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("what", "") else "right")
    styles = {True: "green", False: "bold red", None: ""}
    for each, cells in zip(figures, rows(figures), strict=True):
        *rest, mark = cells
        style = styles[each.passed]
        table.add_row(*rest, f"[{style}]{mark}[/]" if style else mark)
    console.print(table)


def _print_plain(group: str, figures: Sequence[Figure], out: TextIO) -> None:
    lines = [_COLUMNS, *rows(figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    print(group, file=out)
    for line in lines:
        first, *others = (
            cell.rjust(width) if 0 < column < len(line) - 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join((first, *others)).rstrip(), file=out)
