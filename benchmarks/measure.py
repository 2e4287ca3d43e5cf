"""`Figure`, what a benchmark returns, and the taking of samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs


@attrs.frozen(kw_only=True)
class Figure:
    """One line of the table.

    Attributes:
        what: What was done.
        n: How large the map was, or how many of something there were.
        unit: Of ``median``, ``p99`` and ``bar``: ``us``, ``ms``, ``s``, ``B`` or
            ``x`` (a ratio of two figures); empty for a number of things.
        median: Half of the samples are no larger. Of one sample, that.
        p99: 99 % of them are no larger; None where there are too few.
        bar: What the median shall not exceed; None where nothing was promised.
        note: What has to be known to read the figure.
    """

    what: str
    n: int | None = None
    unit: str = "us"
    median: float
    p99: float | None = None
    bar: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The median as a share of the bar; None where that is 0, or there is none."""
        return self.median / self.bar if self.bar else None

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        return None if self.bar is None else self.median <= self.bar


@attrs.frozen
class Settings:
    """How thoroughly to measure.

    Attributes:
        quick: Small sizes and few samples: to see that it runs, not for figures.
    """

    quick: bool = False

    def samples(self, full: int) -> int:
        """How many samples to take where ``full`` are wanted."""
        return max(full // 50, 4) if self.quick else full

    def sizes(self, *full: int) -> tuple[int, ...]:
        """Those of the sizes to measure: quickly, the small ones; at least one."""
        return tuple(each for each in full if each <= 1_000) or full[:1] if self.quick else full


class Skipped(Exception):
    """A benchmark cannot be run here, and why."""


Benchmark: TypeAlias = Callable[[Settings], list[Figure]]
Benchmarks: TypeAlias = Mapping[str, Benchmark]

_UNITS = {"us": 1e3, "ms": 1e6, "s": 1e9}  # in nanoseconds


def figure(
    what: str,
    samples: Iterable[float],
    *,
    n: int | None = None,
    unit: str = "us",
    bar: float | None = None,
    note: str = "",
) -> Figure:
    """The figure for samples that were taken in nanoseconds."""
    ordered = sorted(each / _UNITS[unit] for each in samples)
    return Figure(
        what=what,
        n=n,
        unit=unit,
        median=statistics.median(ordered),
        p99=quantile(ordered, 0.99) if len(ordered) >= 100 else None,
        bar=bar,
        note=note,
    )


def ratio(
    what: str,
    this: Sequence[float],
    that: Sequence[float],
    *,
    n: int | None = None,
    bar: float | None = None,
    of: Callable[[Sequence[float]], float] = statistics.median,
    note: str = "",
) -> Figure:
    """How many times ``that`` one takes, both in samples of one unit."""
    return Figure(what=what, n=n, unit="x", median=of(this) / of(that), bar=bar, note=note)


def quantile(ordered: Sequence[float], q: float) -> float:
    """A quantile of samples in ascending order."""
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def p99(samples: Sequence[float]) -> float:
    """What 99 % of the samples do not exceed."""
    return quantile(sorted(samples), 0.99)


def in_turns(
    alternatives: Mapping[str, Callable[[], object]], samples: int, *, block: int = 1
) -> dict[str, list[float]]:
    """Time calls of several functions, ``block`` of each in turn; nanoseconds by name.

    Each is called ``block`` times unmeasured first.
    """
    taken: dict[str, list[float]] = {name: [] for name in alternatives}
    clock = time.perf_counter_ns
    for warm in (True, *[False] * -(-samples // block)):
        for name, call in alternatives.items():
            into = taken[name]
            for _ in range(block):
                began = clock()
                call()
                took = clock() - began
                if not warm:
                    into.append(took)
    return taken
