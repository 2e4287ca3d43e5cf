"""`RamBlock`: host memory behind RAM and ROM, its lifetime and its views.

Lifetime is left to Python's buffer protocol, which does exactly what is needed:
a mapping cannot go away while anybody has a memoryview of it or knows its
address (a memslot does), and goes away when nobody does. `RamBlock.close` asks
for it to happen now, and says so when it cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlistener.core.dirty import (
    ALL_CLIENTS,
    DIRTY_PAGE_SIZE,
    DirtyBitmap,
    DirtyClient,
    DirtyRanges,
    runs,
)
from memlistener.core.identity import Identity
from memlistener.core.region import MemoryRegion, set_allocator
from memlistener.errors import RamInUseError, RegionError, RegionTypeError

# Known to Python's mmap from 3.13 on only. The guest's RAM is address space
# until it is touched: without this a large guest is refused by the host's
# overcommit heuristics though it would never use what it was given.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
PAGE_SIZE = mmap.PAGESIZE

# What makes pages zeros again and frees them. That MADV_DONTNEED does so at once is
# Linux's own; of a shared mapping the pages belong to the file, and only the other
# takes them out of that.
_DROP = mmap.MADV_DONTNEED if sys.platform == "linux" else None
_PUNCH = getattr(mmap, "MADV_REMOVE", None)

_CLOSED = memoryview(b"")
_CLOSED.release()


class RamBlock(Identity):
    """A stretch of host memory that a guest sees (QEMU's ``RAMBlock``).

    Make one with `anonymous`, `memfd`, `file` or `from_buffer`. It stays mapped
    for as long as a view of it, a region with it or a memslot on it exists.
    """

    __slots__ = (
        "__weakref__",
        "_advice",
        "_dirty",
        "_dirty_lock",
        "_fd",
        "_memory",
        "_name",
        "_size",
        "_when_taken",
    )

    def __init__(
        self,
        name: str,
        memory: Any,
        size: int,
        fd: int | None = None,
        *,
        advice: int | None = None,
    ) -> None:
        """Use the class methods instead."""
        self._name = name
        self._memory = memory
        self._size = size
        self._fd = fd
        self._advice = advice  # that discards pages; None where nothing does
        # vCPU threads mark pages too, when a write of theirs is served in user space.
        self._dirty_lock = threading.Lock()
        self._dirty: dict[DirtyClient, DirtyBitmap] = {}  # made when a page is first marked
        self._when_taken: list[Callable[[int, int], object]] = []

    @classmethod
    def anonymous(cls, size: int, *, name: str = "ram") -> RamBlock:
        """Zeroed private memory; no page of it exists before it is touched.

        Args:
            size: In bytes; rounded up to whole pages for the mapping only.
            name: For people.

        Raises:
            RegionError: ``size`` is not positive.
            OSError: The host has no such amount of address space.
        """
        _check(name, size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        return cls(name, _map(name, -1, size, flags, 0), size, advice=_DROP)

    @classmethod
    def memfd(cls, size: int, *, name: str = "ram") -> RamBlock:
        """Zeroed memory that other processes can map: `fileno` is what to send them.

        Raises:
            RegionError: ``size`` is not positive.
            OSError: The host refuses.
        """
        _check(name, size)
        fd = os.memfd_create(name)
        try:
            os.ftruncate(fd, _pages(size))
            memory = _map(name, fd, size, mmap.MAP_SHARED | _NORESERVE, 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(name, memory, size, fd, advice=_PUNCH)

    @classmethod
    def file(
        cls,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        offset: int = 0,
        shared: bool = True,
        name: str | None = None,
    ) -> RamBlock:
        """Memory mapped from a file.

        Args:
            path: An existing file.
            size: In bytes; None for all from ``offset`` to the file's end.
            offset: Where in the file to start: a multiple of the page size.
            shared: True: what is written reaches the file. False: it stays
                private to this block (the file is only read).
            name: For people; the file's name by default.

        Raises:
            RegionError: ``size`` or ``offset`` do not fit the file.
            OSError: The file cannot be opened or mapped.
        """
        for what, value in (("size", size), ("offset", offset)):
            if value is not None or what == "offset":
                _check_int(f"{what} of {os.fspath(path)!r}", value)
        fd = os.open(path, (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            there = os.fstat(fd).st_size
            label = name if name is not None else Path(path).name
            if offset % PAGE_SIZE or not offset >= 0:
                raise RegionError(
                    f"{label!r}: offset {offset:#x} is not a multiple of the page size "
                    f"{PAGE_SIZE:#x}"
                )
            wanted = there - offset if size is None else size
            if not 0 < wanted <= there - offset:
                raise RegionError(
                    f"{label!r}: [{offset:#x}, {offset + wanted:#x}) is not in the file, "
                    f"which has {there:#x} bytes"
                )
            flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | _NORESERVE
            memory = _map(label, fd, wanted, flags, offset, round_up=False)
            # Private pages that are dropped would show the file again, and not zeros.
            return cls(label, memory, wanted, advice=_PUNCH if shared else None)
        finally:
            os.close(fd)  # the mapping has its own reference

    @classmethod
    def from_buffer(cls, buffer: Any, *, name: str = "ram") -> RamBlock:
        """Memory that the caller owns: a bytearray, an mmap, a ctypes or NumPy array.

        The buffer is kept alive, and cannot be resized, while the block is used.

        Raises:
            RegionError: The buffer is read-only, empty, or not contiguous.
        """
        try:
            view = memoryview(buffer)
        except TypeError as exc:
            raise RegionTypeError(f"{name!r}: {type(buffer).__name__} is not a buffer") from exc
        if view.readonly or not view.contiguous or view.nbytes == 0:
            raise RegionError(
                f"{name!r}: a guest's memory must be writable, contiguous and not empty; "
                f"this {type(buffer).__name__} of {view.nbytes:#x} bytes is not: copy it "
                f"into a bytearray"
            )
        # An object of our own in between: its lifetime tells whether it is used.
        memory = (ctypes.c_ubyte * view.nbytes).from_buffer(view.cast("B"))
        return cls(name, memory, view.nbytes)

    @property
    def name(self) -> str:
        """For people."""
        return self._name

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    @property
    def view(self) -> memoryview:
        """The memory: ``size`` bytes, readable and writable. O(1), no copy.

        Raises:
            ValueError: The block was closed.
        """
        view = memoryview(self._memory)
        return (view if view.format == "B" else view.cast("B"))[: self._size]

    @property
    def host_address(self) -> int:
        """Where the memory is in this process: true for as long as you hold a `view`."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def fileno(self) -> int:
        """The file descriptor behind a `memfd` block, which stays the block's.

        Raises:
            RegionError: The block has none.
        """
        if self._fd is None:
            raise RegionError(f"{self!r} has no file descriptor: make it with RamBlock.memfd")
        return self._fd

    # ---- discarding ---------------------------------------------------------------

    @property
    def discardable(self) -> bool:
        """Whether `discard` can do anything for this kind of memory."""
        return self._advice is not None

    def discard(self, offset: int, size: int) -> None:
        """Give the host its memory back: it reads as zeros (``ram_block_discard_range``).

        It stays mapped, and is there again when it is next touched. A guest may run
        meanwhile. All of it counts as written (`mark_dirty`). Of a `memfd` or a
        shared file it goes for everybody who has mapped it: a hole is punched.

        Where others were told that the memory is there, use `RamDiscardManager`.

        Args:
            offset: Where to begin, in bytes; a multiple of the page size.
            size: How many bytes, likewise.

        Raises:
            RegionError: The range is not within the block, or not of whole pages;
                or it is a `from_buffer` block, or private to a file.
            OSError: The host refuses: the pages are locked, or the file system knows
                no holes.
        """
        self._pages(offset, size)
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise RegionError(
                f"[{offset:#x}, {offset + size:#x}) of {self!r} cannot be discarded: both ends "
                f"have to be multiples of the page size {PAGE_SIZE:#x}"
            )
        if self._advice is None:
            raise RegionError(
                f"{self!r} cannot be discarded: use RamBlock.anonymous, RamBlock.memfd, or "
                f"RamBlock.file with shared=True"
            )
        if size:
            try:
                self._memory.madvise(self._advice, offset, size)
            except OSError as exc:
                raise OSError(
                    exc.errno,
                    f"cannot discard [{offset:#x}, {offset + size:#x}) of {self!r}: {exc.strerror}",
                ) from exc
            self.mark_dirty(offset, size)

    # ---- dirty pages --------------------------------------------------------------

    def mark_dirty(self, offset: int, size: int, clients: int = ALL_CLIENTS) -> None:
        """Say that [offset, offset + size) was written (``memory_region_set_dirty``).

        Guests' writes and those of `AddressSpace.write` and `AddressSpace.load` are
        known without: this is for whoever writes through a `view`. From any thread;
        to be called after the write, so that who takes the page finds the data.

        Args:
            offset: Where the write began, in bytes.
            size: How many bytes were written.
            clients: Whose bits to set: a mask with bit ``1 << client`` for each
                `DirtyClient`; all of them by default.

        Raises:
            RegionError: The range is not within the block.
        """
        first, end = self._pages(offset, size)
        if first < end:
            with self._dirty_lock:
                for bitmap in self._bitmaps(clients):
                    bitmap.mark(first, end)

    def merge_dirty(
        self, offset: int, bitmap: bytes | bytearray, clients: int = ALL_CLIENTS
    ) -> None:
        """Set the bits that a bitmap has set, as `mark_dirty` would one by one.

        Args:
            offset: Of the page that is its bit 0; a multiple of the page size.
            bitmap: Bit ``n`` of it is bit ``n % 8`` of byte ``n // 8``. What lies
                beyond the block is ignored.
            clients: As for `mark_dirty`.

        Raises:
            RegionError: The offset is not that of a page of the block.
        """
        first, _ = self._pages(offset, 0)
        if offset % DIRTY_PAGE_SIZE:
            raise RegionError(f"a bitmap of {self!r} begins with a page, not at {offset:#x}")
        with self._dirty_lock:
            for each in self._bitmaps(clients):
                each.merge(first, bitmap)

    def take_dirty(
        self, client: DirtyClient, offset: int = 0, size: int | None = None
    ) -> DirtyRanges:
        """The pages written since this client last took them; from now on it has not.

        Other clients' bits stay. `MemorySystem.dirty_log_sync` fetches what guests
        have written from the accelerators first. What the memory holds *after* this
        call is at least as new as the writes that the call returned: take, then
        read, and a write that comes in between is returned again next time. From any
        thread.

        On KVM with manual protection this is when the pages are write-protected
        again, so take what you are going to read, when you are going to read it.

        Args:
            client: Whose bits.
            offset: Where to begin, in bytes; rounded down to a page.
            size: How far to go, in bytes; rounded up; None for all the rest.

        Returns:
            Stretches of dirty memory, ascending: ``(offset, size)``, in bytes.

        Raises:
            RegionError: The range is not within the block.
            KvmError: The kernel refuses to protect the pages; no bit was taken.
        """
        client = _check_client(client)
        if size is None:
            size = self._size - offset
        first, end = self._pages(offset, size)
        if client not in self._dirty or first >= end:
            return DirtyRanges(array("Q"), self._size)
        with self._dirty_lock:
            taken = self._dirty[client].take(first, end)
        try:
            low = first * DIRTY_PAGE_SIZE
            high = min(end * DIRTY_PAGE_SIZE, self._size)
            for callback in tuple(self._when_taken):
                callback(low, high - low)
        except BaseException:
            with self._dirty_lock:
                self._dirty[client].merge(first & ~7, taken)
            raise
        return DirtyRanges(runs(taken, first & ~7), self._size)

    def dirty_pages(self, client: DirtyClient) -> int:
        """How many pages `take_dirty` would give this client. Takes none."""
        client = _check_client(client)
        with self._dirty_lock:
            bitmap = self._dirty.get(client)
            return bitmap.count() if bitmap is not None else 0

    def when_taken(self, callback: Callable[[int, int], object]) -> Callable[[], None]:
        """Call ``callback(offset, size)`` whenever a client takes bits of a range of pages.

        On the client's thread. For accelerators that leave pages writable until then. Called before
        `take_dirty` returns; what it raises comes out of there, and no bit is taken.

        Returns:
            A function that takes the request back. Again does no harm.
        """
        self._when_taken.append(callback)

        def undo() -> None:
            with contextlib.suppress(ValueError):
                self._when_taken.remove(callback)

        return undo

    def _bitmaps(self, clients: int) -> list[DirtyBitmap]:
        """Those of the clients in a mask. With the lock held."""
        found = []
        for client in DirtyClient:
            if clients >> client & 1:
                bitmap = self._dirty.get(client)
                if bitmap is None:
                    bitmap = self._dirty[client] = DirtyBitmap(-(-self._size // DIRTY_PAGE_SIZE))
                found.append(bitmap)
        return found

    def _pages(self, offset: int, size: int) -> tuple[int, int]:
        """The pages that [offset, offset + size) is on: the first, and the one after the last."""
        _check_int(f"offset in {self!r}", offset)
        _check_int(f"size of a range of {self!r}", size)
        if offset < 0 or size < 0 or offset + size > self._size:
            raise RegionError(f"[{offset:#x}, {offset + size:#x}) is not within {self!r}")
        first = offset // DIRTY_PAGE_SIZE
        return first, -(-(offset + size) // DIRTY_PAGE_SIZE) if size else first

    def close(self) -> None:
        """Unmap now, instead of when the last user is gone. Idempotent.

        Raises:
            RamInUseError: A region, a view, a slot or an address of it is still in use.
        """
        try:
            if isinstance(self._memory, mmap.mmap):
                self._memory.close()
            else:
                self._let_go()
        except BufferError as exc:
            raise RamInUseError(
                f"{self!r} is still used by a region, a memoryview or a memslot: "
                f"release those first"
            ) from exc
        self._close_fd()

    def _let_go(self) -> None:
        """As mmap's close, for a buffer: ctypes counts no exports, Python does references."""
        if self._memory is _CLOSED:
            return
        alive = weakref.ref(self._memory)
        self._memory = _CLOSED
        if alive() is not None:
            self._memory = alive()
            raise BufferError("exported pointers exist")

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ may not have run
            self._close_fd()

    def __repr__(self) -> str:
        return f"<RamBlock {self._name!r} size {self._size:#x}>"


def _check(name: str, size: int) -> None:
    if not isinstance(name, str):
        raise RegionTypeError(f"a block's name is a str, not {name!r}")
    _check_int(f"size of {name!r}", size)
    if size <= 0:
        raise RegionError(f"size of {name!r} is {size:#x}: it must be positive")


def _check_int(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RegionTypeError(f"{what} is an int, not {value!r}")


def _check_client(client: object) -> DirtyClient:
    if not isinstance(client, DirtyClient):
        raise RegionTypeError(f"a client is a DirtyClient, not {client!r}")
    return client


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _map(
    name: str, fd: int, size: int, flags: int, offset: int, *, round_up: bool = True
) -> mmap.mmap:
    length = _pages(size) if round_up else size
    try:
        return mmap.mmap(fd, length, flags=flags, offset=offset)
    except (OSError, OverflowError) as exc:
        raise OSError(
            getattr(exc, "errno", None) or 12,
            f"cannot map {size:#x} bytes of host memory for {name!r}: {exc}",
        ) from exc


_allocating = threading.Lock()


def _allocate(region: MemoryRegion) -> None:
    with _allocating:  # vCPU threads may be the first to touch a region, several at once
        if region._block is None:
            block = RamBlock.anonymous(region._largest, name=region._name)
            region._take(block, region._data[: region._largest])


set_allocator(_allocate)
