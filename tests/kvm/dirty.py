"""What tests of dirty logging share: writes of a guest, and which pages became known."""

from __future__ import annotations

import pytest

from memlistener import DirtyClient, MemoryRegion, RamBlock
from memlistener.kvm import DirtyLogMethod, Vcpu
from memlistener.testing import Halt, Write
from tests.kvm.rig import PAGE, Rig

VGA, CODE, MIGRATION = DirtyClient
BASE = 0x200000
PAGES = 16

by_method = pytest.mark.parametrize("method", DirtyLogMethod, ids=lambda each: each.value)


async def write(rig: Rig, vcpu: Vcpu, *addresses: int) -> None:
    """Have the guest write a byte at each address."""
    rig.load(vcpu, *(Write(addr, 1, 0x5A) for addr in addresses), Halt())
    await vcpu.run()


async def written(rig: Rig, block: RamBlock, client: DirtyClient = MIGRATION) -> list[int]:
    """Fetch and take: the numbers of the pages."""
    await rig.memory.dirty_log_sync()
    return taken(block, client)


def taken(block: RamBlock, client: DirtyClient = MIGRATION) -> list[int]:
    """Take without fetching: the numbers of the pages."""
    return [
        page
        for offset, size in block.take_dirty(client)
        for page in range(offset // PAGE, (offset + size) // PAGE)
    ]


def sixteen_pages(rig: Rig) -> MemoryRegion:
    """RAM that a test moves about."""
    ram = MemoryRegion.ram("ram", PAGES * PAGE)
    rig.system.add_subregion(BASE, ram)
    return ram
