"""AddressSpace: reading, writing, mapping, and what meets nothing."""

from __future__ import annotations

import gc
from array import array
from typing import Any

import pytest
import trio
import trio.testing

from memlistener import (
    AddressSpace,
    MemoryRegion,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RamBlock,
    RamInUseError,
    RegionError,
    RegionTypeError,
    UnassignedAccessError,
)
from tests.small_machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- reading and writing -----------------------------------------------------------------


async def test_memory(machine: Machine) -> None:
    """What is written to RAM is read back, through the alias too, without a checkpoint."""
    space = machine.space
    with trio.testing.assert_no_checkpoints():
        assert await space.write(0x1FFE, b"ab") is MemTxResult.OK
        assert await space.read(0x1FFC, 4) == b"\0\0ab"
        assert await space.read(0x8FFE, 2) == b"ab"
        assert await space.read(0x2000, 8) == b"firmware"
    assert await space.read(0x1FFE, 10) == b"abfirmware"[:10]
    assert await space.read(0x123, 0) == b""
    assert space.unassigned_accesses == 0


@pytest.mark.parametrize("data", [b"xy", bytearray(b"xy"), memoryview(b"xy")])
async def test_any_bytes_can_be_written(
    machine: Machine, data: bytes | bytearray | memoryview
) -> None:
    """bytes, bytearray and memoryview alike."""
    await machine.space.write(0, data)
    assert await machine.space.read(0, 2) == b"xy"


@pytest.mark.parametrize("addr", [0x2000, 0x8000])
async def test_writes_to_read_only_memory_vanish(machine: Machine, addr: int) -> None:
    """F2: ROM, and RAM behind a read-only alias, which is writable elsewhere."""
    before = await machine.space.read(addr, 4)
    assert await machine.space.write(addr, b"evil") is MemTxResult.ACCESS_ERROR
    assert await machine.space.read(addr, 4) == before
    assert await machine.space.write(0x1000, b"good") is MemTxResult.OK


async def test_device(machine: Machine) -> None:
    """The ops get offset, size and attributes, and values in the device's byte order."""
    attrs = MemTxAttrs(secure=True, requester_id=7)
    assert await machine.space.read(0x6000, 4, attrs) == bytes.fromhex("44332211")
    assert await machine.space.write(0x6002, b"\x01\x02", attrs) is MemTxResult.OK
    assert machine.ops.value == 0x0201
    assert machine.ops.log == [("read", 0, 4, attrs), ("write", 2, 2, attrs)]


async def test_unassigned(machine: Machine) -> None:
    """K5: reads give all ones, writes vanish, both are counted and reported."""
    space = machine.space
    assert await space.read_result(0x100000, 2) == (b"\xff\xff", MemTxResult.DECODE_ERROR)
    assert await space.read(0x7000, 1) == b"\xff"
    assert await space.write((1 << 64) - 1, b"x") is MemTxResult.DECODE_ERROR
    assert space.unassigned_accesses == 3
    # The part of an access that meets something is served.
    await space.write(0x1FFF, b"x")
    assert await space.read_result(0x2FFF, 2) == (b"\0\xff", MemTxResult.DECODE_ERROR)
    assert space.unassigned_accesses == 4


async def test_unassigned_raises() -> None:
    """K5: made an error where the address space was created so; counted all the same."""
    space = Machine(unassigned_raises=True).space
    with pytest.raises(UnassignedAccessError, match="read of 4 bytes at 0x3000 in 'memory'"):
        await space.read(0x3000, 4)
    with pytest.raises(UnassignedAccessError, match="write of 1 bytes at 0x7000 in 'memory'"):
        await space.write(0x7000, b"x")
    assert space.unassigned_accesses == 2
    assert await space.read(0x2000, 8) == b"firmware"


@pytest.mark.parametrize(("addr", "size"), [(-1, 1), (1 << 64, 1), ((1 << 64) - 1, 2), (0, -1)])
async def test_outside_64_bits(machine: Machine, addr: int, size: int) -> None:
    """Addresses do not wrap, they are refused."""
    with pytest.raises(RegionError, match="not within the 64 bits of 'memory'"):
        await machine.space.read(addr, size)
    with pytest.raises(RegionError, match="not within the 64 bits of 'memory'"):
        machine.space.map(addr, size)
    if size > 0:
        with pytest.raises(RegionError, match="not within the 64 bits of 'memory'"):
            await machine.space.write(addr, b"x" * size)


async def test_reads_during_a_transaction_see_the_old_map(machine: Machine) -> None:
    """T2: an access goes by the published view."""
    async with machine.memory.transaction():
        machine.ram.set_enabled(False)
        assert await machine.space.write(0, b"x") is MemTxResult.OK
    assert await machine.space.write(0, b"x") is MemTxResult.DECODE_ERROR


# ---- mapping -------------------------------------------------------------------------------


async def test_map(machine: Machine) -> None:
    """A memoryview of the memory itself, no copy."""
    view = machine.space.map(0x1004, 4)
    view[:] = b"data"
    assert await machine.space.read(0x1004, 4) == b"data"
    assert bytes(machine.space.map(0x8004, 4)) == b"data"
    assert machine.ram.block.view[0x1004:0x1008] == b"data"


@pytest.mark.parametrize("addr", [0x2000, 0x8000, 0x4000])
def test_map_of_read_only_memory(machine: Machine, addr: int) -> None:
    """F2: ROM, a read-only alias and a flash in ROMD mode can be mapped, read-only."""
    view = machine.space.map(addr, 0x1000)
    assert len(view) == 0x1000
    assert view.readonly
    assert not machine.space.map(0, 0x2000).readonly


@pytest.mark.parametrize(
    ("addr", "size", "what"),
    [
        (0x3000, 1, "there is nothing"),
        (0x1FFF, 2, "RAM"),
        (0x6000, 4, "'device'"),
        (0x7000, 1, "'apic'"),
        (0x2FFF, 2, "'rom'"),
    ],
)
def test_map_of_what_is_not_one_stretch_of_memory(
    machine: Machine, addr: int, size: int, what: str
) -> None:
    """The error says what is there instead."""
    with pytest.raises(RegionError, match=f"(?i)is not one stretch of memory.*{what}"):
        machine.space.map(addr, size)


async def test_map_of_a_flash_out_of_romd_mode(machine: Machine) -> None:
    """K1: then every access is the device's."""
    flash = machine.space.view.lookup(0x4000)
    assert flash is not None
    async with machine.memory.transaction():
        flash.region.set_romd_mode(False)
    with pytest.raises(RegionError, match="not one stretch of memory"):
        machine.space.map(0x4000, 1)


async def test_a_mapping_outlives_the_map() -> None:
    """T15: the memory stays while anybody has a view of it."""
    block = RamBlock.anonymous(0x1000)
    root = MemoryRegion.container("root", 0x1000)
    ram = MemoryRegion.ram("ram", 0x1000, block=block)
    root.add_subregion(0, ram)
    memory = MemorySystem()
    space: AddressSpace = memory.create_address_space("memory", root)
    view = space.map(0, 4)
    async with memory.transaction():
        root.del_subregion(ram)
    del ram
    gc.collect()  # the region has a hold of its own
    view[:] = b"safe"
    with pytest.raises(RamInUseError):
        block.close()
    assert bytes(view) == b"safe"
    view.release()
    block.close()


# ---- loading -------------------------------------------------------------------------------


def test_load_writes_ram_and_rom_across_regions() -> None:
    """What a machine is set up with may go over several regions, read-only ones too."""
    root = MemoryRegion.container("root", 1 << 32)
    ram, rom = MemoryRegion.ram("ram", 0x1000), MemoryRegion.rom("rom", 0x1000)
    root.add_subregion(0, ram)
    root.add_subregion(0x1000, rom)
    space = MemorySystem().create_address_space("memory", root)
    space.load(0xFFE, bytearray(b"abcd"))
    assert bytes(ram.block.view[-2:]) == b"ab"
    assert bytes(rom.block.view[:2]) == b"cd"
    space.load(0xFFF, b"")


def test_load_writes_all_or_nothing() -> None:
    """Where a part does not fit into memory, nothing was written."""
    root = MemoryRegion.container("root", 1 << 32)
    ram = MemoryRegion.ram("ram", 0x1000)
    root.add_subregion(0, ram)
    space = MemorySystem().create_address_space("memory", root)
    with pytest.raises(RegionError, match="at 0x1000 there is nothing"):
        space.load(0xFFE, b"abcd")
    assert bytes(ram.block.view[-2:]) == bytes(2)
    with pytest.raises(RegionError, match="64 bits"):
        space.load(-1, b"a")


# ---- what is written ---------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 1.0, "0", True])
async def test_what_is_no_number(wrong: Any) -> None:
    """The error names the argument, and the address space."""
    space = MemorySystem().create_address_space("memory", MemoryRegion.ram("ram", 0x1000))
    with pytest.raises(RegionTypeError, match="addr of an access to 'memory' is an int, not"):
        await space.read(wrong, 1)
    with pytest.raises(RegionTypeError, match="size of an access to 'memory' is an int, not"):
        await space.read(0, wrong)
    with pytest.raises(RegionTypeError, match="addr of an access"):
        await space.write(wrong, b"a")
    with pytest.raises(RegionTypeError, match="size of an access"):
        space.map(0, wrong)
    with pytest.raises(RegionTypeError, match="addr of an access"):
        space.load(wrong, b"a")


@pytest.mark.parametrize("data", [0x41, None, "text", [1, 2]])
async def test_data_that_is_no_buffer(data: Any) -> None:
    """An int is no number of zeroes."""
    space = MemorySystem().create_address_space("memory", MemoryRegion.ram("ram", 0x1000))
    with pytest.raises(RegionTypeError, match="data is bytes or another buffer, not"):
        await space.write(0, data)
    with pytest.raises(RegionTypeError, match="data is bytes or another buffer, not"):
        space.load(0, data)


@pytest.mark.parametrize("data", [array("H", [0x4241, 0x4443]), memoryview(b"AxBxCxDx")[::2]])
async def test_any_buffer(data: Any) -> None:
    """Bytes, in the order of the buffer."""
    space = MemorySystem().create_address_space("memory", MemoryRegion.ram("ram", 0x1000))
    assert await space.write(0, data) == MemTxResult.OK
    space.load(4, data)
    assert await space.read(0, 9) == b"ABCDABCD\0"
