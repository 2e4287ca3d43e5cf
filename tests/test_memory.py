"""`MemorySystem` and `AddressSpace`: creating, destroying, reading, writing, mapping."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from memlistener import (
    AddressSpace,
    FlatView,
    ListenerError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RamBlock,
    RamInUseError,
    RegionError,
    TransactionError,
    UnassignedAccessError,
)
from memlistener.testing import RecordingListener


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


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- creating and destroying ----------------------------------------------------------


def test_create(machine: Machine) -> None:
    """A new address space shows its tree at once; F1: also where the root is in a container."""
    memory = machine.memory
    inner = memory.create_address_space("ram only", machine.ram)
    assert memory.address_spaces == (machine.space, inner)
    assert (inner.name, inner.root, inner.memory) == ("ram only", machine.ram, memory)
    assert inner.listeners == ()
    assert inner.unassigned_accesses == 0
    assert inner.view == FlatView.render(machine.ram)
    assert [(each.start, each.size, each.region) for each in inner.view] == [
        (0, 0x2000, machine.ram)
    ]
    assert repr(inner) == "<AddressSpace 'ram only' root 'ram'>"


async def test_two_spaces_with_one_root(machine: Machine) -> None:
    """T10: both see a change; F7: and share the view."""
    second = machine.memory.create_address_space("second", machine.root)
    assert second.view is machine.space.view
    async with machine.memory.transaction():
        machine.window.set_enabled(False)
    assert second.view is machine.space.view
    assert second.view == FlatView.render(machine.root)
    machine.memory.destroy_address_space(machine.space)
    async with machine.memory.transaction():
        machine.window.set_enabled(True)
    assert second.view == FlatView.render(machine.root)
    assert machine.space.view != second.view


async def test_two_spaces_with_one_root_that_becomes_empty(machine: Machine) -> None:
    """T10, F7: the second one's listeners hear of it too."""
    root = MemoryRegion.container("root", 0x1000)
    device = MemoryRegion.io("device", 0x100, None)
    root.add_subregion(0, device)
    spaces = [machine.memory.create_address_space(name, root) for name in ("one", "two")]
    listener = RecordingListener()
    await machine.memory.register(listener, spaces[1])
    listener.clear()
    async with machine.memory.transaction():
        root.del_subregion(device)
    assert [len(space.view) for space in spaces] == [0, 0]
    assert listener.trace == ["begin", "region_del [0x0, 0x100) device+0x0", "commit"]


async def test_create_inside_a_transaction(machine: Machine) -> None:
    """T1, T13: refused, since the tree is neither what it was nor final."""
    async with machine.memory.transaction():
        with pytest.raises(TransactionError, match="cannot be created inside a transaction"):
            machine.memory.create_address_space("new", machine.root)
    assert machine.memory.address_spaces == (machine.space,)


def test_destroy(machine: Machine) -> None:
    """T11: the tree is free again; destroying twice is harmless."""
    with pytest.raises(TransactionError):
        machine.ram.set_size(0x1000)
    machine.memory.destroy_address_space(machine.space)
    machine.memory.destroy_address_space(machine.space)
    assert machine.memory.address_spaces == ()
    machine.ram.set_size(0x1000)
    again = machine.memory.create_address_space("again", machine.root)
    assert again.view == FlatView.render(machine.root)


async def test_destroy_with_listeners(machine: Machine) -> None:
    """T8: they have to be told first, so it is refused."""
    listener = RecordingListener()
    await machine.memory.register(listener, machine.space)
    with pytest.raises(ListenerError, match="still has listeners"):
        machine.memory.destroy_address_space(machine.space)
    await machine.memory.unregister(listener)
    machine.memory.destroy_address_space(machine.space)
    assert machine.memory.address_spaces == ()


async def test_destroy_inside_a_transaction(machine: Machine) -> None:
    """T1: refused, also from a task that does not have the transaction."""

    async def destroy() -> None:
        with pytest.raises(TransactionError, match="inside a transaction"):
            machine.memory.destroy_address_space(machine.space)

    async with machine.memory.transaction():
        await destroy()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(destroy)
    assert machine.memory.address_spaces == (machine.space,)


async def test_destroy_while_a_listener_registers(machine: Machine) -> None:
    """T8: no listener ends up with an address space that is gone."""
    outcome: list[object] = []

    class Slow(MemoryListener):
        async def begin(self) -> None:
            try:
                machine.memory.destroy_address_space(machine.space)
            except (ListenerError, TransactionError) as error:
                outcome.append(type(error))

    await machine.memory.register(Slow(), machine.space)
    assert len(outcome) == 1
    assert machine.memory.address_spaces == (machine.space,)


async def test_destroy_before_a_waiting_listener_gets_its_turn(machine: Machine) -> None:
    """T8: registering then finds that the address space is gone."""
    waiting = RecordingListener()

    async def register() -> None:
        with pytest.raises(ListenerError, match="not an address space"):
            await machine.memory.register(waiting, machine.space)

    async with trio.open_nursery() as nursery:
        async with machine.memory.transaction():
            nursery.start_soon(register)
            await trio.testing.wait_all_tasks_blocked()
        machine.memory.destroy_address_space(machine.space)
    assert waiting.heard == []
    assert machine.space.listeners == ()


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
    view[:] = b"safe"
    with pytest.raises(RamInUseError):
        block.close()
    assert bytes(view) == b"safe"
    view.release()
    block.close()
