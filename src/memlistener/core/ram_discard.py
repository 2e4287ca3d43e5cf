"""Which granules of a region's RAM are populated, and what of a request is new.

A memory device plugs and unplugs parts of its RAM. The region stays as it is, and
so does the view: what comes and goes is the backing, in *granules* of one size. Who
keeps RAM pinned is told of that (`memlistener.ram_discard`).

Here is what needs no waiting: the granules themselves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from memlistener.errors import RegionError, RegionTypeError

DEFAULT_GRANULARITY = 2 << 20  # virtio-mem's on x86: a transparent huge page
SMALLEST_GRANULARITY = 0x1000


class PopulatedGranules:
    """The populated part of a stretch of RAM; none of it at first.

    Args:
        name: Whose, for errors.
        size: Of all, in bytes.
        granularity: What requests are multiples of, in bytes.

    Raises:
        RegionError: The granularity is no power of two from 4096 up, or the size is
            no multiple of it.
    """

    __slots__ = ("_bounds", "_name", "granularity", "size")

    def __init__(self, name: str, size: int, granularity: int = DEFAULT_GRANULARITY) -> None:
        _check_int(f"granularity of {name!r}", granularity)
        if granularity < SMALLEST_GRANULARITY or granularity & (granularity - 1):
            raise RegionError(
                f"granularity of {name!r} is a power of two from {SMALLEST_GRANULARITY:#x} up, "
                f"not {granularity:#x}"
            )
        if size % granularity:
            raise RegionError(
                f"size {size:#x} of {name!r} is not a multiple of its granularity "
                f"{granularity:#x}: choose a smaller granularity, or another size"
            )
        self._name = name
        self.size = size
        self.granularity = granularity
        # Where populated begins and where it ends, in turn, ascending: a place with an
        # odd number of bounds up to it is populated. A guest plugs long runs, so this
        # is short where a bitmap would be long.
        self._bounds: list[int] = []

    def request(self, what: str, offset: int, size: int) -> tuple[int, int]:
        """The bounds of a range that somebody wants to ``what``: whole granules.

        Raises:
            RegionError: The range is not that, or not within the stretch.
        """
        low, high = self.within(offset, size)
        if (low | high) & (self.granularity - 1):
            raise RegionError(
                f"cannot {what} [{low:#x}, {high:#x}) of {self._name!r}: both ends have to be "
                f"multiples of its granularity {self.granularity:#x}"
            )
        return low, high

    def within(self, offset: int, size: int | None) -> tuple[int, int]:
        """The bounds of any range; ``size`` None for all the rest.

        Raises:
            RegionError: It is not within the stretch.
        """
        _check_int(f"offset in {self._name!r}", offset)
        if size is None:
            size = self.size - offset
        _check_int(f"size of a range of {self._name!r}", size)
        if offset < 0 or size < 0 or offset + size > self.size:
            raise RegionError(
                f"[{offset:#x}, {offset + size:#x}) is not within {self._name!r}, of which "
                f"{self.size:#x} bytes can be populated"
            )
        return offset, offset + size

    def runs(self, low: int, high: int, *, populated: bool) -> list[tuple[int, int]]:
        """The longest runs of [low, high) that are populated, or that are not, ascending.

        So what a request to populate a range has to do is what is not populated of it.
        """
        bounds = self._bounds
        first, last = bisect_right(bounds, low), bisect_left(bounds, high)
        edges = [low, *bounds[first:last], high] if low < high else []
        skipped = bool(first & 1) is not populated
        return list(zip(edges[skipped::2], edges[skipped + 1 :: 2], strict=False))

    def mark(self, low: int, high: int, *, populated: bool) -> None:
        """From now on all of [low, high) is populated, or none of it."""
        if low >= high:
            return
        bounds = self._bounds
        # Bounds at the ends themselves go too: what they divided is alike now.
        first, last = bisect_left(bounds, low), bisect_right(bounds, high)
        new = []
        if bool(first & 1) is not populated:
            new.append(low)
        if bool(last & 1) is not populated:
            new.append(high)
        bounds[first:last] = new


def _check_int(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RegionTypeError(f"{what} is an int, not {value!r}")
