"""The strategies make what they promise, and reach what is rare."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings

from memlistener import FlatView, MemoryRegion, RegionKind
from memlistener.testing.strategies import (
    RegionPlan,
    TreePlan,
    addresses,
    sizes,
    tree_plans,
)
from tests.trees import examples, snapshot


def described(regions: list[MemoryRegion]) -> list[tuple[object, ...]]:
    """A tree by numbers, so that two of one plan can be compared."""
    number = {region: index for index, region in enumerate(regions)}

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return number[value] if isinstance(value, MemoryRegion) else value

    return [tuple(map(plain, each)) for each in snapshot(regions)]


def depth(region: MemoryRegion) -> int:
    return 0 if region.container is None else 1 + depth(region.container)


@examples(dev=50, ci=200)
@given(tree_plans(min_regions=3, max_regions=9, limit=0x1000))
def test_plans_keep_within_their_limits(plan: TreePlan) -> None:
    """Numbers of regions, sizes and addresses; region 0 is a container without one."""
    assert 3 <= len(plan.regions) <= 9
    assert all(1 <= each.size <= 0x1000 and 0 <= each.addr < 0x1000 for each in plan.regions)
    regions = plan.build()
    assert len(regions) == len(plan.regions)
    assert regions[0].kind is RegionKind.CONTAINER
    assert regions[0].container is None
    FlatView.render(regions[0]).check()


@examples(dev=40, ci=100)
@given(tree_plans())
def test_building_twice_gives_the_same(plan: TreePlan) -> None:
    """Two trees of one plan share nothing and are alike."""
    one, two = plan.build(), plan.build()
    assert not set(one) & set(two)
    assert described(one) == described(two)


@given(addresses(0x40), sizes(0x40))
def test_small_limits(addr: int, size: int) -> None:
    """Addresses stay below the limit, sizes may reach it."""
    assert 0 <= addr < 0x40
    assert 1 <= size <= 0x40


@given(addresses(), sizes())
def test_full_limits(addr: int, size: int) -> None:
    """By default all 64 bits."""
    assert 0 <= addr < 1 << 64
    assert 1 <= size <= 1 << 64


RARE: dict[str, Callable[[list[MemoryRegion]], bool]] = {
    "four deep": lambda regions: any(depth(each) >= 4 for each in regions),
    "alias of an alias": lambda regions: any(
        each.alias_target is not None and each.alias_target.alias_target is not None
        for each in regions
    ),
    "alias of a container with children": lambda regions: any(
        each.alias_target is not None and each.alias_target.subregions for each in regions
    ),
    "negative priority": lambda regions: any(each.priority < 0 for each in regions),
    "equal priorities": lambda regions: any(
        len({child.priority for child in each.subregions}) < len(each.subregions)
        for each in regions
    ),
    "a whole 64 bits below the root": lambda regions: any(
        each.size == 1 << 64 for each in regions[1:]
    ),
    "past the end": lambda regions: any(each.addr + each.size > 1 << 64 for each in regions),
    "disabled with children": lambda regions: any(
        not each.enabled and each.subregions for each in regions
    ),
    "a leaf with children": lambda regions: any(
        each.kind is RegionKind.RAM and each.subregions for each in regions
    ),
    "romd off": lambda regions: any(not each.romd_mode for each in regions),
    "read-only alias": lambda regions: any(
        each.readonly and each.kind is RegionKind.ALIAS for each in regions
    ),
    "a view of five ranges": lambda regions: len(FlatView.render(regions[0])) >= 5,
    "unmergeable neighbours": lambda regions: any(
        each.unmergeable and each.start for each in FlatView.render(regions[0])
    ),
}


def test_what_is_rare_is_found() -> None:
    """F1 to F6 are only tested by trees that have what they are about."""
    found: dict[str, int] = dict.fromkeys(RARE, 0)

    @settings(max_examples=150, database=None, derandomize=True)
    @given(tree_plans())
    def look(plan: TreePlan) -> None:
        regions = plan.build()
        for name, condition in RARE.items():
            found[name] += condition(regions)

    look()
    assert {name for name, count in found.items() if not count} == set()


def test_a_cycle_is_left_out() -> None:
    """A plan whose alias would show itself builds, without that alias in the tree."""
    plan = TreePlan(
        (
            RegionPlan(RegionKind.CONTAINER, 0x1000, 0, 0, 0),
            RegionPlan(RegionKind.ALIAS, 0x1000, 0, 0, 0, target=0),
        )
    )
    root, alias = plan.build()
    assert alias.container is None
    assert root.subregions == ()
