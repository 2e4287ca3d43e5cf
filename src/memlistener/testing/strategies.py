"""Hypothesis strategies: trees of regions, and sequences of changes to them.

Trees come as a `TreePlan`, a frozen value that prints as what it is, shrinks
well, and builds the same tree as often as it is asked to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attrs
from hypothesis import strategies as st

from memlistener.core.kinds import RegionKind
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError

_BOUNDARIES = (0, 1, 0x10, 0x1000, 0x2000, 0x3000, 0x8000, 1 << 32, 1 << 63)
_SIZES = (1, 2, 0x10, 0x1000, 0x1800, 0x4000, 0x10000, 1 << 32, 1 << 63, 1 << 64)
_LEAVES = (
    RegionKind.RAM,
    RegionKind.ROM,
    RegionKind.ROM_DEVICE,
    RegionKind.IO,
    RegionKind.RESERVATION,
    RegionKind.IOMMU,
)
_HOLDERS = (RegionKind.CONTAINER, RegionKind.CONTAINER, RegionKind.CONTAINER, *_LEAVES)


@attrs.frozen
class RegionPlan:
    """One region of a `TreePlan`; ``into`` and ``target`` are indices of earlier ones."""

    kind: RegionKind
    size: int
    into: int
    addr: int
    priority: int
    enabled: bool = True
    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False
    romd_mode: bool = True
    target: int = 0
    offset: int = 0


@attrs.frozen
class TreePlan:
    """A recipe for a tree: region 0 is the root container, the others follow."""

    regions: tuple[RegionPlan, ...]

    def build(self, *, ops: object = None) -> list[MemoryRegion]:
        """Make the tree anew; the first region is its root.

        A region that cannot be added where the plan says (it would make a
        cycle) is left without a container.
        """
        made: list[MemoryRegion] = []
        for number, plan in enumerate(self.regions):
            region = _make(number, plan, made, ops)
            made.append(region)
            region.set_enabled(plan.enabled)
            if plan.readonly:
                region.set_readonly(True)
            region.set_nonvolatile(plan.nonvolatile)
            region.set_unmergeable(plan.unmergeable)
            if plan.kind is RegionKind.ROM_DEVICE:
                region.set_romd_mode(plan.romd_mode)
            if number and plan.into < number:
                holder = made[plan.into]
                if holder.kind is not RegionKind.ALIAS:
                    with contextlib.suppress(RegionError):  # it would make a cycle
                        holder.add_subregion_overlap(plan.addr, region, plan.priority)
        return made


def _make(number: int, plan: RegionPlan, made: list[MemoryRegion], ops: object) -> MemoryRegion:
    name = f"{plan.kind.value}{number}"
    if plan.kind is RegionKind.ALIAS:
        return MemoryRegion.alias(name, made[plan.target], offset=plan.offset, size=plan.size)
    makers: dict[RegionKind, Callable[[], MemoryRegion]] = {
        RegionKind.CONTAINER: lambda: MemoryRegion.container(name, plan.size),
        RegionKind.RAM: lambda: MemoryRegion.ram(name, plan.size),
        RegionKind.ROM: lambda: MemoryRegion.rom(name, plan.size),
        RegionKind.ROM_DEVICE: lambda: MemoryRegion.rom_device(name, plan.size, ops),
        RegionKind.IO: lambda: MemoryRegion.io(name, plan.size, ops),
        RegionKind.RESERVATION: lambda: MemoryRegion.reservation(name, plan.size),
        RegionKind.IOMMU: lambda: MemoryRegion.iommu(name, plan.size, _unmapped),
    }
    return makers[plan.kind]()


def _unmapped(*_: object) -> None:
    """An IOMMU that maps nothing."""


def addresses(limit: int = 1 << 64) -> st.SearchStrategy[int]:
    """Addresses below ``limit``: mostly small and round, so that things meet."""
    near = st.sampled_from([each for each in _BOUNDARIES if each < limit])
    return st.one_of(
        near,
        st.integers(0, min(limit, 0x40) - 1),
        st.integers(0, min(15, (limit - 1) // 0x800)).map(lambda n: n * 0x800),
        st.integers(0, limit - 1),
    )


def sizes(limit: int = 1 << 64) -> st.SearchStrategy[int]:
    """Sizes from 1 to ``limit`` bytes."""
    near = st.sampled_from([each for each in _SIZES if each <= limit])
    return st.one_of(near, near, st.integers(1, min(limit, 0x40)), st.integers(1, limit))


@st.composite
def tree_plans(
    draw: st.DrawFn, *, min_regions: int = 2, max_regions: int = 14, limit: int = 1 << 64
) -> TreePlan:
    """Trees with everything: nesting, aliases of aliases, overlaps, priorities.

    Args:
        draw: Given by Hypothesis.
        min_regions: At least so many regions, the root included.
        max_regions: At most so many.
        limit: Sizes and addresses stay below this many bytes.
    """
    count = draw(st.integers(min_regions, max_regions))
    root = RegionPlan(RegionKind.CONTAINER, limit, 0, 0, 0)
    plans = [root]
    rarely = st.sampled_from((False, False, False, False, True))
    for number in range(1, count):
        # The latest region is a likely holder: that makes deep trees.
        holders = [n for n in range(number) if plans[n].kind is not RegionKind.ALIAS]
        into = draw(st.one_of(st.just(holders[-1]), st.sampled_from(holders)))
        kind = draw(st.sampled_from((*_HOLDERS, RegionKind.ALIAS, RegionKind.ALIAS)))
        plans.append(
            RegionPlan(
                kind=kind,
                size=draw(sizes(limit)),
                into=into,
                addr=draw(addresses(draw(st.sampled_from((plans[into].size, limit))))),
                priority=draw(st.integers(-2, 2)),
                enabled=not draw(rarely),
                readonly=draw(rarely),
                nonvolatile=draw(rarely),
                unmergeable=draw(rarely),
                romd_mode=not draw(rarely),
                target=draw(st.integers(0, number - 1)) if kind is RegionKind.ALIAS else 0,
                offset=draw(addresses(limit)) if kind is RegionKind.ALIAS else 0,
            )
        )
    return TreePlan(tuple(plans))
