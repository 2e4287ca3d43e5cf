"""Waiting times, kept in constant space: what a bracket cost, however often it ran."""

from __future__ import annotations

_STEPS = 5  # bits of each value that are kept: buckets are at most 3 % wide


class Histogram:
    """Counts of durations by size, each kept to within 3 %."""

    __slots__ = ("_buckets", "count", "maximum", "total")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.maximum = 0

    def add(self, nanoseconds: int) -> None:
        """Count one duration."""
        shift = max(nanoseconds.bit_length() - _STEPS - 1, 0)
        bucket = (shift << (_STEPS + 1)) + (nanoseconds >> shift)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += nanoseconds
        if nanoseconds > self.maximum:
            self.maximum = nanoseconds

    def quantile(self, q: float) -> int:
        """The duration, in nanoseconds, that a share ``q`` of all do not exceed."""
        if not self.count:
            return 0
        wanted = q * self.count
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                shift = bucket >> (_STEPS + 1)
                top = (((bucket & ((2 << _STEPS) - 1)) + 1) << shift) - 1
                return min(top, self.maximum)
        return self.maximum
