"""Dirty bits: who wants to know of writes, which pages were written, and taking them.

A `DirtyBitmap` has a bit for each page, as the kernel's bitmaps have: bit ``n %
8`` of byte ``n // 8``. Two things are done to it as a whole: a bitmap that the
kernel gave is merged into it, and the pages in it are taken as runs. A guest of
64 GiB has 2 MiB of bitmap, nearly all of it zero, so both have to pass over
zeros at the speed of memory: they compare in chunks, and where the C extension
is loaded it does it all (`accelerate`).
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import overload

DIRTY_PAGE_SIZE = 4096
_PAGE_SHIFT = 12


class DirtyClient(enum.IntEnum):
    """Who logs writes (QEMU's ``DIRTY_MEMORY_*``); the value is the bit's number.

    Each has bits of its own: taking one client's leaves the others'.
    """

    VGA = 0
    CODE = 1
    MIGRATION = 2


ALL_CLIENTS = (1 << len(DirtyClient)) - 1


class DirtyRanges(Sequence[tuple[int, int]]):
    """Stretches of dirty memory in ascending order: ``(offset, size)`` each, in bytes.

    They neither touch nor overlap. Kept in two machine words each, so that a
    million of them is nothing to be afraid of.
    """

    __slots__ = ("_bounds", "_size")

    def __init__(self, runs: array[int], limit: int) -> None:
        """Runs of pages.

        Args:
            runs: For each the first page, and the page after the last.
            limit: Bytes of the memory, whose last page may be a part of one.
        """
        self._bounds = runs
        self._size = limit

    @property
    def pages(self) -> int:
        """How many pages they have."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        bounds = iter(self._bounds)
        for first, end in zip(bounds, bounds, strict=True):
            offset = first << _PAGE_SHIFT
            yield offset, min(end << _PAGE_SHIFT, self._size) - offset

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[int, int]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, int] | Sequence[tuple[int, int]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"range {index} of {len(self)}")
        at = 2 * (index % len(self))
        offset = self._bounds[at] << _PAGE_SHIFT
        return offset, min(self._bounds[at + 1] << _PAGE_SHIFT, self._size) - offset

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DirtyRanges | list | tuple):
            return list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it compares equal to lists

    def __repr__(self) -> str:
        shown = ", ".join(f"[{at:#x}, {at + size:#x})" for at, size in self[:4])
        more = f", ... {len(self)} ranges" if len(self) > 4 else ""
        return f"<DirtyRanges {shown or 'none'}{more}>"


class DirtyBitmap:
    """A bit for each page of a stretch of memory.

    Not thread-safe: whoever has one has a lock.

    Args:
        pages: How many.
    """

    __slots__ = ("_bits", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._bits = bytearray((pages + 7) >> 3)

    def mark(self, first: int, end: int) -> None:
        """Set the bits of the pages [first, end)."""
        bits = self._bits
        if end - first == 1:
            bits[first >> 3] |= 1 << (first & 7)
        elif first < end:
            low, high = first >> 3, (end - 1) >> 3
            head, tail = _masks(first, end)
            if low == high:
                bits[low] |= head & tail
            else:
                bits[low] |= head
                bits[low + 1 : high] = b"\xff" * (high - low - 1)
                bits[high] |= tail

    def merge(self, first: int, bitmap: bytes | bytearray) -> None:
        """Set the bits that ``bitmap`` has set; its bit 0 is page ``first``.

        Bits beyond the last page are nobody's, and ignored.
        """
        if first & 7:
            value = int.from_bytes(bitmap, "little") << (first & 7)
            bitmap = value.to_bytes(len(bitmap) + 1, "little")
        at = first >> 3
        size = min(len(bitmap), len(self._bits) - at)
        _or(self._bits, at, bitmap, size)
        if self.pages & 7:
            self._bits[-1] &= (1 << (self.pages & 7)) - 1

    def take(self, first: int, end: int) -> bytes | bytearray:
        """Clear the bits of the pages [first, end), and return them.

        Returns:
            A bitmap whose bit 0 is page ``first & ~7``, with nothing set outside
            of [first, end): `merge` puts it back.
        """
        if first >= end:
            return b""
        bits = self._bits
        if not first and end == self.pages:
            self._bits = bytearray(len(bits))
            return bits
        low, high = first >> 3, (end + 7) >> 3
        head, tail = _masks(first, end)
        part = bits[low:high]
        part[0] &= head
        part[-1] &= tail
        bits[low + 1 : high - 1] = bytes(max(high - low - 2, 0))
        bits[low] &= ~part[0]
        bits[high - 1] &= ~part[-1]
        return part

    def __contains__(self, page: int) -> bool:
        return bool(self._bits[page >> 3] >> (page & 7) & 1)

    def count(self) -> int:
        """How many bits are set."""
        return int.from_bytes(self._bits, "little").bit_count()


def _masks(first: int, end: int) -> tuple[int, int]:
    """Of the pages [first, end), those in the byte of the first, and in that of the last."""
    return 0xFF << (first & 7) & 0xFF, 0xFF >> (-end & 7)


def runs(bitmap: bytes | bytearray, base: int = 0) -> array[int]:
    """The runs of set bits: for each, the first page and the page after the last.

    Args:
        bitmap: One bit a page.
        base: The page of its bit 0.
    """
    return _runs(bitmap, base)


def is_empty(bitmap: bytes | bytearray) -> bool:
    """Whether no bit is set."""
    whole = len(bitmap) - len(bitmap) % len(_ZEROS)
    return all(bitmap.startswith(_ZEROS, at) for at in range(0, whole, len(_ZEROS))) and not any(
        bitmap[whole:]
    )


# ---- what is done to many bytes -----------------------------------------------------

# To compare a chunk with zeros costs 100 ns up to this size, and then grows; a chunk
# that is not zero costs microseconds whatever its size.
_CHUNK = 512
_ZEROS = bytes(4096)
_CHUNK_OF_ZEROS = bytes(_CHUNK)


def _or_in_python(bits: bytearray, at: int, bitmap: bytes | bytearray, size: int) -> None:
    for low in range(0, size, _CHUNK):
        part = bitmap[low : min(low + _CHUNK, size)]
        if part == _CHUNK_OF_ZEROS:
            continue
        where = slice(at + low, at + low + len(part))
        both = int.from_bytes(bits[where], "little") | int.from_bytes(part, "little")
        bits[where] = both.to_bytes(len(part), "little")


def _runs_in_python(bitmap: bytes | bytearray, base: int) -> array[int]:
    found = array("Q")
    for low in range(0, len(bitmap), _CHUNK):
        part = bitmap[low : low + _CHUNK]
        if part == _CHUNK_OF_ZEROS:
            continue
        left = int.from_bytes(part, "little")
        page = base + 8 * low
        while left:
            zeros = (left & -left).bit_length() - 1
            left >>= zeros
            ones = (~left & (left + 1)).bit_length() - 1
            left >>= ones
            page += zeros
            if found and found[-1] == page:  # it goes on from the chunk before
                found[-1] = page + ones
            else:
                found.append(page)
                found.append(page + ones)
            page += ones
    return found


_or: Callable[[bytearray, int, bytes | bytearray, int], None] = _or_in_python
_runs: Callable[[bytes | bytearray, int], array[int]] = _runs_in_python


def accelerate(
    or_: Callable[[bytearray, int, bytes | bytearray, int], None] = _or_in_python,
    runs: Callable[[bytes | bytearray, int], array[int]] = _runs_in_python,
) -> None:
    """Do the work on many bytes with other functions from now on; without any, in Python.

    Args:
        or_: ``(bits, at, bitmap, size)``: or the first ``size`` bytes of ``bitmap``
            into ``bits[at:]``.
        runs: ``(bitmap, base)``: as the function `runs`.
    """
    global _or, _runs
    _or, _runs = or_, runs
