"""What `memlistener.core.dirty` does to whole bitmaps, done by the extension.

A harvest at 1 % dirty takes a hundredth of the time that Python needs. Used from
the moment that the extension is loaded.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # array[int] is a type from Python 3.12 on only
    Functions: TypeAlias = tuple[
        Callable[[bytearray, int, bytes | bytearray, int], None],
        Callable[[bytes | bytearray, int], array[int]],
    ]


def bitmap_functions(ffi: Any, lib: Any) -> Functions:
    """The arguments of `memlistener.core.dirty.accelerate`."""

    def or_(bits: bytearray, at: int, bitmap: bytes | bytearray, size: int) -> None:
        assert at + size <= len(bits)
        assert size <= len(bitmap)
        lib.ml_bitmap_or(
            ffi.from_buffer("uint8_t[]", bits) + at, ffi.from_buffer("uint8_t[]", bitmap), size
        )

    def runs(bitmap: bytes | bytearray, base: int) -> array[int]:
        data = ffi.from_buffer("uint8_t[]", bitmap)
        size = len(bitmap)
        found = array("Q", bytes(8 * lib.ml_bitmap_bounds(data, size, base, ffi.NULL)))
        if found:
            lib.ml_bitmap_bounds(data, size, base, ffi.from_buffer("uint64_t[]", found))
        return found

    return or_, runs
