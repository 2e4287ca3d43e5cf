"""A range as a value, and what is made of two that touch."""

from __future__ import annotations

from typing import Any

import pytest

from memlistener import FlatRange, MemoryRegion
from memlistener.core.flatrange import mergeable, merged, part
from memlistener.core.kinds import NONVOLATILE, READONLY, ROMD_MODE, UNMERGEABLE

RAM = MemoryRegion.ram("ram", 0x1000)


def test_flags() -> None:
    """Every flag has its attribute."""
    for flag, name in (
        (READONLY, "readonly"),
        (ROMD_MODE, "romd_mode"),
        (NONVOLATILE, "nonvolatile"),
        (UNMERGEABLE, "unmergeable"),
    ):
        each = FlatRange(0, 1, RAM, 0, flag)
        names = ("readonly", "romd_mode", "nonvolatile", "unmergeable")
        assert [one for one in names if getattr(each, one)] == [name]
        assert each.dirty_log_mask == 0
    assert FlatRange(0, 1, RAM, 0, 0x50).dirty_log_mask == 5


def test_equal_by_content() -> None:
    """Two equal ranges are one key."""
    one, two = (FlatRange(0, 0x1000, RAM, 0, 0) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize("field", ["start", "size", "region", "offset", "flags"])
def test_unequal(field: str) -> None:
    """Any difference counts."""
    one = FlatRange(0, 0x1000, RAM, 0, 0)
    changed: dict[str, Any] = {field: MemoryRegion.ram("ram", 0x1000) if field == "region" else 1}
    two = one._replace(**changed)
    assert one != two
    assert (one == two) is False


def test_repr() -> None:
    """Half-open, hex, and the flags that are unusual."""
    assert (
        repr(FlatRange(0x1000, 0x800, RAM, 0x10, ROMD_MODE))
        == "<FlatRange [0x1000, 0x1800) ram 'ram' +0x10>"
    )
    flags = READONLY | NONVOLATILE | UNMERGEABLE
    assert repr(FlatRange(0, 1, RAM, 0, flags)).endswith(
        "+0x0 readonly nonvolatile unmergeable not-romd>"
    )


def test_immutable() -> None:
    """A range that somebody holds stays what it is."""
    each = FlatRange(0, 1, RAM, 0, 0)
    with pytest.raises(AttributeError):
        each.start = 1  # type: ignore[misc]


def test_mergeable() -> None:
    """F6: they touch, go on in one region, and are alike."""
    left = FlatRange(0x1000, 0x800, RAM, 0, ROMD_MODE)
    right = FlatRange(0x1800, 0x100, RAM, 0x800, ROMD_MODE)
    assert mergeable(left, right)
    other = MemoryRegion.ram("other", 0x1000)
    for changes in ({"start": 0x1801}, {"region": other}, {"offset": 0x900}, {"flags": READONLY}):
        assert not mergeable(left, right._replace(**changes))
    apart = [each._replace(flags=UNMERGEABLE) for each in (left, right)]
    assert not mergeable(*apart)
    assert merged(apart) == apart
    assert merged([left, right, right._replace(start=0x2000)]) == [
        FlatRange(0x1000, 0x900, RAM, 0, ROMD_MODE),
        FlatRange(0x2000, 0x100, RAM, 0x800, ROMD_MODE),
    ]


def test_part() -> None:
    """The offset goes along with the address."""
    whole = FlatRange(0x1000, 0x800, RAM, 0x100, READONLY)
    assert part(whole, 0x1000, 0x1800) == whole
    assert part(whole, 0x1200, 0x1400) == FlatRange(0x1200, 0x200, RAM, 0x300, READONLY)
