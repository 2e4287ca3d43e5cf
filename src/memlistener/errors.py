"""Every error memlistener raises, in one place.

Two things are *not* errors here. What a guest does wrong is data: a
`MemTxResult` from an access, a `VcpuExit` from a run. And a listener or device
handler that raises is never wrapped: its own exception comes out of the
transaction or out of ``vcpu.run()``.

What is left is misuse by the host program, and refusals by the kernel:

``MemlistenerError``
    Base class: catch this to catch all of the below.
``RegionError`` (also a ``ValueError``)
    One region, or a pair of regions, does not make sense: a size of 0, a region
    added twice, siblings that overlap, an alias cycle. Nothing was changed.
    Its subclass ``RegionTypeError`` is a ``TypeError`` too.
``TransactionError`` (also a ``RuntimeError``)
    The right change at the wrong time: a live tree changed outside a
    transaction, a transaction opened from inside a listener.
``ListenerError`` (also a ``ValueError``)
    A listener is registered twice, or taken away where it is not.
``UnassignedAccessError`` (also a ``LookupError``)
    An access met nothing, and the address space was told to make that an error.
``BrokenMemoryError`` (also a ``RuntimeError``)
    A transaction failed *and* undoing it failed. The memory system refuses all
    further use; vCPUs stay stopped.
``RamInUseError`` (also a ``BufferError``)
    A `RamBlock` was closed while something still uses its memory.
``VcpuBusyError`` (also a ``RuntimeError``)
    Something that needs a stopped vCPU was asked of one that runs.
``KvmUnavailableError`` (also an ``OSError``)
    KVM cannot be used here at all; says what is missing and what to do.
``KvmError`` (also an ``OSError``)
    KVM is there and refused one request; carries the ``errno``.
``MemslotError``
    A `KvmError` about a memslot: names the section, the slot and the ioctl.
"""

from __future__ import annotations


class MemlistenerError(Exception):
    """Base class of every error that memlistener itself raises."""


class RegionError(MemlistenerError, ValueError):
    """A region, or a pair of regions, does not make sense together."""


class RegionTypeError(RegionError, TypeError):
    """An argument about a region is not of a type that makes sense there."""


class TransactionError(MemlistenerError, RuntimeError):
    """A change or a transaction at a moment when it cannot be made."""


class ListenerError(MemlistenerError, ValueError):
    """A listener is registered twice, not at all, or is none."""


class UnassignedAccessError(MemlistenerError, LookupError):
    """An access met nothing, in an address space that makes this an error."""


class BrokenMemoryError(MemlistenerError, RuntimeError):
    """A failed transaction could not be undone; the memory system is unusable."""


class RamInUseError(MemlistenerError, BufferError):
    """A `RamBlock` was closed while its memory is still in use."""


class VcpuBusyError(MemlistenerError, RuntimeError):
    """A vCPU that runs was asked for something that needs it stopped."""


class KvmUnavailableError(MemlistenerError, OSError):
    """KVM cannot be used on this machine; the message says why and the mend."""


class KvmError(MemlistenerError, OSError):
    """KVM refused a request. ``errno`` is the kernel's."""


class MemslotError(KvmError):
    """KVM refused to change a memslot, or the slots would run out."""
