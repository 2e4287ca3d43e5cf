"""A transaction that fails, wherever it fails, leaves everything as it was."""

import trio

from memlistener import MemoryListener, MemoryRegion, MemoryRegionSection, MemorySystem
from memlistener.testing import RecordingListener


class NoMoreThan(MemoryListener):
    """Refuses sections above a size, as a kernel that runs out of something does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def region_add(self, section: MemoryRegionSection) -> None:
        """Raise, if the section is too long."""
        if section.size > self.limit:
            raise MemoryError(f"{section} is too long for me")


async def main() -> None:
    """Fail twice: in the transaction's own body, and in a listener."""
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", 0x1000)
    system.add_subregion(0, ram)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    recorder = RecordingListener()
    await memory.register(recorder, space)
    await memory.register(NoMoreThan(0x8000), space)
    before = space.view
    recorder.clear()

    # The body raises: no listener hears of it.
    try:
        async with memory.transaction():
            ram.set_address(0x4000)
            raise LookupError("the other half of the machine is missing")
    except LookupError as error:
        print("body:", error)
    assert ram.addr == 0
    assert recorder.trace == []

    # A listener raises: who had heard of it already hears the inverse.
    try:
        async with memory.transaction():
            system.add_subregion(0x10000, MemoryRegion.ram("more", 0x10000))
    except MemoryError as error:
        print("listener:", error)
    print("\n".join(recorder.trace))
    assert recorder.trace == [
        "begin",
        "region_add [0x10000, 0x20000) more+0x0",
        "begin",
        "region_del [0x10000, 0x20000) more+0x0",
        "commit",
    ]
    assert system.subregions == (ram,)
    assert space.view is before


trio.run(main)
