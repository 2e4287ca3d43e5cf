"""How an access is fitted to a device: cutting it, and making it of what is implemented."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import AccessConstraints, MemoryRegionOps, MemTxAttrs, MemTxResult, RegionError
from memlistener.core.ops import constraints, endianness, implement, split
from tests.trees import examples

ACCESS_SIZES = (1, 2, 4, 8)


@st.composite
def access_constraints(draw: st.DrawFn) -> AccessConstraints:
    low, high = sorted(draw(st.tuples(*[st.sampled_from(ACCESS_SIZES)] * 2)))
    return AccessConstraints(low, high, draw(st.booleans()))


class TestConstraints:
    def test_defaults(self) -> None:
        """Any size from 1 to 8, aligned."""
        assert AccessConstraints() == AccessConstraints(1, 8, False)

    @pytest.mark.parametrize("size", [0, 3, 16, -1, "4"])
    def test_bad_sizes(self, size: int) -> None:
        """Sizes are 1, 2, 4 or 8."""
        with pytest.raises(RegionError, match="min_access_size is 1, 2, 4 or 8"):
            AccessConstraints(min_access_size=size)
        with pytest.raises(RegionError, match="max_access_size is 1, 2, 4 or 8"):
            AccessConstraints(max_access_size=size)

    def test_the_smallest_exceeds_the_largest(self) -> None:
        """Both are in the error."""
        with pytest.raises(RegionError, match="min_access_size 4 is more than max_access_size 2"):
            AccessConstraints(4, 2)

    @pytest.mark.parametrize("value", [AccessConstraints(), MemTxAttrs()])
    def test_frozen(self, value: AccessConstraints | MemTxAttrs) -> None:
        """Both can be shared by all."""
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            value.unaligned = True  # type: ignore[union-attr, misc]

    def test_any_object_has_constraints(self) -> None:
        """Ops need not be `MemoryRegionOps`; what they do not say is the default."""
        assert constraints(object()) == (AccessConstraints(), AccessConstraints())
        assert endianness(object()) == "little"

        class Ops(MemoryRegionOps):
            endianness = "big"
            valid = AccessConstraints(4, 4)
            impl = AccessConstraints(1, 1)

        assert constraints(Ops()) == (AccessConstraints(4, 4), AccessConstraints(1, 1))
        assert endianness(Ops()) == "big"


class TestDefaultOps:
    def test_refusal(self) -> None:
        """Ops that override nothing refuse reads and writes."""
        ops = MemoryRegionOps()
        assert ops.read(0, 1, MemTxAttrs()) is MemTxResult.ACCESS_ERROR
        assert ops.write(0, 0, 1, MemTxAttrs()) is MemTxResult.ACCESS_ERROR
        assert ops.thread_safe is False

    def test_results_combine(self) -> None:
        """A result is false when all went well, and keeps every reason when not."""
        assert not MemTxResult.OK
        both = MemTxResult.ERROR | MemTxResult.DECODE_ERROR
        assert both != MemTxResult.ERROR
        assert both & MemTxResult.ERROR
        assert not both & MemTxResult.ACCESS_ERROR


class TestSplit:
    @pytest.mark.parametrize(
        ("offset", "size", "valid", "expected"),
        [
            (0, 8, AccessConstraints(), [(0, 8)]),
            (0, 8, AccessConstraints(max_access_size=4), [(0, 4), (4, 4)]),
            (1, 4, AccessConstraints(), [(1, 1), (2, 2), (4, 1)]),
            (1, 4, AccessConstraints(unaligned=True), [(1, 4)]),
            (0, 7, AccessConstraints(), [(0, 4), (4, 2), (6, 1)]),
            (6, 16, AccessConstraints(), [(6, 2), (8, 8), (16, 4), (20, 2)]),
            (5, 0, AccessConstraints(), []),
        ],
    )
    def test_by_hand(
        self, offset: int, size: int, valid: AccessConstraints, expected: list[tuple[int, int]]
    ) -> None:
        """The largest power of two that is allowed, again and again."""
        assert list(split(offset, size, valid)) == expected

    @examples(dev=200, ci=600)
    @given(st.integers(0, 40), st.integers(0, 40), access_constraints())
    def test_covers_exactly(self, offset: int, size: int, valid: AccessConstraints) -> None:
        """Every byte once, in ascending order, in sizes and at offsets that a bus has."""
        parts = list(split(offset, size, valid))
        covered = [at + byte for at, length in parts for byte in range(length)]
        assert covered == list(range(offset, offset + size))
        for at, length in parts:
            assert length in ACCESS_SIZES
            assert length <= valid.max_access_size
            assert valid.unaligned or at % length == 0


class TestImplement:
    @pytest.mark.parametrize(
        ("offset", "size", "impl", "expected"),
        [
            (4, 4, AccessConstraints(), [(4, 4, 0)]),
            (8, 8, AccessConstraints(1, 2), [(8, 2, 0), (10, 2, 2), (12, 2, 4), (14, 2, 6)]),
            (5, 1, AccessConstraints(4, 4), [(4, 4, -1)]),
            (5, 1, AccessConstraints(4, 4, unaligned=True), [(5, 4, 0)]),
            (3, 2, AccessConstraints(4, 4), [(0, 4, -3), (4, 4, 1)]),
            (1, 4, AccessConstraints(), [(1, 1, 0), (2, 2, 1), (4, 1, 3)]),
            (1, 4, AccessConstraints(2, 4), [(0, 4, -1), (4, 2, 3)]),
            (1, 4, AccessConstraints(unaligned=True), [(1, 4, 0)]),
        ],
    )
    def test_by_hand(
        self,
        offset: int,
        size: int,
        impl: AccessConstraints,
        expected: list[tuple[int, int, int]],
    ) -> None:
        """Narrow ones are widened, wide ones cut, unaligned ones aligned."""
        assert implement(offset, size, impl) == expected

    @examples(dev=200, ci=1000)
    @given(
        st.integers(0, 40),
        st.sampled_from(ACCESS_SIZES),
        access_constraints(),
        st.binary(min_size=64, max_size=64),
    )
    def test_values_combine(
        self, offset: int, size: int, impl: AccessConstraints, memory: bytes
    ) -> None:
        """Calls of sizes that are implemented cover the access, and make its value."""
        calls = implement(offset, size, impl)
        value = 0
        for at, length, shift in calls:
            assert impl.min_access_size <= length <= impl.max_access_size
            assert impl.unaligned or at % length == 0
            part = int.from_bytes(memory[at : at + length], "little")
            value |= part << 8 * shift if shift >= 0 else part >> -8 * shift
        covered = [at + byte for at, length, _ in calls for byte in range(length)]
        assert covered == sorted(set(covered))
        assert set(range(offset, offset + size)) <= set(covered)
        mask = (1 << 8 * size) - 1
        assert value & mask == int.from_bytes(memory[offset : offset + size], "little")
        # No call is for nothing.
        assert all(at < offset + size and at + length > offset for at, length, _ in calls)
