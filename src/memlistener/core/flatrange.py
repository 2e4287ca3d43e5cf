"""`FlatRange`: a run of addresses that shows one stretch of one region."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from memlistener.core.kinds import (
    LOG_SHIFT,
    NONVOLATILE,
    READONLY,
    ROMD_MODE,
    UNMERGEABLE,
)

if TYPE_CHECKING:
    from memlistener.core.region import MemoryRegion


class FlatRange(NamedTuple):
    """A run of addresses that shows one stretch of one region.

    A tuple, because views of a million are made and a frozen attrs class takes
    five times as long to construct.

    Attributes:
        start: First address.
        size: Bytes.
        region: What shows; never a container or an alias.
        offset: Where in ``region`` it starts, in bytes.
        flags: The flags below, packed.
    """

    start: int
    size: int
    region: MemoryRegion
    offset: int
    flags: int

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.start + self.size

    @property
    def readonly(self) -> bool:
        """Whether the region, or anything above it on the way, is read-only."""
        return bool(self.flags & READONLY)

    @property
    def romd_mode(self) -> bool:
        """Whether a ROM device is read as memory; True for other regions."""
        return bool(self.flags & ROMD_MODE)

    @property
    def nonvolatile(self) -> bool:
        """Whether the memory outlives the machine."""
        return bool(self.flags & NONVOLATILE)

    @property
    def unmergeable(self) -> bool:
        """Whether the range stays apart from its neighbours."""
        return bool(self.flags & UNMERGEABLE)

    @property
    def dirty_log_mask(self) -> int:
        """One bit for each client that logs writes to the range."""
        return self.flags >> LOG_SHIFT

    def __repr__(self) -> str:
        flags = "".join(
            f" {name}" for name in ("readonly", "nonvolatile", "unmergeable") if getattr(self, name)
        )
        if not self.flags & ROMD_MODE:
            flags += " not-romd"
        return (
            f"<FlatRange [{self.start:#x}, {self.end:#x}) {self.region.kind.value} "
            f"{self.region.name!r} +{self.offset:#x}{flags}>"
        )


def mergeable(left: FlatRange, right: FlatRange) -> bool:
    """Rule F6, for two ranges in ascending order."""
    return (
        left[2] is right[2]
        and left[0] + left[1] == right[0]
        and left[3] + left[1] == right[3]
        and left[4] == right[4]
        and not left[4] & UNMERGEABLE
    )


def merged(ranges: Iterable[FlatRange]) -> list[FlatRange]:
    """Ascending ranges with those made one that are to be (rule F6)."""
    found: list[FlatRange] = []
    last: FlatRange | None = None
    for each in ranges:
        if last is not None and last[2] is each[2] and mergeable(last, each):
            start, size, region, offset, flags = last
            last = found[-1] = FlatRange(start, size + each[1], region, offset, flags)
        else:
            found.append(each)
            last = each
    return found


def part(each: FlatRange, low: int, high: int) -> FlatRange:
    """What of a range lies in [low, high), which it covers."""
    start, _, region, offset, flags = each
    return FlatRange(low, high - low, region, offset + low - start, flags)
