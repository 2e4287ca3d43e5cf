"""Fetching the pages that guests have written, from the kernel onto the `RamBlock`.

Three ways, as `DirtyLogMethod` says; each is a class with the same few methods, in
`dirty_bitmap` and `dirty_ring`.
What is common to them: bits are fetched on trio's thread, in one piece with the
memslot ioctls that a commit makes, so that a slot's number means the same to the
kernel and here; and what was fetched is on the block, for every client that logs
the memory, whatever else fails. Bits may be taken on any thread.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import attrs

from memlistener.core.dirty import DIRTY_PAGE_SIZE
from memlistener.errors import KvmError
from memlistener.kvm import backend as kernel
from memlistener.kvm.slots import Memslot
from memlistener.ram import RamBlock


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


def explained(ioctl: str, logged: Logged, error: OSError) -> KvmError:
    """The error of an ioctl that failed, with the slot in it."""
    number = error.errno or 0
    return KvmError(number, f"{ioctl}: {logged.memslot}: {os.strerror(number)}")
