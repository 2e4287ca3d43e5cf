"""Simpler ways of doing the same, measured in turns with ours.

Each is what one would write first, and each is right: the figures say from which
size on it loses, and what ours costs where it does not.

1. Render everything again at each commit, instead of the damaged windows: QEMU's
   way, though with our n log n render.
2. Keep the ranges of a view in one list and copy it at each commit, instead of
   chunks that the views share.
3. Keep the children of a container in one list sorted by address, instead of a
   grid by size and address.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from benchmarks import maps
from benchmarks.measure import Benchmarks, Figure, Settings, figure, in_turns
from memlistener import FlatRange, FlatView, MemoryRegion
from memlistener.core.children import Children
from memlistener.core.diff import Event, diff

_SIZES = (100, 1_000, 10_000, 100_000)
_by_address = attrgetter("addr")


class Toggled:
    """A flat map in which one region is shown and hidden, and its view by turns."""

    def __init__(self, n: int) -> None:
        self.map = maps.flat(n)
        self.view = FlatView.render(self.map.root)
        region = self.map.region
        self.window = (region.addr, region.addr + region.size)

    def _toggle(self) -> None:
        self.map.region.set_enabled(not self.map.region.enabled)

    def by_window(self) -> list[Event]:
        """Ours: render the window, share the rest."""
        self._toggle()
        self.view, events = self.view.updated(self.map.root, [self.window])
        return events

    def by_render(self) -> list[Event]:
        """Render the whole tree and compare all of it."""
        self._toggle()
        old = self.view
        self.view = FlatView.render(self.map.root)
        return diff(old, self.view)


def full_render(settings: Settings) -> list[Figure]:
    """A view after a toggle: its window, or everything again."""
    found = []
    for n in settings.sizes(*_SIZES):
        each = Toggled(n)
        by_window = in_turns({"": each.by_window}, settings.samples(1_000), block=50)[""]
        by_render = in_turns({"": each.by_render}, settings.samples(max(200_000 // n, 10)))[""]
        found += [
            figure("next view: the damaged window", by_window, n=n),
            figure("next view: everything rendered again", by_render, n=n),
        ]
    return found


class CopiedList:
    """A view as two lists that each commit copies: the ranges, and where they start."""

    def __init__(self, view: FlatView) -> None:
        self.ranges = list(view)
        self.starts = [each.start for each in self.ranges]

    def replaced(self, low: int, high: int, new: list[FlatRange]) -> CopiedList:
        """The next view, with ``new`` in the place of what starts in [low, high)."""
        after = CopiedList.__new__(CopiedList)
        first, last = bisect_left(self.starts, low), bisect_left(self.starts, high)
        after.ranges = self.ranges.copy()
        after.starts = self.starts.copy()
        after.ranges[first:last] = new
        after.starts[first:last] = [each.start for each in new]
        return after


def copied_list(settings: Settings) -> list[Figure]:
    """One range taken out of a view and put back: chunks, or one list copied.

    Only the storage is measured: nothing is rendered and nothing compared.
    """
    found = []
    for n in settings.sizes(*_SIZES):
        view = FlatView.render(maps.flat(n).root)
        low = n // 2 * maps.STEP
        gone = view.lookup(low)
        assert gone is not None
        shown: list[FlatRange] = [gone]
        copied = [CopiedList(view)]
        chunked = [view]

        def by_copy(
            copied: list[CopiedList] = copied, low: int = low, shown: list[FlatRange] = shown
        ) -> None:
            there = copied[0].replaced(low, low + 1, [])
            copied[0] = there.replaced(low, low + 1, shown)

        def by_chunk(
            chunked: list[FlatView] = chunked, low: int = low, shown: list[FlatRange] = shown
        ) -> None:
            for new in ([], shown):
                old = chunked[0]
                # What `FlatView.updated` does between rendering and returning.
                chunked[0] = old._spliced([(old._span(low, low), new)])

        taken = in_turns({"copy": by_copy, "chunk": by_chunk}, settings.samples(500), block=10)
        found += [
            figure("two splices of a view: chunks", taken["chunk"], n=n),
            figure("two splices of a view: one list, copied", taken["copy"], n=n),
        ]
    return found


def sorted_children(settings: Settings) -> list[Figure]:
    """A child moved and found again: the grid, or one list sorted by address.

    The list keeps no order of priority and looks for neighbours of the child's
    own size only: a wide sibling far below would be missed, so it does less.
    """
    found = []
    for n in settings.sizes(*_SIZES):
        regions = [MemoryRegion.io(f"device {index}", maps.PAGE, None) for index in range(n)]
        grid = Children()
        for index, each in enumerate(regions):
            each.set_address(index * maps.STEP)
            grid.add(each)
        ordered = sorted(regions, key=_by_address)
        child = regions[n // 2]
        places = (child.addr + maps.PAGE, child.addr)

        def in_grid(
            grid: Children = grid,
            child: MemoryRegion = child,
            places: tuple[int, int] = places,
        ) -> None:
            for addr in places:
                grid.remove(child)
                child.set_address(addr)
                grid.add(child)
                assert child in grid.in_window(addr, addr + maps.PAGE)

        def in_list(
            ordered: list[MemoryRegion] = ordered,
            child: MemoryRegion = child,
            places: tuple[int, int] = places,
        ) -> None:
            for addr in places:
                del ordered[bisect_left(ordered, child.addr, key=_by_address)]
                child.set_address(addr)
                insort(ordered, child, key=_by_address)
                first = bisect_left(ordered, addr - maps.PAGE + 1, key=_by_address)
                last = bisect_left(ordered, addr + maps.PAGE, key=_by_address)
                assert child in ordered[first:last]

        taken = in_turns({"grid": in_grid, "list": in_list}, settings.samples(500), block=10)
        found += [
            figure("two moves of a child: grid", taken["grid"], n=n),
            figure("two moves of a child: sorted list", taken["list"], n=n),
        ]
    return found


BENCHMARKS: Benchmarks = {
    "full_render": full_render,
    "copied_list": copied_list,
    "sorted_children": sorted_children,
}
