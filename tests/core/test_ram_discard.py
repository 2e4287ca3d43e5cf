"""Granules: which are populated, against a set of their numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import RegionError, RegionTypeError
from memlistener.core.ram_discard import DEFAULT_GRANULARITY, PopulatedGranules
from tests.trees import examples

PAGE = 0x1000
COUNT = 12
SIZE = COUNT * PAGE


@pytest.fixture
def granules() -> PopulatedGranules:
    return PopulatedGranules("dimm", SIZE, PAGE)


def test_nothing_at_first(granules: PopulatedGranules) -> None:
    """A device starts with all of it unplugged."""
    assert granules.runs(0, SIZE, populated=True) == []
    assert granules.runs(0, SIZE, populated=False) == [(0, SIZE)]


def test_a_granule_is_a_huge_page() -> None:
    """virtio-mem's, unless told otherwise."""
    assert PopulatedGranules("dimm", 1 << 30).granularity == DEFAULT_GRANULARITY == 0x200000


def test_neighbours_are_one_run(granules: PopulatedGranules) -> None:
    """Whatever the order in which they came."""
    for first in (0, 2, 1, 5):
        granules.mark(first * PAGE, (first + 1) * PAGE, populated=True)
    assert granules.runs(0, SIZE, populated=True) == [(0, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert granules.runs(PAGE, 6 * PAGE, populated=False) == [(3 * PAGE, 5 * PAGE)]


def test_runs_are_cut_anywhere(granules: PopulatedGranules) -> None:
    """A section may begin and end within a granule; an empty one has no runs."""
    granules.mark(PAGE, 3 * PAGE, populated=True)
    assert granules.runs(0x1800, 0x3001, populated=True) == [(0x1800, 0x3000)]
    assert granules.runs(0x1800, 0x3001, populated=False) == [(0x3000, 0x3001)]
    assert granules.runs(0x1800, 0x1800, populated=True) == []
    assert granules.runs(0x1800, 0x1800, populated=False) == []


numbers = st.integers(0, COUNT)
requests = st.lists(st.tuples(numbers, numbers, st.booleans()), max_size=20)


@given(requests, st.integers(0, SIZE), st.integers(0, SIZE))
@examples(dev=300, ci=1000)
def test_against_a_set(requests: list[tuple[int, int, bool]], low: int, high: int) -> None:
    """After any requests: the runs are those of a set of numbers, and none touch."""
    granules = PopulatedGranules("dimm", SIZE, PAGE)
    naive: set[int] = set()
    for first, end, populated in requests:
        numbers = set(range(first, end))
        new = {
            at // PAGE
            for start, stop in granules.runs(first * PAGE, end * PAGE, populated=not populated)
            for at in range(start, stop, PAGE)
        }
        assert new == (numbers - naive if populated else numbers & naive)
        granules.mark(first * PAGE, end * PAGE, populated=populated)
        naive = naive | numbers if populated else naive - numbers
    for populated in (True, False):
        runs = granules.runs(low, high, populated=populated)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs))
        for at in range(0, SIZE, 0x800):
            wanted = low <= at < high and (at // PAGE in naive) is populated
            assert any(start <= at < end for start, end in runs) is wanted
    both = granules.runs(low, high, populated=True) + granules.runs(low, high, populated=False)
    assert sum(end - start for start, end in both) == max(high - low, 0)


@pytest.mark.parametrize("granularity", [0, -PAGE, 0x800, 0x3000, 0x1001])
def test_bad_granularities(granularity: int) -> None:
    """A power of two from a page up, and it divides the size."""
    with pytest.raises(RegionError, match=r"granularity of 'dimm' is a power of two from 0x1000"):
        PopulatedGranules("dimm", SIZE, granularity)
    with pytest.raises(RegionError, match=r"size 0xc000 .* multiple of its granularity 0x200000"):
        PopulatedGranules("dimm", SIZE)


@pytest.mark.parametrize(("offset", "size"), [(0x800, PAGE), (0, 0x800), (0x800, 0x800)])
def test_part_of_a_granule(granules: PopulatedGranules, offset: int, size: int) -> None:
    """A request is of whole granules; says which range of what, and what they are."""
    with pytest.raises(
        RegionError, match=r"cannot populate \[0x.* of 'dimm': .* granularity 0x1000"
    ):
        granules.request("populate", offset, size)
    assert granules.within(offset, size) == (offset, offset + size)


@pytest.mark.parametrize(("offset", "size"), [(-PAGE, PAGE), (0, -PAGE), (PAGE, SIZE)])
def test_out_of_range(granules: PopulatedGranules, offset: int, size: int) -> None:
    """Within the stretch."""
    with pytest.raises(RegionError, match=r"is not within 'dimm', of which 0xc000 bytes"):
        granules.request("discard", offset, size)


@pytest.mark.parametrize(("offset", "size"), [("0", 0), (0, 1.0), (True, 0)])
def test_not_ints(granules: PopulatedGranules, offset: Any, size: Any) -> None:
    """Says what is none."""
    with pytest.raises(RegionTypeError, match="is an int, not"):
        granules.request("discard", offset, size)


@pytest.mark.parametrize("granularity", ["4096", 4096.0, None, True])
def test_granularity_is_an_int(granularity: Any) -> None:
    """And no bool."""
    with pytest.raises(RegionTypeError, match="granularity of 'dimm' is an int"):
        PopulatedGranules("dimm", SIZE, granularity)


def test_the_rest(granules: PopulatedGranules) -> None:
    """Without a size, up to the end; nothing is a range too."""
    assert granules.within(PAGE, None) == (PAGE, SIZE)
    assert granules.request("populate", SIZE, 0) == (SIZE, SIZE)
