"""The clients of dirty logging."""

from __future__ import annotations

import pytest

from memlistener import DirtyClient, MemoryRegion, RegionError


def test_numbers_are_qemus() -> None:
    """A client's value is the number of its bit, as in QEMU."""
    assert [each.name for each in DirtyClient] == ["VGA", "CODE", "MIGRATION"]
    assert list(DirtyClient) == [0, 1, 2]


def test_each_client_has_a_bit_of_its_own() -> None:
    """Turning one client's logging off leaves the others'."""
    ram = MemoryRegion.ram("ram", 0x1000)
    for client in DirtyClient:
        ram.set_log(True, client)
    assert ram.dirty_log_mask == 0b111
    ram.set_log(False, DirtyClient.CODE)
    assert ram.dirty_log_mask == 0b101


def test_only_memory_logs() -> None:
    """A region without memory has no writes to log, and a client is one of them."""
    with pytest.raises(RegionError, match="no memory"):
        MemoryRegion.io("dev", 0x1000, None).set_log(True, DirtyClient.VGA)
    with pytest.raises(TypeError, match="not a DirtyClient"):
        MemoryRegion.ram("ram", 0x1000).set_log(True, 7)  # type: ignore[arg-type]
