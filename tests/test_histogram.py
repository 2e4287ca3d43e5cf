from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memlistener.histogram import Histogram

durations = st.one_of(st.integers(0, 200), st.integers(0, 1 << 40))


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(st.lists(durations, min_size=1), st.floats(0.0, 1.0))
def test_quantile_is_that_of_the_sorted_list(values: list[int], q: float) -> None:
    """A quantile is the sorted list's own, or up to one bucket (1/32 of it) above."""
    ordered = sorted(values)
    exact = next(v for rank, v in enumerate(ordered, 1) if rank >= q * len(ordered))
    assert exact <= filled(values).quantile(q) <= min(exact + exact // 32, ordered[-1])


@given(st.lists(durations))
def test_totals_are_exact(values: list[int]) -> None:
    """Count, total and maximum are not rounded."""
    histogram = filled(values)
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert histogram.maximum == max(values, default=0)
    assert histogram.quantile(1.0) == max(values, default=0)


@given(st.lists(durations, min_size=1), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_quantiles_ascend(values: list[int], p: float, q: float) -> None:
    """A larger share never has a smaller duration."""
    histogram = filled(values)
    assert histogram.quantile(min(p, q)) <= histogram.quantile(max(p, q))


def test_small_durations_are_exact() -> None:
    """Below 64 ns there is a bucket for each value."""
    histogram = filled(list(range(64)))
    assert [histogram.quantile((n + 1) / 64) for n in range(64)] == list(range(64))


def test_empty() -> None:
    """Where nothing was counted every quantile is 0."""
    assert Histogram().quantile(0.5) == 0


def test_constant_space() -> None:
    """A million different durations take a bucket per 3 %, not one each."""
    histogram = filled(list(range(0, 1 << 40, 1 << 20)))
    assert histogram.count == 1 << 20
    assert len(histogram._buckets) <= 32 * 40
