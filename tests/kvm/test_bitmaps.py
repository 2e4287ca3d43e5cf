"""What the extension does to bitmaps is what Python does to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.core import dirty
from memlistener.kvm import bindings, bitmaps

pytestmark = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))

# Long runs of either kind of byte, and anything between them.
data = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.integers(0, 600).map(bytes),
        st.integers(0, 600).map(lambda n: b"\xff" * n),
    ),
    max_size=5,
).map(b"".join)


@pytest.fixture(autouse=True)
def _in_python() -> Iterator[None]:
    """The module under comparison, without the extension's help."""
    fast = dirty._or, dirty._runs
    dirty.accelerate()
    yield
    dirty.accelerate(*fast)


def _functions() -> bitmaps.Functions:
    ffi, lib = bindings.load()
    return bitmaps.bitmap_functions(ffi, lib)


@given(data, st.integers(0, 1 << 50))
def test_runs(bitmap: bytes, base: int) -> None:
    """The same runs."""
    _, runs = _functions()
    assert runs(bitmap, base) == dirty.runs(bitmap, base)
    assert runs(bytearray(bitmap), base) == dirty.runs(bitmap, base)


@given(data, data, st.data())
def test_or(bits: bytes, bitmap: bytes, drawn: st.DataObject) -> None:
    """The same bits, and nothing touched outside of them."""
    or_, _ = _functions()
    at = drawn.draw(st.integers(0, len(bits)))
    size = drawn.draw(st.integers(0, min(len(bits) - at, len(bitmap))))
    one, two = bytearray(bits), bytearray(bits)
    or_(one, at, bitmap, size)
    dirty._or(two, at, bitmap, size)
    assert one == two
    with pytest.raises(AssertionError):
        or_(one, at, bitmap, len(bits) + 1)


def test_loading_the_extension_is_what_makes_them_used() -> None:
    """From then on nobody has to ask for them."""
    code = (
        "from memlistener.core import dirty; from memlistener.kvm import bindings;"
        "assert dirty._runs is dirty._runs_in_python; bindings.bindings();"
        "assert dirty._runs is not dirty._runs_in_python;"
        "assert dirty._or is not dirty._or_in_python"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
