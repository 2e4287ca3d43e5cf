"""Host memory: where it comes from, who may see it, and when it goes."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
import time
import weakref
from array import array
from pathlib import Path
from typing import Any

import pytest

from memlistener import (
    DirtyClient,
    FlatView,
    MemoryRegion,
    MemorySystem,
    RamBlock,
    RamInUseError,
    RegionError,
    RegionTypeError,
)
from memlistener.ram import PAGE_SIZE

TIB = 1 << 40


def resident() -> int:
    """Bytes of memory that this process really has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "image"
    found.write_bytes(b"a" * PAGE_SIZE + b"b" * PAGE_SIZE + b"end")
    return found


class TestAnonymous:
    def test_zeroed_and_writable(self) -> None:
        """The view has exactly the size that was asked for."""
        block = RamBlock.anonymous(0x1801, name="dimm")
        assert (block.name, block.size) == ("dimm", 0x1801)
        assert bytes(block.view) == bytes(0x1801)
        block.view[0x1800] = 7
        assert block.view[0x1800] == 7
        assert repr(block) == "<RamBlock 'dimm' size 0x1801>"

    def test_costs_nothing_before_it_is_touched(self) -> None:
        """A terabyte of RAM is address space only, and each touched page is one."""
        before = resident()
        ram = MemoryRegion.ram("ram", TIB)
        assert len(FlatView.render(ram)) == 1
        view = ram.block.view
        assert len(view) == TIB
        view[TIB - 1] = view[TIB // 2] = 1
        assert resident() - before < 16 << 20

    def test_blocks_are_apart(self) -> None:
        """Private memory is private."""
        one, two = RamBlock.anonymous(PAGE_SIZE), RamBlock.anonymous(PAGE_SIZE)
        one.view[0] = 1
        assert two.view[0] == 0

    def test_more_than_the_host_has(self) -> None:
        """The error names the block and its size."""
        with pytest.raises(OSError, match=r"cannot map 0x4000000000000000 bytes .* 'huge'"):
            RamBlock.anonymous(1 << 62, name="huge")

    def test_more_than_can_be_said(self) -> None:
        """2**64 bytes are an OSError too, not an overflow."""
        with pytest.raises(OSError, match="cannot map"):
            RamBlock.anonymous(1 << 64)
        with pytest.raises(OSError, match="'all'"):
            _ = MemoryRegion.ram("all", 1 << 64).block


@pytest.mark.parametrize("make", [RamBlock.anonymous, RamBlock.memfd])
class TestSizes:
    @pytest.mark.parametrize("size", [0, -1])
    def test_out_of_range(self, make: Any, size: int) -> None:
        """Memory has at least one byte."""
        with pytest.raises(RegionError, match=f"size of 'odd' is {size:#x}"):
            make(size, name="odd")

    @pytest.mark.parametrize("size", [True, 1.0, None])
    def test_wrong_type(self, make: Any, size: object) -> None:
        """A size is an int and no bool."""
        with pytest.raises(RegionTypeError, match="size of 'odd' is an int"):
            make(size, name="odd")


class TestMemfd:
    def test_shared_with_others(self) -> None:
        """Whoever maps the descriptor sees the same memory."""
        block = RamBlock.memfd(0x1800, name="shared")
        with mmap.mmap(block.fileno(), 0x2000) as other:
            block.view[5] = 42
            assert other[5] == 42
            other[0x17FF] = 7
        assert block.view[0x17FF] == 7
        assert len(block.view) == 0x1800

    def test_close_closes_the_descriptor(self) -> None:
        """And tells so afterwards."""
        block = RamBlock.memfd(PAGE_SIZE)
        fd = block.fileno()
        os.fstat(fd)
        block.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        with pytest.raises(RegionError, match="no file descriptor"):
            block.fileno()

    def test_dropping_closes_the_descriptor(self) -> None:
        """Without a word to `close`."""
        block = RamBlock.memfd(PAGE_SIZE)
        fd = block.fileno()
        del block
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_a_failure_leaves_no_descriptor(self) -> None:
        """What could not be mapped is closed."""
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match=r".+"):
            RamBlock.memfd(1 << 62)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_others_have_none(self) -> None:
        """The error says what to use instead."""
        with pytest.raises(RegionError, match=r"make it with RamBlock\.memfd"):
            RamBlock.anonymous(PAGE_SIZE).fileno()


class TestFile:
    def test_shared(self, path: Path) -> None:
        """What is written reaches the file."""
        block = RamBlock.file(path)
        assert (block.name, block.size) == ("image", 2 * PAGE_SIZE + 3)
        assert bytes(block.view[-4:]) == b"bend"
        block.view[0] = ord("X")
        block.close()
        assert path.read_bytes()[:2] == b"Xa"

    def test_private(self, path: Path) -> None:
        """What is written stays here, and the file need not be writable."""
        path.chmod(0o400)
        block = RamBlock.file(path, shared=False, name="flash")
        block.view[0] = ord("X")
        assert (block.name, bytes(block.view[:2])) == ("flash", b"Xa")
        assert path.read_bytes()[:2] == b"aa"

    def test_a_part(self, path: Path) -> None:
        """From an offset on, so many bytes."""
        block = RamBlock.file(path, offset=PAGE_SIZE, size=0x10)
        assert bytes(block.view) == b"b" * 0x10
        assert RamBlock.file(path, offset=PAGE_SIZE).size == PAGE_SIZE + 3

    @pytest.mark.parametrize("offset", [1, PAGE_SIZE - 1, -PAGE_SIZE])
    def test_bad_offsets(self, path: Path, offset: int) -> None:
        """Mappings start at pages."""
        with pytest.raises(RegionError, match=r"'image': offset .* multiple of the page size"):
            RamBlock.file(path, offset=offset)

    @pytest.mark.parametrize(
        ("offset", "size"),
        [
            (0, 2 * PAGE_SIZE + 4),
            (PAGE_SIZE, PAGE_SIZE + 4),
            (0, 0),
            (0, -1),
            (4 * PAGE_SIZE, None),
        ],
    )
    def test_beyond_the_file(self, path: Path, offset: int, size: int | None) -> None:
        """A mapping past the file's end would fault when it is touched."""
        with pytest.raises(RegionError, match=r"'image': \[.*\) is not in the file, .* 0x2003"):
            RamBlock.file(path, offset=offset, size=size)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        """There is nothing to map."""
        (tmp_path / "empty").touch()
        with pytest.raises(RegionError, match="not in the file"):
            RamBlock.file(tmp_path / "empty")

    def test_no_file(self, tmp_path: Path) -> None:
        """The operating system's own error comes out."""
        with pytest.raises(FileNotFoundError):
            RamBlock.file(tmp_path / "none")

    def test_leaves_no_descriptor(self, path: Path) -> None:
        """The mapping has its own reference to the file."""
        before = len(os.listdir("/proc/self/fd"))
        block = RamBlock.file(path, size=PAGE_SIZE)
        # Python's mmap keeps a duplicate; it goes with the block.
        block.close()
        assert len(os.listdir("/proc/self/fd")) == before


class TestFromBuffer:
    def test_no_copy(self) -> None:
        """The caller's memory is the guest's."""
        buffer = bytearray(b"abcd")
        block = RamBlock.from_buffer(buffer)
        block.view[0] = ord("X")
        assert buffer == b"Xbcd"
        assert block.size == 4

    def test_any_item_size(self) -> None:
        """Sizes are in bytes, whatever the buffer's items are."""
        block = RamBlock.from_buffer((ctypes.c_uint32 * 4)(1))
        assert (block.size, block.view.format) == (16, "B")
        assert block.view[0] == 1

    def test_the_buffer_cannot_shrink_under_the_guest(self) -> None:
        """A bytearray cannot be resized while it is guest memory, and can be afterwards."""
        buffer = bytearray(16)
        block = RamBlock.from_buffer(buffer)
        with pytest.raises(BufferError):
            buffer.clear()
        block.close()
        buffer.clear()

    @pytest.mark.parametrize("buffer", [b"constant", bytearray(), memoryview(bytearray(8))[::2]])
    def test_unsuitable(self, buffer: Any) -> None:
        """Read-only, empty, or with holes: the error says what to do."""
        with pytest.raises(RegionError, match=r"'odd': .* copy it into a bytearray"):
            RamBlock.from_buffer(buffer, name="odd")

    def test_no_buffer(self) -> None:
        """A list is none."""
        with pytest.raises(RegionTypeError, match="list is not a buffer"):
            RamBlock.from_buffer([1, 2])


class TestLifetime:
    @pytest.mark.parametrize("kind", ["anonymous", "memfd", "buffer", "file"])
    def test_close_is_refused_while_in_use(self, kind: str, path: Path) -> None:
        """A view keeps the memory, and the refusal leaves it as it was."""
        block = {
            "anonymous": lambda: RamBlock.anonymous(PAGE_SIZE),
            "memfd": lambda: RamBlock.memfd(PAGE_SIZE),
            "buffer": lambda: RamBlock.from_buffer(bytearray(PAGE_SIZE)),
            "file": lambda: RamBlock.file(path),
        }[kind]()
        view = block.view
        with pytest.raises(RamInUseError, match="release those first") as caught:
            block.close()
        assert isinstance(caught.value, BufferError)
        view[0] = 42
        assert block.view[0] == 42
        view.release()
        block.close()
        block.close()
        with pytest.raises(ValueError, match=r"closed|released"):
            _ = block.view

    def test_a_slice_keeps_it_too(self) -> None:
        """Any view of a view."""
        block = RamBlock.anonymous(PAGE_SIZE)
        part = block.view[1:2].toreadonly()
        with pytest.raises(RamInUseError):
            block.close()
        part.release()
        block.close()

    def test_a_view_outlives_its_block(self) -> None:
        """Memory is never unmapped under somebody who looks at it."""
        block = RamBlock.anonymous(PAGE_SIZE)
        view = block.view
        gone = weakref.ref(block)
        del block
        gc.collect()
        assert gone() is None
        view[0] = 1
        assert view[0] == 1

    def test_a_flat_range_keeps_the_memory(self) -> None:
        """T15: whoever holds a range of an old view holds its memory."""
        ram = MemoryRegion.ram("ram", PAGE_SIZE)
        system = MemoryRegion.container("system", PAGE_SIZE)
        system.add_subregion(0, ram)
        ram.block.view[0] = 42
        (each,) = FlatView.render(system)
        gone = weakref.ref(ram)
        system.del_subregion(ram)
        del ram
        gc.collect()
        assert gone() is not None
        assert each.region.block.view[0] == 42

    def test_unmapped_when_nobody_is_left(self) -> None:
        """And not before: the last one to leave frees it."""
        buffer = bytearray(8)
        ram = MemoryRegion.ram("ram", 8, block=RamBlock.from_buffer(buffer))
        with pytest.raises(BufferError):
            buffer.clear()
        del ram
        gc.collect()
        buffer.clear()

    @pytest.mark.parametrize("block", [RamBlock.anonymous(8), RamBlock.from_buffer(bytearray(8))])
    def test_host_address(self, block: RamBlock) -> None:
        """It is where the view's bytes are, and asking for it keeps nothing."""
        block.view[:] = b"address!"
        assert ctypes.string_at(block.host_address, 8) == b"address!"
        block.close()


class TestBehindRegions:
    def test_a_region_keeps_it_open(self) -> None:
        """T15: what a region shows cannot be unmapped; when the region is gone it can."""
        block = RamBlock.anonymous(0x1000)
        region = MemoryRegion.ram("ram", 0x1000, block=block)
        with pytest.raises(RamInUseError, match="a region"):
            block.close()
        del region
        block.close()
        lazy = MemoryRegion.ram("ram", 0x1000)
        with pytest.raises(RamInUseError, match="a region"):
            lazy.block.close()

    def test_several_threads_get_one_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of vCPUs may be the first to touch memory: all write to the same."""
        region = MemoryRegion.ram("ram", 0x1000)
        anonymous = RamBlock.anonymous
        started = threading.Barrier(4)

        def slow(size: int, *, name: str = "ram") -> RamBlock:
            time.sleep(0.05)
            return anonymous(size, name=name)

        monkeypatch.setattr(RamBlock, "anonymous", slow)

        def touch(at: int) -> None:
            started.wait()
            region.block.view[at] = 1

        threads = [threading.Thread(target=touch, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bytes(region.block.view[:5]) == b"\1\1\1\1\0"

    async def test_mapped_in_a_transaction_that_fails(self) -> None:
        """T13: memory that was mapped while the region was smaller is as large as it was."""
        memory = MemorySystem()
        root = MemoryRegion.container("root", 0x1000)
        rom = MemoryRegion.rom("rom", 0x1000, data=b"firmware")
        root.add_subregion(0, rom)
        space = memory.create_address_space("space", root)

        async def fail() -> None:
            async with memory.transaction():
                rom.set_size(0x400)
                assert rom.block.size >= 0x400
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert rom.size == 0x1000
        assert len(space.map(0, 0x1000)) == 0x1000
        assert await space.read(0xFF8, 8) == bytes(8)
        assert await space.read(0, 8) == b"firmware"

    def test_a_free_region_maps_what_it_is(self) -> None:
        """Nothing takes a change to a free region back, so its size is all it needs."""
        region = MemoryRegion.ram("ram", 1 << 40)
        region.set_size(0x1000)
        assert region.block.size == 0x1000

    @pytest.mark.parametrize("block", [b"x", bytearray(16), 16])
    def test_what_is_no_block(self, block: Any) -> None:
        """A clear TypeError."""
        with pytest.raises(RegionTypeError, match="is a RamBlock, not"):
            MemoryRegion.ram("ram", 16, block=block)

    @pytest.mark.parametrize("data", ["abc", None, 5])
    def test_what_is_no_data(self, data: Any) -> None:
        """A clear TypeError; any buffer will do, by its bytes."""
        with pytest.raises(RegionTypeError, match="is bytes, not"):
            MemoryRegion.rom("rom", 16, data=data)
        items: Any = array("H", [0x4241, 0x4443])
        assert bytes(MemoryRegion.rom("rom", 16, data=items).block.view[:5]) == b"ABCD\0"
        with pytest.raises(RegionError, match="do not fit"):
            MemoryRegion.rom("rom", 3, data=items)

    def test_arguments(self, tmp_path: Path) -> None:
        """Names are str, sizes and offsets int."""
        (tmp_path / "image").write_bytes(b"x" * 0x2000)
        wrong: Any = "0"
        with pytest.raises(RegionTypeError, match=r"offset of .*image.* is an int"):
            RamBlock.file(tmp_path / "image", offset=wrong)
        with pytest.raises(RegionTypeError, match=r"size of .*image.* is an int"):
            RamBlock.file(tmp_path / "image", size=True)
        wrong = None
        with pytest.raises(RegionTypeError, match=r"offset of .*image.* is an int"):
            RamBlock.file(tmp_path / "image", offset=wrong)
        with pytest.raises(RegionTypeError, match="name is a str"):
            RamBlock.anonymous(16, name=wrong)
        with pytest.raises(RegionTypeError, match=r"size of .* is an int"):
            RamBlock.memfd(wrong)


class TestDiscard:
    """Memory that goes back to the host, and reads as zeros."""

    @pytest.fixture(params=["anonymous", "memfd", "file"])
    def block(self, request: pytest.FixtureRequest, tmp_path: Path) -> RamBlock:
        """Four pages of ones, of every kind that can be discarded."""
        if request.param == "file":
            (tmp_path / "image").write_bytes(bytes(5 * PAGE_SIZE))
            block = RamBlock.file(tmp_path / "image", offset=PAGE_SIZE)
        else:
            block = getattr(RamBlock, request.param)(4 * PAGE_SIZE)
        block.view[:] = b"\1" * block.size
        return block

    def test_reads_as_zeros(self, block: RamBlock) -> None:
        """That range and no other, also through a view from before; and it can be used again."""
        view = block.view
        assert block.discardable
        block.discard(PAGE_SIZE, 2 * PAGE_SIZE)
        ones, zeros = b"\1" * PAGE_SIZE, bytes(PAGE_SIZE)
        assert bytes(view) == ones + zeros + zeros + ones
        view[PAGE_SIZE] = 2
        assert block.view[PAGE_SIZE] == 2

    def test_counts_as_written(self, block: RamBlock) -> None:
        """Who copies the memory has to copy the zeros."""
        block.discard(PAGE_SIZE, 2 * PAGE_SIZE)
        for client in DirtyClient:
            assert block.take_dirty(client) == [(PAGE_SIZE, 2 * PAGE_SIZE)]

    def test_nothing(self, block: RamBlock) -> None:
        """No bytes, no change; at the very end too."""
        block.discard(0, 0)
        block.discard(4 * PAGE_SIZE, 0)
        assert bytes(block.view) == b"\1" * block.size
        assert block.dirty_pages(DirtyClient.VGA) == 0

    def test_gives_memory_back(self) -> None:
        """The process has less of it afterwards: that is what it is for."""
        block = RamBlock.anonymous(64 << 20)
        for at in range(0, block.size, PAGE_SIZE):
            block.view[at] = 1
        before = resident()
        block.discard(0, block.size)
        assert before - resident() > 48 << 20

    def test_a_file_gets_a_hole(self, tmp_path: Path) -> None:
        """The host's disk has room again too, and nothing but the range is touched."""
        image = tmp_path / "image"
        image.write_bytes(b"x" * 4 * PAGE_SIZE)
        block = RamBlock.file(image, offset=PAGE_SIZE, size=2 * PAGE_SIZE)
        block.discard(0, PAGE_SIZE)
        assert image.read_bytes() == b"x" * PAGE_SIZE + bytes(PAGE_SIZE) + b"x" * 2 * PAGE_SIZE

    def test_what_cannot_be(self, path: Path) -> None:
        """A caller's own memory stays; a private file's pages would be the file's again."""
        for block in (
            RamBlock.from_buffer(bytearray(b"mine" * PAGE_SIZE)),
            RamBlock.from_buffer(mmap.mmap(-1, PAGE_SIZE)),
            RamBlock.file(path, size=2 * PAGE_SIZE, shared=False),
        ):
            before = bytes(block.view)
            assert not block.discardable
            with pytest.raises(RegionError, match="use RamBlock"):
                block.discard(0, PAGE_SIZE)
            assert bytes(block.view) == before
            assert block.dirty_pages(DirtyClient.VGA) == 0

    @pytest.mark.parametrize(
        ("offset", "size", "message"),
        [
            (1, PAGE_SIZE, "multiples of the page size"),
            (0, 1, "multiples of the page size"),
            (0, 5 * PAGE_SIZE, "is not within"),
            (-PAGE_SIZE, PAGE_SIZE, "is not within"),
            ("0", PAGE_SIZE, "is an int"),
        ],
    )
    def test_bad_ranges(self, block: RamBlock, offset: Any, size: int, message: str) -> None:
        """Whole pages within the block; nothing is changed."""
        with pytest.raises(RegionError, match=message):
            block.discard(offset, size)
        assert bytes(block.view) == b"\1" * block.size

    def test_the_host_refuses(self, block: RamBlock, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the block and the range, and no page counts as written."""
        monkeypatch.setattr(block, "_advice", -1)
        where = rf"\[{PAGE_SIZE:#x}, {2 * PAGE_SIZE:#x}\) of <RamBlock"
        with pytest.raises(OSError, match=f"cannot discard {where}") as info:
            block.discard(PAGE_SIZE, PAGE_SIZE)
        assert info.value.errno == errno.EINVAL
        assert block.dirty_pages(DirtyClient.VGA) == 0

    def test_closed(self) -> None:
        """There is nothing to give back any more."""
        block = RamBlock.anonymous(PAGE_SIZE)
        block.close()
        with pytest.raises(ValueError, match="closed"):
            block.discard(0, PAGE_SIZE)


VGA, CODE, MIGRATION = DirtyClient


class TestDirtyPages:
    """Who wrote what, and who has been told."""

    def test_each_client_takes_its_own(self) -> None:
        """Several clients: taking one's bits leaves the others'."""
        block = RamBlock.anonymous(0x10000)
        block.mark_dirty(0x1FFF, 2)
        assert [block.dirty_pages(each) for each in DirtyClient] == [2, 2, 2]
        assert block.take_dirty(VGA) == [(0x1000, 0x2000)]
        assert block.take_dirty(VGA) == []
        assert block.take_dirty(MIGRATION) == [(0x1000, 0x2000)]
        assert [block.dirty_pages(each) for each in DirtyClient] == [0, 2, 0]

    def test_only_for_some(self) -> None:
        """A mask says whose bits are set."""
        block = RamBlock.anonymous(0x10000)
        block.mark_dirty(0, 1, 1 << CODE | 1 << VGA)
        block.merge_dirty(0x8000, b"\x05", 1 << VGA)
        assert block.take_dirty(VGA) == [(0, 0x1000), (0x8000, 0x1000), (0xA000, 0x1000)]
        assert block.take_dirty(CODE) == [(0, 0x1000)]
        assert block.take_dirty(MIGRATION) == []

    def test_part_of_a_page(self) -> None:
        """The last page ends where the block does; a range is rounded to pages outwards."""
        block = RamBlock.from_buffer(bytearray(0x2800))
        block.mark_dirty(0x27FF, 1)
        block.mark_dirty(0xFFF, 1)
        assert block.take_dirty(VGA, 0x2010, 1) == [(0x2000, 0x800)]
        assert block.take_dirty(VGA, 0x800) == [(0, 0x1000)]
        block.merge_dirty(0, b"\xff" * 8)
        assert block.take_dirty(VGA) == [(0, 0x2800)]

    def test_nothing(self) -> None:
        """A range of no bytes is on no page."""
        block = RamBlock.anonymous(0x2000)
        block.mark_dirty(0, 0)
        block.mark_dirty(0x2000, 0)
        assert block.dirty_pages(VGA) == 0
        block.mark_dirty(0, 0x2000)
        assert block.take_dirty(VGA, 0x1000, 0) == []
        assert block.take_dirty(VGA, 0x2000) == []
        assert block.dirty_pages(VGA) == 2

    def test_whoever_protects_pages_is_told(self) -> None:
        """Before the bits are given away, and only for ranges in which some can be."""
        block = RamBlock.anonymous(0x4000)
        told: list[tuple[int, int]] = []
        undo = block.when_taken(lambda offset, size: told.append((offset, size)))
        block.take_dirty(VGA)
        assert told == []
        block.mark_dirty(0, 1)
        block.take_dirty(VGA, 0x1000, 0x2000)
        block.take_dirty(VGA)
        assert told == [(0x1000, 0x2000), (0, 0x4000)]
        undo()
        undo()
        block.take_dirty(VGA)
        assert len(told) == 2

    def test_no_bit_is_lost_where_protecting_fails(self) -> None:
        """The error leaves take_dirty, and the next one has all that there was."""
        block = RamBlock.anonymous(0x4000)

        def refuse(offset: int, size: int) -> None:
            block.mark_dirty(0x2000, 1)  # meanwhile
            raise OSError(22, "no")

        block.mark_dirty(0x1000, 1)
        undo = block.when_taken(refuse)
        with pytest.raises(OSError, match="no"):
            block.take_dirty(VGA)
        undo()
        assert block.take_dirty(VGA) == [(0x1000, 0x2000)]

    @pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0x1000, 1), (0, 0x1001)])
    def test_out_of_range(self, offset: int, size: int) -> None:
        """Names the range and the block; nothing is marked or taken."""
        block = RamBlock.anonymous(0x1000, name="small")
        with pytest.raises(RegionError, match=r"is not within .*'small'"):
            block.mark_dirty(offset, size)
        with pytest.raises(RegionError, match=r"is not within .*'small'"):
            block.take_dirty(VGA, offset, size)

    def test_arguments(self) -> None:
        """A client is a DirtyClient; a bitmap begins with a page."""
        block = RamBlock.anonymous(0x1000)
        wrong: Any = 2
        with pytest.raises(RegionTypeError, match="is a DirtyClient"):
            block.take_dirty(wrong)
        with pytest.raises(RegionTypeError, match="is a DirtyClient"):
            block.dirty_pages(wrong)
        with pytest.raises(RegionError, match="begins with a page"):
            block.merge_dirty(0x10, b"\1")
        wrong = "0"
        with pytest.raises(RegionTypeError, match=r"offset in .* is an int"):
            block.mark_dirty(wrong, 1)
        wrong = None
        with pytest.raises(RegionTypeError, match="is an int"):
            block.mark_dirty(0, wrong)

    async def test_accesses_mark_what_is_logged(self) -> None:
        """Writes and loads, through whatever range logs them, for those who log; others not."""
        root = MemoryRegion.container("root", 0x10000)
        logged, other = MemoryRegion.ram("logged", 0x4000), MemoryRegion.ram("other", 0x4000)
        logged.set_log(True, VGA)
        root.add_subregion(0, logged)
        root.add_subregion(0x4000, other)
        root.add_subregion(0x8000, MemoryRegion.alias("a", logged, offset=0x2000, size=0x1000))
        memory = MemorySystem()
        space = memory.create_address_space("memory", root)
        await space.write(0x3FFF, b"ab")
        await space.write(0x8000, b"c")
        space.load(0xFFF, b"de")
        assert logged.block.take_dirty(VGA) == [(0, 0x4000)]
        assert logged.block.take_dirty(MIGRATION) == []
        assert other.block.dirty_pages(VGA) == 0
        await memory.dirty_log_start()
        await space.write(0x3FFF, b"ab")
        assert logged.block.take_dirty(MIGRATION) == [(0x3000, 0x1000)]
        assert other.block.take_dirty(MIGRATION) == [(0, 0x1000)]
        await memory.dirty_log_stop()
        await space.write(0x3FFF, b"ab")
        assert other.block.dirty_pages(MIGRATION) == 0
