"""The memslots of a `FakeVm`, and what the kernel checks before it changes one.

Pure: no locks and no threads; `FakeVm` calls in with its lock held. The checks,
their order and their errnos are those of Linux's ``kvm_set_memory_region`` on
x86. A property test runs the same requests here and on /dev/kvm.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import os
from collections.abc import Callable
from operator import attrgetter

import attrs

from memlistener.errors import KvmError
from memlistener.kvm.backend import MEM_LOG_DIRTY_PAGES, MEM_READONLY

PAGE_SIZE = 0x1000
_PAGE_MASK = PAGE_SIZE - 1
# KVM_MEM_MAX_NR_PAGES: dirty bitmaps are indexed with an unsigned int.
_MAX_PAGES = (1 << 31) - 1
# TASK_SIZE_MAX with four levels of page tables.
_HOST_LIMIT = (1 << 47) - PAGE_SIZE


def kernel_error(number: int, message: str) -> KvmError:
    """An error with the kernel's errno, and a text that says what it minds."""
    return KvmError(number, f"{os.strerror(number)}: {message}")


@attrs.frozen
class FakeMemslot:
    """One memslot, as ``struct kvm_userspace_memory_region`` describes it.

    Attributes:
        slot: Its id, with the address-space id in the upper 16 bits.
        flags: ``KVM_MEM_LOG_DIRTY_PAGES`` and ``KVM_MEM_READONLY``.
        guest_phys_addr: Where the guest sees it.
        memory_size: In bytes.
        userspace_addr: Where the host keeps it.
    """

    slot: int
    flags: int
    guest_phys_addr: int = attrs.field(repr=hex)
    memory_size: int = attrs.field(repr=hex)
    userspace_addr: int = attrs.field(repr=hex)

    @property
    def end(self) -> int:
        """The guest address behind its last byte."""
        return self.guest_phys_addr + self.memory_size

    @property
    def readonly(self) -> bool:
        """Whether guest writes exit as MMIO."""
        return bool(self.flags & MEM_READONLY)

    @property
    def logs_dirty(self) -> bool:
        """Whether guest writes mark pages."""
        return bool(self.flags & MEM_LOG_DIRTY_PAGES)


_by_address = attrgetter("guest_phys_addr")


class MemslotTable:
    """The memslots of one VM, over all its address spaces."""

    def __init__(
        self, *, limit: int, address_spaces: int, readonly_offered: bool, physical_bits: int
    ) -> None:
        """A table with no slots.

        Args:
            limit: Slots in each address space (``KVM_CAP_NR_MEMSLOTS``).
            address_spaces: How many there are.
            readonly_offered: Whether ``KVM_MEM_READONLY`` is a known flag.
            physical_bits: The width of guest-physical addresses.
        """
        self._limit = limit
        self._valid_flags = MEM_LOG_DIRTY_PAGES | (MEM_READONLY if readonly_offered else 0)
        self._physical_limit = 1 << physical_bits
        self._slots: dict[int, FakeMemslot] = {}
        # Per address space, ascending and disjoint.
        self._ordered: list[list[FakeMemslot]] = [[] for _ in range(address_spaces)]
        # Sets of page numbers within the slot: huge slots, few dirty pages. A page
        # that is not there is write-protected: the next write to it is noticed.
        self._dirty: dict[int, set[int]] = {}
        # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reporting does not protect.
        self.manual_protect = False
        # Each vCPU has a dirty ring instead of each slot a bitmap.
        self.rings = False

    def slots(self) -> tuple[FakeMemslot, ...]:
        """Every slot, by address space and then by guest address."""
        return tuple(slot for space in self._ordered for slot in space)

    def update(self, new: FakeMemslot, between: Callable[[], object] = lambda: None) -> None:
        """``KVM_SET_USER_MEMORY_REGION``: create, move, re-flag or delete a slot.

        Args:
            new: The slot as it is to be; size 0 to delete it.
            between: Called in the middle of a move, when the slot is nowhere.
                The kernel moves a slot no other way.

        Raises:
            KvmError: EINVAL or EEXIST, and nothing has changed.
        """
        self._check_request(new)
        old = self._slots.get(new.slot)
        if new.memory_size == 0:
            if old is None:
                raise kernel_error(errno.EINVAL, f"no slot {new.slot:#x} to delete")
            self._remove(old)
            self._dirty.pop(old.slot, None)
            return
        if old is not None:
            self._check_modification(old, new)
        if old is None or old.guest_phys_addr != new.guest_phys_addr:
            self._check_place(new)
        if old is not None:
            self._remove(old)
            if old.guest_phys_addr != new.guest_phys_addr:
                between()
        self._insert(new)
        # Logging that stays on keeps its bitmap, even through a move.
        if not new.logs_dirty:
            self._dirty.pop(new.slot, None)
        else:
            self._dirty.setdefault(new.slot, set())

    def dirty_log(self, slot: int, pages: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: the bitmap of ``slot``, which starts anew.

        Under manual protection it does not: `clear_dirty_log` does that.

        Raises:
            KvmError: EINVAL for an id out of range, ENOENT where nothing logs,
                ENXIO where there are rings.
            ValueError: The slot has another number of pages: the kernel would
                have written past the end of the caller's buffer.
        """
        dirty = self._bitmap_of(slot)
        slot_pages = self._slots[slot].memory_size // PAGE_SIZE
        if pages != slot_pages:
            raise ValueError(f"slot {slot:#x} has {slot_pages:#x} pages, not {pages:#x}")
        bitmap = bytearray((pages + 63) // 64 * 8)
        for page in dirty:
            bitmap[page >> 3] |= 1 << (page & 7)
        if not self.manual_protect:
            dirty.clear()
        return bytes(bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes) -> None:
        """``KVM_CLEAR_DIRTY_LOG``: protect the pages that ``bitmap`` names.

        Raises:
            KvmError: As for `dirty_log`, and EINVAL for pages that are not the
                slot's or not a number of them that the kernel takes.
            ValueError: The bitmap is too short.
        """
        if len(bitmap) * 8 < pages:
            raise ValueError(f"a bitmap of {len(bitmap):#x} bytes has no {pages:#x} pages")
        if self.rings:
            raise kernel_error(errno.ENXIO, "this VM has dirty rings")
        self._check_id(slot)
        if first_page & 63:
            raise kernel_error(errno.EINVAL, f"page {first_page:#x} begins no word of the bitmap")
        dirty = self._bitmap_of(slot)
        there = self._slots[slot].memory_size // PAGE_SIZE
        if first_page + pages > there or (first_page + pages < there and pages & 63):
            raise kernel_error(
                errno.EINVAL, f"{pages:#x} pages from {first_page:#x} of slot {slot:#x}"
            )
        bits = int.from_bytes(bitmap, "little") & ((1 << pages) - 1)
        dirty -= {page for page in dirty if page >= first_page and bits >> page - first_page & 1}

    def protect(self, slot: int, page: int) -> None:
        """Notice the next write to a page, as ``KVM_RESET_DIRTY_RINGS`` has it."""
        self._dirty.get(slot, set()).discard(page)

    def _bitmap_of(self, slot: int) -> set[int]:
        if self.rings:
            raise kernel_error(errno.ENXIO, "this VM has dirty rings")
        self._check_id(slot)
        dirty = self._dirty.get(slot)
        if dirty is None:
            raise kernel_error(errno.ENOENT, f"slot {slot:#x} is absent or does not log")
        return dirty

    def load(self, address_space: int, addr: int, size: int) -> bytes | None:
        """Bytes of guest memory within one page; None where no slot is."""
        slot = self._find(address_space, addr)
        return None if slot is None else bytes(_host_bytes(slot, addr, size))

    def store(
        self,
        address_space: int,
        addr: int,
        data: bytes,
        noticed: Callable[[int, int], object] = lambda slot, page: None,
    ) -> bool:
        """Write within one page, marking it dirty; False: no slot, or read-only.

        Args:
            address_space: The vCPU's.
            addr: Where.
            data: What.
            noticed: Called with slot and page, where the page was write-protected.
        """
        slot = self._find(address_space, addr)
        if slot is None or slot.readonly:
            return False
        _host_bytes(slot, addr, len(data))[:] = data
        if slot.logs_dirty:
            page = (addr - slot.guest_phys_addr) // PAGE_SIZE
            dirty = self._dirty[slot.slot]
            if page not in dirty:
                dirty.add(page)
                noticed(slot.slot, page)
        return True

    def check(self) -> None:
        """Assert every invariant of the table."""
        for space_id, space in enumerate(self._ordered):
            assert space == sorted(space, key=_by_address)
            assert all(a.end <= b.guest_phys_addr for a, b in itertools.pairwise(space))
            assert all(slot.slot >> 16 == space_id for slot in space)
        assert set(self.slots()) == set(self._slots.values())
        assert set(self._dirty) == {s.slot for s in self._slots.values() if s.logs_dirty}

    def _check_id(self, slot: int) -> None:
        if slot & 0xFFFF >= self._limit or slot >> 16 >= len(self._ordered):
            raise kernel_error(
                errno.EINVAL,
                f"slot {slot:#x}: {len(self._ordered)} address space(s) "
                f"of {self._limit} slots are all there is",
            )

    def _check_request(self, new: FakeMemslot) -> None:
        # A deletion is checked like anything else: its flags and addresses too.
        if new.flags & ~self._valid_flags:
            raise kernel_error(errno.EINVAL, f"unknown flags {new.flags & ~self._valid_flags:#x}")
        self._check_id(new.slot)
        for name in ("memory_size", "guest_phys_addr", "userspace_addr"):
            value: int = getattr(new, name)
            if value & _PAGE_MASK:
                raise kernel_error(errno.EINVAL, f"{name} {value:#x} is not page-aligned")
        if new.userspace_addr + new.memory_size > _HOST_LIMIT:
            raise kernel_error(
                errno.EINVAL, f"host memory reaches up to {_HOST_LIMIT:#x}, past which is {new}"
            )
        # The kernel's sum is 64 bits wide, and wraps even when it comes to 2**64.
        if new.end >= 1 << 64:
            raise kernel_error(errno.EINVAL, f"{new} reaches past the end of guest memory")
        if new.memory_size // PAGE_SIZE > _MAX_PAGES:
            raise kernel_error(errno.EINVAL, f"{new} has more than {_MAX_PAGES:#x} pages")

    def _check_modification(self, old: FakeMemslot, new: FakeMemslot) -> None:
        if new.memory_size != old.memory_size:
            raise kernel_error(errno.EINVAL, f"{old} cannot be resized to {new.memory_size:#x}")
        if new.userspace_addr != old.userspace_addr:
            raise kernel_error(
                errno.EINVAL, f"{old} cannot change its host memory to {new.userspace_addr:#x}"
            )
        if new.readonly != old.readonly:
            raise kernel_error(errno.EINVAL, f"{old} cannot change KVM_MEM_READONLY in place")

    def _check_place(self, new: FakeMemslot) -> None:
        space = self._ordered[new.slot >> 16]
        first = bisect.bisect_right(space, new.guest_phys_addr, key=_by_address) - 1
        # In its way can be the slot below its start and those that follow; of
        # these one can be its former self, so look at three.
        for other in space[max(first, 0) : first + 3]:
            overlaps = other.guest_phys_addr < new.end and new.guest_phys_addr < other.end
            if overlaps and other.slot != new.slot:
                raise kernel_error(errno.EEXIST, f"{new} overlaps {other}")
        if new.end > self._physical_limit:
            raise kernel_error(
                errno.EINVAL, f"{new} reaches past the guest's {self._physical_limit:#x}"
            )

    def _insert(self, slot: FakeMemslot) -> None:
        self._slots[slot.slot] = slot
        bisect.insort(self._ordered[slot.slot >> 16], slot, key=_by_address)

    def _remove(self, slot: FakeMemslot) -> None:
        del self._slots[slot.slot]
        space = self._ordered[slot.slot >> 16]
        del space[bisect.bisect_left(space, slot.guest_phys_addr, key=_by_address)]

    def _find(self, address_space: int, addr: int) -> FakeMemslot | None:
        space = self._ordered[address_space]
        index = bisect.bisect_right(space, addr, key=_by_address) - 1
        if index >= 0 and addr < space[index].end:
            return space[index]
        return None


def _host_bytes(slot: FakeMemslot, addr: int, size: int) -> memoryview:
    # Unsafe, and as safe as on the kernel: whoever made the slot promised that
    # the memory stays mapped while the slot exists. The caller holds the lock
    # under which slots are deleted, so the view does not outlive the slot. An
    # array made from an address, unlike ctypes.memmove, keeps the GIL: other
    # Python threads see an access of up to a page whole or not at all.
    address = slot.userspace_addr + (addr - slot.guest_phys_addr)
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
