"""Who logs writes, bit by bit."""

from __future__ import annotations

import pytest

from memlistener import DirtyClient, FlatView, MemoryRegion, RegionError
from memlistener.core.kinds import LOG_SHIFT


def test_clients_have_a_bit_each() -> None:
    """Several clients: the numbers are QEMU's, and no two share a bit."""
    assert [(each.name, each.value) for each in DirtyClient] == [
        ("VGA", 0),
        ("CODE", 1),
        ("MIGRATION", 2),
    ]


def test_clearing_one_leaves_the_others() -> None:
    """Several clients: set_log sets and clears one bit."""
    ram = MemoryRegion.ram("ram", 0x1000)
    for client in DirtyClient:
        ram.set_log(True, client)
    assert ram.dirty_log_mask == 0b111
    ram.set_log(False, DirtyClient.CODE)
    assert ram.dirty_log_mask == 0b101
    ram.set_log(False, DirtyClient.CODE)
    assert ram.dirty_log_mask == 0b101


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion.io("io", 0x1000, None),
        MemoryRegion.container("container", 0x1000),
        MemoryRegion.reservation("reservation", 0x1000),
        MemoryRegion.alias("alias", MemoryRegion.ram("ram", 0x1000), offset=0, size=0x1000),
    ],
    ids=lambda region: region.name,
)
def test_only_memory_is_logged(region: MemoryRegion) -> None:
    """Dirty logging: what has no memory has no dirty pages."""
    with pytest.raises(RegionError, match="no memory"):
        region.set_log(True, DirtyClient.VGA)
    assert region.dirty_log_mask == 0


def test_who_is_no_client() -> None:
    """Dirty logging: a client is a DirtyClient, and a switch is a bool."""
    ram = MemoryRegion.ram("ram", 0x1000)
    with pytest.raises(TypeError, match="not a DirtyClient"):
        ram.set_log(True, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a bool"):
        ram.set_log(1, DirtyClient.VGA)  # type: ignore[arg-type]


def test_masks_show_in_a_view() -> None:
    """F6: through aliases too; and the memory-wide mask is that of memory only."""
    root = MemoryRegion.container("root", 0x10000)
    ram = MemoryRegion.ram("ram", 0x1000)
    ram.set_log(True, DirtyClient.VGA)
    root.add_subregion(0, ram)
    root.add_subregion(0x2000, MemoryRegion.alias("window", ram, offset=0x800, size=0x100))
    root.add_subregion(0x4000, MemoryRegion.io("io", 0x1000, None))
    assert [each.dirty_log_mask for each in FlatView.render(root)] == [1, 1, 0]
    everything = 1 << DirtyClient.MIGRATION + LOG_SHIFT
    assert [each.dirty_log_mask for each in FlatView.render(root, log_mask=everything)] == [5, 5, 0]
