"""Compare a view, or what a listener heard, with a literal that a person can read.

    assert_flatview(space.view, '''
        [0x0, 0xa0000) ram 'lomem' +0x0
        [0xa0000, 0xa8000) ram 'vram' +0x10000
    ''')

A literal is compared by meaning, line by line: indentation, blank lines,
comments behind ``#``, upper or lower case hex, leading zeroes and ``_`` in
numbers do not count. Where it differs, the error shows both, with ``+`` before
lines that are there and were not expected, and ``-`` before those that are
missing; ``got`` can be pasted into the test as it stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from memlistener.core.flatview import FlatView
from memlistener.core.region import MemoryRegion
from memlistener.testing.recording import RecordingListener

_NUMBER = re.compile(r"\b(?:0x[0-9a-fA-F_]+|\d[\d_]*)\b")
# A name: in quotes, as views print it, or between a range and an offset, as traces do.
_NAME = re.compile(
    r"'[^']*'|\"[^\"]*\""
    r"|(?<=\) )[^\s'\"](?:[^'\"]*?[^\s'\"])??(?=\+(?:0x[0-9a-fA-F_]+|\d[\d_]*)(?:\s|$))"
)


def assert_flatview(view: FlatView | MemoryRegion, expected: str) -> None:
    """Assert that a view shows exactly these ranges.

    Args:
        view: The view; or a root region, which is rendered.
        expected: One range a line, as ``str(view)`` prints it.

    Raises:
        AssertionError: It shows something else; the message shows the difference.
    """
    if isinstance(view, MemoryRegion):
        view = FlatView.render(view)
    _compare("the flat view", str(view).splitlines(), expected)


def assert_trace(heard: RecordingListener | Iterable[object], expected: str) -> None:
    """Assert that a listener heard exactly this, in this order.

    Args:
        heard: A `RecordingListener`, or what it heard.
        expected: One call a line: ``begin``, ``region_add [0x0, 0x1000) ram+0x0``.

    Raises:
        AssertionError: It heard something else; the message shows the difference.
    """
    calls = heard.heard if isinstance(heard, RecordingListener) else heard
    _compare("the trace", [str(each) for each in calls], expected)


def _compare(what: str, got: list[str], expected: str) -> None:
    wanted = [line for line in map(_stripped, expected.splitlines()) if line]
    if [_normal(line) for line in got] == [_normal(line) for line in wanted]:
        return
    # Lines that mean the same are shown the same, so that only real differences show.
    shown = {_normal(line): line for line in got}
    wanted = [shown.get(_normal(line), line) for line in wanted]
    lines = "\n".join(difflib.ndiff(wanted, got))
    plain = "\n".join(got) or "(nothing)"
    raise AssertionError(f"{what} is not as expected:\n{lines}\n\ngot:\n{plain}")


def _stripped(line: str) -> str:
    """Without a comment (but a ``#`` in a name is none) and without indentation."""
    names = [match.span() for match in _NAME.finditer(line)]
    for at, char in enumerate(line):
        if char == "#" and not any(low < at < high for low, high in names):
            line = line[:at]
            break
    return line.strip()


def _normal(line: str) -> str:
    """A line by meaning: numbers by value, white space folded, names as they are."""
    parts = []
    at = 0
    for name in _NAME.finditer(line):
        parts += [_normal_part(line[at : name.start()]), name.group()]
        at = name.end()
    return "".join([*parts, _normal_part(line[at:])]).strip()


def _normal_part(text: str) -> str:
    text = " ".join(text.split(" ")) if not text.strip() else re.sub(r"\s+", " ", text)
    return _NUMBER.sub(lambda number: _value(number.group()), text)


def _value(number: str) -> str:
    digits = number.replace("_", "")
    return hex(int(digits, 16) if digits.lower().startswith("0x") else int(digits))
