"""`AddressSpace`: a root region, the view of it that is published, and accesses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from memlistener import dispatch
from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.identity import Identity
from memlistener.core.ioeventfd import Attached
from memlistener.core.ops import UNSPECIFIED, MemTxAttrs, MemTxResult
from memlistener.core.region import MemoryRegion
from memlistener.core.ways import Sight
from memlistener.errors import RegionError, RegionTypeError, UnassignedAccessError
from memlistener.listener import Hook, MemoryListener, Registration

if TYPE_CHECKING:
    from memlistener.memory import MemorySystem

# What has Python's buffer protocol; `collections.abc.Buffer` is Python 3.12's.
Buffer: TypeAlias = "bytes | bytearray | memoryview | Any"


class Sharing:
    """Which address spaces come down to which region, and so share its view (rule F7)."""

    def __init__(self) -> None:
        self._spaces: dict[MemoryRegion | None, dict[AddressSpace, None]] = {}

    def of(self, root: MemoryRegion | None) -> Iterable[AddressSpace]:
        """Those that come down to ``root`` now."""
        return self._spaces.get(root, ())

    def add(self, space: AddressSpace) -> None:
        """``space`` shows what it comes down to."""
        self._spaces.setdefault(space._view_root, {})[space] = None

    def remove(self, space: AddressSpace) -> None:
        """``space`` no longer does."""
        spaces = self._spaces[space._view_root]
        del spaces[space]
        if not spaces:
            del self._spaces[space._view_root]


class AddressSpace(Identity):
    """A root region and what it shows (QEMU's ``AddressSpace``).

    Make one with `MemorySystem.create_address_space`.
    """

    def __init__(
        self,
        memory: MemorySystem,
        name: str,
        root: MemoryRegion,
        *,
        number: int,
        unassigned_raises: bool,
    ) -> None:
        """Use `MemorySystem.create_address_space`."""
        self._memory = memory
        self._number = number  # in the order of creation
        self._name = name
        self._root = root
        self._unassigned_raises = unassigned_raises
        self._registrations: list[Registration] = []
        self._hooks: dict[str, tuple[Hook, ...]] = {}  # by name, in ascending priority
        self._view = FlatView()
        self._view_root: MemoryRegion | None = None  # what it was rendered from (F7)
        self._unassigned = 0
        self._unassigned_mutex = threading.Lock()

    @property
    def name(self) -> str:
        """For people."""
        return self._name

    @property
    def root(self) -> MemoryRegion:
        """The region whose tree is shown."""
        return self._root

    @property
    def memory(self) -> MemorySystem:
        """The memory system that the address space belongs to."""
        return self._memory

    @property
    def view(self) -> FlatView:
        """The published view: as of the last commit, whole, from any thread."""
        return self._view

    def _publish(self, view: FlatView, root: MemoryRegion | None) -> None:
        """Show ``view``, which was rendered from ``root``: for readers one assignment."""
        self._view = view
        if root is not self._view_root:
            self._memory._sharing.remove(self)
            self._view_root = root
            self._memory._sharing.add(self)

    @property
    def listeners(self) -> tuple[MemoryListener, ...]:
        """The registered listeners in ascending priority."""
        return tuple(each.listener for each in self._registrations)

    @property
    def unassigned_accesses(self) -> int:
        """How many accesses met nothing (rule K5), by whomever they were made."""
        return self._unassigned

    async def read(self, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED) -> bytes:
        """Read ``size`` bytes at ``addr``, as a device or a CPU would.

        Where nothing is, or a device refuses, the bytes are 0xff; use
        `read_result` to tell. Memory costs no checkpoint; async ops do what they do.

        Raises:
            RegionError: The range is not within 64 bits.
            UnassignedAccessError: Nothing is there, and the address space was
                created with ``unassigned_raises``.
        """
        data, _ = await self.read_result(addr, size, attrs)
        return data

    async def read_result(
        self, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED
    ) -> tuple[bytes, MemTxResult]:
        """As `read`, with how it went."""
        self._check_range(addr, size)
        return await self.read_in(self._view, addr, size, attrs)

    async def read_in(
        self, view: FlatView, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED
    ) -> tuple[bytes, MemTxResult]:
        """As `read_result`, in a view of this address space that the caller has."""
        data, result, unassigned = await dispatch.read(view, addr, size, attrs)
        if unassigned:
            self._count_unassigned(addr, size, "read", unassigned)
        return data, result

    async def write(self, addr: int, data: Buffer, attrs: MemTxAttrs = UNSPECIFIED) -> MemTxResult:
        """Write ``data`` (bytes, or any other buffer) at ``addr``, as a device or a CPU would.

        Returns:
            How it went: what meets nothing or read-only memory vanishes.

        Raises:
            RegionError: The range is not within 64 bits.
            UnassignedAccessError: As for `read`.
        """
        raw = data if isinstance(data, bytes) else _buffer(data).tobytes()
        self._check_range(addr, len(raw))
        return await self.write_in(self._view, addr, raw, attrs)

    async def write_in(
        self, view: FlatView, addr: int, data: bytes, attrs: MemTxAttrs = UNSPECIFIED
    ) -> MemTxResult:
        """As `write`, in a view of this address space that the caller has."""
        try:
            result, unassigned = await dispatch.write(view, addr, data, attrs)
        finally:
            if view is not self._view:
                # Somebody may have begun to log meanwhile, which `view` does not know.
                dispatch.mark_written(view, addr, len(data), self._memory._dirty_log.clients)
        if unassigned:
            self._count_unassigned(addr, len(data), "write", unassigned)
        return result

    def map(self, addr: int, size: int) -> memoryview:
        """The memory behind [addr, addr + size): no copy, RAM and ROM only.

        The view of read-only memory is read-only. It stays valid, and the
        memory alive, whatever happens to the map afterwards.

        Raises:
            RegionError: Part of the range is not memory, or not one stretch of it.
        """
        self._check_range(addr, size)
        each = self._view.lookup(addr)
        if each is None or addr + size > each.end or not dispatch.reads_memory(each):
            what = "nothing" if each is None else repr(each)
            raise RegionError(
                f"[{addr:#x}, {addr + size:#x}) of {self._name!r} is not one stretch of "
                f"memory: at {addr:#x} there is {what}; use read() and write()"
            )
        offset = each.offset + addr - each.start
        found: memoryview = each.region.block.view[offset : offset + size]
        return found if dispatch.writes_memory(each) else found.toreadonly()

    def load(self, addr: int, data: Buffer) -> None:
        """Put ``data`` into RAM or ROM, to set a machine up (``rom_add_blob``).

        Plain, and not an access: read-only memory is written, and devices are not
        called. Pages are marked where writes are logged. May go over several regions.

        Raises:
            RegionError: Part of the range is not memory; nothing was written.
        """
        raw = memoryview(_buffer(data).tobytes())
        self._check_range(addr, len(raw))
        parts: list[tuple[FlatRange, int, memoryview]] = []
        at = addr
        while at < addr + len(raw):
            each = self._view.lookup(at)
            if each is None or not dispatch.reads_memory(each):
                what = "nothing" if each is None else repr(each)
                raise RegionError(
                    f"{len(raw):#x} bytes at {addr:#x} of {self._name!r} do not fit into "
                    f"memory: at {at:#x} there is {what}"
                )
            offset = each.offset + at - each.start
            part = raw[at - addr : each.end - addr]
            parts.append((each, offset, part))
            at += len(part)
        for each, offset, part in parts:
            dispatch.write_memory(each, offset, part)

    def _count_unassigned(self, addr: int, size: int, what: str, count: int = 1) -> None:
        """An access met nothing: count it, or make it an error if so asked.

        Raises:
            UnassignedAccessError: The address space was created to raise it.
        """
        with self._unassigned_mutex:  # vCPU threads count too
            self._unassigned += count
        if self._unassigned_raises:
            raise UnassignedAccessError(
                f"{what} of {size} bytes at {addr:#x} in {self._name!r}: nothing is there"
            )

    def _check_range(self, addr: int, size: int) -> None:
        for what, value in (("addr", addr), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise RegionTypeError(
                    f"{what} of an access to {self._name!r} is an int, not {value!r}"
                )
        if addr < 0 or size < 0 or addr + size > 1 << 64:
            raise RegionError(
                f"[{addr:#x}, {addr + size:#x}) is not within the 64 bits of {self._name!r}"
            )

    # ---- TreeOwner ----------------------------------------------------------------

    @property
    def journal(self) -> object:
        """The memory system keeps one journal for all its address spaces."""
        return self._memory

    def check_change(self, region: MemoryRegion, what: str) -> None:
        """Rule T11: only the task with the open transaction may change a live tree."""
        self._memory._check_change(region, what)

    def record(self, undo: Callable[[], None]) -> None:
        """Keep the way back from a change."""
        self._memory._pending.journal.append(undo)

    def damage(self, low: int, high: int, sight: Sight | None = None) -> None:
        """[low, high) has to be rendered again when the transaction ends."""
        self._memory._pending.damage(self, low, high, sight)

    def reattached(self, region: MemoryRegion, before: Attached, low: int, high: int) -> None:
        """What hangs on ``region`` changed, which shows in [low, high)."""
        self._memory._pending.reattached(self, region, before, low, high)

    def detached(self, region: MemoryRegion) -> None:
        """Follow ``region`` to the transaction's end: a rollback brings it back."""
        self._memory._pending.follow(region)

    def __repr__(self) -> str:
        return f"<AddressSpace {self._name!r} root {self._root.name!r}>"


def _buffer(data: Buffer) -> memoryview:
    try:
        return memoryview(data)
    except TypeError as exc:
        raise RegionTypeError(
            f"data is bytes or another buffer, not {type(data).__name__}"
        ) from exc
