"""What a region can be, and the flags of what it shows."""

from __future__ import annotations

import enum

LIMIT = 1 << 64  # one past the last address

# The flags of a flat range, packed into an int (a million ranges are made).
READONLY = 1
ROMD_MODE = 2
NONVOLATILE = 4
UNMERGEABLE = 8
INHERITED = READONLY | NONVOLATILE | UNMERGEABLE  # OR-ed downwards (rule F2)
LOG_SHIFT = 4  # the dirty-log mask sits above the flags


class RegionKind(enum.Enum):
    """What a region is; the value is QEMU's word for it in ``info mtree``."""

    CONTAINER = "container"
    RAM = "ram"
    ROM = "rom"
    ROM_DEVICE = "romd"
    IO = "i/o"
    ALIAS = "alias"
    RESERVATION = "reservation"
    IOMMU = "iommu"


# Kinds with a RamBlock behind them.
BACKED = frozenset({RegionKind.RAM, RegionKind.ROM, RegionKind.ROM_DEVICE})
