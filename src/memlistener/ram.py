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
import threading
import weakref
from pathlib import Path
from typing import Any

from memlistener.core.identity import Identity
from memlistener.core.region import MemoryRegion, set_allocator
from memlistener.errors import RamInUseError, RegionError, RegionTypeError

# Known to Python's mmap from 3.13 on only. The guest's RAM is address space
# until it is touched: without this a large guest is refused by the host's
# overcommit heuristics though it would never use what it was given.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
PAGE_SIZE = mmap.PAGESIZE

_CLOSED = memoryview(b"")
_CLOSED.release()


class RamBlock(Identity):
    """A stretch of host memory that a guest sees (QEMU's ``RAMBlock``).

    Make one with `anonymous`, `memfd`, `file` or `from_buffer`. It stays mapped
    for as long as a view of it, a region with it or a memslot on it exists.
    """

    __slots__ = ("__weakref__", "_fd", "_memory", "_name", "_size")

    def __init__(self, name: str, memory: Any, size: int, fd: int | None = None) -> None:
        """Use the class methods instead."""
        self._name = name
        self._memory = memory
        self._size = size
        self._fd = fd

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
        return cls(name, _map(name, -1, size, flags, 0), size)

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
        return cls(name, memory, size, fd)

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
            return cls(label, _map(label, fd, wanted, flags, offset, round_up=False), wanted)
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
