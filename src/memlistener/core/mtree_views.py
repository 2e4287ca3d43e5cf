"""Reading ``info mtree -f``: text -> views.

A view says which regions show and where, not how large they are, which ranges
of one name are of one region, or how the tree is made. The regions made here
are as large as what is seen of them. Ranges of one name, kind and priority are
taken to be of one region while no two of them show the same offset.
"""

from __future__ import annotations

import attrs

from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.kinds import LIMIT, NONVOLATILE, READONLY, ROMD_MODE
from memlistener.core.mtree import ViewDump, ViewSpace
from memlistener.core.mtree_lines import (
    Guess,
    Line,
    RegionLine,
    is_empty_view_line,
    read_lines,
    read_range_line,
    read_root_line,
    read_space_line,
)
from memlistener.core.region import MemoryRegion


@attrs.frozen
class ParsedViews:
    """What ``info mtree -f`` said.

    Attributes:
        views: In the order of the text.
        guesses: What it did not say.
    """

    views: tuple[ViewDump, ...]
    guesses: tuple[Guess, ...]


@attrs.define(eq=False)
class _Section:
    header: Line
    spaces: list[ViewSpace] = attrs.field(factory=list)
    root: str | None = None
    has_root: bool = False
    ranges: list[RegionLine] = attrs.field(factory=list)


def parse_flatviews(text: str) -> ParsedViews:
    """Read the output of ``info mtree -f``.

    Printing the result with `format_views` gives the same text (but for notes
    of which accelerator has a range mapped, which are dropped).

    Raises:
        MtreeError: The text is something else; says where.
    """
    sections = _sections(text)
    views = tuple(ViewDump(tuple(each.spaces), each.root, _view(each.ranges)) for each in sections)
    guesses = [
        Guess("a view does not say how large regions are: each is as large as what is seen of it"),
        Guess("ranges of one name, kind and priority are of one region, unless offsets repeat"),
        Guess("'i/o' may be an IOMMU or a ROM device out of ROMD mode: taken as I/O"),
        Guess("'rom' may be anything seen as read-only: taken as ROM"),
    ]
    mapped = tuple(
        line.source.number for each in sections for line in each.ranges if line.kind == "ramd"
    )
    if mapped:
        guesses.append(Guess("'ramd', a device's mapped memory, is taken as RAM", mapped))
    return ParsedViews(views, tuple(guesses))


def _sections(text: str) -> list[_Section]:
    sections: list[_Section] = []
    for line in read_lines(text):
        if line.text.startswith("FlatView #"):
            _check_whole(sections)
            sections.append(_Section(line))
        elif not sections:
            raise line.error("'FlatView #0'")
        else:
            _read_into(sections[-1], line)
    if not sections:
        raise Line(1, "").error("'FlatView #0'")
    _check_whole(sections)
    return sections


def _check_whole(sections: list[_Section]) -> None:
    if sections and not sections[-1].has_root:
        raise sections[-1].header.error("' Root memory region: name' to follow")


def _read_into(section: _Section, line: Line) -> None:
    if not section.has_root:
        space = read_space_line(line)
        if space is not None:
            section.spaces.append(space)
        else:
            section.root = read_root_line(line)
            section.has_root = True
    elif not is_empty_view_line(line):
        found = read_range_line(line)
        if section.ranges and section.ranges[-1].start + section.ranges[-1].size > found.start:
            raise line.error("a range that starts after the one before it ends")
        section.ranges.append(found)


def _view(lines: list[RegionLine]) -> FlatView:
    """A view of regions that are made for it."""
    seen: dict[tuple[str, str, int], list[list[RegionLine]]] = {}
    for line in lines:
        groups = seen.setdefault((line.name, line.kind, line.priority), [])
        for group in groups:
            if not any(_same_bytes(line, other) for other in group):
                group.append(line)
                break
        else:
            groups.append([line])
    ranges: list[FlatRange] = []
    for groups in seen.values():
        for group in groups:
            region = _region(group)
            ranges += [_range(line, region) for line in group]
    return FlatView(sorted(ranges, key=lambda each: each.start))


def _same_bytes(one: RegionLine, two: RegionLine) -> bool:
    return one.offset < two.offset + two.size and two.offset < one.offset + one.size


def _region(lines: list[RegionLine]) -> MemoryRegion:
    """The region that ``lines`` show pieces of."""
    first = lines[0]
    size = max(line.offset + line.size for line in lines)
    if size > LIMIT:
        raise first.source.error("offset and size that stay below 2**64")
    region = make_region(first.kind, first.name, size)
    set_place(region, 0, first.priority)
    return region


def _range(line: RegionLine, region: MemoryRegion) -> FlatRange:
    flags = ROMD_MODE
    flags |= READONLY if line.kind == "rom" else 0
    flags |= NONVOLATILE if line.nonvolatile else 0
    return FlatRange(line.start, line.size, region, line.offset, flags)


def make_region(kind: str, name: str, size: int) -> MemoryRegion:
    """A region of the kind that the text names; ``i/o`` is I/O, without ops."""
    if kind in ("ram", "ramd"):
        return MemoryRegion.ram(name, size)
    if kind == "rom":
        return MemoryRegion.rom(name, size)
    if kind == "romd":
        return MemoryRegion.rom_device(name, size, None)
    if kind == "container":
        return MemoryRegion.container(name, size)
    return MemoryRegion.io(name, size, None)


def set_place(region: MemoryRegion, addr: int, priority: int) -> None:
    """Give a region that is in no container an address and a priority all the same."""
    holder = MemoryRegion.container("", LIMIT)
    holder.add_subregion_overlap(addr, region, priority)
    holder.del_subregion(region)
