"""assert_flatview and assert_trace: what counts as equal, and what an error shows."""

from __future__ import annotations

import pytest

from memlistener import FlatView, MemoryRegion, MemorySystem
from memlistener.testing import RecordingListener, assert_flatview, assert_trace


@pytest.fixture
def root() -> MemoryRegion:
    """RAM with a device window in its middle, and a name that looks like a comment."""
    root = MemoryRegion.container("root", 1 << 64)
    root.add_subregion(0, MemoryRegion.ram("ram", 0x3000))
    root.add_subregion_overlap(0x1000, MemoryRegion.io("uart #0x01", 0x1000, None), 1)
    return root


LITERAL = """
    [0x0, 0x1000) ram 'ram' +0x0
    [0x1000, 0x2000) i/o 'uart #0x01' +0x0
    [0x2000, 0x3000) ram 'ram' +0x2000
"""


def test_equal(root: MemoryRegion) -> None:
    """A literal as printed is equal, for a view and for a root region."""
    assert_flatview(root, LITERAL)
    assert_flatview(FlatView.render(root), str(FlatView.render(root)))


def test_by_meaning(root: MemoryRegion) -> None:
    """Spelling of numbers, white space and comments do not count; names do."""
    assert_flatview(
        root,
        """
        # the low memory
        [0, 0x0000_1000)   ram 'ram' +0     # up to the window

        [4096, 0x2000) i/o 'uart #0x01' +0x0
        [0x2000, 0X3000) ram 'ram' +0x2_000
        """.replace("0X", "0x"),
    )
    with pytest.raises(AssertionError):
        assert_flatview(root, LITERAL.replace("#0x01", "#0x1"))


def test_difference(root: MemoryRegion) -> None:
    """The error marks what is missing and what is there instead, and shows it all."""
    with pytest.raises(AssertionError) as caught:
        assert_flatview(root, LITERAL.replace("0x2000) i/o", "0x2800) i/o"))
    text = str(caught.value)
    assert "- [0x1000, 0x2800) i/o 'uart #0x01' +0x0" in text
    assert "+ [0x1000, 0x2000) i/o 'uart #0x01' +0x0" in text
    assert "  [0x0, 0x1000) ram 'ram' +0x0" in text
    assert text.endswith(f"got:\n{FlatView.render(root)}")


def test_order_and_number_count(root: MemoryRegion) -> None:
    """A line missing, too many or out of place is a difference."""
    lines = LITERAL.strip().splitlines()
    for wrong in (lines[:2], [*lines, lines[0]], lines[::-1], []):
        with pytest.raises(AssertionError):
            assert_flatview(root, "\n".join(wrong))


def test_empty_view() -> None:
    """Nothing equals nothing, and the error says so where more was expected."""
    assert_flatview(FlatView(), "  # nothing\n")
    with pytest.raises(AssertionError, match=r"got:\n\(nothing\)"):
        assert_flatview(FlatView(), "[0x0, 0x1) ram 'ram' +0x0")


async def test_trace(root: MemoryRegion) -> None:
    """A listener's record is compared call by call."""
    memory = MemorySystem()
    space = memory.create_address_space("memory", root)
    listener = RecordingListener()
    await memory.register(listener, space)
    listener.clear()
    async with memory.transaction():
        root.subregions[0].set_enabled(False)
    expected = """
        begin
        region_del [0x0, 0x1000) ram+0x0
        region_del [0x1000, 0x2000) uart #0x01+0x0
        region_del [0x2000, 0x3000) ram+0x2000
        region_add [0x0, 0x3000) ram+0x0
        commit
    """
    heard = [each for each in listener.heard if "uart" not in str(each)]
    assert_trace(heard, "\n".join(line for line in expected.splitlines() if "uart" not in line))
    with pytest.raises(AssertionError, match="the trace is not as expected"):
        assert_trace(listener, "begin\ncommit")


@pytest.mark.parametrize("name", ["ram-010", "cpu#1", "a 0x10 b", "x+0x1", "10"])
async def test_names_in_traces_are_names(name: str) -> None:
    """A number in a name is no number, and a # no comment: what was got can be pasted."""
    memory = MemorySystem()
    space = memory.create_address_space("memory", MemoryRegion.ram(name, 0x1000))
    listener = RecordingListener()
    await memory.register(listener, space)
    got = "\n".join(listener.trace)
    assert_trace(listener, got)
    assert_trace(listener, got.replace("[0x0, 0x1000)", "[0, 4096)") + "  # comment +0x5")
    other = {"ram-010": "ram-10", "cpu#1": "cpu", "a 0x10 b": "a 16 b", "x+0x1": "x+1", "10": "0xa"}
    with pytest.raises(AssertionError):
        assert_trace(listener, got.replace(name, other[name]))
