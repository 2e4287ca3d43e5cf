"""A machine with one of everything that an address space can show."""

from __future__ import annotations

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs


class Register(MemoryRegionOps):
    """One device register, and a record of who used it how."""

    def __init__(self) -> None:
        self.value = 0x11223344
        self.log: list[tuple[str, int, int, MemTxAttrs]] = []

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        self.log.append(("read", offset, size, attrs))
        return self.value

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        self.log.append(("write", offset, size, attrs))
        self.value = value


class Machine:
    """RAM at 0, a read-only window onto it at 0x8000, ROM, a flash, a device, a reservation."""

    def __init__(self, *, unassigned_raises: bool = False) -> None:
        self.ops = Register()
        self.root = MemoryRegion.container("root", 1 << 64)
        self.ram = MemoryRegion.ram("ram", 0x2000)
        self.window = MemoryRegion.alias("window", self.ram, offset=0x1000, size=0x1000)
        self.window.set_readonly(True)
        self.root.add_subregion(0, self.ram)
        self.root.add_subregion(0x2000, MemoryRegion.rom("rom", 0x1000, data=b"firmware"))
        self.root.add_subregion(0x4000, MemoryRegion.rom_device("flash", 0x1000, self.ops))
        self.root.add_subregion(0x6000, MemoryRegion.io("device", 4, self.ops))
        self.root.add_subregion(0x7000, MemoryRegion.reservation("apic", 0x1000))
        self.root.add_subregion(0x8000, self.window)
        self.memory = MemorySystem()
        self.space = self.memory.create_address_space(
            "memory", self.root, unassigned_raises=unassigned_raises
        )
