"""The subregions of one container, against a plain list."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import MemoryRegion
from memlistener.core.children import Children
from memlistener.testing.strategies import addresses, sizes
from tests.trees import examples


@attrs.frozen
class Step:
    what: str
    which: int
    addr: int
    size: int
    priority: int
    low: int
    length: int


steps = st.builds(
    Step,
    what=st.sampled_from(("add", "add", "add", "remove", "move", "resize", "undo")),
    which=st.integers(0, 99),
    addr=addresses(0x10000),
    size=sizes(0x10000),
    priority=st.integers(-2, 2),
    low=addresses(0x10000),
    length=sizes(0x10000),
)


def reaches(child: MemoryRegion, low: int, high: int) -> bool:
    return child.addr < high and child.addr + child.size > low


def tried_first(children: list[MemoryRegion]) -> list[MemoryRegion]:
    """F4 for a list in the order of adding: sorting keeps the order of equals."""
    return sorted(reversed(children), key=lambda child: -child.priority)


def check(container: MemoryRegion, added: list[MemoryRegion], low: int, high: int) -> None:
    children = container._children
    assert children is not None
    order = tried_first(added)
    assert list(children) == order
    assert container.subregions == tuple(order)
    assert len(children) == len(added)
    found = list(children.in_window(low, high))
    assert [each for each in found if reaches(each, low, high)] == [
        each for each in order if reaches(each, low, high)
    ]
    assert found == [each for each in order if each in found]  # what is beside it too


@pytest.mark.parametrize("to_begin_with", [0, 14, 40])
@examples(dev=40, ci=150)
@given(todo=st.lists(steps, max_size=40))
def test_order_and_windows(to_begin_with: int, todo: list[Step]) -> None:
    """F4: any window gives what a plain list gives, in the same order, with many or few."""
    container = MemoryRegion.container("container", 0x10000)
    added: list[MemoryRegion] = []
    for number in range(to_begin_with):
        region = MemoryRegion.ram(f"first{number}", 1 << number % 13)
        container.add_subregion_overlap(number * 0x321, region, number % 3)
        added.append(region)
    for number, step in enumerate(todo):
        if step.what == "add":
            region = MemoryRegion.ram(f"ram{number}", step.size)
            container.add_subregion_overlap(step.addr, region, step.priority)
            added.append(region)
        elif added:
            region = added[step.which % len(added)]
            if step.what == "remove":
                container.del_subregion(region)
                added.remove(region)
            elif step.what == "move":
                region.set_address(step.addr)
                added.remove(region)
                added.append(region)
            elif step.what == "resize":
                region.set_size(step.size)
            else:
                # There and back again, as a rollback does it.
                rank = region._rank
                container._unplace(region)
                container._place(region, rank)
        if container._children is not None:
            check(container, added, step.low, step.low + step.length)


def test_a_window_asks_for_little() -> None:
    """Of many children, a window finds only those near it."""
    children = Children()
    for number in range(10_000):
        region = MemoryRegion.ram("ram", 0x100)
        region.set_address(number * 0x100)
        children.add(region)
    found = list(children.in_window(0x5000, 0x5100))
    assert 1 <= len(found) <= 3
    assert any(each.addr == 0x5000 for each in found)


def test_a_child_larger_than_the_window_is_found() -> None:
    """Whatever its size, and however far below the window it starts."""
    children = Children()
    for number in range(20):
        region = MemoryRegion.ram("ram", 0x100)
        region.set_address(0x100000 + number * 0x100)
        children.add(region)
    everything = MemoryRegion.ram("everything", 1 << 64)
    children.add(everything)
    assert list(children.in_window((1 << 64) - 1, 1 << 64)) == [everything]


def test_put_back() -> None:
    """What was removed comes back to its place among its equals, not to the first."""
    children = Children()
    regions = [MemoryRegion.ram(f"ram{number}", 1) for number in range(5)]
    for each in regions:
        children.add(each)
    rank = regions[2]._rank
    children.remove(regions[2])
    children.put_back(regions[2], rank)
    assert list(children) == regions[::-1]
    latest = MemoryRegion.ram("latest", 1)
    children.add(latest)
    assert list(children) == [latest, *regions[::-1]]


def test_the_enabled_ones() -> None:
    """F7: who is enabled is known without a look at the others."""
    container = MemoryRegion.container("container", 1 << 32)
    regions = [MemoryRegion.io(f"r{number}", 1, None) for number in range(5)]
    regions[0].set_enabled(False)
    for number, region in enumerate(regions):
        container.add_subregion(number, region)
    children = container._children
    assert children is not None
    assert children.enabled == set(regions[1:])
    for region in regions[1:4]:
        region.set_enabled(False)
    assert children.enabled == {regions[4]}
    container.del_subregion(regions[4])
    assert children.enabled == set()
    regions[4].set_enabled(False)
    regions[4].set_enabled(True)
    regions[2].set_enabled(True)
    assert children.enabled == {regions[2]}


class Counting(dict[MemoryRegion, None]):
    """Counts how often somebody goes over it."""

    walks = 0

    def __iter__(self) -> Iterator[MemoryRegion]:
        Counting.walks += 1
        return super().__iter__()


def test_putting_back_sorts_once() -> None:
    """T13: undoing n moves costs n, and whoever asks for the order then one sorting."""
    children = Children()
    regions = [MemoryRegion.io(f"r{number}", 1, None) for number in range(40)]
    for region in regions:
        children.add(region)
    children._by_priority[0] = Counting(children._by_priority[0])
    ranks = [region._rank for region in regions]
    for region, rank in zip(regions, ranks, strict=True):
        children.remove(region)
        children.put_back(region, rank)
    assert Counting.walks == 0
    assert list(children) == regions[::-1]
    assert Counting.walks == 1


@examples(dev=100, ci=300)
@given(st.lists(st.integers(-50, 50)), st.randoms(use_true_random=False))
def test_many_priorities(priorities: list[int], random: Random) -> None:
    """F4: each may have a priority of its own."""
    children = Children()
    added: list[MemoryRegion] = []
    for priority in priorities:
        region = MemoryRegion.io("r", 1, None)
        region._priority = priority
        children.add(region)
        added.append(region)
        if random.random() < 0.3:
            children.remove(added.pop(random.randrange(len(added))))
        assert list(children) == tried_first(added)


@examples(dev=150, ci=1000)
@given(
    st.lists(st.tuples(st.integers(0, 0x400), st.integers(1, 0x400), st.booleans()), min_size=1),
    st.integers(0, 0x400),
    st.integers(1, 0x400),
)
def test_alone(spans: list[tuple[int, int, bool]], low: int, size: int) -> None:
    """Nobody else reaches in where it says so; and of few it says so whenever it is true."""
    children = Children()
    regions = []
    for addr, each, enabled in spans:
        region = MemoryRegion.io("r", each, None)
        region._addr, region._enabled = addr, enabled
        children.add(region)
        regions.append(region)
    for region in regions:
        others = [
            each
            for each in regions
            if each is not region
            and each.enabled
            and each.addr < low + size
            and each.addr + each.size > low
        ]
        said = children.alone(region, low, low + size)
        assert not (said and others)
        if len(regions) < 8:
            assert said is not bool(others)


def test_alone_looks_at_few() -> None:
    """However many siblings there are: a change near them costs what changed."""
    children = Children()
    for number in range(1000):
        region = MemoryRegion.io("hidden", 0x100, None)
        region._addr, region._enabled = number * 0x100, False
        children.add(region)
    assert children._grid is not None
    for cells in children._grid.values():
        for cell, members in cells.items():
            cells[cell] = Counting(members)
    Counting.walks = 0
    assert not children.alone(region, 0, 1 << 64)
    assert 0 < Counting.walks <= 64
