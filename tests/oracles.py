"""Independent oracles: the rules of flattening, done in the most obvious way.

Written from the numbered rules alone; slow, recursive, and sharing no code with
the library. `resolve` answers for one address (rule F8), `flatten` makes the
whole list of ranges as QEMU does (rules F1 to F6).
"""

from __future__ import annotations

import attrs

from memlistener import FlatRange, MemoryRegion, RegionKind

TOP = 1 << 64


@attrs.frozen(order=False)
class Shown:
    """A run of addresses and what shows there."""

    start: int
    size: int
    region: MemoryRegion
    offset: int
    readonly: bool
    nonvolatile: bool
    unmergeable: bool
    romd_mode: bool
    dirty_log_mask: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size

    @classmethod
    def of(cls, each: FlatRange) -> Shown:
        return cls(
            each.start,
            each.size,
            each.region,
            each.offset,
            each.readonly,
            each.nonvolatile,
            each.unmergeable,
            each.romd_mode,
            each.dirty_log_mask,
        )

    def at(self, addr: int) -> Shown:
        """One byte of it."""
        return attrs.evolve(self, start=addr, size=1, offset=self.offset + addr - self.start)


@attrs.frozen
class Flags:
    """What is OR-ed downwards (rule F2)."""

    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False

    def with_those_of(self, region: MemoryRegion) -> Flags:
        return Flags(
            self.readonly or region.readonly,
            self.nonvolatile or region.nonvolatile,
            self.unmergeable or region.unmergeable,
        )


def terminates(region: MemoryRegion) -> bool:
    return region.kind not in (RegionKind.CONTAINER, RegionKind.ALIAS)


def shown(region: MemoryRegion, start: int, size: int, offset: int, flags: Flags) -> Shown:
    return Shown(
        start,
        size,
        region,
        offset,
        flags.readonly,
        flags.nonvolatile,
        flags.unmergeable,
        region.romd_mode,
    )


def resolve(root: MemoryRegion, addr: int) -> Shown | None:
    """What shows at ``addr`` (rule F8), or None."""

    def within(region: MemoryRegion, offset: int, flags: Flags) -> Shown | None:
        if not region.enabled or not 0 <= offset < region.size:
            return None
        flags = flags.with_those_of(region)
        if region.alias_target is not None:
            return within(region.alias_target, region.alias_offset + offset, flags)
        for child in region.subregions:
            found = within(child, offset - child.addr, flags)
            if found is not None:
                return found
        return shown(region, addr, 1, offset, flags) if terminates(region) else None

    return within(root, addr - root.addr, Flags())


def flatten(root: MemoryRegion) -> list[Shown]:
    """All ranges, ascending and merged, by filling gaps (rules F1 to F6)."""
    ranges: list[Shown] = []

    def fill(region: MemoryRegion, base: int, low: int, high: int, flags: Flags) -> None:
        at = low
        index = 0
        while at < high:
            while index < len(ranges) and ranges[index].end <= at:
                index += 1
            if index < len(ranges) and ranges[index].start <= at:
                at = ranges[index].end
                continue
            upto = min(high, ranges[index].start) if index < len(ranges) else high
            ranges.insert(index, shown(region, at, upto - at, at - base, flags))
            at = upto

    def walk(region: MemoryRegion, base: int, low: int, high: int, flags: Flags) -> None:
        base += region.addr
        low, high = max(low, base), min(high, base + region.size)
        if low >= high or not region.enabled:
            return
        flags = flags.with_those_of(region)
        if region.alias_target is not None:
            target = region.alias_target
            walk(target, base - target.addr - region.alias_offset, low, high, flags)
            return
        for child in region.subregions:
            walk(child, base, low, high, flags)
        if terminates(region):
            fill(region, base, low, high, flags)

    walk(root, 0, 0, TOP, Flags())
    return merged(ranges)


def merged(ranges: list[Shown]) -> list[Shown]:
    """Neighbours joined (rule F6)."""
    result: list[Shown] = []
    for each in ranges:
        if result and joins(result[-1], each):
            result[-1] = attrs.evolve(result[-1], size=result[-1].size + each.size)
        else:
            result.append(each)
    return result


def joins(left: Shown, right: Shown) -> bool:
    return (
        left.end == right.start
        and left.region is right.region
        and left.offset + left.size == right.offset
        and left.dirty_log_mask == right.dirty_log_mask
        and left.romd_mode == right.romd_mode
        and left.readonly == right.readonly
        and left.nonvolatile == right.nonvolatile
        and not left.unmergeable
        and not right.unmergeable
    )
