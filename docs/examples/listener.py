"""A listener hears what a transaction changed, and nothing else."""

import trio

from memlistener import MemoryListener, MemoryRegion, MemoryRegionSection, MemorySystem


class Tracer(MemoryListener):
    """Keeps what it hears; only the hooks that it defines are called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def region_add(self, section: MemoryRegionSection) -> None:
        """A stretch of a region has come into view."""
        start = section.offset_within_address_space
        self.heard.append(f"add [{start:#x}, {section.end:#x}) {section.region.name}")

    def region_del(self, section: MemoryRegionSection) -> None:
        """A stretch of a region has gone."""
        start = section.offset_within_address_space
        self.heard.append(f"del [{start:#x}, {section.end:#x}) {section.region.name}")

    async def commit(self) -> None:
        """All of it has been said. Slow work goes here; any hook may be async."""
        await trio.lowlevel.checkpoint()
        self.heard.append("commit")


async def main() -> None:
    """Put a window over the middle of some RAM."""
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", 0x10000)
    window = MemoryRegion.alias("window", ram, offset=0, size=0x1000)
    system.add_subregion(0, ram)  # no address space shows it yet: free to change

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)  # from here on it is live
    tracer = Tracer()
    await memory.register(tracer, space)  # hears the map as it is
    async with memory.transaction():
        system.add_subregion_overlap(0x8000, window, 1)

    print("\n".join(tracer.heard))
    assert tracer.heard == [
        "add [0x0, 0x10000) ram",
        "commit",
        "del [0x0, 0x10000) ram",
        "add [0x0, 0x8000) ram",
        "add [0x8000, 0x9000) ram",
        "add [0x9000, 0x10000) ram",
        "commit",
    ]


trio.run(main)
