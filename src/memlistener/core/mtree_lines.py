"""The lines of ``info mtree``, one at a time: text -> frozen values, or an error.

What the lines mean together is in `mtree_parse` (trees) and `mtree_views`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from memlistener.core.kinds import LIMIT
from memlistener.core.mtree import NO_RANGES, NO_ROOT, OVERFLOW, ViewSpace
from memlistener.errors import MemlistenerError

_MASK = LIMIT - 1
_HEX = "[0-9a-f]{16}"
_REGION = re.compile(
    rf"(?P<indent> *)(?P<start>{_HEX})-(?P<last>{_HEX}) "
    r"\(prio (?P<priority>-?[0-9]+), (?P<nonvolatile>nv-)?(?P<kind>[^ ,()]+)\): (?P<rest>.*)",
    re.DOTALL,
)
_ALIAS = re.compile(
    rf"alias (?P<name>.*) @(?P<target>.*) (?P<start>{_HEX})-(?P<last>{_HEX})", re.DOTALL
)
_OFFSET = re.compile(rf"(?P<name>.*) @(?P<offset>{_HEX})", re.DOTALL)
_SPACE = re.compile(r' AS "(?P<name>.*)", root: (?P<root>.*)', re.DOTALL)
_DISABLED = " [disabled]"
_ACCELERATORS = (" KVM", " HVF", " WHPX", " NVMM")
_ROOT = " Root memory region: "
# "container" is what QEMU prints since version 10 where it used to say "i/o".
_KINDS = ("ram", "rom", "romd", "ramd", "i/o", "container")


class MtreeError(MemlistenerError, ValueError):
    """A text that is not ``info mtree`` output.

    Attributes:
        number: Of the line, counted from 1.
        line: The line.
        expected: What would have been right there.
    """

    def __init__(self, number: int, line: str, expected: str) -> None:
        super().__init__(number, line, expected)
        self.number = number
        self.line = line
        self.expected = expected

    def __str__(self) -> str:
        return f"line {self.number}: expected {self.expected}, not {self.line!r}"


@attrs.frozen
class Guess:
    """Something the text does not say, and what was taken to be so.

    Attributes:
        what: For people: what is not known, and what was assumed.
        lines: Numbers of the lines it concerns; none for the text as a whole.
    """

    what: str
    lines: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.lines:
            return self.what
        shown = ", ".join(map(str, self.lines[:8]))
        more = f" and {len(self.lines) - 8} more" if len(self.lines) > 8 else ""
        return f"line{'s' if len(self.lines) > 1 else ''} {shown}{more}: {self.what}"


@attrs.frozen
class Line:
    """A line of the text; numbers count from 1."""

    number: int
    text: str

    def error(self, expected: str) -> MtreeError:
        """An error that shows this line."""
        return MtreeError(self.number, self.text, expected)


@attrs.frozen
class RegionLine:
    """A line that shows a region in a tree, or a range in a view.

    Attributes:
        source: The line.
        level: Of indentation; the root of a section has 1.
        start: First address, modulo 2**64.
        size: Bytes, 1 to 2**64; what has size 0 reads as 1.
        priority: Signed.
        kind: As printed: see `printed_kind`; also ``ramd`` and ``container``.
        nonvolatile: Whether it is marked ``nv-``.
        name: The region's.
        target: What an alias shows, by name; None for other regions.
        offset: Of an alias in its target, or of a range in its region.
        disabled: Whether it is marked so.
    """

    source: Line
    level: int
    start: int
    size: int
    priority: int
    kind: str
    nonvolatile: bool
    name: str
    target: str | None = None
    offset: int = 0
    disabled: bool = False


def read_lines(text: str) -> Iterator[Line]:
    """The lines that say something: not empty, not a monitor's prompt."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line and not line.startswith("(qemu)"):
            yield Line(number, line)


def is_flatviews(text: str) -> bool:
    """Whether ``text`` starts as ``info mtree -f`` does."""
    first = next(read_lines(text), None)
    return first is not None and first.text.startswith("FlatView #")


def read_tree_line(line: Line) -> RegionLine:
    """A line of a tree.

    Raises:
        MtreeError: It is none.
    """
    found, rest = _read_region(line)
    disabled = rest.endswith(_DISABLED)
    rest = rest.removesuffix(_DISABLED)
    alias = _ALIAS.fullmatch(rest)
    if alias is None:
        return attrs.evolve(found, name=rest, disabled=disabled)
    offset = int(alias["start"], 16)
    if (int(alias["last"], 16) - offset) & _MASK != found.size - 1:
        raise line.error(f"an alias that shows as much of its target as its size, {found.size:#x}")
    return attrs.evolve(
        found, name=alias["name"], target=alias["target"], offset=offset, disabled=disabled
    )


def read_range_line(line: Line) -> RegionLine:
    """A line of a view: a range.

    Raises:
        MtreeError: It is none, or reaches past 2**64.
    """
    found, rest = _read_region(line)
    if found.start + found.size > LIMIT:
        raise line.error("a last address that is not below the first")
    if found.kind == "container":
        raise line.error("a kind that shows in a view, which a container does not")
    for accelerator in _ACCELERATORS:  # who has it mapped, as some builds say
        rest = rest.removesuffix(accelerator)
    offset = _OFFSET.fullmatch(rest)
    if offset is None:
        return attrs.evolve(found, name=rest)
    return attrs.evolve(found, name=offset["name"], offset=int(offset["offset"], 16))


def _read_region(line: Line) -> tuple[RegionLine, str]:
    """What trees and views have in common, and the rest of the line."""
    match = _REGION.fullmatch(line.text.removeprefix(OVERFLOW))
    if match is None or len(match["indent"]) % 2 or not match["indent"]:
        raise line.error("'  first-last (prio N, kind): name', indented by two spaces a level")
    if match["kind"] not in _KINDS:
        raise line.error(f"a kind that is one of {', '.join(_KINDS)}")
    start = int(match["start"], 16)
    found = RegionLine(
        source=line,
        level=len(match["indent"]) // 2,
        start=start,
        size=((int(match["last"], 16) - start) & _MASK) + 1,
        priority=int(match["priority"]),
        kind=match["kind"],
        nonvolatile=match["nonvolatile"] is not None,
        name="",
    )
    return found, match["rest"]


def read_space_line(line: Line) -> ViewSpace | None:
    """A line that says ``AS "name", root: name``; None for another."""
    match = _SPACE.fullmatch(line.text)
    if match is None:
        return None
    root, alias, target = match["root"].rpartition(", alias ")
    return ViewSpace(match["name"], root, target) if alias else ViewSpace(match["name"], target)


def read_root_line(line: Line) -> str | None:
    """The name of a view's root; None where it has none.

    Raises:
        MtreeError: The line says something else.
    """
    if not line.text.startswith(_ROOT):
        raise line.error("""' AS "name", root: name' or ' Root memory region: name'""")
    name = line.text.removeprefix(_ROOT)
    return None if name == NO_ROOT else name


def is_empty_view_line(line: Line) -> bool:
    """Whether the line says that there are no ranges."""
    return line.text.strip() == NO_RANGES
