"""Sections of ``info mtree``: lines -> trees of nodes, one for each headline."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from memlistener.core.kinds import LIMIT
from memlistener.core.mtree_lines import Guess, Line, RegionLine, read_lines, read_tree_line
from memlistener.core.region import MemoryRegion

_SPACE = "address-space: "
_REGION = "memory-region: "
_PLAIN_GUESS = (
    "no line is marked [disabled]: if this is plain `info mtree`, disabled regions are hidden and "
    "what is below them may have been taken for part of what is printed before it"
)
_HIDDEN_GUESS = "below a disabled region that is hidden: a container stands in for it"


@attrs.define(eq=False)
class Node:
    """A region as one section prints it.

    Attributes:
        source: The line it is printed on, or for a hidden one the next.
        name: The region's.
        addr: Offset in its container.
        size: Bytes.
        kind: As printed.
        priority: As printed.
        nonvolatile: As printed.
        disabled: As printed, or known because it is hidden.
        target_name: What an alias shows, by name.
        offset: Where in its target an alias starts.
        hidden: Whether it was not printed itself.
        children: As printed: by address.
        is_space: Whether it is the root of an address space.
        is_target: Whether a section of its own shows it, since an alias does.
        canonical: The node that stands for the region; itself, or another one
            where the region is printed more than once.
        target: The root of the section that shows what an alias shows.
        region: The region, once it is made.
    """

    source: Line
    name: str
    addr: int
    size: int
    kind: str = "i/o"
    priority: int = 0
    nonvolatile: bool = False
    disabled: bool = False
    target_name: str | None = None
    offset: int = 0
    hidden: bool = False
    children: list[Node] = attrs.field(factory=list)
    is_space: bool = False
    is_target: bool = False
    canonical: Node = attrs.field(init=False)
    target: Node | None = None
    region: MemoryRegion | None = None

    def __attrs_post_init__(self) -> None:
        self.canonical = self

    def walk(self) -> Iterator[Node]:
        """This node and all below it, as printed."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)


@attrs.define(eq=False)
class Section:
    """The tree below one headline, or below those of several address spaces.

    Attributes:
        header: The last headline.
        spaces: Names of the address spaces; empty for a ``memory-region:``.
        name: Of a ``memory-region:``.
        lines: Of the tree.
    """

    header: Line
    spaces: list[str]
    name: str
    lines: list[RegionLine] = attrs.field(factory=list)
    root: Node = attrs.field(init=False)


def read_sections(text: str) -> tuple[list[Section], list[Guess]]:
    """The sections of a text, each with its tree.

    Raises:
        MtreeError: A line does not belong there.
    """
    sections: list[Section] = []
    for line in read_lines(text):
        if line.text.startswith(_SPACE):
            name = line.text.removeprefix(_SPACE)
            # Address spaces with one root share a tree: it follows the last.
            if sections and sections[-1].spaces and sections[-1].header.number == line.number - 1:
                sections[-1].spaces.append(name)
                sections[-1].header = line
            else:
                sections.append(Section(line, [name], ""))
        elif line.text.startswith(_REGION):
            sections.append(Section(line, [], line.text.removeprefix(_REGION)))
        elif not sections:
            raise line.error("'address-space: name'")
        else:
            sections[-1].lines.append(read_tree_line(line))
    if not sections:
        raise Line(1, "").error("'address-space: name'")
    # One marked region shows that the text is `info mtree -D`, which hides nothing.
    marked = any(line.disabled for section in sections for line in section.lines)
    hidden = [number for section in sections for number in _grow(section, marked)]
    return sections, _guesses(marked, hidden)


def _guesses(marked: bool, hidden: list[int]) -> list[Guess]:
    guesses = [] if marked else [Guess(_PLAIN_GUESS)]
    if hidden:
        guesses.append(Guess(_HIDDEN_GUESS, tuple(hidden)))
    return guesses


def _grow(section: Section, marked: bool) -> list[int]:
    """Make the section's tree; the numbers of lines below something hidden."""
    hidden: list[int] = []
    path: list[Node] = []  # from the root to the node printed last
    bases: list[int] = []  # their absolute addresses
    for line in section.lines:
        level = line.level
        if level == 1 and path:
            raise line.source.error(
                f"one root below {section.header.text!r}, or a line that is indented further"
            )
        del path[level - 1 :], bases[level - 1 :]
        if path and not marked and not _can_hold(path[-1], bases[-1], line):
            path.pop()
            bases.pop()
        if path and path[-1].target_name is not None:
            raise line.source.error("nothing below an alias")
        if len(path) < level - 1:
            if marked:
                raise line.source.error(f"at most {2 * len(path) + 2} spaces")
            hidden.append(line.source.number)
        while len(path) < level - 1:
            _attach(path, bases, _stand_in(section, line, path, bases), line.start)
        base = bases[-1] if bases else 0
        node = Node(
            line.source,
            line.name,
            (line.start - base) % LIMIT,
            line.size,
            line.kind,
            line.priority,
            line.nonvolatile,
            line.disabled,
            line.target,
            line.offset,
        )
        _attach(path, bases, node, line.start)
        if level == 1:
            _check_root(section, line)
    if not path:  # the root is hidden, and has nothing below it
        if marked:
            raise section.header.error("a root to follow")
        path.append(_stand_in(section, None, path, bases))
        hidden.append(section.header.number)
    section.root = path[0]
    return hidden


def _attach(path: list[Node], bases: list[int], node: Node, start: int) -> None:
    if path:
        path[-1].children.append(node)
    path.append(node)
    bases.append(start)


def _check_root(section: Section, line: RegionLine) -> None:
    if not section.spaces and line.name != section.name:
        raise line.source.error(f"{section.name!r}, as the headline says")


def _can_hold(node: Node, base: int, line: RegionLine) -> bool:
    """Whether a line one level deeper can be a child of the node before it.

    It cannot where that node is an alias, and hardly where none of it is within
    that node: then a disabled region between the two is hidden.
    """
    if node.hidden:
        return True
    if node.target_name is not None:
        return False
    return line.start < base + node.size and base < line.start + line.size


def _stand_in(
    section: Section, line: RegionLine | None, path: list[Node], bases: list[int]
) -> Node:
    """A disabled container in the place of a hidden region."""
    name = section.name if not path else "(hidden)"
    if line is None:
        return Node(section.header, name, 0, LIMIT, disabled=True, hidden=True)
    start = 0 if not path else line.start
    base = bases[-1] if bases else 0
    size = line.size if path else LIMIT
    addr = (start - base) % LIMIT
    return Node(line.source, name, addr, size, disabled=True, hidden=True)
