"""Reading ``info mtree``: text -> trees of regions.

The text shows a tree several times: below its address spaces, again as
``memory-region: NAME`` where an alias shows it, and as part of every tree that
contains it. It names alias targets by name only, and names are not unique. So:

1. Lines become sections, each a tree of nodes (`mtree_sections`).
2. Sections that show one and the same region are made one, aliases get their
   targets (`mtree_link`).
3. Nodes become regions, here.

Nothing is returned before all of it is known to be right. What the text does
not say is guessed, and every guess is reported; ``info mtree -f`` of the same
moment settles most of them (`mtree_settle`).
"""

from __future__ import annotations

import attrs

from memlistener.core.mtree import Space
from memlistener.core.mtree_lines import Guess, MtreeError
from memlistener.core.mtree_link import link
from memlistener.core.mtree_sections import Node, Section, read_sections
from memlistener.core.mtree_settle import settle, shown_names, wrongly_shown
from memlistener.core.mtree_views import ParsedViews, make_region, parse_flatviews, set_place
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError


@attrs.frozen
class ParsedMachine:
    """What ``info mtree`` said.

    Attributes:
        spaces: Name and root of each address space, in the order of the text.
        guesses: What the text did not say, and what was taken to be so.
        hidden: Regions that the text shows only because an alias that it hides
            (a disabled one, in plain ``info mtree``) shows them.
    """

    spaces: tuple[Space, ...]
    guesses: tuple[Guess, ...]
    hidden: tuple[MemoryRegion, ...] = ()


def parse_mtree(text: str, views: str | None = None) -> ParsedMachine:
    """Read the output of ``info mtree -D``, or of plain ``info mtree``.

    Printing the result with `format_tree` gives the same text, except that
    ``ramd`` becomes ``ram`` and ``container`` ``i/o``.

    Args:
        text: The output. Plain ``info mtree`` leaves out disabled regions but
            prints what is below them, so that it has to be guessed to whom that
            belongs; prefer ``-D``.
        views: Output of ``info mtree -f`` for the same machine at the same
            moment. It shows which ``i/o`` regions are containers and which
            aliases are read-only; without it both are guessed.

    Raises:
        MtreeError: ``text`` or ``views`` is something else; says where.
    """
    shown = parse_flatviews(views) if views is not None else None
    sections, guesses = read_sections(text)
    roots, link_guesses = link(sections)
    guesses += link_guesses
    containers: set[Node] = set()  # known not to show, though something of that name does
    while True:
        builder = _Builder(shown, containers)
        builder.build(roots)
        spaces = tuple((name, _region(each.root)) for each in sections for name in each.spaces)
        wrong = wrongly_shown(spaces, shown) if shown is not None else set()
        nodes = {node for root in roots for node in root.walk() if node.region in wrong}
        if nodes <= containers:
            break
        containers |= nodes
    guesses += builder.guesses()
    if shown is not None:
        guesses += settle(spaces, shown)
    return ParsedMachine(spaces, tuple(guesses), _hidden(sections))


def _hidden(sections: list[Section]) -> tuple[MemoryRegion, ...]:
    regions = (_region(each.root) for each in sections if not each.spaces)
    return tuple(each for each in regions if not each._aliases)


def _region(node: Node) -> MemoryRegion:
    region = node.canonical.region
    assert region is not None
    return region


_CONTAINER_GUESS = "'i/o' may be a container, I/O or an IOMMU: taken as a container"
_IO_GUESS = "'i/o' may be a container, I/O, an IOMMU or a ROM device out of ROMD mode: taken as I/O"
_SHOWN_GUESS = "'i/o' that shows in a view is not a container, but may be an IOMMU: taken as I/O"
_SIZE_GUESS = "sizes 0 and 1 print alike: taken as 1"
_MAPPED_GUESS = "'ramd', a device's mapped memory, is taken as RAM"
_READONLY_GUESS = "an alias may be read-only without saying so: taken as writable"
_USUAL_READONLY = ("pam-rom", "ram")  # how a PC write-protects its shadowed BIOS
_USUAL_READONLY_GUESS = "an alias of RAM that is called pam-rom is taken to be read-only"
_ORDER_GUESS = (
    "of overlapping siblings of equal priority, the one that starts last is taken to show"
)


class _Builder:
    """Makes the regions of a forest of nodes."""

    def __init__(self, shown: ParsedViews | None, containers: set[Node]) -> None:
        self._shown = shown_names(shown) if shown is not None else None
        self._containers = containers
        self._notes: dict[str, list[int]] = {}

    def guesses(self) -> list[Guess]:
        """What was guessed so far, by subject."""
        return [Guess(what, tuple(sorted(lines))) for what, lines in self._notes.items()]

    def build(self, roots: list[Node]) -> None:
        nodes = [node for root in roots for node in root.walk()]
        in_space = {root for root in roots if root.is_space}
        for node in nodes:
            node.region = None
        for node in nodes:
            if node.target is None:
                node.region = self._make(node, root_of_space=node in in_space)
        self._make_aliases([node for node in nodes if node.target is not None])
        for node in nodes:
            self._set_attributes(node)
        for root in roots:
            set_place(_region(root), root.addr, root.priority)
        for node in nodes:
            self._place_children(node)

    def _note(self, what: str, node: Node) -> None:
        self._notes.setdefault(what, []).append(node.source.number)

    # ---- regions --------------------------------------------------------------

    def _make(self, node: Node, *, root_of_space: bool) -> MemoryRegion:
        kind = node.kind
        if kind == "i/o" and not node.hidden:
            kind = self._decide(node, root_of_space)
        elif kind == "ramd":
            self._note(_MAPPED_GUESS, node)
        if node.size == 1:
            self._note(_SIZE_GUESS, node)
        return make_region(kind, node.name, node.size)

    def _decide(self, node: Node, root_of_space: bool) -> str:
        """Whether an ``i/o`` region is a container or I/O."""
        if self._shown is not None:
            if node.name not in self._shown or node in self._containers:
                return "container"  # or hidden from everywhere: the views are the same
            self._note(_SHOWN_GUESS, node)
            return "i/o"
        if _looks_like_container(node, root_of_space):
            self._note(_CONTAINER_GUESS, node)
            return "container"
        self._note(_IO_GUESS, node)
        return "i/o"

    def _make_aliases(self, aliases: list[Node]) -> None:
        """Make aliases behind what they show, which may be aliases too."""
        waiting: dict[Node, list[Node]] = {}
        ready: list[Node] = []
        for node in aliases:
            assert node.target is not None
            target = node.target.canonical
            if target.region is not None:
                ready.append(node)
            else:
                waiting.setdefault(target, []).append(node)
        while ready:
            node = ready.pop()
            assert node.target is not None
            target_region = _region(node.target)
            node.region = MemoryRegion.alias(
                node.name, target_region, offset=node.offset, size=node.size
            )
            if node.size == 1:
                self._note(_SIZE_GUESS, node)
            if self._shown is None and (node.name, node.kind) != _USUAL_READONLY:
                self._note(_READONLY_GUESS, node)
            ready += waiting.pop(node, ())
        for left in waiting.values():
            raise left[0].source.error("an alias that does not, in the end, show itself")

    def _set_attributes(self, node: Node) -> None:
        region = _region(node)
        if self._shown is None and (node.name, node.kind) == _USUAL_READONLY:
            self._note(_USUAL_READONLY_GUESS, node)
            region.set_readonly(True)
        if node.nonvolatile:
            region.set_nonvolatile(True)
        if node.disabled:
            region.set_enabled(False)

    # ---- the tree -------------------------------------------------------------

    def _place_children(self, node: Node) -> None:
        """Add the children; of equals at one address the first printed is the latest."""
        region = _region(node)
        for child in sorted(reversed(node.children), key=lambda each: each.addr):
            try:
                region.add_subregion_overlap(child.addr, _region(child), child.priority)
            except RegionError as error:
                raise MtreeError(
                    child.source.number, child.source.text, f"a region that can be here ({error})"
                ) from error
        self._note_overlaps(node)

    def _note_overlaps(self, node: Node) -> None:
        """Note siblings whose order, which the text does not give, matters."""
        ends: dict[int, tuple[int, int]] = {}  # priority -> furthest end, and its start
        for child in node.children:
            if child.disabled:
                continue
            end, start = ends.get(child.priority, (0, 0))
            if child.addr < end and child.addr != start:
                self._note(_ORDER_GUESS, child)
            ends[child.priority] = max((end, start), (child.addr + child.size, child.addr))


# What QEMU's own boards and devices use these names for.
_USUAL_CONTAINERS = {
    "bcm2835-gpu",
    "device-memory",
    "e1000e-flash",
    "gpex_ioport",
    "gpex_mmio",
    "memhp container",
    "pci0-mem",
    "pci_bridge_io",
    "pci_io",
    "pci_mem",
    "platform bus",
}
_USUAL_IO = {
    "gpex_ioport_window",
    "gpex_mmio_window",
    "pci0-io",
    "rtc",
    "unin-pci-isa-mmio",
    "vga.mmio",
}


def _looks_like_container(node: Node, root_of_space: bool) -> bool:
    """What is usual in QEMU's machines.

    What has children is mostly a container, except that the root of a space of
    a few ports answers for those that nobody has. What has none is mostly I/O,
    except where it is far too large for a device's registers.
    """
    if node.name in _USUAL_CONTAINERS or node.name in _USUAL_IO:
        return node.name in _USUAL_CONTAINERS
    if root_of_space and node.size <= 1 << 32:
        return False
    return bool(node.children) or (node.size > 1 << 32 and node.is_target)
