"""`DirtyRingLog`: the dirty ring of each vCPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import ClassVar

import attrs

from memlistener.core.dirty import DirtyBitmap
from memlistener.errors import KvmUnavailableError
from memlistener.kvm import backend as kernel
from memlistener.kvm.dirty_log import Logged

# 64 MiB written fill a ring of 256 KiB.
RING_ENTRIES = 16384


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
