"""RAM that is plugged in parts, and a back end that pins what is there of it."""

import itertools

import trio

from memlistener import (
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    RamDiscardListener,
    RamDiscardManager,
    RegionKind,
)

MIB = 1 << 20


class Pins(MemoryListener, RamDiscardListener):
    """What a device may access, in its addresses. VFIO would pin and map it."""

    def __init__(self) -> None:
        self.pinned: set[tuple[int, int]] = set()

    async def region_add(self, section: MemoryRegionSection) -> None:
        """RAM has come into view: all of it is there, or a manager knows what is."""
        manager = section.region.ram_discard_manager
        if manager is not None:
            await manager.register(self, section)  # calls populate for what is there
        elif section.region.kind is RegionKind.RAM:
            self.populate(section)

    async def region_del(self, section: MemoryRegionSection) -> None:
        """RAM has gone from view."""
        manager = section.region.ram_discard_manager
        if manager is not None:
            await manager.unregister(self, section)  # calls discard for what is there
        elif section.region.kind is RegionKind.RAM:
            self.discard(section)

    def populate(self, section: MemoryRegionSection) -> None:
        """Granule by granule, since any of them may go."""
        self.pinned |= self._granules(section)

    def discard(self, section: MemoryRegionSection) -> None:
        """Before the memory goes."""
        self.pinned -= self._granules(section)

    @staticmethod
    def _granules(section: MemoryRegionSection) -> set[tuple[int, int]]:
        manager = section.region.ram_discard_manager
        step = section.region.size if manager is None else manager.granularity
        start = section.offset_within_region
        end = start + section.size
        cuts = [start, *range((start // step + 1) * step, end, step), end]
        shift = section.offset_within_address_space - start
        return {(low + shift, high + shift) for low, high in itertools.pairwise(cuts)}


async def main() -> None:
    """Plug, use and unplug."""
    system = MemoryRegion.container("system", 1 << 32)
    system.add_subregion(0, MemoryRegion.ram("ram", MIB))
    dimm = MemoryRegion.ram("dimm", 64 * MIB)
    manager = RamDiscardManager(dimm)  # granules of 2 MiB; before anybody sees the region
    system.add_subregion(16 * MIB, dimm)

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    pins = Pins()
    await memory.register(pins, space)
    assert pins.pinned == {(0, MIB)}

    await manager.populate(0, 4 * MIB)
    await space.write(18 * MIB, b"data")
    print("pinned", [f"[{low:#x}, {high:#x})" for low, high in sorted(pins.pinned)])
    assert pins.pinned == {(0, MIB), (16 * MIB, 18 * MIB), (18 * MIB, 20 * MIB)}

    async with memory.transaction():
        dimm.set_address(32 * MIB)
    assert pins.pinned == {(0, MIB), (32 * MIB, 34 * MIB), (34 * MIB, 36 * MIB)}

    await manager.discard(2 * MIB, 2 * MIB)  # the host has its memory back
    print("pinned", [f"[{low:#x}, {high:#x})" for low, high in sorted(pins.pinned)])
    assert pins.pinned == {(0, MIB), (32 * MIB, 34 * MIB)}
    assert await space.read(34 * MIB, 4) == bytes(4)


trio.run(main)
