"""Views as values: reading them, and making the next one from the last."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatRange, FlatView, MemoryRegion
from memlistener.core.diff import Event, RegionAdd, RegionDel, diff
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.core.test_render import pc
from tests.oracles import TOP, Shown, flatten
from tests.trees import Journal, Mutation, Owner, examples, mutations, replay


def flat_map(count: int, spacing: int = 0x1000) -> tuple[MemoryRegion, list[MemoryRegion]]:
    """A container with ``count`` I/O regions of half the spacing each."""
    system = MemoryRegion.container("system", TOP)
    regions = [MemoryRegion.io(f"io{number}", spacing // 2, None) for number in range(count)]
    for number, region in enumerate(regions):
        system.add_subregion(number * spacing, region)
    return system, regions


def described(events: list[Event]) -> list[str]:
    return [
        f"{'del' if isinstance(each, RegionDel) else 'add'} {each.range.region.name} "
        f"[{each.range.start:x}, {each.range.end:x})"
        for each in events
    ]


class TestReading:
    def test_lookup(self) -> None:
        """F8: the first and the last byte of a range, and neither neighbour."""
        system, regions = flat_map(3)
        view = FlatView.render(system)
        for number, region in enumerate(regions):
            first = view.lookup(number * 0x1000)
            assert first is not None
            assert first.region is region
            assert view.lookup(number * 0x1000 + 0x7FF) is first
            assert view.lookup(number * 0x1000 + 0x800) is None
        assert view.lookup(TOP - 1) is None

    @pytest.mark.parametrize("addr", [-1, -TOP, TOP, TOP + 1])
    def test_lookup_outside(self, addr: int) -> None:
        """Where no address is, nothing is, at either end of a full view."""
        assert FlatView.render(MemoryRegion.io("io", TOP, None)).lookup(addr) is None

    def test_lookup_in_an_empty_view(self) -> None:
        """Nothing shows nothing."""
        assert FlatView().lookup(0) is None

    @pytest.mark.parametrize("count", [1, 2, 256, 257, 513, 3000])
    def test_views_of_any_size(self, count: int) -> None:
        """Length, iteration and lookup agree however many chunks there are."""
        system, regions = flat_map(count)
        view = FlatView.render(system)
        view.check()
        assert len(view) == count == len(list(view))
        assert [each.region for each in view] == regions
        for number in range(count):
            found = view.lookup(number * 0x1000 + 0x123)
            assert found is not None
            assert found.region is regions[number]

    def test_overlapping(self) -> None:
        """Half-open on both sides, and in the middle of a range too."""
        view = FlatView.render(flat_map(1000)[0])
        everything = list(view)

        def naive(low: int, high: int) -> list[FlatRange]:
            return [each for each in everything if each.start < high and each.end > low]

        for low, high in (
            (0, 1),
            (0x7FF, 0x801),
            (0x800, 0x1000),
            (0x800, 0x1001),
            (0x400, 0x401),
            (255 * 0x1000, 257 * 0x1000),
            (256 * 0x1000, 256 * 0x1000 + 1),
            (0, TOP),
            (999 * 0x1000 + 0x7FF, TOP),
            (5000 * 0x1000, TOP),
        ):
            assert list(view.overlapping(low, high)) == naive(low, high)
        assert list(FlatView().overlapping(0, TOP)) == []

    def test_equal_by_content(self) -> None:
        """Two renders are equal and hash alike; another tree's is not, nor is a list."""
        system, regions = flat_map(10)
        one, two = FlatView.render(system), FlatView.render(system)
        assert one is not two
        assert one == two
        assert hash(one) == hash(two)
        regions[3].set_enabled(False)
        assert one != FlatView.render(system)
        assert FlatView.render(flat_map(10)[0]) != one
        assert one != list(one)

    def test_text(self) -> None:
        """One line a range."""
        system, _ = flat_map(2)
        view = FlatView.render(system)
        assert str(view) == "[0x0, 0x800) i/o 'io0' +0x0\n[0x1000, 0x1800) i/o 'io1' +0x0"
        assert repr(view) == "<FlatView of 2 ranges>"

    def test_a_view_of_given_ranges(self) -> None:
        """A view is made of any ranges in order."""
        view = FlatView.render(flat_map(700)[0])
        assert FlatView(view) == view
        assert FlatView(iter(view)) == view

    def test_check_finds_faults(self) -> None:
        """`check` is worth calling: ranges that overlap or should be one are found."""
        ram = MemoryRegion.ram("ram", 0x1000)
        whole = FlatRange(0, 0x1000, ram, 0, 0)
        half, rest = whole._replace(size=0x800), FlatRange(0x800, 0x800, ram, 0x800, 0)
        box = MemoryRegion.container("box", 0x1000)
        for bad in (
            [whole, rest],
            [half, rest],
            [rest, half],
            [whole._replace(size=0)],
            [whole._replace(start=TOP - 1)],
            [whole._replace(region=box)],
            [whole._replace(offset=-1)],
        ):
            with pytest.raises(AssertionError):
                FlatView(bad).check()
        FlatView([half, rest._replace(offset=0)]).check()


class TestUpdating:
    def test_the_vga_window_goes(self) -> None:
        """Vector (b): four deletes and one overlapping add, in ascending order."""
        system, vga_window = pc()
        owner = Owner(system)
        view = FlatView.render(system)
        system.del_subregion(vga_window)
        after, events = view.updated(system, owner.take_damage())
        assert described(events) == [
            "del ram [0, a0000)",
            "del vram [a0000, a8000)",
            "del vram [a8000, b0000)",
            "del ram [b0000, e0000000)",
            "add ram [0, e0000000)",
        ]
        assert after == FlatView.render(system)
        after.check()

    def test_nothing_changed(self) -> None:
        """T10: a window in which all is as it was gives the same view, and no events."""
        system, _ = flat_map(1000)
        view = FlatView.render(system)
        for windows in ([], [(0, TOP)], [(0x1234, 0x5678)], [(0x800, 0x1000), (0, 1)], [(5, 5)]):
            same, events = view.updated(system, windows)
            assert same is view
            assert events == []

    def test_old_views_stay(self) -> None:
        """A view that somebody holds is whole, whatever comes after it."""
        system, regions = flat_map(1000)
        view = FlatView.render(system)
        before = list(view)
        owner = Owner(system)
        regions[500].set_enabled(False)
        after, _ = view.updated(system, owner.take_damage())
        assert list(view) == before
        assert len(after) == len(view) - 1

    def test_chunks_are_shared(self) -> None:
        """A change to one range of many replaces one chunk, and keeps the ranges of the rest."""
        system, regions = flat_map(5000)
        owner = Owner(system)
        view = FlatView.render(system)
        regions[2500].set_address(regions[2500].addr + 0x100)
        after, events = view.updated(system, owner.take_damage())
        assert len(events) == 2
        old = {id(chunk) for chunk in view._chunks}
        fresh = [chunk for chunk in after._chunks if id(chunk) not in old]
        assert len(view._chunks) > 10
        assert len(fresh) == 1
        assert sum(one is two for one, two in zip(view, after, strict=True)) == 4999

    def test_windows_in_any_order(self) -> None:
        """Windows may overlap, touch, come twice, and reach past either end."""
        system, regions = flat_map(10)
        owner = Owner(system)
        view = FlatView.render(system)
        for number in (7, 2, 3):
            regions[number].set_readonly(True)
        windows = [*owner.take_damage(), (-5, 1), (0x7000, TOP + 5), (-10, -5), (0x2000, 0x4000)]
        after, events = view.updated(system, windows)
        assert after == FlatView.render(system)
        assert events == diff(view, after)
        assert [each.range.start for each in events] == [0x2000, 0x3000, 0x7000] * 2

    def test_merging_across_a_window_s_edge(self) -> None:
        """F6: what is rendered anew merges with neighbours that were not."""
        system = MemoryRegion.container("system", 0x10000)
        ram = MemoryRegion.ram("ram", 0x3000)
        parts = [
            MemoryRegion.alias(f"part{number}", ram, offset=number * 0x1000, size=0x1000)
            for number in range(3)
        ]
        for number, part in enumerate(parts):
            system.add_subregion(number * 0x1000, part)
        owner = Owner(system)
        view = FlatView.render(system)
        assert len(view) == 1
        parts[1].set_enabled(False)
        split, events = view.updated(system, owner.take_damage())
        assert described(events) == [
            "del ram [0, 3000)",
            "add ram [0, 1000)",
            "add ram [2000, 3000)",
        ]
        parts[1].set_enabled(True)
        joined, events = split.updated(system, owner.take_damage())
        assert described(events) == [
            "del ram [0, 1000)",
            "del ram [2000, 3000)",
            "add ram [0, 3000)",
        ]
        assert joined == view

    def test_an_unmergeable_range_joins_itself(self) -> None:
        """F6: cut by a window's edge it is still one range, as a full render has it."""
        system = MemoryRegion.container("system", 0x10000)
        ram = MemoryRegion.ram("ram", 0x3000)
        ram.set_unmergeable(True)
        over = MemoryRegion.io("over", 0x100, None)
        system.add_subregion(0, ram)
        view = FlatView.render(system)
        owner = Owner(system)
        system.add_subregion_overlap(0x1000, over, 1)
        cut, _ = view.updated(system, owner.take_damage())
        assert len(cut) == 3
        system.del_subregion(over)
        joined, _ = cut.updated(system, owner.take_damage())
        joined.check()
        assert joined == view

    def test_an_unmergeable_range_behind_another_root(self) -> None:
        """F6, F7: the root that a view is rendered from may change between two updates."""
        outer = MemoryRegion.container("outer", 0x10000)
        device = MemoryRegion.io("device", 0x10000, None)
        device.set_unmergeable(True)
        outer.add_subregion(0, MemoryRegion.alias("all", device, offset=0, size=0x10000))
        over = MemoryRegion.io("over", 0x1000, None)
        outer.add_subregion_overlap(0x5000, over, 1)
        owner = Owner(outer)
        view = FlatView.render(outer)
        over.set_enabled(False)
        view, _ = view.updated(device, owner.take_damage())
        assert view == FlatView.render(device)
        assert len(view) == 1
        over.set_enabled(True)
        view, _ = view.updated(outer, owner.take_damage())
        over.set_address(0x8000)
        view, events = view.updated(outer, owner.take_damage())
        view.check()
        assert view == FlatView.render(outer)
        assert described(events) == [
            "del device [0, 5000)",
            "del over [5000, 6000)",
            "del device [6000, 10000)",
            "add device [0, 8000)",
            "add over [8000, 9000)",
            "add device [9000, 10000)",
        ]

    def test_unmergeable_neighbours_stay_apart(self) -> None:
        """F6: windows that touch unmergeable ranges take these in, and join nothing."""
        system = MemoryRegion.container("system", 0x10000)
        device = MemoryRegion.io("device", 0x4000, None)
        device.set_unmergeable(True)
        aliases = [
            MemoryRegion.alias(f"alias{n}", device, offset=n * 0x1000, size=0x1000)
            for n in range(4)
        ]
        for n, each in enumerate(aliases):
            system.add_subregion(n * 0x1000, each)
        owner = Owner(system)
        view = FlatView.render(system)
        for n in (1, 3, 0):
            for enabled in (False, True):
                aliases[n].set_enabled(enabled)
                view, events = view.updated(system, owner.take_damage())
                view.check()
                assert view == FlatView.render(system)
                assert len(events) == 1

    def test_empty_to_full_and_back(self) -> None:
        """A view may grow from nothing and shrink to nothing."""
        system, regions = flat_map(1500)
        owner = Owner(system)
        full = FlatView.render(system)
        for each in regions:
            each.set_enabled(False)
        empty, events = full.updated(system, owner.take_damage())
        empty.check()
        assert len(empty) == 0
        assert events == [RegionDel(each) for each in full]
        for each in regions:
            each.set_enabled(True)
        again, events = empty.updated(system, owner.take_damage())
        again.check()
        assert again == full
        assert events == [RegionAdd(each) for each in full]

    def test_shrinking_leaves_no_crumbs(self) -> None:
        """Chunks that lose nearly all of their ranges are put together."""
        system, regions = flat_map(4000)
        owner = Owner(system)
        view = FlatView.render(system)
        for number, each in enumerate(regions):
            if number % 100:
                each.set_enabled(False)
                view, _ = view.updated(system, owner.take_damage())
        view.check()
        assert len(view) == 40
        assert len(view._chunks) <= 3

    def test_random_toggles_of_a_large_map(self) -> None:
        """5,000 ranges, toggled, moved and resized in bursts: always the full render."""
        choose = random.Random(20)
        system, regions = flat_map(5000)
        owner = Owner(system)
        view = FlatView.render(system)
        believed = {each.start: each for each in view}
        for _ in range(60):
            for _ in range(choose.choice((1, 1, 2, 30))):
                region = choose.choice(regions)
                if region.enabled and choose.random() < 0.3:
                    region.set_size(choose.choice((0x400, 0x800, 0x1000, 0x1800)))
                elif choose.random() < 0.3:
                    region.set_address(choose.randrange(5000) * 0x1000 + choose.choice((0, 0x200)))
                else:
                    region.set_enabled(not region.enabled)
            new, events = view.updated(system, owner.take_damage())
            new.check()
            assert new == FlatView.render(system)
            assert events == diff(view, new)
            replay(events, believed)
            view = new
        assert believed == {each.start: each for each in view}


@examples(dev=100, ci=400)
@given(
    tree_plans(limit=0x8000),
    st.lists(st.lists(mutations(0x8000), min_size=1, max_size=4), min_size=1, max_size=10),
)
def test_updated_is_a_full_render(plan: TreePlan, transactions: list[list[Mutation]]) -> None:
    """T5, T10: after every transaction the updated view is what a full render gives.

    In two address spaces over one tree: the root, and an alias of a part of it.
    """
    regions = plan.build()
    journal = Journal()
    window = MemoryRegion.alias("window", regions[0], offset=0x1800, size=0x3000)
    owners = [Owner(regions[0], journal), Owner(window, journal)]
    views = [FlatView.render(each.root) for each in owners]
    maps = [{each.start: each for each in view} for view in views]
    for changes in transactions:
        for change in changes:
            change.apply(regions)
        for number, owner in enumerate(owners):
            old = views[number]
            new, events = old.updated(owner.root, owner.take_damage())
            new.check()
            full = FlatView.render(owner.root)
            assert new == full
            assert [Shown.of(each) for each in new] == flatten(owner.root)
            assert events == diff(old, full)
            assert (new is old) == (not events)
            replay(events, maps[number])
            assert maps[number] == {each.start: each for each in full}
            for passes in (RegionDel, RegionAdd):
                starts = [each.range.start for each in events if isinstance(each, passes)]
                assert all(one < two for one, two in pairwise(starts))
            views[number] = new


@examples(dev=20, ci=60)
@given(
    tree_plans(limit=0x8000),
    st.integers(0, 0x120),
    st.lists(mutations(0x8000), max_size=8),
)
def test_in_a_map_of_many_chunks(plan: TreePlan, where: int, changes: list[Mutation]) -> None:
    """T5: the same in the middle of a view of many ranges, and across its chunks' edges."""
    system, _ = flat_map(600)
    view = FlatView.render(system)
    owner = Owner(system)
    regions = plan.build()
    system.add_subregion_overlap(where * 0x1000, regions[0], 1)
    for change in (None, *changes):
        if change is not None:
            change.apply(regions)
        new, events = view.updated(system, owner.take_damage())
        new.check()
        full = FlatView.render(system)
        assert new == full
        assert events == diff(view, full)
        view = new
