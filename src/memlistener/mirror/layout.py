"""How the guest's RAM is mapped, and the changes that transactions make to that.

The part of the RAM that moves is mapped in one to three pieces, each a memslot, that
together show all of it in one stretch: at `WINDOW`, or up to `Geometry.slide` pages
below. A device may cover one page of the window, which makes two slots of one.

So a change alters which slot an offset in the RAM belongs to, where in the slot it
is, and at which guest address it is written: all that dirty bits are counted by.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs, RamBlock
from memlistener.mirror.guest import FIXED_SIZE, PAGE, REGISTERS, WINDOW, Geometry

_CUTS = 2  # at most, so there are three pieces


@attrs.frozen
class Layout:
    """How the RAM is mapped, as a value. In pages.

    Attributes:
        slide: How far below the window it begins.
        cuts: Where in it a piece ends and the next begins, ascending.
        device: The page of the window that a device covers, if one does.
    """

    slide: int = 0
    cuts: tuple[int, ...] = ()
    device: int | None = None

    def move(self, rng: random.Random, geometry: Geometry) -> Layout:
        """Slide."""
        return attrs.evolve(self, slide=rng.randint(0, geometry.slide))

    def split(self, rng: random.Random, geometry: Geometry) -> Layout:
        """One piece becomes two, if there may be so many."""
        if len(self.cuts) == _CUTS:
            return self
        return self._with_cut(self.cuts, rng, geometry)

    def merge(self, rng: random.Random, geometry: Geometry) -> Layout:
        """Two pieces become one, if there are two."""
        return attrs.evolve(self, cuts=self._without_cut(rng)) if self.cuts else self

    def resize(self, rng: random.Random, geometry: Geometry) -> Layout:
        """A piece becomes smaller, and its neighbour larger, if there are two."""
        return self._with_cut(self._without_cut(rng), rng, geometry) if self.cuts else self

    def toggle(self, rng: random.Random, geometry: Geometry) -> Layout:
        """The device comes, or goes."""
        return attrs.evolve(
            self, device=rng.randrange(geometry.window) if self.device is None else None
        )

    def changed(self, rng: random.Random, geometry: Geometry) -> Layout:
        """Another layout, by one to three kinds of change."""
        found = self
        while found == self:
            for change in rng.sample(CHANGES, rng.randint(1, 3)):
                found = change(found, rng, geometry)
        return found

    def _without_cut(self, rng: random.Random) -> tuple[int, ...]:
        gone = rng.choice(self.cuts)
        return tuple(cut for cut in self.cuts if cut != gone)

    def _with_cut(self, cuts: tuple[int, ...], rng: random.Random, geometry: Geometry) -> Layout:
        cut = rng.randrange(1, geometry.moving)
        return attrs.evolve(self, cuts=tuple(sorted({*cuts, cut})))


CHANGES: tuple[Callable[[Layout, random.Random, Geometry], Layout], ...] = (
    Layout.move,
    Layout.split,
    Layout.merge,
    Layout.resize,
    Layout.toggle,
)


class RamMap:
    """The regions that show a layout; they are made once, and changed.

    Args:
        system: Where they are mapped; must not be live yet.
        ram: The RAM.
        geometry: How large it is.
    """

    def __init__(self, system: MemoryRegion, ram: MemoryRegion, geometry: Geometry) -> None:
        self._geometry = geometry
        system.add_subregion(0, MemoryRegion.alias("fixed", ram, offset=0, size=FIXED_SIZE))
        self._pieces = []
        for number in range(_CUTS + 1):
            piece = MemoryRegion.alias(f"piece {number}", ram, offset=FIXED_SIZE, size=PAGE)
            piece.set_unmergeable(True)  # or what is cut would be merged again
            # They overlap only while a transaction changes one after the other.
            system.add_subregion_overlap(WINDOW, piece, 0)
            self._pieces.append(piece)
        self._device = MemoryRegion.io("device", PAGE, Registers(ram.block))
        system.add_subregion_overlap(WINDOW, self._device, 1)
        self.show(Layout())

    def show(self, layout: Layout) -> None:
        """Map the RAM so. Inside a transaction."""
        base = WINDOW - layout.slide * PAGE
        bounds = [0, *layout.cuts, self._geometry.moving]
        for number, piece in enumerate(self._pieces):
            piece.set_enabled(number + 1 < len(bounds))
            if piece.enabled:
                first, end = bounds[number : number + 2]
                piece.set_alias_offset(FIXED_SIZE + first * PAGE)
                piece.set_size((end - first) * PAGE)
                piece.set_address(base + first * PAGE)
        self._device.set_enabled(layout.device is not None)
        if layout.device is not None:
            self._device.set_address(WINDOW + layout.device * PAGE)


class Registers(MemoryRegionOps):
    """A device that keeps its registers in the guest's RAM.

    Nobody else knows that it writes there, so it says so. Its vCPU's thread does
    both, while the memory may be being copied: hence first the write, then the mark.
    """

    thread_safe = True  # an access is one copy, and no two vCPUs store to one word

    def __init__(self, block: RamBlock) -> None:
        self._block = block
        self._memory = block.view[REGISTERS : REGISTERS + PAGE]

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        """See `MemoryRegionOps`."""
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """See `MemoryRegionOps`."""
        self._memory[offset : offset + size] = value.to_bytes(size, "little")
        self._block.mark_dirty(REGISTERS + offset, size)
