"""Rule F7: the region that a root comes down to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given

from memlistener import FlatView, MemoryRegion
from memlistener.core.sharing import view_root
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.trees import examples


@examples(dev=150, ci=600)
@given(tree_plans(limit=0x10000))
def test_the_same_view(plan: TreePlan) -> None:
    """F7: what every region of a tree comes down to renders the same; None renders empty."""
    for region in plan.build():
        root = view_root(region)
        assert FlatView.render(region) == (FlatView() if root is None else FlatView.render(root))


def alias(target: MemoryRegion, offset: int = 0, size: int | None = None) -> MemoryRegion:
    return MemoryRegion.alias("alias", target, offset=offset, size=size or target.size)


def holding(child: MemoryRegion, addr: int = 0, size: int = 0x1000) -> MemoryRegion:
    container = MemoryRegion.container("holder", size)
    container.add_subregion(addr, child)
    return container


def changed(region: MemoryRegion, **changes: object) -> MemoryRegion:
    for name, value in changes.items():
        getattr(region, f"set_{name}")(value)
    return region


@pytest.fixture
def ram() -> MemoryRegion:
    return MemoryRegion.ram("ram", 0x1000)


REDUCED: dict[str, Callable[[MemoryRegion], MemoryRegion]] = {
    "itself": lambda ram: ram,
    "an alias": alias,
    "an alias that is too long": lambda ram: alias(ram, size=0x2000),
    "an alias of an alias": lambda ram: alias(alias(ram)),
    "a container": holding,
    "a larger container": lambda ram: holding(ram, size=0x4000),
    "a container of an alias": lambda ram: holding(alias(ram)),
    "containers within each other": lambda ram: alias(holding(holding(ram))),
}
KEPT: dict[str, Callable[[MemoryRegion], MemoryRegion]] = {
    "an alias of a part": lambda ram: alias(ram, size=0x800),
    "an alias with an offset": lambda ram: alias(ram, 0x800),
    "a read-only alias": lambda ram: changed(alias(ram), readonly=True),
    "a nonvolatile alias": lambda ram: changed(alias(ram), nonvolatile=True),
    "a container that is not to be merged": lambda ram: changed(holding(ram), unmergeable=True),
    "a smaller container": lambda ram: holding(ram, size=0x800),
    "a container with the child elsewhere": lambda ram: holding(ram, 0x800, 0x2000),
}
EMPTY: dict[str, Callable[[MemoryRegion], MemoryRegion]] = {
    "disabled": lambda ram: changed(ram, enabled=False),
    "an alias of what is disabled": lambda ram: alias(changed(ram, enabled=False)),
    "a disabled alias": lambda ram: changed(alias(ram), enabled=False),
    "a container of nothing enabled": lambda ram: holding(changed(ram, enabled=False)),
    "an empty container": lambda _: MemoryRegion.container("empty", 0x1000),
}


def by_name(cases: dict[str, Callable[[MemoryRegion], MemoryRegion]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", cases.values(), ids=cases.keys())


@by_name(REDUCED)
def test_comes_down(ram: MemoryRegion, make: Callable[[MemoryRegion], MemoryRegion]) -> None:
    """F7: goes through what adds nothing."""
    assert view_root(make(ram)) is ram


@by_name(KEPT)
def test_stays(ram: MemoryRegion, make: Callable[[MemoryRegion], MemoryRegion]) -> None:
    """F7: what clips, moves or marks is a root of its own."""
    root = make(ram)
    assert view_root(root) is root


@by_name(EMPTY)
def test_nothing(ram: MemoryRegion, make: Callable[[MemoryRegion], MemoryRegion]) -> None:
    """F7: nothing enabled comes down to nothing."""
    assert view_root(make(ram)) is None


def test_two_children(ram: MemoryRegion) -> None:
    """F7: of two only an enabled one counts."""
    holder = holding(ram)
    other = MemoryRegion.io("other", 0x1000, None)
    holder.add_subregion_overlap(0, other, 1)
    assert view_root(holder) is holder
    other.set_enabled(False)
    assert view_root(holder) is ram


def test_a_terminating_region_with_children(ram: MemoryRegion) -> None:
    """F7, F5: shows in its own gaps, so it is what it comes down to."""
    parent = MemoryRegion.io("parent", 0x1000, None)
    parent.add_subregion(0, ram)
    assert view_root(parent) is parent


def test_a_target_elsewhere(ram: MemoryRegion) -> None:
    """F7, F1: a target that sits at an address renders there, and the alias at its own."""
    holding(ram, 0x1000, 0x4000)
    window = alias(ram)
    assert view_root(window) is window
    holding(window, 0x1000, 0x4000)
    assert view_root(window) is ram
