"""K1: a flash chip: code in it, and commands that make it a device for a while."""

from __future__ import annotations

import trio

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs
from memlistener.testing import Fetch, Read, Write
from tests.kvm.rig import LONG_ENOUGH, PAGE, Rig

FLASH = 0x4000000
RET = b"\xc3"
STATUS = 0x80
READ_STATUS, READ_ARRAY = 0x70, 0xFF


class Flash(MemoryRegionOps):
    """Goes out of ROMD mode when it is asked for its status, and back at once when told to."""

    def __init__(self) -> None:
        self.region = MemoryRegion.rom_device("flash", 2 * PAGE, self, data=RET * 2 * PAGE)
        self.commands = 0

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        assert not self.region.romd_mode
        return STATUS

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        self.commands += 1
        await self.switch(value == READ_ARRAY)

    async def switch(self, romd_mode: bool) -> None:
        """In a transaction, of whichever task."""
        async with self.rig.memory.transaction():
            self.region.set_romd_mode(romd_mode)

    rig: Rig


async def test_k1_a_guest_drives_flash_that_it_runs_code_from(rig: Rig) -> None:
    """K1, B6: fetched from, then asked for its status, then fetched from again; and so on."""
    flash = Flash()
    flash.rig = rig
    rig.system.add_subregion(FLASH, flash.region)
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm,
            Fetch(FLASH + 0x10),
            Read(FLASH, 1),
            Write(FLASH, 1, READ_STATUS),
            Read(FLASH, 1),
            Write(FLASH, 1, READ_ARRAY),
            Fetch(FLASH + PAGE),
            loop=True,
        )
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_rounds(vcpu, 30)
                nursery.cancel_scope.cancel()
        statistics = vm.statistics()
    assert flash.commands >= 60
    assert rig.results(vcpu) == [RET[0], STATUS]
    assert statistics.holes == 0
    assert set(statistics.exits) == {"Mmio"}  # no InternalError, above all


async def test_k1_replaced_while_a_guest_fetches_from_it(rig: Rig) -> None:
    """K1, B1: two chips change places while a vCPU executes whichever is there."""
    flash = Flash()
    other = MemoryRegion.rom_device("other", 2 * PAGE, flash, data=RET * 2 * PAGE)
    other.set_romd_mode(False)
    rig.system.add_subregion_overlap(FLASH, flash.region, 0)
    rig.system.add_subregion_overlap(FLASH, other, 1)
    other.set_enabled(False)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Fetch(FLASH + 0x10), Fetch(FLASH + PAGE), loop=True)
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                for number in range(30):
                    await rig.wait_rounds(vcpu)
                    there = number % 2 == 0
                    async with rig.memory.transaction():
                        other.set_romd_mode(there)
                        other.set_enabled(there)
                        flash.region.set_romd_mode(not there)
                nursery.cancel_scope.cancel()
        statistics = vm.statistics()
    assert statistics.exits == {}
    assert statistics.gate.kicks >= 30
