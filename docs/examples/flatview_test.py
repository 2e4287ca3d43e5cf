"""A machine's map and its changes, compared with what a person wrote down."""

import trio

from memlistener import AddressSpace, MemoryRegion, MemorySystem
from memlistener.testing import RecordingListener, assert_flatview, assert_trace

MAP = """
    [0x0,      0xa_0000)  ram 'ram' +0x0
    [0xa_0000, 0xc_0000)  i/o 'vga' +0x0      # hides the RAM below
    [0xc_0000, 0x10_0000) ram 'ram' +0xc_0000
"""


def build(memory: MemorySystem) -> tuple[AddressSpace, MemoryRegion]:
    """1 MiB of RAM with a VGA window in it."""
    system = MemoryRegion.container("system", 1 << 32)
    vga = MemoryRegion.io("vga", 0x20000, None)
    system.add_subregion(0, MemoryRegion.ram("ram", 1 << 20))
    system.add_subregion_overlap(0xA0000, vga, 1)
    return memory.create_address_space("memory", system), vga


def test_map(memory_system: MemorySystem) -> None:
    """`memory_system` is a fixture of the pytest plugin that memlistener brings."""
    space, _ = build(memory_system)
    assert_flatview(space.view, MAP)


async def test_window_goes_away(memory_system: MemorySystem) -> None:
    """What a listener hears when the VGA is switched off."""
    space, vga = build(memory_system)
    listener = RecordingListener()
    await memory_system.register(listener, space)
    listener.clear()
    async with memory_system.transaction():
        vga.set_enabled(False)
    assert_trace(
        listener,
        """
        begin
        region_del [0x0, 0xa0000) ram+0x0
        region_del [0xa0000, 0xc0000) vga+0x0
        region_del [0xc0000, 0x100000) ram+0xc0000
        region_add [0x0, 0x100000) ram+0x0
        commit
        """,
    )
    print("heard", len(listener.heard), "calls")


if __name__ == "__main__":
    test_map(MemorySystem())
    trio.run(test_window_goes_away, MemorySystem())
