"""Who logs writes, and which pages were written, bit by bit."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memlistener import DirtyClient, DirtyRanges, FlatView, MemoryRegion, RegionError
from memlistener.core.dirty import DirtyBitmap, is_empty, runs
from memlistener.core.kinds import LOG_SHIFT


def test_clients_have_a_bit_each() -> None:
    """Several clients: the numbers are QEMU's, and no two share a bit."""
    assert [(each.name, each.value) for each in DirtyClient] == [
        ("VGA", 0),
        ("CODE", 1),
        ("MIGRATION", 2),
    ]


def test_clearing_one_leaves_the_others() -> None:
    """Several clients: set_log sets and clears one bit."""
    ram = MemoryRegion.ram("ram", 0x1000)
    for client in DirtyClient:
        ram.set_log(True, client)
    assert ram.dirty_log_mask == 0b111
    ram.set_log(False, DirtyClient.CODE)
    assert ram.dirty_log_mask == 0b101
    ram.set_log(False, DirtyClient.CODE)
    assert ram.dirty_log_mask == 0b101


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion.io("io", 0x1000, None),
        MemoryRegion.container("container", 0x1000),
        MemoryRegion.reservation("reservation", 0x1000),
        MemoryRegion.alias("alias", MemoryRegion.ram("ram", 0x1000), offset=0, size=0x1000),
    ],
    ids=lambda region: region.name,
)
def test_only_memory_is_logged(region: MemoryRegion) -> None:
    """Dirty logging: what has no memory has no dirty pages."""
    with pytest.raises(RegionError, match="no memory"):
        region.set_log(True, DirtyClient.VGA)
    assert region.dirty_log_mask == 0


def test_who_is_no_client() -> None:
    """Dirty logging: a client is a DirtyClient, and a switch is a bool."""
    ram = MemoryRegion.ram("ram", 0x1000)
    with pytest.raises(TypeError, match="not a DirtyClient"):
        ram.set_log(True, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a bool"):
        ram.set_log(1, DirtyClient.VGA)  # type: ignore[arg-type]


def test_masks_show_in_a_view() -> None:
    """F6: through aliases too; and the memory-wide mask is that of memory only."""
    root = MemoryRegion.container("root", 0x10000)
    ram = MemoryRegion.ram("ram", 0x1000)
    ram.set_log(True, DirtyClient.VGA)
    root.add_subregion(0, ram)
    root.add_subregion(0x2000, MemoryRegion.alias("window", ram, offset=0x800, size=0x100))
    root.add_subregion(0x4000, MemoryRegion.io("io", 0x1000, None))
    assert [each.dirty_log_mask for each in FlatView.render(root)] == [1, 1, 0]
    everything = 1 << DirtyClient.MIGRATION + LOG_SHIFT
    assert [each.dirty_log_mask for each in FlatView.render(root, log_mask=everything)] == [5, 5, 0]


# ---- bitmaps: everything against sets of page numbers --------------------------------

PAGES = 200  # three words and a bit, so that all edges come up
spans = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(sorted)


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[int, bytes]:
    """A bitmap and the page of its bit 0."""
    return draw(st.integers(0, PAGES - 1)), draw(st.binary(max_size=40))


def set_bits(bitmap: bytes | bytearray, base: int = 0) -> set[int]:
    """The pages of a bitmap, the slow way."""
    return {
        base + 8 * index + bit
        for index, byte in enumerate(bitmap)
        for bit in range(8)
        if byte >> bit & 1
    }


def pages_of(bounds: Sequence[int]) -> set[int]:
    """The pages of runs, which have to be apart and in order."""
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert len(bounds) % 2 == 0
    return {
        page
        for low, high in zip(bounds[::2], bounds[1::2], strict=True)
        for page in range(low, high)
    }


class Bitmaps(RuleBasedStateMachine):
    """A `DirtyBitmap` and a set of pages are the same after whatever is done to both."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = DirtyBitmap(PAGES)
        self.pages: set[int] = set()

    @rule(span=spans)
    def mark(self, span: list[int]) -> None:
        self.bitmap.mark(*span)
        self.pages.update(range(*span))

    @rule(given=bitmaps())
    def merge(self, given: tuple[int, bytes]) -> None:
        first, bitmap = given
        self.bitmap.merge(first, bitmap)
        self.pages |= {page for page in set_bits(bitmap, first) if page < PAGES}

    @rule(span=spans)
    def take(self, span: list[int]) -> None:
        taken = self.bitmap.take(*span)
        wanted = self.pages & set(range(*span))
        assert set_bits(taken, span[0] & ~7) == wanted
        assert pages_of(runs(taken, span[0] & ~7)) == wanted
        self.pages -= wanted

    @rule(span=spans)
    def take_and_put_back(self, span: list[int]) -> None:
        self.bitmap.merge(span[0] & ~7, self.bitmap.take(*span))

    @invariant()
    def same(self) -> None:
        assert self.bitmap.count() == len(self.pages)
        assert {page for page in range(PAGES) if page in self.bitmap} == self.pages


TestBitmaps = Bitmaps.TestCase


@given(st.binary(max_size=40), st.integers(0, 1 << 40), st.integers(0, 3))
def test_runs(bitmap: bytes, base: int, chunks: int) -> None:
    """Runs are those of the bits, however long the bitmap: across the chunks too."""
    bitmap = b"\xff" * 512 * (chunks // 2) + bytes(512) * (chunks % 2) + bitmap
    assert pages_of(runs(bitmap, base)) == set_bits(bitmap, base)


@given(st.integers(0, 10000), st.none() | st.integers(0, 80000))
def test_is_empty(size: int, bit: int | None) -> None:
    """Of any length, and wherever the one bit is."""
    bitmap = bytearray(size)
    assert is_empty(bitmap)
    if bit is not None and bit < 8 * size:
        bitmap[bit >> 3] |= 1 << (bit & 7)
        assert not is_empty(bitmap)
        assert not is_empty(bytes(bitmap))


class TestDirtyRanges:
    """What a client gets: a sequence of (offset, size), in bytes."""

    def test_sequence(self) -> None:
        """The last page may be a part of one."""
        ranges = DirtyRanges(array("Q", [0, 1, 3, 5]), 0x4800)
        assert list(ranges) == [(0, 0x1000), (0x3000, 0x1800)]
        assert [ranges[0], ranges[-1]] == [(0, 0x1000), (0x3000, 0x1800)]
        assert ranges[1:] == [(0x3000, 0x1800)]
        assert len(ranges) == 2
        assert ranges.pages == 3
        assert ranges == [(0, 0x1000), (0x3000, 0x1800)]
        assert ranges != []
        assert ranges != 5
        with pytest.raises(IndexError):
            ranges[2]

    def test_repr(self) -> None:
        """In hex, and never a million of them."""
        assert repr(DirtyRanges(array("Q"), 0)) == "<DirtyRanges none>"
        many = DirtyRanges(array("Q", range(20)), 1 << 20)
        assert repr(many).startswith("<DirtyRanges [0x0, 0x1000), [0x2000, 0x3000), ")
        assert repr(many).endswith("... 10 ranges>")
