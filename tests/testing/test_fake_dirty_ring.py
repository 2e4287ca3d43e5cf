"""The fake ring, and what the extension does to a real one: the same, entry by entry."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.kvm import bindings
from memlistener.testing.fake_dirty_ring import DirtyRing

ENTRIES = 256
_GFN = struct.Struct("=IIQ")  # struct kvm_dirty_gfn: flags, slot, offset
_DIRTY, _RESET = 1, 2


class KernelRing:
    """A ring in memory as the kernel has it: its side in Python, ours in C."""

    def __init__(self, place: int) -> None:
        self._ffi, self._lib = bindings.load()
        self._memory = bytearray(ENTRIES * _GFN.size)
        self._ring: Any = self._ffi.from_buffer(self._memory)
        self._next = self._ffi.new("uint32_t *", place)
        self._found = self._ffi.new("uint64_t[]", 2 * ENTRIES)
        self._dirty_index = self._reset_index = place

    def push(self, slot: int, page: int) -> None:
        """The kernel's."""
        _GFN.pack_into(self._memory, self._at(self._dirty_index), _DIRTY, slot, page)
        self._dirty_index += 1

    def reset(self) -> int:
        """The kernel's."""
        count = 0
        while True:
            flags, slot, page = _GFN.unpack_from(self._memory, self._at(self._reset_index))
            if not flags & _RESET:
                return count
            _GFN.pack_into(self._memory, self._at(self._reset_index), 0, slot, page)
            self._reset_index += 1
            count += 1

    def collect(self) -> list[tuple[int, int]]:
        """Ours."""
        count = self._lib.ml_collect_dirty_gfns(self._ring, ENTRIES, self._next, self._found)
        values = self._ffi.unpack(self._found, 2 * count)
        return list(zip(values[::2], values[1::2], strict=True))

    def skip(self, none: int) -> int:
        """Ours."""
        skipped: int = self._lib.ml_skip_dirty_gfns(self._ring, ENTRIES, self._next, none)
        return skipped

    @staticmethod
    def _at(index: int) -> int:
        return index % ENTRIES * _GFN.size


actions = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, ENTRIES + 20)),
        st.tuples(st.just("skip"), st.sampled_from((0, ENTRIES // 4))),
        st.tuples(st.sampled_from(("collect", "reset")), st.just(0)),
    ),
    max_size=30,
)


@pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))
@given(actions, st.sampled_from((0, (1 << 32) - ENTRIES)))
def test_as_the_extension(steps: list[tuple[str, int]], place: int) -> None:
    """Whatever is written, overwritten, found, skipped and taken back; and where places wrap."""
    fake, real = DirtyRing(ENTRIES, noticed_late=True), KernelRing(place)
    page = 0
    for what, how in steps:
        if what == "push":
            for _ in range(how):
                page += 1
                fake.push(page % 3, page)
                real.push(page % 3, page)
        elif what == "skip":
            assert fake.skip(how) == real.skip(how)
        elif what == "collect":
            assert fake.collect() == real.collect()
        else:
            assert fake.reset(lambda slot, page: None) == real.reset()


def test_full_with_some_room_left() -> None:
    """64 entries before its end a ring counts as full; taking entries back makes room."""
    ring = DirtyRing(ENTRIES, noticed_late=False)
    full: list[bool] = []
    for page in range(ENTRIES - 65):
        ring.push(0, page)
    full.append(ring.full)
    ring.push(0, ENTRIES)
    full.append(ring.full)
    assert len(ring.collect()) == ENTRIES - 64
    full.append(ring.full)
    protected: list[int] = []
    assert ring.reset(lambda slot, page: protected.append(page)) == ENTRIES - 64
    assert protected == [*range(ENTRIES - 65), ENTRIES]
    full.append(ring.full)
    assert full == [False, True, True, False]
