"""Dirty bits: who wants to know of writes, and which pages were written."""

from __future__ import annotations

import enum


class DirtyClient(enum.IntEnum):
    """Who logs writes (QEMU's ``DIRTY_MEMORY_*``); the value is the bit's number.

    Each has bits of its own: taking one client's leaves the others'.
    """

    VGA = 0
    CODE = 1
    MIGRATION = 2
