"""`DirtyBitmapLog`: KVM_GET_DIRTY_LOG, a bitmap for each slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import ClassVar

from memlistener.core.dirty import DIRTY_PAGE_SIZE, DirtyBitmap, is_empty
from memlistener.kvm import backend as kernel
from memlistener.kvm.dirty_log import Logged, explained
from memlistener.ram import RamBlock


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
            raise explained("KVM_GET_DIRTY_LOG", logged, error) from error
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
            raise explained("KVM_CLEAR_DIRTY_LOG", logged, error) from error
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
