"""The memory maps that are measured, each with the region in it that changes."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memlistener import MemoryRegion

PAGE = 0x1000
STEP = 2 * PAGE  # from one region of a flat map to the next: they do not touch

Change = Callable[[], None]


@attrs.frozen
class Map:
    """A tree, and one region of it.

    Attributes:
        root: The tree.
        region: What changes. It is of `PAGE` bytes and has a free page behind it.
        free: Where in its container there is room for it, far from where it is.
    """

    root: MemoryRegion
    region: MemoryRegion
    free: int

    def changes(self) -> dict[str, tuple[Change, Change]]:
        """What can be done to the region by name, and how it is taken back."""
        region, home = self.region, self.region.addr
        return {
            "toggle": (lambda: region.set_enabled(False), lambda: region.set_enabled(True)),
            "move": (lambda: region.set_address(self.free), lambda: region.set_address(home)),
            "resize": (lambda: region.set_size(PAGE // 2), lambda: region.set_size(PAGE)),
        }


def flat(n: int, name: str = "flat") -> Map:
    """``n`` I/O regions side by side in one container; the one in the middle changes."""
    root = MemoryRegion.container(name, 1 << 64)
    changing: MemoryRegion | None = None
    for index in range(n):
        region = MemoryRegion.io(f"device {index}", PAGE, None)
        root.add_subregion(index * STEP, region)
        if index == n // 2:
            changing = region
    assert changing is not None
    return Map(root, changing, (n + 8) * STEP)


def pc(containers: int = 300, depth: int = 5) -> Map:
    """A tree like a PC's: chipset, buses, slots, devices and BARs, with RAM below them.

    ``containers`` containers, nested ``depth`` deep, with two I/O regions at the
    bottom of each branch. RAM shows through two aliases, below and above 4 GiB,
    and the memory behind the PCI hole through sixteen PAM-like windows. What
    changes is a BAR in the last branch.
    """
    root = MemoryRegion.container("system", 1 << 64)
    ram = MemoryRegion.ram("pc.ram", 8 << 30)
    root.add_subregion_overlap(
        0, MemoryRegion.alias("ram-below-4g", ram, offset=0, size=3 << 30), 0
    )
    root.add_subregion_overlap(
        1 << 32, MemoryRegion.alias("ram-above-4g", ram, offset=3 << 30, size=5 << 30), 0
    )
    pci = MemoryRegion.container("pci", 1 << 64)
    root.add_subregion_overlap(0, pci, -1)
    hole = MemoryRegion.alias("pci-hole", pci, offset=0xA0000, size=0x20000)
    root.add_subregion_overlap(0xA0000, hole, 1)
    for index in range(16):
        at = 0xC0000 + index * 0x4000
        pam = MemoryRegion.alias(f"pam {index}", ram, offset=at, size=0x4000)
        pam.set_readonly(index % 2 == 0)
        root.add_subregion_overlap(at, pam, 1)
    branch = 64 * PAGE
    base = 0xC0000000
    left = containers - 2  # the root and the PCI container are two
    number = 0
    changing: MemoryRegion | None = None
    while left > 0:
        holder, at = pci, base + number * branch
        for level in range(min(depth - 2, left)):
            inner = MemoryRegion.container(f"bus {number}.{level}", branch)
            holder.add_subregion_overlap(at, inner, 1)
            holder, at = inner, 0
            left -= 1
        for bar in range(2):
            changing = MemoryRegion.io(f"bar {number}.{bar}", PAGE, None)
            holder.add_subregion_overlap(bar * 8 * PAGE, changing, 1)
        number += 1
    assert changing is not None
    return Map(root, changing, 32 * PAGE)


def chain(containers: int = 300) -> Map:
    """Containers one in another, ``containers`` deep, with a region in each; the last changes.

    Every tenth container shows the one below it through an alias.
    """
    root = holder = MemoryRegion.container("depth 0", 1 << 64)
    for depth in range(1, containers):
        holder.add_subregion(0, MemoryRegion.io(f"device {depth}", PAGE, None))
        inner = MemoryRegion.container(f"depth {depth}", 1 << 62)
        if depth % 10:
            holder.add_subregion(STEP, inner)
        else:
            alias = MemoryRegion.alias(f"alias {depth}", inner, offset=0, size=1 << 62)
            holder.add_subregion(STEP, alias)
        holder = inner
    region = MemoryRegion.io("last", PAGE, None)
    holder.add_subregion(0, region)
    return Map(root, region, 64 * PAGE)
