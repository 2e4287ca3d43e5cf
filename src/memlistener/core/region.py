"""The tree of memory regions, its structural checks, and what a change reaches.

A `MemoryRegion` is QEMU's: a container, RAM, ROM, a ROM device, I/O, an alias of
another region, a reservation or an IOMMU. One class serves for all of them, as
in QEMU, since an attribute such as ``readonly`` means the same for each; `kind`
tells them apart.

Every mutator does the same five things in the same order (`core.change`):

1. check its arguments, and raise `RegionError` with nothing changed;
2. find every tree owner (`TreeOwner`: an address space) that the region is
   reachable from, upwards through containers and aliases, and ask each whether
   the change may happen now;
3. make the change;
4. hand each owner's journal the way back;
5. tell each owner which window of its address space may look different now:
   what the region showed before, and what it shows after.

Regions know nothing of transactions or tasks; owners do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, overload

from attrs import evolve

from memlistener.core.change import TreeOwner, above_of, change, showing_itself
from memlistener.core.children import Children
from memlistener.core.dirty import DirtyClient
from memlistener.core.identity import Identity
from memlistener.core.ioeventfd import NOTHING, Attached, IoEventFd
from memlistener.core.iommu import Iommu, Translate, Translates
from memlistener.core.kinds import (
    BACKED,
    LIMIT,
    LOG_SHIFT,
    NONVOLATILE,
    READONLY,
    ROMD_MODE,
    UNMERGEABLE,
    RegionKind,
)
from memlistener.core.ways import Way, outdate
from memlistener.errors import RegionError, RegionTypeError


class Block(Protocol):
    """What a region needs of its host memory; `memlistener.RamBlock` is one."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    @property
    def view(self) -> memoryview:
        """The memory, readable and writable."""
        ...


# memlistener.ram puts its allocator here: core makes no host memory itself.
_allocate: Callable[[MemoryRegion], None] | None = None


def set_allocator(allocate: Callable[[MemoryRegion], None]) -> None:
    """Say how a RAM region gets its memory when none was given to it.

    Several threads may come with one region: it is to get one block.
    """
    global _allocate
    _allocate = allocate


class _Container:
    """``MemoryRegion.container(...)`` makes one; ``region.container`` is its own.

    Two things of one name, both QEMU's words: on the class, the constructor of
    a pure container (``memory_region_init``); on a region, the region that this
    one is a subregion of, or None.
    """

    @overload
    def __get__(
        self, region: None, owner: type[MemoryRegion]
    ) -> Callable[[str, int], MemoryRegion]: ...
    @overload
    def __get__(self, region: MemoryRegion, owner: type[MemoryRegion]) -> MemoryRegion | None: ...
    def __get__(
        self, region: MemoryRegion | None, owner: type[MemoryRegion]
    ) -> Callable[[str, int], MemoryRegion] | MemoryRegion | None:
        return _make_container if region is None else region._container


def _make_container(name: str, size: int) -> MemoryRegion:
    """A region that shows only its subregions (``memory_region_init``).

    Args:
        name: For people: errors, ``info mtree``. Need not be unique.
        size: In bytes, 1 to 2**64.

    Raises:
        RegionError: ``size`` is out of range.
    """
    return MemoryRegion(RegionKind.CONTAINER, name, size)


class MemoryRegion(Identity):
    """A node of the memory tree (QEMU's ``MemoryRegion``).

    Make one with a class method: `container`, `ram`, `rom`, `rom_device`, `io`,
    `alias`, `reservation` or `iommu`; the attributes are read-only and change
    through the ``set_`` and ``add_`` methods. A region that no address space
    reaches can be changed freely; a live one only inside
    ``async with memory.transaction()``, else `TransactionError` is raised.
    """

    __slots__ = (
        "__weakref__",
        "_addr",
        "_alias_offset",
        "_alias_target",
        "_aliases",
        "_attached",
        "_block",
        "_children",
        "_container",
        "_data",
        "_enabled",
        "_export",
        "_flags",
        "_iommu",
        "_kind",
        "_largest",
        "_looped",
        "_may_overlap",
        "_name",
        "_ops",
        "_owners",
        "_passed",
        "_priority",
        "_ram_discard_manager",
        "_rank",
        "_signals",
        "_size",
        "_terminates",
        "_way",
    )

    def __init__(self, kind: RegionKind, name: str, size: int) -> None:
        """Use the class methods instead."""
        if not isinstance(name, str):
            raise TypeError(f"a region's name is a str, not {type(name).__name__}")
        _check_size(name, size)
        self._kind = kind
        self._name = name
        self._size = size
        self._addr = 0
        self._priority = 0
        self._rank = 0
        self._enabled = True
        self._flags = ROMD_MODE
        self._terminates = kind not in (RegionKind.CONTAINER, RegionKind.ALIAS)
        self._may_overlap = False
        self._container: MemoryRegion | None = None
        self._children: Children | None = None
        self._alias_target: MemoryRegion | None = None
        self._alias_offset = 0
        # Aliases of this region, weakly: an alias that was dropped with the
        # container that held it is no concern of its target.
        self._aliases: weakref.WeakSet[MemoryRegion] | None = None
        self._looped = False  # whether an alias ever led from here back to here
        self._owners: tuple[TreeOwner, ...] = ()
        self._way: Way | None = None  # kept by `core.ways`, as is `_passed`
        self._passed = 0
        self._attached = NOTHING
        # The ioeventfds as of the last transaction's end: dispatch signals them.
        self._signals: tuple[IoEventFd, ...] = ()
        self._ops: Any = None
        self._iommu: Iommu | None = None
        self._ram_discard_manager: Any = None
        self._block: Any = None
        self._export: memoryview | None = None  # keeps the block from being closed
        self._largest = size  # that a rollback may bring back
        self._data = b""

    # ---- constructors -------------------------------------------------------

    container = _Container()

    @classmethod
    def ram(cls, name: str, size: int, *, block: Block | None = None) -> MemoryRegion:
        """Host memory that a guest reads and writes (``memory_region_init_ram``).

        Args:
            name: For people.
            size: In bytes, 1 to 2**64. Nothing is allocated before it is used.
            block: The memory, a `RamBlock` of at least ``size`` bytes; without
                one, anonymous zeroed memory is mapped when first needed.

        Raises:
            RegionError: ``size`` is out of range, or more than the block has.
        """
        region = cls(RegionKind.RAM, name, size)
        region._adopt(block)
        return region

    @classmethod
    def rom(
        cls, name: str, size: int, *, data: bytes = b"", block: Block | None = None
    ) -> MemoryRegion:
        """RAM that the guest cannot write (``memory_region_init_rom``).

        Args:
            name: For people.
            size: In bytes, 1 to 2**64.
            data: What the memory starts with; zeroes follow.
            block: Memory to use instead of new memory; see `ram`.

        Raises:
            RegionError: ``size`` is out of range, or less than ``data`` needs.
        """
        region = cls(RegionKind.ROM, name, size)
        region._flags |= READONLY
        region._adopt(block, data)
        return region

    @classmethod
    def rom_device(
        cls, name: str, size: int, ops: Any, *, data: bytes = b"", block: Block | None = None
    ) -> MemoryRegion:
        """Memory to read, ops to write: a flash (``memory_region_init_rom_device``).

        In ROMD mode (how it starts) reads go straight to memory and writes to
        ``ops.write``; out of it (`set_romd_mode`) both go to ``ops``.

        Raises:
            RegionError: ``size`` is out of range, or less than ``data`` needs.
        """
        region = cls(RegionKind.ROM_DEVICE, name, size)
        region._ops = ops
        region._adopt(block, data)
        return region

    @classmethod
    def io(cls, name: str, size: int, ops: Any) -> MemoryRegion:
        """A device's registers (``memory_region_init_io``).

        Args:
            name: For people.
            size: In bytes, 1 to 2**64.
            ops: A `MemoryRegionOps`, or any object with its ``read(offset, size,
                attrs)`` and ``write(offset, value, size, attrs)``.
        """
        region = cls(RegionKind.IO, name, size)
        region._ops = ops
        return region

    @classmethod
    def alias(cls, name: str, target: MemoryRegion, *, offset: int, size: int) -> MemoryRegion:
        """A window onto part of another region (``memory_region_init_alias``).

        Args:
            name: For people.
            target: What is seen through the window; may be an alias itself.
            offset: Where in ``target`` the window starts, in bytes.
            size: In bytes; what reaches past the target's end shows nothing.

        Raises:
            RegionError: ``size`` or ``offset`` is out of range.
        """
        region = cls(RegionKind.ALIAS, name, size)
        _check_region(target, "alias")
        _check_offset(name, "offset", offset)
        region._alias_target = target
        region._alias_offset = offset
        if target._aliases is None:
            target._aliases = weakref.WeakSet()
        target._aliases.add(region)
        outdate(target)
        return region

    @classmethod
    def reservation(cls, name: str, size: int) -> MemoryRegion:
        """Addresses kept for somebody else, such as the kernel's own devices."""
        return cls(RegionKind.RESERVATION, name, size)

    @classmethod
    def iommu(cls, name: str, size: int, translate: Translate | Translates) -> MemoryRegion:
        """Pages of other address spaces (``memory_region_init_iommu``).

        Args:
            name: For people.
            size: In bytes, 1 to 2**64.
            translate: A function, plain or ``async def``, that is called as
                `IommuOps.translate` is; or an `IommuOps`, or any object with one.
        """
        region = cls(RegionKind.IOMMU, name, size)
        region._iommu = Iommu(name, translate)
        return region

    def _adopt(self, block: Block | None, data: bytes = b"") -> None:
        try:
            data = memoryview(data).tobytes()
        except TypeError as exc:
            raise RegionTypeError(f"data of {self._name!r} is bytes, not {data!r}") from exc
        if len(data) > self._size:
            raise RegionError(
                f"{self._name!r}: {len(data):#x} bytes of data do not fit its size {self._size:#x}"
            )
        if block is None:
            self._data = data
            return
        self._take(block, data)

    def _take(self, block: Block, data: bytes) -> None:
        """Have ``block`` from now on, beginning with ``data``."""
        if not (isinstance(getattr(block, "view", None), memoryview) and hasattr(block, "size")):
            raise RegionTypeError(f"block of {self._name!r} is a RamBlock, not {block!r}")
        if block.size < self._size:
            raise RegionError(
                f"{self._name!r}: its size {self._size:#x} is more than its block has, "
                f"{block.size:#x}: make the region smaller or the block larger"
            )
        export = block.view
        export[: len(data)] = data
        self._export = export
        self._data = b""
        self._block = block  # last: other threads look here

    # ---- attributes ---------------------------------------------------------

    @property
    def kind(self) -> RegionKind:
        """What the region is."""
        return self._kind

    @property
    def name(self) -> str:
        """The name it was made with."""
        return self._name

    @property
    def size(self) -> int:
        """Size in bytes, 1 to 2**64."""
        return self._size

    @property
    def addr(self) -> int:
        """Offset in the container in bytes; what it last was where there is none."""
        return self._addr

    @property
    def priority(self) -> int:
        """Priority among its siblings: the higher hides the lower."""
        return self._priority

    @property
    def enabled(self) -> bool:
        """False hides the region and all below it."""
        return self._enabled

    @property
    def readonly(self) -> bool:
        """The region's own flag; what is above it in a view may add to it."""
        return bool(self._flags & READONLY)

    @property
    def nonvolatile(self) -> bool:
        """The region's own flag: memory that outlives the machine."""
        return bool(self._flags & NONVOLATILE)

    @property
    def unmergeable(self) -> bool:
        """The region's own flag: its ranges are never merged with neighbours."""
        return bool(self._flags & UNMERGEABLE)

    @property
    def romd_mode(self) -> bool:
        """Whether a ROM device is read as memory; True for all other regions."""
        return bool(self._flags & ROMD_MODE)

    @property
    def dirty_log_mask(self) -> int:
        """A bit for each `DirtyClient` that `set_log` turned on for this region."""
        return self._flags >> LOG_SHIFT

    @property
    def eventfds(self) -> tuple[IoEventFd, ...]:
        """The ioeventfds, at offsets in the region."""
        return self._attached.eventfds

    @property
    def coalesced(self) -> tuple[tuple[int, int], ...]:
        """The coalesced ranges: (offset, size) each."""
        return self._attached.coalesced

    @property
    def alias_target(self) -> MemoryRegion | None:
        """What an alias shows; None for other regions."""
        return self._alias_target

    @property
    def alias_offset(self) -> int:
        """Where in its target an alias starts, in bytes."""
        return self._alias_offset

    @property
    def subregions(self) -> tuple[MemoryRegion, ...]:
        """The subregions in the order they are tried: highest priority first."""
        return tuple(self._children) if self._children is not None else ()

    @property
    def ops(self) -> Any:
        """What answers accesses to I/O and to ROM devices; else None."""
        return self._ops

    @property
    def translate(self) -> Translate | None:
        """An IOMMU region's translation; else None."""
        return None if self._iommu is None else self._iommu.translate

    @property
    def block(self) -> Any:
        """The `RamBlock` behind RAM, ROM and ROM devices; None for other regions.

        Raises:
            OSError: The memory has to be mapped now, and the host refuses.
        """
        if self._block is None and self._kind in BACKED:
            if _allocate is None:  # pragma: no cover - memlistener.ram always sets it
                raise RegionError(f"{self._name!r} has no block: import memlistener.ram")
            _allocate(self)
        return self._block

    @property
    def ram_discard_manager(self) -> Any:
        """The `RamDiscardManager` of RAM that is populated in parts; else None."""
        return self._ram_discard_manager

    def __repr__(self) -> str:
        where = f" at {self._addr:#x}" if self._container is not None else ""
        return f"<MemoryRegion {self._kind.value} {self._name!r} size {self._size:#x}{where}>"

    # ---- mutators -----------------------------------------------------------

    def add_subregion(self, addr: int, region: MemoryRegion) -> None:
        """Map ``region`` at ``addr`` with priority 0; siblings may not overlap it.

        Siblings that were mapped with `add_subregion_overlap` may
        (``memory_region_add_subregion``).

        Args:
            addr: Offset in this region, in bytes. What reaches past this
                region's end shows nothing.
            region: A region that is in no container yet.

        Raises:
            RegionError: ``region`` overlaps a sibling, is in a container
                already, contains this one, or would show itself there.
            TransactionError: The tree is live and no transaction is open.
        """
        self._add(addr, region, 0, may_overlap=False)

    def add_subregion_overlap(self, addr: int, region: MemoryRegion, priority: int) -> None:
        """Map ``region`` at ``addr``; where it overlaps, the higher priority shows.

        Args:
            addr: Offset in this region, in bytes.
            region: A region that is in no container yet.
            priority: Signed, compared among siblings only. Of equal priorities
                the later-added shows.

        Raises:
            RegionError: As `add_subregion`, but overlaps are welcome.
            TransactionError: The tree is live and no transaction is open.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RegionTypeError(f"priority of {region!r} in {self!r} is an int, not {priority!r}")
        self._add(addr, region, priority, may_overlap=True)

    def _add(self, addr: int, region: MemoryRegion, priority: int, *, may_overlap: bool) -> None:
        _check_region(region, "add")
        _check_offset(region._name, "addr", addr)
        if self._kind is RegionKind.ALIAS:
            raise RegionError(
                f"an alias has no subregions: add {region!r} to the target "
                f"{self._alias_target!r}, not to {self!r}"
            )
        if region._container is not None:
            raise RegionError(
                f"{region!r} is already a subregion of {region._container!r}: "
                f"del_subregion it there before adding it to {self!r}"
            )
        holder: MemoryRegion | None = self
        while holder is not None:
            if holder is region:
                raise RegionError(
                    f"adding {region!r} to {self!r} would make a cycle: the one contains the other"
                )
            holder = holder._container
        if not may_overlap:
            self._check_overlap(addr, region)
        old_addr, old_priority, old_overlap = region._addr, region._priority, region._may_overlap

        def apply() -> None:
            region._addr, region._priority, region._may_overlap = addr, priority, may_overlap
            self._place(region)

        def undo() -> None:
            self._unplace(region)
            region._addr, region._priority = old_addr, old_priority
            region._may_overlap = old_overlap

        above = above_of(self)
        if region in above:
            # An alias leads from here back to here. Real machines have that (an
            # alias of one half of a container in its other half); what cannot be
            # is an alias that shows itself, and so on without end.
            region._container, region._addr = self, addr
            loop = showing_itself(region)
            region._container, region._addr = None, old_addr
            self._refuse_loop(loop, f"adding {region!r} to {self!r} at {addr:#x}")
            for each in (self, *above):
                each._looped = True
        change(region, "add_subregion", apply, undo, above=self)

    def _refuse_loop(self, loop: MemoryRegion | None, what: str) -> None:
        if loop is not None:
            raise RegionError(
                f"{what} would make a cycle: {loop!r} shows itself through its target "
                f"{loop._alias_target!r}; move the alias, or make it smaller"
            )

    def _check_loop(self, what: str, value: int) -> None:
        """Whether a region that an alias leads back to may get another place or size."""
        if self._looped:
            old = getattr(self, what)
            setattr(self, what, value)
            loop = showing_itself(self)
            setattr(self, what, old)
            self._refuse_loop(loop, f"setting {what[1:]} of {self!r} to {value:#x}")

    def _check_overlap(self, addr: int, region: MemoryRegion) -> None:
        if self._children is None:
            return
        end = addr + region._size
        for other in self._children.in_window(addr, end):
            if other._may_overlap or other._addr >= end or other._addr + other._size <= addr:
                continue
            raise RegionError(
                f"{region._name!r} at [{addr:#x}, {end:#x}) overlaps {other._name!r} at "
                f"[{other._addr:#x}, {other._addr + other._size:#x}) in {self!r}: move one of "
                f"them, or use add_subregion_overlap() to say which one shows"
            )

    def del_subregion(self, region: MemoryRegion) -> None:
        """Unmap ``region`` from this container (``memory_region_del_subregion``).

        Raises:
            RegionError: ``region`` is not a subregion of this one.
            TransactionError: The tree is live and no transaction is open.
        """
        _check_region(region, "del")
        if region._container is not self:
            where = "no container" if region._container is None else repr(region._container)
            raise RegionError(f"{region!r} is not a subregion of {self!r}: it is in {where}")
        rank = region._rank

        def undo() -> None:
            self._place(region, rank)

        owners = change(region, "del_subregion", lambda: self._unplace(region), undo)
        for owner in owners:
            owner.detached(region)

    def set_enabled(self, enabled: bool) -> None:
        """Show or hide the region and all below it (``memory_region_set_enabled``)."""
        _check_bool(self, "enabled", enabled)

        def apply(value: bool = enabled) -> None:
            self._enabled = value
            if self._container is not None and self._container._children is not None:
                self._container._children.switch(self)

        old = self._enabled
        change(self, "set_enabled", apply, lambda: apply(old))

    def set_address(self, addr: int) -> None:
        """Move the region within its container (``memory_region_set_address``).

        It keeps its priority and becomes the latest among its equals (rule F4).
        Overlaps are not checked, since a transaction may move several.
        """
        _check_offset(self._name, "addr", addr)
        self._check_loop("_addr", addr)
        container, old, rank = self._container, self._addr, self._rank

        def move(to: int, rank: int | None) -> None:
            if container is not None:
                container._unplace(self)
            self._addr = to
            if container is not None:
                container._place(self, rank)

        change(self, "set_address", lambda: move(addr, None), lambda: move(old, rank))

    def set_size(self, size: int) -> None:
        """Resize the region (``memory_region_set_size``).

        Raises:
            RegionError: ``size`` is out of range, or more than its block has.
        """
        _check_size(self._name, size)
        if self._block is not None and size > self._block.size:
            raise RegionError(
                f"{self!r} cannot grow to {size:#x}: its block has {self._block.size:#x}"
            )
        self._check_loop("_size", size)
        siblings = self._container._children if self._container is not None else None

        def resize(to: int) -> None:
            if siblings is not None:
                siblings.unfile(self)
            self._size = to
            if siblings is not None:
                siblings.file(self)

        old = self._size
        owners = change(self, "set_size", lambda: resize(size), lambda: resize(old))
        # Memory that is mapped from now on is enough for what a rollback brings back.
        self._largest = max(self._largest, size) if owners else size

    def set_alias_offset(self, offset: int) -> None:
        """Move an alias's window over its target (``memory_region_set_alias_offset``).

        Raises:
            RegionError: The region is not an alias, or ``offset`` is out of range.
        """
        if self._kind is not RegionKind.ALIAS:
            raise RegionError(f"{self!r} is not an alias: it has no alias offset")
        _check_offset(self._name, "offset", offset)
        self._check_loop("_alias_offset", offset)

        def apply(value: int = offset) -> None:
            self._alias_offset = value

        old = self._alias_offset
        change(self, "set_alias_offset", apply, lambda: apply(old))

    def set_readonly(self, readonly: bool) -> None:
        """Make memory read-only to the guest (``memory_region_set_readonly``)."""
        self._set_flag("readonly", READONLY, readonly)

    def set_nonvolatile(self, nonvolatile: bool) -> None:
        """Mark memory as outliving the machine (``memory_region_set_nonvolatile``)."""
        self._set_flag("nonvolatile", NONVOLATILE, nonvolatile)

    def set_unmergeable(self, unmergeable: bool) -> None:
        """Keep the region's ranges apart from neighbours' (``_set_unmergeable``)."""
        self._set_flag("unmergeable", UNMERGEABLE, unmergeable)

    def set_romd_mode(self, romd_mode: bool) -> None:
        """Switch a ROM device between memory and ops (``memory_region_rom_device_set_romd``).

        Raises:
            RegionError: The region is not a ROM device.
        """
        if self._kind is not RegionKind.ROM_DEVICE:
            raise RegionError(f"{self!r} is not a ROM device: it has no ROMD mode")
        self._set_flag("romd_mode", ROMD_MODE, romd_mode)

    def _set_flag(self, what: str, flag: int, value: bool) -> None:
        _check_bool(self, what, value)
        old = self._flags
        new = old | flag if value else old & ~flag

        def apply(flags: int) -> None:
            self._flags = flags

        change(self, f"set_{what}", lambda: apply(new), lambda: apply(old), flags=True)

    def set_log(self, log: bool, client: DirtyClient) -> None:
        """Have writes to the region logged for one client, or not (``memory_region_set_log``).

        Raises:
            RegionError: The region has no memory.
        """
        _check_bool(self, "log", log)
        if self._kind not in BACKED:
            raise RegionError(f"{self!r} has no memory whose writes could be logged")
        try:
            bit = 1 << DirtyClient(client) + LOG_SHIFT
        except ValueError as exc:
            raise RegionTypeError(f"{client!r} is not a DirtyClient") from exc
        self._set_flag("log", bit, log)

    def add_eventfd(self, offset: int, size: int, eventfd: Any, *, data: int | None = None) -> None:
        """Have a write signal an eventfd instead of ops (``memory_region_add_eventfd``).

        On KVM the kernel does it, and the vCPU does not stop for it; a write that
        ends in user space signals it too. Memory is written as ever: only where
        a write would not go to RAM there is something to signal.

        Args:
            offset: In the region, in bytes: where the write has to begin.
            size: Width of the write: 1, 2, 4 or 8 bytes, 0 for any.
            eventfd: A `memlistener.EventFd`, or any other object with
                ``fileno()``, or a file descriptor. Keep it open while it hangs
                on the region.
            data: The value that has to be written, as ops would see it; None for
                any. The kernel matches values of a width only: on KVM, 0 does
                not go with it.

        Raises:
            RegionError: It does not fit the region, the same write signals
                something already, or the region is a container or an alias.
        """
        fd = self._eventfd(offset, size, eventfd, data)
        for each in self._attached.eventfds:
            if each.order() == fd.order():
                raise RegionError(f"{self!r} has {each} already")
        self._attach("add_eventfd", eventfds=(*self._attached.eventfds, fd))

    def del_eventfd(self, offset: int, size: int, eventfd: Any, *, data: int | None = None) -> None:
        """Take back `add_eventfd` of the same arguments (``memory_region_del_eventfd``).

        Raises:
            RegionError: There is none such.
        """
        fd = self._eventfd(offset, size, eventfd, data)
        if fd not in self._attached.eventfds:
            raise RegionError(f"{self!r} has no {fd}: it has {list(self._attached.eventfds)}")
        left = tuple(each for each in self._attached.eventfds if each != fd)
        self._attach("del_eventfd", eventfds=left)

    def _eventfd(self, offset: int, size: int, eventfd: Any, data: int | None) -> IoEventFd:
        if not self._terminates:
            raise RegionError(f"{self!r} answers no accesses: an eventfd hangs on what it shows")
        for what, value in (("offset", offset), ("size", size), ("data", data)):
            if value is not None or what != "data":
                _check_int(f"{what} of an eventfd of {self!r}", value)
        if isinstance(eventfd, int) and not isinstance(eventfd, bool):
            if eventfd < 0:
                raise RegionError(f"eventfd {eventfd} of {self!r} is no open file")
        elif not callable(getattr(eventfd, "fileno", None)):
            raise RegionTypeError(
                f"an eventfd of {self!r} is a file descriptor or has fileno(); {eventfd!r} does not"
            )
        if size not in (0, 1, 2, 4, 8):
            raise RegionError(f"an eventfd's write is 0, 1, 2, 4 or 8 bytes wide, not {size!r}")
        self._check_inside("eventfd", offset, max(size, 1))
        if data is not None and not 0 <= data < 1 << 8 * (size or 8):
            raise RegionError(f"{data:#x} is not a value of {size} bytes")
        return IoEventFd(offset, size, data, eventfd)

    def add_coalescing(self, offset: int, size: int) -> None:
        """Let writes be delivered late and together (``memory_region_add_coalescing``).

        Raises:
            RegionError: It is not an I/O region, or the range is not inside it.
        """
        if self._kind is not RegionKind.IO:
            raise RegionError(f"{self!r} is not an I/O region: its writes cannot be coalesced")
        self._check_inside("coalesced range", offset, size)
        self._attach("add_coalescing", coalesced=(*self._attached.coalesced, (offset, size)))

    def clear_coalescing(self) -> None:
        """Take back every `add_coalescing` (``memory_region_clear_coalescing``)."""
        self._attach("clear_coalescing", coalesced=())

    def _check_inside(self, what: str, offset: int, size: int) -> None:
        _check_int(f"offset of a {what} of {self!r}", offset)
        _check_int(f"size of a {what} of {self!r}", size)
        if offset < 0 or size <= 0 or offset + size > self._size:
            raise RegionError(f"{what} [{offset:#x}, {offset + size:#x}) is not inside {self!r}")

    def _attach(self, what: str, **changes: Any) -> None:
        old = self._attached
        new = evolve(old, **changes)

        def apply(attached: Attached = new) -> None:
            self._attached = attached

        if not change(self, what, apply, lambda: apply(old), before=old):
            self._settle()  # nobody shows it: there is no transaction whose end to wait for

    def _settle(self) -> None:
        """The transaction that changed what hangs on the region is over, or as good as over."""
        self._signals = self._attached.eventfds

    # ---- the machinery of a change -------------------------------------------

    def _place(self, child: MemoryRegion, rank: int | None = None) -> None:
        if self._children is None:
            self._children = Children()
        if rank is None:
            self._children.add(child)
        else:
            self._children.put_back(child, rank)
        child._container = self

    def _unplace(self, child: MemoryRegion) -> None:
        assert self._children is not None
        self._children.remove(child)
        child._container = None

    def _attach_owner(self, owner: TreeOwner) -> None:
        self._owners += (owner,)
        outdate(self)

    def _detach_owner(self, owner: TreeOwner) -> None:
        self._owners = tuple(each for each in self._owners if each is not owner)
        outdate(self)


def _check_region(region: object, what: str) -> None:
    if not isinstance(region, MemoryRegion):
        raise RegionTypeError(f"{what}: {region!r} is not a MemoryRegion")


def _check_int(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RegionTypeError(f"{what} is an int, not {value!r}")


def _check_size(name: str, size: int) -> None:
    _check_int(f"size of {name!r}", size)
    if not 1 <= size <= LIMIT:
        raise RegionError(f"size of {name!r} is {size:#x}: it must be from 1 to 2**64 bytes")


def _check_offset(name: str, what: str, value: int) -> None:
    _check_int(f"{what} of {name!r}", value)
    if not 0 <= value < LIMIT:
        raise RegionError(f"{what} of {name!r} is {value:#x}: it must be from 0 to 2**64 - 1")


def _check_bool(region: MemoryRegion, what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RegionTypeError(f"{what} of {region!r} is a bool, not {value!r}")
