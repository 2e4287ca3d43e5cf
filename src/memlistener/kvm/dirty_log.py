"""Fetching the pages that guests have written, from the kernel onto the `RamBlock`.

Three ways, as `DirtyLogMethod` says; each is a class with the same few methods.
What is common to them: bits are fetched on trio's thread, in one piece with the
memslot ioctls that a commit makes, so that a slot's number means the same to the
kernel and here; and what was fetched is on the block, for every client that logs
the memory, whatever else fails. Bits may be taken on any thread.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import attrs

from memlistener.core.dirty import DIRTY_PAGE_SIZE, DirtyBitmap, is_empty
from memlistener.errors import KvmError, KvmUnavailableError
from memlistener.kvm import backend as kernel
from memlistener.kvm.slots import Memslot
from memlistener.ram import RamBlock

# 64 MiB written fill a ring of 256 KiB.
RING_ENTRIES = 16384


class DirtyLogMethod(enum.Enum):
    """How a VM learns which pages its guests have written."""

    BITMAP = "bitmap"
    """KVM_GET_DIRTY_LOG, which write-protects what it reports at once."""

    MANUAL_PROTECT = "manual-protect"
    """KVM_GET_DIRTY_LOG only reports, and KVM_CLEAR_DIRTY_LOG write-protects a page
    when a client takes it (`RamBlock.take_dirty`), not long before. As `BITMAP`
    where the kernel does not offer it."""

    RING = "ring"
    """The dirty ring: each vCPU names the pages that it writes as it writes them.
    What it costs depends on how much is written, and not on how much memory
    there is; a vCPU whose ring is full waits until it has been emptied."""


@attrs.define(eq=False)
class Logged:
    """A memslot whose dirty log is on, and whose pages those are.

    Attributes:
        memslot: As the kernel has it.
        block: The memory behind it.
        offset: Of the slot's first byte in the block. No multiple of the page size
            where the block does not begin with a page of the host's.
        clients: Who logs it: a mask of `DirtyClient` bits.
    """

    memslot: Memslot
    block: RamBlock
    offset: int
    clients: int

    @property
    def pages(self) -> int:
        """How many it has."""
        return self.memslot.memory_size // DIRTY_PAGE_SIZE

    def mark(self, first: int, bitmap: bytes | bytearray) -> None:
        """The pages in a bitmap were written; its bit 0 is the slot's page ``first``."""
        at = self.offset + first * DIRTY_PAGE_SIZE
        within = at % DIRTY_PAGE_SIZE
        self.block.merge_dirty(at - within, bitmap, self.clients)
        if within:  # each is on two of the block's
            self.block.merge_dirty(at - within + DIRTY_PAGE_SIZE, bitmap, self.clients)

    def mark_all(self) -> None:
        """Count all of its pages as written."""
        self.block.mark_dirty(self.offset, self.memslot.memory_size, self.clients)


@attrs.frozen
class DirtyLogsOf:
    """What a fetch inside a bracket was for, to tell instruments."""

    slots: tuple[Memslot, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.slots))


class DirtyLog(Protocol):
    """What each of the three does.

    Attributes:
        ioctl: The name of the ioctl that fetches.
        overflowed: Some writes were not recorded: whoever fetched is to call
            `recover`, with all vCPUs held.
        overflows: How often that happened.
    """

    ioctl: ClassVar[str]
    overflowed: bool
    overflows: int

    def added(self, logged: Logged) -> None:
        """A slot logs from now on."""
        ...

    def removed(self, logged: Logged) -> None:
        """A slot was deleted, or its log is off. What it had was fetched before."""
        ...

    def fetch(self, slots: Iterable[Logged]) -> None:
        """Bring the bits of these slots onto their blocks."""
        ...

    def full(self, vcpu: kernel.VcpuHandle) -> None:
        """A vCPU has left the guest since its ring is full."""
        ...

    def when_overflowed(self, protect: Callable[[], object]) -> None:
        """Have ``protect()`` turn the logs of some slots off and on, in `recover`."""
        ...

    def recover(self) -> None:
        """Protect all pages that log anew, and count them as written."""
        ...

    def clear(self, logged: Logged, first: int, end: int) -> None:
        """Pages [first, end) of a slot were taken: a write to them counts again."""
        ...

    def add_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """There is one more who writes."""
        ...

    def remove_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """It is about to be closed; it has written its last."""
        ...

    def close(self) -> None:
        """The VM closes; everything was fetched."""
        ...


class DirtyBitmapLog:
    """KVM_GET_DIRTY_LOG, with or without manual protection.

    With it the kernel reports a page again and again until it is cleared. So
    what was reported last is kept for each slot, and cleared when the first
    client takes it; a page that nobody has taken costs its guest nothing more.

    Clients take on threads of their own, too. A lock keeps what was reported equal
    to what the kernel has, and a page that another thread is clearing from being
    taken as protected; and after `clear` of a whole slot nobody else clears in it,
    so the slot may go.

    Args:
        vm: The VM's handle.
        manual: Whether to use KVM_CLEAR_DIRTY_LOG.
    """

    ioctl: ClassVar = "KVM_GET_DIRTY_LOG"
    overflowed = False
    overflows = 0

    def __init__(self, vm: kernel.VmHandle, *, manual: bool) -> None:
        self.manual = manual
        self._vm = vm
        self._lock = threading.Lock()
        self._reported: dict[RamBlock, dict[Logged, DirtyBitmap]] = {}
        self._watched: dict[RamBlock, Callable[[], None]] = {}
        self._slots: dict[RamBlock, int] = {}
        if manual:
            # Not INITIALLY_SET: a slot that a transaction makes again would report
            # all of its pages, and a pre-copy would never come to an end.
            vm.enable_cap(
                kernel.CAP_MANUAL_DIRTY_LOG_PROTECT2, kernel.DIRTY_LOG_MANUAL_PROTECT_ENABLE
            )

    def added(self, logged: Logged) -> None:
        """See `DirtyLog`."""
        block = logged.block
        self._slots[block] = self._slots.get(block, 0) + 1
        if self.manual and block not in self._watched:
            self._watched[block] = block.when_taken(
                lambda offset, size: self._taken(block, offset, size)
            )

    def removed(self, logged: Logged) -> None:
        """See `DirtyLog`."""
        block = logged.block
        with self._lock:
            self._forget(logged)
        self._slots[block] -= 1
        if not self._slots[block]:
            del self._slots[block]
            if block in self._watched:
                self._watched.pop(block)()

    def fetch(self, slots: Iterable[Logged]) -> None:
        """See `DirtyLog`.

        Raises:
            KvmError: The kernel refuses; names the slot. What came before is on its block.
        """
        for each in slots:
            with self._lock:
                self._fetch(each)

    def _fetch(self, logged: Logged) -> None:
        try:
            bitmap = self._vm.get_dirty_log(logged.memslot.slot, logged.pages)
        except OSError as error:
            raise _explained("KVM_GET_DIRTY_LOG", logged, error) from error
        if is_empty(bitmap):
            return
        logged.mark(0, bitmap)
        if self.manual:
            reported = DirtyBitmap(logged.pages)
            reported.merge(0, bitmap)
            self._reported.setdefault(logged.block, {})[logged] = reported

    def clear(self, logged: Logged, first: int, end: int) -> None:
        """See `DirtyLog`.

        Raises:
            KvmError: The kernel refuses; names the slot.
        """
        with self._lock:
            reported = self._reported.get(logged.block, {}).get(logged)
            if reported is not None:
                self._clear(logged, reported, first, end)

    def _clear(self, logged: Logged, reported: DirtyBitmap, first: int, end: int) -> None:
        bits = reported.take(first, end)
        # The kernel clears whole words, and up to the slot's end an odd number of pages.
        low = first & ~63
        bitmap = bytes(((first & ~7) - low) // 8) + bits
        pages = min(-(-end // 64) * 64, logged.pages) - low
        try:
            if not is_empty(bits):
                self._vm.clear_dirty_log(
                    logged.memslot.slot, low, pages, bitmap.ljust(-(-pages // 64) * 8, b"\0")
                )
        except OSError as error:
            reported.merge(first & ~7, bits)
            raise _explained("KVM_CLEAR_DIRTY_LOG", logged, error) from error
        if first == 0 and end == logged.pages:
            self._forget(logged)  # there is nothing left in it

    def _taken(self, block: RamBlock, offset: int, size: int) -> None:
        """Somebody took the bits of a part of a block: of whole pages."""
        with self._lock:
            reported = tuple(self._reported.get(block, ()))
        for each in reported:
            low = max(offset, each.offset) - each.offset
            high = min(offset + size, each.offset + each.memslot.memory_size) - each.offset
            if low < high:
                self.clear(each, low // DIRTY_PAGE_SIZE, -(-high // DIRTY_PAGE_SIZE))

    def _forget(self, logged: Logged) -> None:
        """What was reported of a slot; with the lock held."""
        slots = self._reported.get(logged.block, {})
        if slots.pop(logged, None) is not None and not slots:
            del self._reported[logged.block]

    def full(self, vcpu: kernel.VcpuHandle) -> None:
        """See `DirtyLog`: there are no rings."""

    def when_overflowed(self, protect: Callable[[], object]) -> None:
        """See `DirtyLog`: a bitmap has room for all."""

    def recover(self) -> None:
        """See `DirtyLog`."""

    def add_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """See `DirtyLog`: the bitmaps are the slots'."""

    def remove_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """See `DirtyLog`."""

    def close(self) -> None:
        """See `DirtyLog`."""
        for undo in self._watched.values():
            undo()
        self._watched.clear()
        with self._lock:
            self._reported.clear()


@attrs.define(eq=False)
class _Ring:
    """What is known of a vCPU's ring.

    Attributes:
        vcpu: Whose it is.
        astray: Whether we may be at another place in it than the kernel.
        fulls: How often it was said to be full since an entry was last found in it.
    """

    vcpu: kernel.VcpuHandle
    astray: bool = False
    fulls: int = 0


class DirtyRingLog:
    """The dirty ring of each vCPU.

    An entry names a slot by its number, and may be as old as the last time that
    the rings were emptied: so they are emptied before a number gets another
    meaning, and whenever one is full.

    A ring counts as full while it has some room left, 64 entries or a few more.
    That has to do until the vCPU comes out, and where guest code is interpreted it
    does not: seen on Linux 6.18, vCPUs wrote a thousand pages more. Then entries
    are overwritten, their pages are written without anybody hearing of it, and the
    kernel and we are at different places in the ring. Nothing is lost all the
    same: that it happened is seen (a ring with no free entry, or entries that the
    kernel does not take back), every page that logs counts as written, all of them
    are protected anew (`overflowed` asks for `recover`), and the place is
    found again, by giving back what lies between.

    An entry's page is protected when the entry has been given back, and only then
    is its bit on the block for good: who takes it before that would miss the next
    write. Where the kernel does not take entries back, their pages are on the block,
    and again when it has.

    Args:
        vm: The VM's handle; it has no vCPU yet.
        entries: How many each ring has: a power of two.

    Raises:
        KvmUnavailableError: The kernel has no dirty ring, or none so large.
    """

    ioctl: ClassVar = "KVM_RESET_DIRTY_RINGS"

    def __init__(self, vm: kernel.VmHandle, *, entries: int) -> None:
        self.overflowed = False
        self.overflows = 0
        self._vm = vm
        self._entries = entries
        self._rings: dict[kernel.VcpuHandle, _Ring] = {}
        self._logged: dict[int, Logged] = {}
        self._collected: list[tuple[int, int]] = []  # and not given back
        self._owed = 0  # how many entries that is, with those that were skipped
        self._protect: list[Callable[[], object]] = []
        for cap in (kernel.CAP_DIRTY_LOG_RING_ACQ_REL, kernel.CAP_DIRTY_LOG_RING):
            most = vm.check_extension(cap)
            if most:
                break
        else:
            raise KvmUnavailableError(
                "this kernel has no dirty ring: use Linux 5.11 or later on x86-64, or another "
                "DirtyLogMethod"
            )
        try:
            vm.enable_cap(cap, entries * kernel.DIRTY_GFN_SIZE)
        except OSError as error:
            number = error.errno or 0
            raise KvmUnavailableError(
                number,
                f"the kernel makes no dirty ring of {entries} entries "
                f"({os.strerror(number)}): give a power of two from 1,024 to "
                f"{most // kernel.DIRTY_GFN_SIZE:,}",
            ) from error

    def added(self, logged: Logged) -> None:
        """See `DirtyLog`."""
        self._logged[logged.memslot.slot] = logged

    def removed(self, logged: Logged) -> None:
        """See `DirtyLog`."""
        del self._logged[logged.memslot.slot]

    def fetch(self, slots: Iterable[Logged] = ()) -> None:
        """Empty all rings, whoever the entries are of; see `DirtyLog`.

        Raises:
            KvmError: The kernel refuses to take the entries back; the bits are on
                their blocks.
        """
        for ring in self._rings.values():
            self._collect(ring)
        try:
            self._give_back()
        finally:
            self._mark()
        self._collected.clear()

    def full(self, vcpu: kernel.VcpuHandle) -> None:
        """A vCPU has left the guest since its ring is full: as `fetch`.

        Raises:
            KvmError: As for `fetch`.
        """
        ring = self._rings.get(vcpu)
        if ring is None:
            return  # it was closed meanwhile, and its ring emptied
        if not self._collect(ring) and ring.astray:
            ring.fulls += 1
            if ring.fulls > 1:
                # Full again, and nobody has found anything in it meanwhile: the kernel is
                # further ahead of us than it lets a vCPU write. A quarter of the ring is
                # less than that, wherever it draws the line.
                self._owed += vcpu.skip_dirty_gfns(self._entries // 4)
        self.fetch()

    def _collect(self, ring: _Ring) -> bool:
        """Take all that is in a ring; whether there was anything."""
        before = len(self._collected)
        while True:
            entries = ring.vcpu.collect_dirty_gfns()
            self._collected += entries
            self._owed += len(entries)
            if entries:
                ring.fulls = 0
            if len(entries) == self._entries:
                self._overflow()
            # Where we may be astray, what we have found may not be all: the kernel's
            # entries can begin behind our place and end before it.
            skipped = ring.vcpu.skip_dirty_gfns() if ring.astray else 0
            self._owed += skipped
            if not skipped:
                return len(self._collected) > before

    def _mark(self) -> None:
        """Bring what was collected onto the blocks."""
        found: dict[Logged, list[int]] = {}
        for slot, page in self._collected:
            logged = self._logged.get(slot)
            if logged is None or page >= logged.pages:
                continue  # of a slot whose log went off: it was fetched before that
            found.setdefault(logged, []).append(page)
        for logged, pages in found.items():
            first = min(pages)  # the rest of a large slot costs nothing
            bitmap = DirtyBitmap(max(pages) + 1 - first)
            for page in pages:
                bitmap.mark(page - first, page - first + 1)
            logged.mark(first, bitmap.take(0, bitmap.pages))

    def _give_back(self) -> None:
        while self._owed:
            # Fewer, or none at all, where a signal is pending.
            done = self._vm.reset_dirty_rings() or self._vm.reset_dirty_rings()
            if not 0 < done <= self._owed:
                # The first is written again already; or there were some behind a gap
                # that was not known.
                self._overflow()
                self._owed = 0
                return
            self._owed -= done

    def _overflow(self) -> None:
        self.overflowed = True
        self.overflows += 1
        for ring in self._rings.values():  # which of them it was is not always plain
            ring.astray = True

    def when_overflowed(self, protect: Callable[[], object]) -> None:
        """See `DirtyLog`."""
        self._protect.append(protect)

    def recover(self) -> None:
        """See `DirtyLog`.

        Raises:
            KvmError: The kernel refuses; `overflowed` stays, and the next fetch is to
                try again.
        """
        self._mark_all()  # first: to protect them may fail half way
        for protect in self._protect:
            protect()
        self.overflowed = False

    def _mark_all(self) -> None:
        for each in self._logged.values():
            each.mark_all()

    def clear(self, logged: Logged, first: int, end: int) -> None:
        """See `DirtyLog`: done when the ring was emptied."""

    def add_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """See `DirtyLog`."""
        self._rings[handle] = _Ring(handle)

    def remove_vcpu(self, handle: kernel.VcpuHandle) -> None:
        """See `DirtyLog`."""
        if handle in self._rings:
            try:
                self.fetch()
            finally:
                del self._rings[handle]

    def close(self) -> None:
        """See `DirtyLog`."""
        if self.overflowed:
            self._mark_all()


def open_dirty_log(vm: kernel.VmHandle, method: DirtyLogMethod, ring_entries: int) -> DirtyLog:
    """The one that ``method`` asks for, switched on in the kernel.

    Raises:
        KvmUnavailableError: The kernel does not have it.
    """
    if method is DirtyLogMethod.RING:
        return DirtyRingLog(vm, entries=ring_entries)
    offered = vm.check_extension(kernel.CAP_MANUAL_DIRTY_LOG_PROTECT2)
    manual = method is DirtyLogMethod.MANUAL_PROTECT and bool(
        offered & kernel.DIRTY_LOG_MANUAL_PROTECT_ENABLE
    )
    return DirtyBitmapLog(vm, manual=manual)


def _explained(ioctl: str, logged: Logged, error: OSError) -> KvmError:
    number = error.errno or 0
    return KvmError(number, f"{ioctl}: {logged.memslot}: {os.strerror(number)}")
