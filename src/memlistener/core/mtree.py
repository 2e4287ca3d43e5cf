"""Printing: trees and views in the format of QEMU's ``info mtree``.

`format_tree` prints what ``info mtree`` prints (with ``disabled=True`` what
``info mtree -D`` prints), `format_flatviews` what ``info mtree -f`` prints.
`memlistener.core.mtree_parse` and `memlistener.core.mtree_views` read them back.

The format, as QEMU's output shows it:

* ``address-space: NAME``, one line for each address space over one root, then
  the tree, then an empty line. After these, ``memory-region: NAME`` and its
  tree for everything that an alias shows, in the order in which the printed
  lines mention it first.
* A line of a tree is indented by two spaces a level and says
  ``first-last (prio N, kind): name``, addresses being absolute within the
  section and inclusive; for an alias ``alias name @target first-last``, the
  latter being offsets in the target. Siblings are sorted by address, then by
  descending priority, then the later-added first.
* The kind is the region's, or for an alias its target's: see `printed_kind`.
* Without ``disabled`` a disabled region's own line is left out, but what is
  below it is printed all the same, at its own level.

Addresses are 64 bits wide in the text. One that is larger is printed modulo
2**64 behind the mark ``[DETECTED OVERFLOW!]``.

Names are printed as they are: nothing in the format escapes a line break.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import attrs

from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.kinds import LIMIT, RegionKind
from memlistener.core.region import MemoryRegion
from memlistener.core.sharing import view_root

Space: TypeAlias = tuple[str, MemoryRegion]
"""An address space as the printer needs it: its name and its root."""

OVERFLOW = "[DETECTED OVERFLOW!] "
NO_ROOT = "(none)"
NO_RANGES = "No rendered FlatView"
_MASK = LIMIT - 1


# ---- info mtree ---------------------------------------------------------------


def format_tree(spaces: Iterable[Space], *, disabled: bool = False) -> str:
    """The trees as ``info mtree`` prints them.

    Args:
        spaces: Name and root of each address space. Those with one and the same
            root are printed together, sorted by name, where the first of them
            stands.
        disabled: Whether to print disabled regions too, marked ``[disabled]``
            (``info mtree -D``). Only this form can be read back reliably.
    """
    names: dict[MemoryRegion, list[str]] = {}
    for name, root in spaces:
        names.setdefault(root, []).append(name)
    queue = _Queue()
    out: list[str] = []
    for root, its_names in names.items():
        out += [f"address-space: {name}" for name in sorted(its_names)]
        out += [*_tree_lines(root, queue, disabled), ""]
    for region in queue:  # which grows: printing one alias target may find another
        out.append(f"memory-region: {region.name}")
        out += [*_tree_lines(region, queue, disabled), ""]
    return "".join(f"{line}\n" for line in out)


class _Queue:
    """Alias targets, each once, in the order they were met; grows while it is walked."""

    def __init__(self) -> None:
        self._regions: list[MemoryRegion] = []
        self._seen: set[MemoryRegion] = set()

    def add(self, region: MemoryRegion) -> None:
        if region not in self._seen:
            self._seen.add(region)
            self._regions.append(region)

    def __iter__(self) -> Iterator[MemoryRegion]:
        return iter(self._regions)


def _tree_lines(root: MemoryRegion, queue: _Queue, disabled: bool) -> Iterator[str]:
    """One section's lines; the targets of its aliases go into ``queue``."""
    stack = [(root, 1, 0)]
    while stack:
        region, level, base = stack.pop()
        if region.alias_target is not None:
            queue.add(region.alias_target)
        if region.enabled or disabled:
            yield _tree_line(region, level, base)
        start = (base + region.addr) & _MASK
        children = sorted(region.subregions, key=lambda each: (each.addr, -each.priority))
        stack += [(child, level + 1, start) for child in reversed(children)]


def _tree_line(region: MemoryRegion, level: int, base: int) -> str:
    start = base + region.addr
    overflow = OVERFLOW if start + region.size > LIMIT else ""
    line = f"{overflow}{'  ' * level}{_span(start, region.size)} {_nature(region)}: "
    if region.alias_target is not None:
        line += (
            f"alias {region.name} @{region.alias_target.name} "
            f"{_span(region.alias_offset, region.size)}"
        )
    else:
        line += region.name
    return line if region.enabled else f"{line} [disabled]"


def _nature(region: MemoryRegion) -> str:
    nonvolatile = "nv-" if region.nonvolatile else ""
    return f"(prio {region.priority}, {nonvolatile}{printed_kind(region)})"


def _span(start: int, size: int) -> str:
    return f"{start & _MASK:016x}-{(start + size - 1) & _MASK:016x}"


def printed_kind(region: MemoryRegion) -> str:
    """QEMU's word for a region: ``ram``, ``rom``, ``romd`` or ``i/o``.

    RAM that is read-only is ``rom``, a ROM device in ROMD mode ``romd``, an
    alias what its target is; containers and all others are ``i/o``.
    """
    while region.alias_target is not None:
        region = region.alias_target
    if region.kind in (RegionKind.RAM, RegionKind.ROM):
        return "rom" if region.readonly else "ram"
    if region.kind is RegionKind.ROM_DEVICE and region.romd_mode:
        return "romd"
    return "i/o"


# ---- info mtree -f --------------------------------------------------------------


@attrs.frozen
class ViewSpace:
    """An address space, as a line of ``info mtree -f`` names it.

    Attributes:
        name: Its name.
        root: Its root region's name.
        alias: What the root is an alias of, by name; None where it is none.
    """

    name: str
    root: str
    alias: str | None = None


@attrs.frozen
class ViewDump:
    """One view and the address spaces that share it: a ``FlatView #n``.

    Attributes:
        spaces: Who shares it.
        root: Name of the region that the roots reduce to; None if to nothing.
        view: What they show.
    """

    spaces: tuple[ViewSpace, ...]
    root: str | None
    view: FlatView


def format_flatviews(spaces: Iterable[Space]) -> str:
    """What the address spaces show, as ``info mtree -f`` prints it.

    Those whose roots reduce to one region share a view (rule F7), which stands
    where the first of them does. Ranges print the kind ``rom`` when anything on
    the way to them is read-only.
    """
    return format_views(render_views(spaces))


def render_views(spaces: Iterable[Space]) -> list[ViewDump]:
    """Render each address space, those that share a view once."""
    groups: dict[MemoryRegion | None, list[ViewSpace]] = {}
    for name, root in spaces:
        target = root.alias_target
        entry = ViewSpace(name, root.name, target.name if target is not None else None)
        groups.setdefault(view_root(root), []).append(entry)
    return [
        ViewDump(
            tuple(entries),
            root.name if root is not None else None,
            FlatView.render(root) if root is not None else FlatView(),
        )
        for root, entries in groups.items()
    ]


def format_views(views: Iterable[ViewDump]) -> str:
    """Views, rendered or read, in the format of ``info mtree -f``."""
    out: list[str] = []
    for number, each in enumerate(views):
        out.append(f"FlatView #{number}")
        for space in each.spaces:
            alias = f", alias {space.alias}" if space.alias is not None else ""
            out.append(f' AS "{space.name}", root: {space.root}{alias}')
        out.append(f" Root memory region: {NO_ROOT if each.root is None else each.root}")
        out += [_range_line(item) for item in each.view] or [f"  {NO_RANGES}"]
        out.append("")
    return "".join(f"{line}\n" for line in out)


def range_kind(each: FlatRange) -> str:
    """QEMU's word for a range: the region's, but ``rom`` if it is read-only there."""
    return "rom" if each.readonly else printed_kind(each.region)


def _range_line(each: FlatRange) -> str:
    nonvolatile = "nv-" if each.nonvolatile else ""
    offset = f" @{each.offset:016x}" if each.offset else ""
    return (
        f"  {_span(each.start, each.size)} (prio {each.region.priority}, "
        f"{nonvolatile}{range_kind(each)}): {each.region.name}{offset}"
    )
