"""The subregions of one container: in the order they are tried, and by address.

Two questions are asked of a container. Rendering a whole tree asks for all its
children, highest priority first and the later-added first among equals (rule
F4). Rendering a damaged window asks for those that reach into that window, in
the same order, and must not pay for the others.

The first is a dict for each priority, which keeps the order of insertion and
forgets a member in constant time. The second is a grid for each size class: a
child of size in (2**(k-1), 2**k] is filed under ``addr >> k``, so a window asks
few cells of few classes, and adding, moving or removing a child touches one
cell. Nothing is kept sorted by address, which is what makes a move in a
container of 100,000 children as cheap as in one of 10.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memlistener.core.region import MemoryRegion

# Below this many children a plain scan beats the grid, and most containers of
# real machines stay below it: the grid is only built when it is passed.
_GRID_FROM = 16

# How many cells and children `Children.alone` looks at.
_LOOKS = 64


class Children:
    """The subregions of one container."""

    __slots__ = (
        "_by_priority",
        "_count",
        "_enabled",
        "_grid",
        "_next_rank",
        "_priorities",
        "_unsorted",
    )

    def __init__(self) -> None:
        self._by_priority: dict[int, dict[MemoryRegion, None]] = {}
        self._priorities: list[int] = []  # negated, so ascending
        self._unsorted: set[int] = set()  # priorities whose dicts are not in order of rank
        self._enabled: set[MemoryRegion] = set()
        self._count = 0
        self._next_rank = 0
        # size class -> cell -> children that start in the cell
        self._grid: dict[int, dict[int, dict[MemoryRegion, None]]] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[MemoryRegion]:
        """The children in the order they are tried. O(n)."""
        for priority in self._unsorted:
            siblings = self._by_priority[priority]
            self._by_priority[priority] = dict.fromkeys(sorted(siblings, key=_rank))
        self._unsorted.clear()
        for negated in self._priorities:
            yield from reversed(self._by_priority[-negated])

    def add(self, child: MemoryRegion) -> None:
        """File ``child`` as the latest of its priority. O(1), and a bisection for a new one."""
        siblings = self._by_priority.get(child._priority)
        if siblings is None:
            siblings = self._by_priority[child._priority] = {}
            insort(self._priorities, -child._priority)
        siblings[child] = None
        if child._enabled:
            self._enabled.add(child)
        self._next_rank += 1
        child._rank = self._next_rank
        self._count += 1
        if self._grid is not None:
            self._file(self._grid, child)
        elif self._count > _GRID_FROM:
            self._grid = {}
            for each in self:
                self._file(self._grid, each)

    def remove(self, child: MemoryRegion) -> None:
        """Forget ``child``, which still has the address it was filed with. O(1)."""
        siblings = self._by_priority[child._priority]
        del siblings[child]
        if not siblings:
            del self._by_priority[child._priority]
            del self._priorities[bisect_left(self._priorities, -child._priority)]
            self._unsorted.discard(child._priority)
        self._enabled.discard(child)
        self._count -= 1
        self.unfile(child)

    def put_back(self, child: MemoryRegion, rank: int) -> None:
        """File ``child`` where it stood when it had ``rank``: for undoing. O(1).

        Who next asks for the order pays for it, once for all that were put back.
        """
        self.add(child)
        child._rank = rank
        self._unsorted.add(child._priority)

    def switch(self, child: MemoryRegion) -> None:
        """``child`` was enabled or disabled. O(1)."""
        if child._enabled:
            self._enabled.add(child)
            return
        self._enabled.discard(child)
        if len(self._enabled) == 1:
            # A set that was large is slow to look through for the one that is left.
            self._enabled = set(self._enabled)

    @property
    def enabled(self) -> set[MemoryRegion]:
        """The children that are enabled, in no order."""
        return self._enabled

    def file(self, child: MemoryRegion) -> None:
        """File a child by address again, after its size or address changed."""
        if self._grid is not None:
            self._file(self._grid, child)

    def unfile(self, child: MemoryRegion) -> None:
        """Forget a child's address, before its size or address changes."""
        if self._grid is None:
            return
        size_class = (child._size - 1).bit_length()
        cells = self._grid[size_class]
        cell = child._addr >> size_class
        members = cells[cell]
        del members[child]
        if not members:
            del cells[cell]
            if not cells:
                del self._grid[size_class]

    def in_window(self, low: int, high: int) -> Iterator[MemoryRegion] | list[MemoryRegion]:
        """The children that reach into [low, high), in the order they are tried.

        May include some that do not; the caller clips anyway. O(1) for a window
        of the order of the children's own size; for a wide window never more
        than a scan of all children.
        """
        if self._grid is None:
            return iter(self)
        found: list[MemoryRegion] = []
        for size_class, cells in self._grid.items():
            first = (low >> size_class) - 1
            last = (high - 1) >> size_class
            if last - first < len(cells):
                for cell in range(first, last + 1):
                    members = cells.get(cell)
                    if members is not None:
                        found.extend(members)
            elif len(self._grid) == 1:
                return iter(self)
            else:
                for cell, members in cells.items():
                    if first <= cell <= last:
                        found.extend(members)
        if len(found) > 1:
            found.sort(key=_try_order)
        return found

    def alone(self, child: MemoryRegion, low: int, high: int) -> bool:
        """Whether ``child`` is the only enabled one that reaches into [low, high).

        Says no rather than look at many: O(1).
        """
        if self._grid is None:
            for siblings in self._by_priority.values():
                for each in siblings:
                    if each is not child and _shows_in(each, low, high):
                        return False
            return True
        left = _LOOKS
        for size_class, cells in self._grid.items():
            first = (low >> size_class) - 1
            last = (high - 1) >> size_class
            for cell in range(first, last + 1) if last - first < len(cells) else cells:
                for each in cells.get(cell, ()):
                    if each is not child and _shows_in(each, low, high):
                        return False
                    left -= 1
                left -= 1
                if left < 0:
                    return False
        return True

    @staticmethod
    def _file(grid: dict[int, dict[int, dict[MemoryRegion, None]]], child: MemoryRegion) -> None:
        size_class = (child._size - 1).bit_length()
        cells = grid.setdefault(size_class, {})
        cells.setdefault(child._addr >> size_class, {})[child] = None


def _shows_in(child: MemoryRegion, low: int, high: int) -> bool:
    return child._enabled and child._addr < high and child._addr + child._size > low


def _rank(child: MemoryRegion) -> int:
    return child._rank


def _try_order(child: MemoryRegion) -> tuple[int, int]:
    return (-child._priority, -child._rank)
