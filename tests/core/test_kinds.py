"""What a region can be, and how the flags of a range are packed."""

from __future__ import annotations

from memlistener import MemoryRegion, RegionKind
from memlistener.core import kinds


def test_flags_are_apart() -> None:
    """Each flag has a bit of its own, and the dirty-log mask sits above them."""
    flags = (kinds.READONLY, kinds.ROMD_MODE, kinds.NONVOLATILE, kinds.UNMERGEABLE)
    assert all(flag.bit_count() == 1 for flag in flags)
    assert len(set(flags)) == len(flags)
    assert all(flag < 1 << kinds.LOG_SHIFT for flag in flags)


def test_what_is_inherited() -> None:
    """F2: readonly, nonvolatile and unmergeable are; ROMD mode is a region's own."""
    assert kinds.INHERITED == kinds.READONLY | kinds.NONVOLATILE | kinds.UNMERGEABLE


def test_kinds_are_exported() -> None:
    """`RegionKind` is part of the public names, and `kind` gives one."""
    assert RegionKind is kinds.RegionKind
    assert MemoryRegion.reservation("gap", 1).kind is RegionKind.RESERVATION
    assert {each.value for each in RegionKind} >= {"container", "ram", "rom", "romd", "i/o"}
