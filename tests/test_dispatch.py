"""An access, and what answers it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AccessConstraints,
    EventFd,
    FlatView,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RegionKind,
    RegionTypeError,
)
from memlistener.core.ops import ReadResult, WriteResult
from memlistener.dispatch import on_thread, read, read_here, run_on_thread, write, write_here
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.oracles import resolve
from tests.trees import examples

OK, ERROR = MemTxResult.OK, MemTxResult.ERROR
DECODE, ACCESS = MemTxResult.DECODE_ERROR, MemTxResult.ACCESS_ERROR
ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
by_order = pytest.mark.parametrize("order", ORDERS)


class Memory(MemoryRegionOps):
    """A device whose registers are bytes, and which notes its calls."""

    def __init__(
        self,
        order: Literal["little", "big"] = "little",
        valid: AccessConstraints | None = None,
        impl: AccessConstraints | None = None,
    ) -> None:
        self.endianness = order
        self.valid = valid or AccessConstraints()
        self.impl = impl or AccessConstraints()
        self.bytes = bytearray(range(0x80))
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
        self.calls.append((offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], self.endianness)

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> WriteResult:
        self.calls.append((offset, value, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, self.endianness)
        return None


def view_of(*regions: tuple[int, MemoryRegion]) -> FlatView:
    system = MemoryRegion.container("system", 1 << 64)
    for addr, region in regions:
        system.add_subregion(addr, region)
    return FlatView.render(system)


def io(ops: object) -> FlatView:
    return view_of((0x1000, MemoryRegion.io("io", 0x40, ops)))


class TestMemory:
    async def test_ram(self) -> None:
        """What was written is read."""
        view = view_of((0x1000, MemoryRegion.ram("ram", 0x1000)))
        assert await write(view, 0x1FFC, b"abcd") == (OK, 0)
        assert await read(view, 0x1FFA, 6) == (b"\0\0abcd", OK, 0)

    async def test_a_memoryview_is_written(self) -> None:
        """Anything with bytes will do."""
        view = view_of((0, MemoryRegion.ram("ram", 0x1000)))
        assert await write(view, 0, memoryview(b"xabcdx")[1:5]) == (OK, 0)
        assert await read(view, 0, 4) == (b"abcd", OK, 0)

    async def test_rom(self) -> None:
        """A write to a ROM vanishes, and says so."""
        view = view_of((0, MemoryRegion.rom("rom", 0x1000, data=b"abcd")))
        assert await write(view, 0, b"xx") == (ACCESS, 0)
        assert await read(view, 0, 4) == (b"abcd", OK, 0)

    async def test_ram_behind_a_read_only_alias(self) -> None:
        """F2: read-only there and nowhere else, over the same memory."""
        ram = MemoryRegion.ram("ram", 0x1000)
        window = MemoryRegion.alias("window", ram, offset=0x10, size=0x10)
        window.set_readonly(True)
        view = view_of((0, ram), (0x4000, window))
        assert await write(view, 0x10, b"ok") == (OK, 0)
        assert await write(view, 0x4000, b"no") == (ACCESS, 0)
        assert await read(view, 0x4000, 2) == (b"ok", OK, 0)

    async def test_rom_device(self) -> None:
        """In ROMD mode reads are memory and writes ops; out of it both are ops."""
        ops = Memory()
        flash = MemoryRegion.rom_device("flash", 0x40, ops, data=b"flash")
        assert await read(FlatView.render(flash), 0, 5) == (b"flash", OK, 0)
        assert ops.calls == []
        assert await write(FlatView.render(flash), 0, b"\x90") == (OK, 0)
        assert ops.calls == [(0, 0x90, 1)]
        flash.set_romd_mode(False)
        assert await read(FlatView.render(flash), 0, 2) == (b"\x90\x01", OK, 0)
        assert ops.calls == [(0, 0x90, 1), (0, 2)]
        assert bytes(flash.block.view[:5]) == b"flash"


class TestHoles:
    async def test_nothing(self) -> None:
        """K5: reads give all ones, writes vanish, and both are counted."""
        view = FlatView()
        assert await read(view, 0x123, 4) == (b"\xff" * 4, DECODE, 1)
        assert await write(view, 0x123, b"abcd") == (DECODE, 1)

    async def test_a_reservation(self) -> None:
        """K5: nobody here answers for it."""
        view = view_of((0, MemoryRegion.reservation("apic", 0x1000)))
        assert await read(view, 0, 2) == (b"\xff\xff", DECODE, 1)
        assert await write(view, 0, b"ab") == (DECODE, 1)

    async def test_across_ranges(self) -> None:
        """Each part goes where it belongs: memory, hole, ROM, device."""
        ram, rom = MemoryRegion.ram("ram", 4), MemoryRegion.rom("rom", 4, data=b"ROM!")
        ops = Memory()
        view = view_of((0, ram), (8, rom), (12, MemoryRegion.io("io", 4, ops)))
        assert await read(view, 2, 14) == (
            b"\0\0" + b"\xff" * 4 + b"ROM!" + b"\0\x01\x02\x03",
            DECODE,
            1,
        )
        assert await write(view, 2, b"abcdefghijklmn") == (DECODE | ACCESS, 1)
        assert bytes(ram.block.view) == b"\0\0ab"
        assert bytes(rom.block.view) == b"ROM!"
        assert ops.bytes[:5] == b"klmn\x04"

    async def test_two_holes(self) -> None:
        """K5: what lies around a region is two holes."""
        view = view_of((4, MemoryRegion.ram("ram", 2)))
        assert await read(view, 2, 6) == (b"\xff\xff\0\0\xff\xff", DECODE, 2)

    async def test_the_last_byte(self) -> None:
        """An access may end at 2**64."""
        view = view_of(((1 << 64) - 2, MemoryRegion.ram("ram", 2)))
        assert await read(view, (1 << 64) - 3, 3) == (b"\xff\0\0", DECODE, 1)

    async def test_no_bytes(self) -> None:
        """An access of no size meets nothing and fails at nothing."""
        assert await read(FlatView(), 0, 0) == (b"", OK, 0)
        assert await write(FlatView(), 0, b"") == (OK, 0)


class TestOps:
    @by_order
    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    async def test_sizes(self, order: Literal["little", "big"], size: int) -> None:
        """One call of the access's size; the value is in the device's byte order."""
        ops = Memory(order)
        view = io(ops)
        expected = bytes(range(8, 8 + size))
        assert await read(view, 0x1008, size) == (expected, OK, 0)
        assert ops.calls == [(8, size)]
        ops.calls.clear()
        data = bytes(range(0xA0, 0xA0 + size))
        assert await write(view, 0x1008, data) == (OK, 0)
        assert ops.calls == [(8, int.from_bytes(data, order), size)]

    async def test_offsets_are_in_the_region(self) -> None:
        """Whatever address and alias it is seen at."""
        ops = Memory()
        region = MemoryRegion.io("io", 0x40, ops)
        view = view_of((0x123000, MemoryRegion.alias("part", region, offset=0x20, size=0x10)))
        await read(view, 0x123004, 4)
        assert ops.calls == [(0x24, 4)]

    async def test_unaligned(self) -> None:
        """A device that takes aligned accesses only gets aligned ones."""
        ops = Memory()
        assert await read(io(ops), 0x1001, 4) == (b"\x01\x02\x03\x04", OK, 0)
        assert ops.calls == [(1, 1), (2, 2), (4, 1)]

    async def test_a_device_that_takes_unaligned_ones(self) -> None:
        """One that takes them gets them as they are."""
        anything = AccessConstraints(unaligned=True)
        ops = Memory(valid=anything, impl=anything)
        assert await read(io(ops), 0x1001, 4) == (b"\x01\x02\x03\x04", OK, 0)
        assert ops.calls == [(1, 4)]

    @by_order
    async def test_wider_than_implemented(self, order: Literal["little", "big"]) -> None:
        """An 8-byte access of a device with 2-byte registers is four calls."""
        ops = Memory(order, impl=AccessConstraints(2, 2))
        assert await read(io(ops), 0x1008, 8) == (bytes(range(8, 16)), OK, 0)
        assert ops.calls == [(8, 2), (10, 2), (12, 2), (14, 2)]
        assert await write(io(ops), 0x1000, b"abcdefgh") == (OK, 0)
        assert ops.bytes[:9] == b"abcdefgh\x08"

    @by_order
    async def test_narrower_than_implemented(self, order: Literal["little", "big"]) -> None:
        """A byte of a 4-byte register is that register, and the right byte of it."""
        ops = Memory(order, impl=AccessConstraints(4, 4))
        for at in range(8):
            assert await read(io(ops), 0x1000 + at, 1) == (bytes([at]), OK, 0)
        assert ops.calls == [(0, 4)] * 4 + [(4, 4)] * 4

    @pytest.mark.parametrize("size", [1, 2])
    async def test_sizes_that_are_not_valid(self, size: int) -> None:
        """A size that the device does not take is refused without a call."""
        ops = Memory(valid=AccessConstraints(4, 4))
        assert await read(io(ops), 0x1000, size) == (b"\xff" * size, DECODE, 0)
        assert await write(io(ops), 0x1000, b"ab"[:size]) == (DECODE, 0)
        assert ops.calls == []
        assert await read(io(ops), 0x1000, 8) == (bytes(range(8)), OK, 0)
        assert ops.calls == [(0, 4), (4, 4)]

    async def test_a_refused_read(self) -> None:
        """The device's own result comes out, and the bytes are all ones."""

        class Refuses(Memory):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                return ERROR if offset == 4 else super().read(offset, size, attrs)

        view = io(Refuses(valid=AccessConstraints(1, 4)))
        assert await read(view, 0x1000, 12) == (
            b"\0\x01\x02\x03\xff\xff\xff\xff\x08\x09\x0a\x0b",
            ERROR,
            0,
        )

    async def test_a_refused_write(self) -> None:
        """The other parts are written all the same, as on a bus."""

        class Refuses(Memory):
            def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> WriteResult:
                return ERROR if offset == 0 else super().write(offset, value, size, attrs)

        ops = Refuses(valid=AccessConstraints(1, 4))
        assert await write(io(ops), 0x1000, b"abcdefgh") == (ERROR, 0)
        assert ops.bytes[:8] == b"\0\x01\x02\x03efgh"

    @pytest.mark.parametrize("ops", [None, object(), MemoryRegionOps()])
    async def test_nobody_answers(self, ops: object) -> None:
        """A device without read and write refuses both."""
        assert await read(io(ops), 0x1000, 2) == (b"\xff\xff", ACCESS, 0)
        assert await write(io(ops), 0x1000, b"ab") == (ACCESS, 0)

    async def test_values_are_cut_to_size(self) -> None:
        """A device that returns more bits, or a negative number, is cut to what was asked."""

        class Wide(MemoryRegionOps):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                return -2

        assert await read(io(Wide()), 0x1000, 2) == (b"\xfe\xff", OK, 0)

    @pytest.mark.parametrize("value", [None, b"ab", 1.5])
    async def test_a_read_returns_an_int(self, value: Any) -> None:
        """Anything else is the handler's mistake, and raises with its region and offset."""

        class Wrong(MemoryRegionOps):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                return value  # type: ignore[no-any-return]

        with pytest.raises(RegionTypeError, match=r"read of .*'io'.* offset 0x4 returned"):
            await read(io(Wrong()), 0x1004, 2)

    async def test_a_write_returns_nothing(self) -> None:
        """Or a result; a number is a mistake."""

        class Wrong(MemoryRegionOps):
            def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> WriteResult:
                return value  # type: ignore[return-value]

        with pytest.raises(RegionTypeError, match=r"write to .*'io'.* offset 0x4 returned"):
            await write(io(Wrong()), 0x1004, b"ab")

    async def test_a_handler_that_raises(self) -> None:
        """Its own exception comes out."""

        class Broken(MemoryRegionOps):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await read(io(Broken()), 0x1000, 1)

    async def test_attributes_come_through(self) -> None:
        """The device is told who makes the access."""
        seen: list[MemTxAttrs] = []

        class Asks(MemoryRegionOps):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                seen.append(attrs)
                return 0

            def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> WriteResult:
                seen.append(attrs)
                return None

        who = MemTxAttrs(secure=True, requester_id=7)
        await read(io(Asks()), 0x1000, 1, who)
        await write(io(Asks()), 0x1000, b"x", who)
        await read(io(Asks()), 0x1000, 1)
        assert seen == [who, who, MemTxAttrs()]

    async def test_async_ops(self, autojump_clock: trio.testing.MockClock) -> None:
        """Handlers may take their time."""

        class Slow(MemoryRegionOps):
            async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
                await trio.sleep(1)
                return 0x42

            async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
                await trio.sleep(2)

        start = trio.current_time()
        assert await read(io(Slow()), 0x1000, 1) == (b"\x42", OK, 0)
        assert await write(io(Slow()), 0x1000, b"x") == (OK, 0)
        assert trio.current_time() - start == pytest.approx(3)


@attrs.define
class Answer:
    """Ops with nothing but what is given."""

    thread_safe: bool = False

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return 7


class TestThreads:
    def test_memory_and_holes_need_no_trio(self) -> None:
        """Whatever is direct can be served on the thread that makes the access."""
        view = view_of((0, MemoryRegion.ram("ram", 8)), (8, MemoryRegion.rom("rom", 8)))
        for is_write in (False, True):
            assert on_thread(view, 4, 8, is_write)
            assert on_thread(view, 4, 100, is_write)

    @pytest.mark.parametrize("thread_safe", [False, True])
    def test_ops_do_unless_they_say_otherwise(self, thread_safe: bool) -> None:
        """A part that needs trio is enough."""
        view = view_of(
            (0, MemoryRegion.ram("ram", 8)), (8, MemoryRegion.io("io", 8, Answer(thread_safe)))
        )
        assert on_thread(view, 0, 8, False)
        assert on_thread(view, 7, 2, False) is thread_safe
        assert on_thread(view, 8, 1, True) is thread_safe

    def test_rom_devices(self) -> None:
        """Reads in ROMD mode are direct; all else is the ops'."""
        flash = MemoryRegion.rom_device("flash", 8, Answer())
        assert on_thread(FlatView.render(flash), 0, 1, False)
        assert not on_thread(FlatView.render(flash), 0, 1, True)
        flash.set_romd_mode(False)
        assert not on_thread(FlatView.render(flash), 0, 1, False)

    def test_run_on_thread(self) -> None:
        """A plain access runs to its end without an event loop."""
        assert run_on_thread(read(io(Answer(True)), 0x1000, 1)) == (b"\x07", OK, 0)

    def test_a_promise_that_is_not_kept(self) -> None:
        """Ops that say thread_safe and are async are refused."""

        class Lies(MemoryRegionOps):
            thread_safe = True

            async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
                await trio.lowlevel.checkpoint()
                return 0

        with pytest.raises(RegionTypeError, match="plain functions"):
            run_on_thread(read(io(Lies()), 0x1000, 1))

    def test_errors_come_out(self) -> None:
        """An exception in a handler leaves `run_on_thread` too."""

        class Broken(MemoryRegionOps):
            def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_on_thread(read(io(Broken()), 0x1000, 1))


SPAN = 0x40
accesses = st.tuples(
    st.integers(0, SPAN), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 255))
)


@by_order
@examples(dev=60, ci=200)
@given(plan=tree_plans(limit=SPAN, max_regions=9), todo=st.lists(accesses, max_size=10))
def test_against_bytes(
    order: Literal["little", "big"], plan: TreePlan, todo: list[tuple[int, int, int | None]]
) -> None:
    """F8, K5: any access to any map is what byte by byte it would be."""
    regions = plan.build()
    memory: dict[MemoryRegion, bytearray] = {}
    registers: dict[MemoryRegion, Memory] = {}
    for number, region in enumerate(regions):
        if region.kind is RegionKind.IOMMU:
            region.set_enabled(False)  # what it shows is in another address space
        if region.block is not None:
            fill = bytes((number * 16 + at) & 0xFF for at in range(region.size))
            region.block.view[:] = fill
            memory[region] = bytearray(fill)
        if region.kind in (RegionKind.IO, RegionKind.ROM_DEVICE):
            region._ops = registers[region] = Memory(order)
    model = {region: bytearray(ops.bytes) for region, ops in registers.items()}
    view = FlatView.render(regions[0])
    for addr, size, value in todo:
        expected = bytearray()
        how = OK
        for at in range(addr, addr + size):
            found = resolve(regions[0], at)
            if found is None or found.region.kind is RegionKind.RESERVATION:
                how |= DECODE
                expected.append(0xFF)
                continue
            kind = found.region.kind
            direct = kind in (RegionKind.RAM, RegionKind.ROM)
            if value is None:
                if direct or (kind is RegionKind.ROM_DEVICE and found.romd_mode):
                    expected.append(memory[found.region][found.offset])
                else:
                    expected.append(model[found.region][found.offset])
            elif found.readonly:
                how |= ACCESS
            elif direct:
                memory[found.region][found.offset] = value
            else:
                model[found.region][found.offset] = value
        if value is None:
            data, result, _ = run_on_thread(read(view, addr, size))
            assert data == bytes(expected)
        else:
            result, _ = run_on_thread(write(view, addr, bytes([value]) * size))
        assert result == how
    for region, content in memory.items():
        assert bytes(region.block.view) == bytes(content)
    for region, ops in registers.items():
        assert ops.bytes == model[region]


class TestHere:
    """`read_here` and `write_here` do what `read` and `write` do, or nothing."""

    class Ops(MemoryRegionOps):
        """Says what it was asked, in every way that a model may answer."""

        thread_safe = True

        def __init__(self, answer: object, **attributes: object) -> None:
            self.answer = answer
            self.calls: list[tuple[object, ...]] = []
            for name, value in attributes.items():
                setattr(self, name, value)

        def read(self, offset: int, size: int, attrs: MemTxAttrs) -> Any:
            self.calls.append(("read", offset, size, attrs))
            return self.answer

        def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
            self.calls.append(("write", offset, value, size, attrs))
            return self.answer if isinstance(self.answer, MemTxResult) else None

    @given(
        answer=st.one_of(
            st.integers(-1, 1 << 64), st.sampled_from(list(MemTxResult)), st.booleans()
        ),
        order=st.sampled_from(["little", "big"]),
        valid=st.sampled_from(
            [AccessConstraints(), AccessConstraints(2, 4), AccessConstraints(8, 8)]
        ),
        impl=st.sampled_from(
            [AccessConstraints(), AccessConstraints(1, 2), AccessConstraints(4, 4)]
        ),
        addr=st.integers(0xFF8, 0x1018),
        size=st.integers(1, 8),
        data=st.binary(min_size=8, max_size=8),
    )
    def test_same_as_the_long_way(
        self,
        answer: object,
        order: str,
        valid: AccessConstraints,
        impl: AccessConstraints,
        addr: int,
        size: int,
        data: bytes,
    ) -> None:
        """Same bytes, same calls; where it is left to the long way, nothing was called."""
        root = MemoryRegion.container("root", 1 << 32)
        one, two = (self.Ops(answer, endianness=order, valid=valid, impl=impl) for _ in range(2))
        region = MemoryRegion.io("dev", 0x10, one)
        root.add_subregion(0x1000, region)
        view = FlatView.render(root)
        region._ops = two
        long, _, _ = run_on_thread(read(view, addr, size))
        run_on_thread(write(view, addr, data[:size]))
        region._ops = one
        here = read_here(view, addr, size)
        assert here is None or here == long
        wrote = write_here(view, addr, data[:size])
        assert (here is None) == (not wrote)
        assert one.calls == (two.calls if wrote else [])

    def test_left_to_the_long_way(self) -> None:
        """Memory, plain ops, read-only ways and nothing are not for one call."""
        root = MemoryRegion.container("root", 1 << 32)
        plain = self.Ops(0, thread_safe=False)
        root.add_subregion(0, MemoryRegion.io("plain", 0x10, plain))
        root.add_subregion(0x1000, MemoryRegion.ram("ram", 0x1000))
        shown = MemoryRegion.io("dev", 0x10, self.Ops(0))
        root.add_subregion(0x2000, shown)
        shown.set_readonly(True)
        view = FlatView.render(root)
        for addr in (0, 0x1000, 0x3000):
            assert read_here(view, addr, 4) is None
            assert not write_here(view, addr, b"abcd")
        assert read_here(view, 0x2000, 4) == bytes(4)
        assert not write_here(view, 0x2000, b"abcd")
        assert plain.calls == []

    def test_async_ops_that_call_themselves_thread_safe(self) -> None:
        """They are refused, as the long way refuses them, and no coroutine is left over."""

        class Wrong(MemoryRegionOps):
            thread_safe = True

            async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
                return 0

            async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
                pass

        root = MemoryRegion.io("dev", 0x10, Wrong())
        view = FlatView.render(root)
        with pytest.raises(RegionTypeError, match="must be plain"):
            read_here(view, 0, 4)
        with pytest.raises(RegionTypeError, match="must be plain"):
            write_here(view, 0, b"abcd")


# ---- ioeventfds ------------------------------------------------------------------------


class Signals:
    """Eventfds by name, and how often each was signalled since the last look."""

    def __init__(self) -> None:
        self.fds: dict[str, EventFd] = {}

    def __getitem__(self, name: str) -> EventFd:
        return self.fds.setdefault(name, EventFd())

    def seen(self) -> dict[str, int]:
        found = {}
        for name, each in self.fds.items():
            with contextlib.suppress(BlockingIOError):
                found[name] = os.eventfd_read(each.fileno())
        return found

    def close(self) -> None:
        for each in self.fds.values():
            each.close()


@pytest.fixture
def signals() -> Iterator[Signals]:
    if not hasattr(os, "eventfd"):
        pytest.skip("eventfds are Linux's")
    found = Signals()
    yield found
    found.close()


@pytest.mark.parametrize("here", [False, True])
@by_order
async def test_an_eventfd_takes_the_write(
    signals: Signals, here: bool, order: Literal["little", "big"]
) -> None:
    """T9: place, width and value decide; the rest goes to ops, with values in their byte order."""
    ops = Memory(order)
    ops.thread_safe = here
    region = MemoryRegion.io("device", 0x80, ops)
    region.add_eventfd(0x10, 4, signals["four"])
    region.add_eventfd(0x20, 0, signals["any"])
    region.add_eventfd(0x30, 2, signals["match"], data=0x1234)
    view = view_of((0x1000, region))

    async def put(addr: int, value: int, size: int) -> None:
        data = value.to_bytes(size, order)
        if not here:
            assert await write(view, addr, data) == (OK, 0)
        else:
            assert write_here(view, addr, data)

    await put(0x1010, 7, 4)
    assert signals.seen() == {"four": 1}
    await put(0x1010, 7, 2)
    await put(0x1012, 7, 2)
    await put(0x1020, 7, 1)
    await put(0x1020, 7, 8)
    await put(0x1030, 0x1234, 2)
    await put(0x1030, 0x3412, 2)
    await put(0x1030, 0x1234, 4)
    assert signals.seen() == {"any": 2, "match": 1}
    assert ops.calls == [
        (0x10, 7, 2),
        (0x12, 7, 2),
        (0x30, 0x3412, 2),
        (0x30, 0x1234, 4),
    ]


async def test_an_eventfd_needs_no_thread_safe_ops(signals: Signals) -> None:
    """A write that signals is served on the vCPU's thread, whatever the ops are like."""
    region = MemoryRegion.io("device", 0x80, None)
    region.add_eventfd(0, 4, signals["bell"])
    assert write_here(view_of((0, region)), 0, bytes(4))
    assert signals.seen() == {"bell": 1}


async def test_what_an_eventfd_may_hang_on(signals: Signals) -> None:
    """Where a write would not reach memory it signals; RAM is written as ever."""
    ram = MemoryRegion.ram("ram", 0x1000)
    rom = MemoryRegion.rom("rom", 0x1000)
    device = MemoryRegion.rom_device("flash", 0x1000, Memory())
    hole = MemoryRegion.reservation("hole", 0x1000)
    regions = (ram, rom, device, hole)
    for region in regions:
        region.add_eventfd(0, 1, signals[region.name])
    view = view_of(*((0x1000 * n, region) for n, region in enumerate(regions)))
    for n, _ in enumerate(regions):
        assert await write(view, 0x1000 * n, b"!") == (OK, 0)
    assert signals.seen() == {"rom": 1, "flash": 1, "hole": 1}
    assert ram.block.view[0] == ord("!")


async def test_uncommitted_eventfds_are_nobodys(signals: Signals) -> None:
    """T2, T13: an eventfd signals from its commit on, until that of its removal."""
    ops = Memory()
    region = MemoryRegion.io("device", 0x80, ops)
    root = MemoryRegion.container("root", 0x1000)
    root.add_subregion(0, region)
    memory = MemorySystem()
    space = memory.create_address_space("memory", root)

    async def signalled() -> bool:
        await space.write(0, bytes(4))
        return bool(signals.seen())

    with contextlib.suppress(ZeroDivisionError):
        async with memory.transaction():
            region.add_eventfd(0, 4, signals["bell"])
            assert not await signalled()
            raise ZeroDivisionError
    assert not await signalled()
    async with memory.transaction():
        region.add_eventfd(0, 4, signals["bell"])
        assert not await signalled()
    assert await signalled()
    with contextlib.suppress(ZeroDivisionError):
        async with memory.transaction():
            region.del_eventfd(0, 4, signals["bell"])
            assert await signalled()
            raise ZeroDivisionError
    assert await signalled()
    async with memory.transaction():
        root.del_subregion(region)
        region.del_eventfd(0, 4, signals["bell"])
        root.add_subregion(0, region)
        assert await signalled()
    assert not await signalled()


async def test_a_closed_eventfd_is_an_error(signals: Signals) -> None:
    """The host's mistake is the host's to hear of."""
    region = MemoryRegion.io("device", 0x80, Memory())
    bell = signals["bell"]
    region.add_eventfd(0, 4, bell)
    bell.close()
    with pytest.raises(ValueError, match="closed"):
        await write(view_of((0, region)), 0, bytes(4))
