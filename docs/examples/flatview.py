"""What a machine's map shows, as a unit test: no KVM, no threads, no event loop."""

from memlistener import FlatView, MemoryRegion, MemoryRegionOps

system = MemoryRegion.container("system", 1 << 32)
ram = MemoryRegion.ram("ram", 64 << 20)
bios = MemoryRegion.rom("bios", 0x20000)
uart = MemoryRegion.io("uart", 0x1000, MemoryRegionOps())

system.add_subregion(0, ram)
system.add_subregion_overlap(0xE0000, bios, 1)  # priority 1: lies over the RAM
system.add_subregion(0xFE000000, uart)

shown = str(FlatView.render(system))
print(shown)
assert (
    shown
    == """\
[0x0, 0xe0000) ram 'ram' +0x0
[0xe0000, 0x100000) rom 'bios' +0x0 readonly
[0x100000, 0x4000000) ram 'ram' +0x100000
[0xfe000000, 0xfe001000) i/o 'uart' +0x0"""
)

# The firmware switches itself off: the RAM below it is one range again.
bios.set_enabled(False)
found = FlatView.render(system).lookup(0xE0000)
print("at 0xe0000 there is now", found)
assert found is not None
assert found.region is ram
assert found.size == ram.size
