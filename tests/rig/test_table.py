from __future__ import annotations

import io

from rich.console import Console

from memlistener.rig.table import as_table, count, microseconds, vcpus


def test_bad_rows_are_red_and_the_others_are_not() -> None:
    """What went wrong is to be seen at a glance."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="standard", width=80)
    console.print(as_table([[("good", "1", "page", False)], [("bad", "2", "pages", True)]]))
    red = [line for line in output.getvalue().splitlines() if "\x1b[1;31m" in line]
    assert len(red) == 1
    assert "bad" in red[0]


def test_sections_are_apart() -> None:
    """A line between two of them, beside the two around all."""
    output = io.StringIO()
    row = ("rounds", "7", "", False)
    Console(file=output, width=80).print(as_table([[row], [row, row]]))
    assert [line.startswith("│") for line in output.getvalue().splitlines()] == [
        *(False, True, False, True, True, False)
    ]


def test_words_for_figures() -> None:
    """Thousands are separated; one is singular; times are in microseconds."""
    assert microseconds(0.0123456) == "12,345.6"
    assert [count(number, "page") for number in (0, 1, 2000)] == [
        "0 pages",
        "1 page",
        "2,000 pages",
    ]
    assert vcpus((1,)) == "vCPU 1"
    assert vcpus((0, 2)) == "vCPUs 0, 2"
