"""Accesses through IOMMU regions: translated page by page, refused where not allowed."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    IommuAccess,
    IommuOps,
    IommuTlbEntry,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RegionError,
    RegionTypeError,
    UnassignedAccessError,
    dispatch,
)
from tests.trees import examples

NONE, READ, WRITE = IommuAccess.NONE, IommuAccess.READ, IommuAccess.WRITE
DEVICE = MemTxAttrs(requester_id=7)


class Table(IommuOps):
    """A page table: page number -> (target, address there, what is allowed)."""

    def __init__(self, page_size: int = 0x1000) -> None:
        self.min_page_size = page_size
        self.pages: dict[int, tuple[AddressSpace, int, IommuAccess]] = {}
        self.asked: list[tuple[int, IommuAccess, MemTxAttrs]] = []

    def translate(self, addr: int, access: IommuAccess, attrs: MemTxAttrs) -> IommuTlbEntry | None:
        self.asked.append((addr, access, attrs))
        found = self.pages.get(addr // self.min_page_size)
        if found is None:
            return None
        space, where, perm = found
        return IommuTlbEntry(space, where, self.min_page_size - 1, perm)


class Machine:
    """RAM of 0x8000 at 0 of "memory"; a device's space, with an IOMMU of 0x10000 at 0x10000."""

    def __init__(self, translate: Any = None, *, unassigned_raises: bool = False) -> None:
        self.memory = MemorySystem()
        self.ram = MemoryRegion.ram("ram", 0x8000)
        self.system = MemoryRegion.container("system", 1 << 64)
        self.system.add_subregion(0, self.ram)
        self.space = self.memory.create_address_space("memory", self.system)
        self.table = Table()
        self.iommu = MemoryRegion.iommu("iommu", 0x10000, translate or self.table)
        self.bus = MemoryRegion.container("bus", 1 << 32)
        self.bus.add_subregion(0x10000, self.iommu)
        self.device = self.memory.create_address_space(
            "device", self.bus, unassigned_raises=unassigned_raises
        )

    def map(self, page: int, addr: int, perm: IommuAccess = READ | WRITE) -> None:
        self.table.pages[page] = (self.space, addr, perm)


@pytest.fixture
def machine() -> Machine:
    return Machine()


async def test_read_and_write(machine: Machine) -> None:
    """An access goes where its page is; translate hears offset, access and who asks."""
    machine.map(3, 0x5000)
    assert await machine.device.write(0x13010, b"dma", DEVICE) == MemTxResult.OK
    assert bytes(machine.ram.block.view[0x5010:0x5013]) == b"dma"
    assert await machine.device.read_result(0x13010, 3, DEVICE) == (b"dma", MemTxResult.OK)
    assert machine.table.asked == [(0x3010, WRITE, DEVICE), (0x3010, READ, DEVICE)]
    assert machine.device.unassigned_accesses == 0


async def test_page_boundaries(machine: Machine) -> None:
    """An access over two pages is two accesses, to wherever they are."""
    machine.map(0, 0x7000)
    machine.map(1, 0x2000)
    assert await machine.device.write(0x10FFE, b"abcd") == MemTxResult.OK
    view = machine.ram.block.view
    assert (bytes(view[0x7FFE:0x8000]), bytes(view[0x2000:0x2002])) == (b"ab", b"cd")
    assert await machine.device.read(0x10FFE, 4) == b"abcd"


async def test_permissions(machine: Machine) -> None:
    """What a page does not allow gives ACCESS_ERROR and all ones; what it allows is done."""
    machine.map(0, 0x1000, READ)
    machine.map(1, 0x2000, WRITE)
    ones = b"\xff" * 2
    assert await machine.device.write(0x10FFE, b"abcd") == MemTxResult.ACCESS_ERROR
    assert bytes(machine.ram.block.view[0x1FFE:0x2002]) == b"\0\0cd"
    assert await machine.device.read_result(0x10FFE, 4) == (
        b"\0\0" + ones,
        MemTxResult.ACCESS_ERROR,
    )
    assert machine.device.unassigned_accesses == 0


async def test_nothing_mapped(machine: Machine) -> None:
    """None, NONE and a page beside a mapped one: refused up to the end of the page only."""
    machine.map(1, 0x2000)
    machine.ram.block.view[0x2000:0x2002] = b"ok"
    refused = (b"\xff\xffok", MemTxResult.ACCESS_ERROR)
    assert await machine.device.read_result(0x10FFE, 4) == refused
    machine.map(0, 0x1000, NONE)
    assert await machine.device.read_result(0x10FFE, 4) == refused
    assert await machine.device.write(0x12000, b"x") == MemTxResult.ACCESS_ERROR


async def test_unassigned_in_the_target(machine: Machine) -> None:
    """K5: it counts in the address space in which the access was made."""
    machine.map(0, 0x9000)
    assert await machine.device.read_result(0x10000, 2) == (b"\xff\xff", MemTxResult.DECODE_ERROR)
    assert await machine.device.write(0x10000, b"x") == MemTxResult.DECODE_ERROR
    assert (machine.device.unassigned_accesses, machine.space.unassigned_accesses) == (2, 0)
    strict = Machine(unassigned_raises=True)
    strict.map(0, 0x9000)
    with pytest.raises(UnassignedAccessError, match="at 0x10000 in 'device'"):
        await strict.device.read(0x10000, 1)


async def test_beside_other_regions(machine: Machine) -> None:
    """Parts before and after the IOMMU are served as ever."""
    async with machine.memory.transaction():
        machine.bus.add_subregion(0xF000, MemoryRegion.rom("rom", 0x1000, data=b"\x11" * 0x1000))
    machine.map(0, 0)
    machine.ram.block.view[:2] = b"ab"
    assert await machine.device.read(0xFFFE, 4) == b"\x11\x11ab"


async def test_offset_within_the_region(machine: Machine) -> None:
    """Through an alias, translate hears offsets in the region that it belongs to."""
    async with machine.memory.transaction():
        window = MemoryRegion.alias("window", machine.iommu, offset=0x3000, size=0x1000)
        machine.bus.add_subregion(0x80000, window)
    machine.map(3, 0)
    await machine.device.write(0x80004, b"x")
    assert machine.table.asked == [(0x3004, WRITE, MemTxAttrs())]
    assert machine.ram.block.view[4] == ord("x")


async def test_readonly_alias(machine: Machine) -> None:
    """F2: a read-only way to an IOMMU refuses writes before anybody is asked."""
    async with machine.memory.transaction():
        machine.iommu.set_readonly(True)
    machine.map(0, 0)
    assert await machine.device.write(0x10000, b"x") == MemTxResult.ACCESS_ERROR
    assert machine.table.asked == []
    assert await machine.device.read(0x10000, 1) == b"\0"


async def test_ops_behind_an_iommu(machine: Machine) -> None:
    """A device is reached with its own offsets, and with the attributes of the access."""
    log: list[tuple[int, int, MemTxAttrs]] = []

    class Doorbell(MemoryRegionOps):
        async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
            await trio.lowlevel.checkpoint()
            log.append((offset, value, attrs))

    async with machine.memory.transaction():
        machine.system.add_subregion(0xC000, MemoryRegion.io("msi", 0x1000, Doorbell()))
    machine.map(2, 0xC000)
    assert await machine.device.write(0x12008, b"\x2a\0\0\0", DEVICE) == MemTxResult.OK
    assert log == [(8, 0x2A, DEVICE)]


async def test_async_translate() -> None:
    """A translation may have to wait, say for tables in guest memory; a tuple will do."""

    async def translate(addr: int, *_: object) -> tuple[AddressSpace, int, int, IommuAccess]:
        await trio.lowlevel.checkpoint()
        return async_machine.space, addr ^ 0x1000, 0xFFF, READ | WRITE

    async_machine = Machine(translate)
    await async_machine.device.write(0x10FFE, b"abcd")
    view = async_machine.ram.block.view
    assert (bytes(view[0x1FFE:0x2000]), bytes(view[:2])) == (b"ab", b"cd")


async def test_translate_raises() -> None:
    """The owner's error comes out as it is."""

    def translate(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Machine(translate).device.read(0x10000, 1)


async def test_translate_returns_nonsense() -> None:
    """A translation that is none is the program's error, not the guest's."""
    with pytest.raises(RegionTypeError, match="translate of 0x0 returned 5"):
        await Machine(lambda *_: 5).device.read(0x10000, 1)


async def test_translate_of_another_region(machine: Machine) -> None:
    """Only IOMMU regions translate."""
    with pytest.raises(RegionError, match="is no IOMMU region"):
        await dispatch.translate(machine.ram, 0, READ)


async def test_nested(machine: Machine) -> None:
    """Two stages: what the first yields is translated by the second."""
    first = Table(0x100)
    outer = MemoryRegion.iommu("stage 1", 0x1000, first)
    nested = machine.memory.create_address_space("nested", outer)
    first.pages[0] = (machine.device, 0x10F80, READ | WRITE)
    machine.map(0, 0x3000)
    assert await nested.write(0x10, b"x") == MemTxResult.OK
    # 0x10f80 is not a multiple of the page size: its low bits do not count.
    assert machine.ram.block.view[0x3F10] == ord("x")


async def test_in_circles(machine: Machine) -> None:
    """An IOMMU that leads to itself ends in a DECODE_ERROR that counts as unassigned."""
    machine.table.pages[0] = (machine.device, 0x10000, READ | WRITE)
    assert await machine.device.read_result(0x10000, 2) == (b"\xff\xff", MemTxResult.DECODE_ERROR)
    assert await machine.device.write(0x10000, b"x") == MemTxResult.DECODE_ERROR
    assert machine.device.unassigned_accesses == 2
    assert len(machine.table.asked) == 2 * 16


async def test_map(machine: Machine) -> None:
    """There is no one stretch of memory behind an IOMMU."""
    machine.map(0, 0)
    with pytest.raises(RegionError, match=r"at 0x10000 there is .*iommu.*; use read\(\) and write"):
        machine.device.map(0x10000, 0x10)


def test_on_thread(machine: Machine) -> None:
    """A vCPU's thread cannot tell what it would meet behind an IOMMU."""
    machine.map(0, 0)
    for is_write in (False, True):
        assert not dispatch.on_thread(machine.device.view, 0x10000, 4, is_write)
        assert not dispatch.on_thread(machine.device.view, 0xFFFE, 4, is_write)
        assert dispatch.on_thread(machine.device.view, 0xFFF0, 4, is_write)


@given(st.data())
@examples(dev=60, ci=300)
async def test_against_a_naive_page_table(data: st.DataObject) -> None:
    """Byte for byte what a page table says, for pages of mixed sizes and permissions."""
    memory = MemorySystem()
    rams = [MemoryRegion.ram(f"ram{n}", 0x40) for n in range(2)]
    spaces = [memory.create_address_space(each.name, each) for each in rams]
    model = [bytearray(data.draw(st.binary(min_size=0x40, max_size=0x40))) for _ in rams]
    for ram, content in zip(rams, model, strict=True):
        ram.block.view[:0x40] = content

    # offset -> (which RAM, offset in it, what is allowed), and the pages it comes from
    perms = st.sampled_from([NONE, READ, WRITE, READ | WRITE])
    naive: list[tuple[int, int, IommuAccess]] = []
    pages: list[IommuTlbEntry] = []
    while len(naive) < 0x40:
        at = len(naive)
        size = data.draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if at % n == 0]))
        which, perm = data.draw(st.integers(0, 1)), data.draw(perms)
        where = data.draw(st.integers(0, 0x40 // size - 1)) * size
        pages.extend([IommuTlbEntry(spaces[which], where, size - 1, perm)] * size)
        naive.extend((which, where + n, perm) for n in range(size))
    ops = IommuOps()
    ops.translate = lambda addr, *_: pages[addr]  # type: ignore[method-assign]
    device = memory.create_address_space("device", MemoryRegion.iommu("iommu", 0x40, ops))

    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, 0x3F))
        raw = data.draw(st.binary(min_size=1, max_size=0x40 - start))
        refused = MemTxResult.OK
        expected = bytearray()
        is_write = data.draw(st.booleans())
        for n, byte in enumerate(raw):
            which, where, perm = naive[start + n]
            if (WRITE if is_write else READ) not in perm:
                refused = MemTxResult.ACCESS_ERROR
                expected.append(0xFF)
            elif is_write:
                model[which][where] = byte
            else:
                expected.append(model[which][where])
        if is_write:
            assert await device.write(start, raw) == refused
        else:
            assert await device.read_result(start, len(raw)) == (bytes(expected), refused)
        assert [bytes(ram.block.view[:0x40]) for ram in rams] == [bytes(each) for each in model]
