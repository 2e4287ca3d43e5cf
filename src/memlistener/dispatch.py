"""An access -> the memory or the ops of the region that shows there.

The functions are ``async def`` since ops may be; with plain ops they never
suspend, and then a vCPU's own thread can run them to the end without trio
(`run_on_thread`). One code path, whoever makes the access.

What an access meets, in the view of the moment:

- memory (RAM, ROM, a ROM device in ROMD mode): read directly. Written directly
  if writable; a write to read-only memory vanishes with `MemTxResult.ACCESS_ERROR`,
  to a ROM device it goes to its ops;
- an ioeventfd, before anything but memory: a write of its place and width, and
  of its value if it has one, signals it and goes no further, as in the kernel;
- ops (I/O, a ROM device out of ROMD mode): called, in sizes they implement;
- an IOMMU: translated, page by page, and continued where that leads. What a page
  does not allow is refused with `MemTxResult.ACCESS_ERROR` (QEMU: as unassigned);
- a reservation or nothing: reads give all ones, writes vanish (rule K5).
"""

from __future__ import annotations

import inspect
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.iommu import IommuAccess, IommuTlbEntry
from memlistener.core.kinds import LOG_SHIFT, READONLY, ROMD_MODE, RegionKind
from memlistener.core.ops import (
    UNSPECIFIED,
    MemTxAttrs,
    MemTxResult,
    constraints,
    endianness,
    implement,
    split,
)
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError, RegionTypeError
from memlistener.eventfd import signal

T = TypeVar("T")

_ASYNC = "thread_safe ops must be plain functions, and these are async"
_SIZES = frozenset({1, 2, 4, 8})

_MEMORY = frozenset({RegionKind.RAM, RegionKind.ROM})
# How many IOMMUs an access may go through, one behind the other, before it is
# taken to go round in circles: a guest may be able to set up such a thing.
_MAX_TRANSLATIONS = 16


def reads_memory(each: FlatRange) -> bool:
    """Whether a read of the range goes straight to memory."""
    kind = each.region.kind
    return kind in _MEMORY or (kind is RegionKind.ROM_DEVICE and bool(each.flags & ROMD_MODE))


def writes_memory(each: FlatRange) -> bool:
    """Whether a write to the range goes straight to memory."""
    return each.region.kind in _MEMORY and not each.flags & READONLY


def on_thread(view: FlatView, addr: int, size: int, is_write: bool) -> bool:
    """Whether an access can be served on the thread that makes it."""
    for _, length, each in _parts(view, addr, size):
        if length and each is not None:
            region = each.region
            if region.kind is RegionKind.IOMMU:
                # Where it leads could be asked, but may be elsewhere a moment later.
                return False
            if region.ops is None or (reads_memory(each) and not is_write):
                continue
            if not getattr(region.ops, "thread_safe", False):
                return False
    return True


def run_on_thread(access: Coroutine[Any, Any, T]) -> T:
    """Run an access that `on_thread` allows to its end, without trio.

    Raises:
        RegionTypeError: Ops that call themselves thread-safe are ``async def``.
    """
    try:
        access.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    access.close()
    raise RegionTypeError(_ASYNC)


def read_here(view: FlatView, addr: int, size: int) -> bytes | None:
    """A read that one call of thread-safe ops answers: most exits of most guests.

    Nothing that `read` would not do, for a fifth of its price: no coroutine, no
    splitting.

    Returns:
        The bytes; None where it takes more than that, and nothing was called.
    """
    each = view.lookup(addr)
    if each is None or not _one_call(each, addr, size):
        return None
    region = each.region
    ops = region.ops
    offset = addr - each.start + each.offset
    value = ops.read(offset, size, UNSPECIFIED)
    if type(value) is int:
        mask = (1 << 8 * size) - 1
        return (value & mask).to_bytes(size, endianness(ops))
    if isinstance(value, MemTxResult):
        return (b"\xff" if value else b"\0") * size
    mask = (1 << 8 * size) - 1
    return (_checked_value(region, offset, value) & mask).to_bytes(size, endianness(ops))


def write_here(view: FlatView, addr: int, data: bytes) -> bool:
    """A write that an ioeventfd or one call of thread-safe ops takes; see `read_here`.

    Returns:
        Whether it was made.
    """
    each = view.lookup(addr)
    if each is None:
        return False
    if each.region._signals and _signalled(each, addr, data):
        return True
    if each.flags & READONLY or not _one_call(each, addr, len(data)):
        return False
    ops = each.region.ops
    offset = addr - each.start + each.offset
    result = ops.write(offset, int.from_bytes(data, endianness(ops)), len(data), UNSPECIFIED)
    if result is not None:
        _checked_result(each.region, offset, result)
    return True


def _one_call(each: FlatRange, addr: int, size: int) -> bool:
    region = each.region
    ops = region.ops
    if region._kind is not RegionKind.IO or not getattr(ops, "thread_safe", False):
        return False
    valid, impl = constraints(ops)
    return (
        size in _SIZES
        and addr + size <= each.start + each.size
        and not (addr - each.start + each.offset) % size
        and valid.min_access_size <= size <= valid.max_access_size
        and impl.min_access_size <= size <= impl.max_access_size
        and callable(getattr(ops, "read", None))
        and callable(getattr(ops, "write", None))
    )


async def read(
    view: FlatView, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED, *, depth: int = 0
) -> tuple[bytes, MemTxResult, int]:
    """Read ``size`` bytes at ``addr``.

    Args:
        view: Where.
        addr: First address.
        size: Bytes.
        attrs: Who reads.
        depth: How many IOMMUs the access has come through.

    Returns:
        The bytes in guest order (all ones where a part was refused), how it
        went, and how many of the parts met nothing.
    """
    data = bytearray()
    result = MemTxResult.OK
    unassigned = 0
    for at, length, each in _parts(view, addr, size):
        if each is None or each.region.kind is RegionKind.RESERVATION:
            data += b"\xff" * length
            result |= MemTxResult.DECODE_ERROR
            unassigned += 1
            continue
        offset = each.offset + at - each.start
        if reads_memory(each):
            data += each.region.block.view[offset : offset + length]
        elif each.region.kind is RegionKind.IOMMU:
            part, how, missed = await _read_iommu(each.region, offset, length, attrs, depth)
            data += part
            result |= how
            unassigned += missed
        else:
            part, how = await _read_ops(each.region, offset, length, attrs)
            data += part
            result |= how
    return bytes(data), result, unassigned


async def write(
    view: FlatView,
    addr: int,
    data: bytes | memoryview,
    attrs: MemTxAttrs = UNSPECIFIED,
    *,
    depth: int = 0,
) -> tuple[MemTxResult, int]:
    """Write ``data`` at ``addr``; the arguments are those of `read`.

    Returns:
        How it went, and how many of the parts met nothing.
    """
    result = MemTxResult.OK
    unassigned = 0
    for at, length, each in _parts(view, addr, len(data)):
        part = data[at - addr : at - addr + length]
        if each is not None and each.region._signals and _signalled(each, at, part):
            continue
        if each is None or each.region.kind is RegionKind.RESERVATION:
            result |= MemTxResult.DECODE_ERROR
            unassigned += 1
            continue
        offset = each.offset + at - each.start
        if writes_memory(each):
            write_memory(each, offset, part)
        elif each.region.kind is RegionKind.IOMMU and not each.flags & READONLY:
            how, missed = await _write_iommu(each.region, offset, part, attrs, depth)
            result |= how
            unassigned += missed
        elif each.region.ops is None or each.flags & READONLY:
            result |= MemTxResult.ACCESS_ERROR
        else:
            result |= await _write_ops(each.region, offset, bytes(part), attrs)
    return result, unassigned


def write_memory(each: FlatRange, offset: int, data: bytes | memoryview) -> None:
    """Write the memory that a range shows, and mark its pages for those who log it.

    Args:
        each: The range.
        offset: In its region.
        data: What to write.
    """
    block = each.region.block
    block.view[offset : offset + len(data)] = data
    clients = each.flags >> LOG_SHIFT
    if clients:
        block.mark_dirty(offset, len(data), clients)


def mark_written(view: FlatView, addr: int, size: int, clients: int) -> None:
    """Mark the memory in [addr, addr + size) for those who log it now.

    Args:
        view: Where it was written.
        addr: First address.
        size: Bytes.
        clients: Who logs all memory: a mask of `DirtyClient` bits.
    """
    for at, length, each in _parts(view, addr, size):
        if each is not None and writes_memory(each):
            who = clients | each.region.dirty_log_mask
            if who:
                each.region.block.mark_dirty(each.offset + at - each.start, length, who)


def _signalled(each: FlatRange, addr: int, data: bytes | memoryview) -> bool:
    """Signal the ioeventfd that a write is for, if there is one.

    The width is that of the access as it is made, whatever the ops would have
    it split into; the value is what they would see.
    """
    if writes_memory(each):
        return False
    region = each.region
    offset = addr - each.start + each.offset
    for fd in region._signals:
        if (
            fd.addr == offset
            and fd.size in (0, len(data))
            and (fd.data is None or fd.data == int.from_bytes(data, endianness(region.ops)))
        ):
            signal(fd.eventfd)
            return True
    return False


def _parts(view: FlatView, addr: int, size: int) -> Iterator[tuple[int, int, FlatRange | None]]:
    """Cut [addr, addr + size) where the view changes: (address, length, range or None)."""
    end = addr + size
    each = view.lookup(addr)
    if each is not None and end <= each.end:
        yield addr, size, each
        return
    for each in view.overlapping(addr, end):
        if each.start > addr:
            yield addr, each.start - addr, None
            addr = each.start
        upto = min(end, each.end)
        yield addr, upto - addr, each
        addr = upto
    if addr < end:
        yield addr, end - addr, None


async def translate(
    region: MemoryRegion, offset: int, access: IommuAccess, attrs: MemTxAttrs = UNSPECIFIED
) -> IommuTlbEntry:
    """The page of an IOMMU region that ``offset`` is on, as its owner has it now.

    Raises:
        RegionError: It is no IOMMU region, or the translation makes no sense.
    """
    iommu = region._iommu
    if iommu is None:
        raise RegionError(f"{region!r} is no IOMMU region: it has no translation")
    found = iommu.translate(offset, access, attrs)
    if inspect.isawaitable(found):
        found = await found
    return iommu.entry(offset, found)


async def _read_iommu(
    region: MemoryRegion, offset: int, length: int, attrs: MemTxAttrs, depth: int
) -> tuple[bytes, MemTxResult, int]:
    if depth == _MAX_TRANSLATIONS:
        return b"\xff" * length, MemTxResult.DECODE_ERROR, 1
    data = bytearray()
    result = MemTxResult.OK
    unassigned = 0
    end = offset + length
    while offset < end:
        entry = await translate(region, offset, IommuAccess.READ, attrs)
        size = min(end - offset, entry.left(offset))
        if entry.target_address_space is None or IommuAccess.READ not in entry.perm:
            data += b"\xff" * size
            result |= MemTxResult.ACCESS_ERROR
        else:
            view = entry.target_address_space.view
            part, how, missed = await read(view, entry.at(offset), size, attrs, depth=depth + 1)
            data += part
            result |= how
            unassigned += missed
        offset += size
    return bytes(data), result, unassigned


async def _write_iommu(
    region: MemoryRegion, offset: int, data: bytes | memoryview, attrs: MemTxAttrs, depth: int
) -> tuple[MemTxResult, int]:
    if depth == _MAX_TRANSLATIONS:
        return MemTxResult.DECODE_ERROR, 1
    result = MemTxResult.OK
    unassigned = 0
    at = 0
    while at < len(data):
        entry = await translate(region, offset + at, IommuAccess.WRITE, attrs)
        part = data[at : at + entry.left(offset + at)]
        if entry.target_address_space is None or IommuAccess.WRITE not in entry.perm:
            result |= MemTxResult.ACCESS_ERROR
        else:
            view = entry.target_address_space.view
            how, missed = await write(view, entry.at(offset + at), part, attrs, depth=depth + 1)
            result |= how
            unassigned += missed
        at += len(part)
    return result, unassigned


async def _read_ops(
    region: MemoryRegion, offset: int, length: int, attrs: MemTxAttrs
) -> tuple[bytes, MemTxResult]:
    ops = region.ops
    if not callable(getattr(ops, "read", None)):
        return b"\xff" * length, MemTxResult.ACCESS_ERROR
    valid, impl = constraints(ops)
    order = endianness(ops)
    data = b""
    result = MemTxResult.OK
    for at, size in split(offset, length, valid):
        if size < valid.min_access_size:
            data += b"\xff" * size
            result |= MemTxResult.DECODE_ERROR
            continue
        whole = 0
        mask = (1 << 8 * size) - 1
        how = MemTxResult.OK
        for where, width, shift in implement(at, size, impl):
            value = ops.read(where, width, attrs)
            if inspect.isawaitable(value):
                value = await value
            if isinstance(value, MemTxResult):
                how |= value
                continue
            value = _checked_value(region, where, value) & ((1 << 8 * width) - 1)
            # In a big-endian device the first register byte is the highest.
            place = size - width - shift if order == "big" else shift
            whole |= value << 8 * place if place >= 0 else value >> -8 * place
        data += (mask if how else whole & mask).to_bytes(size, order)
        result |= how
    return data, result


async def _write_ops(
    region: MemoryRegion, offset: int, data: bytes, attrs: MemTxAttrs
) -> MemTxResult:
    ops = region.ops
    if not callable(getattr(ops, "write", None)):
        return MemTxResult.ACCESS_ERROR
    valid, impl = constraints(ops)
    order = endianness(ops)
    result = MemTxResult.OK
    for at, size in split(offset, len(data), valid):
        if size < valid.min_access_size:
            result |= MemTxResult.DECODE_ERROR
            continue
        whole = int.from_bytes(data[at - offset : at - offset + size], order)
        for where, width, shift in implement(at, size, impl):
            place = size - width - shift if order == "big" else shift
            value = whole >> 8 * place if place >= 0 else whole << -8 * place
            how = ops.write(where, value & ((1 << 8 * width) - 1), width, attrs)
            if inspect.isawaitable(how):
                how = await how
            result |= _checked_result(region, where, how)
    return result


def _checked_value(region: MemoryRegion, where: int, value: object) -> int:
    if not isinstance(value, int):
        _refuse_async(value)
        raise RegionTypeError(
            f"read of {region!r} at offset {where:#x} returned {value!r}: "
            f"it returns an int, or a MemTxResult to refuse"
        )
    return value


def _checked_result(region: MemoryRegion, where: int, result: object) -> MemTxResult:
    if result is None:
        return MemTxResult.OK
    if not isinstance(result, MemTxResult):
        _refuse_async(result)
        raise RegionTypeError(
            f"write to {region!r} at offset {where:#x} returned {result!r}: "
            f"it returns None, or a MemTxResult to refuse"
        )
    return result


def _refuse_async(value: object) -> None:
    if inspect.isawaitable(value):
        if isinstance(value, Coroutine):
            value.close()
        raise RegionTypeError(_ASYNC)
