"""What answers an access: `MemoryRegionOps`, and how an access is fitted to it.

An access is first cut to what the *device* accepts (``valid``: sizes the guest
may use), then each part to what the *model* implements (``impl``: sizes its
``read`` and ``write`` are called with), as in QEMU. Both steps are pure and live
here; calling the ops is `memlistener.dispatch`'s.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Iterator
from typing import Any, Literal, TypeAlias

import attrs

from memlistener.errors import RegionError


class MemTxResult(enum.Flag):
    """How an access went: data, not an exception (QEMU's ``MemTxResult``)."""

    OK = 0
    ERROR = 1  # the device says no
    DECODE_ERROR = 2  # nothing is there, or it does not take this size
    ACCESS_ERROR = 4  # something is there and does not allow it


@attrs.frozen
class MemTxAttrs:
    """Who makes an access (QEMU's ``MemTxAttrs``).

    Attributes:
        secure: ARM TrustZone's secure state, x86's SMM.
        user: Made from user mode.
        requester_id: PCI requester, 0 for a CPU.
    """

    secure: bool = False
    user: bool = False
    requester_id: int = 0


UNSPECIFIED = MemTxAttrs()  # nobody in particular (MEMTXATTRS_UNSPECIFIED)


def _power_of_two(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value not in (1, 2, 4, 8):
        raise RegionError(f"{attribute.name} is 1, 2, 4 or 8 bytes, not {value!r}")


@attrs.frozen
class AccessConstraints:
    """Sizes and alignment of an access (``valid`` and ``impl`` of QEMU's ops).

    Attributes:
        min_access_size: Smallest access in bytes: 1, 2, 4 or 8.
        max_access_size: Largest access in bytes: 1, 2, 4 or 8.
        unaligned: Whether an access may be at an offset that is not a multiple
            of its size. Where not, it is cut into aligned ones.

    Raises:
        RegionError: A size is none of these, or the smallest exceeds the largest.
    """

    min_access_size: int = attrs.field(default=1, validator=_power_of_two)
    max_access_size: int = attrs.field(default=8, validator=_power_of_two)
    unaligned: bool = False

    def __attrs_post_init__(self) -> None:
        if self.min_access_size > self.max_access_size:
            raise RegionError(
                f"min_access_size {self.min_access_size} is more than "
                f"max_access_size {self.max_access_size}"
            )


ReadResult: TypeAlias = int | MemTxResult
WriteResult: TypeAlias = MemTxResult | None


class MemoryRegionOps:
    """Base class for what answers accesses to an I/O region or a ROM device.

    Subclass it, or use any object that has these attributes. ``read`` and
    ``write`` may be plain or ``async def``; they run in the task that called
    ``vcpu.run()`` or ``space.read()``.

    Attributes:
        endianness: Byte order of the device's registers (``DEVICE_BIG_ENDIAN``).
        valid: What the guest may use; the rest gives `MemTxResult.DECODE_ERROR`.
        impl: What `read` and `write` are called with; other sizes are made of these.
        thread_safe: Promise that plain ``read`` and ``write`` may run on the
            thread of the vCPU that makes the access, several at once: ten times
            faster than going through trio.
    """

    endianness: Literal["little", "big"] = "little"
    valid: AccessConstraints = AccessConstraints()
    impl: AccessConstraints = AccessConstraints()
    thread_safe: bool = False

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> ReadResult | Awaitable[ReadResult]:
        """The value of ``size`` bytes at ``offset`` in the region.

        Return a `MemTxResult` instead to refuse.
        """
        return MemTxResult.ACCESS_ERROR

    def write(
        self, offset: int, value: int, size: int, attrs: MemTxAttrs
    ) -> WriteResult | Awaitable[WriteResult]:
        """Write ``value``, ``size`` bytes wide, at ``offset`` in the region.

        Return a `MemTxResult` to refuse.
        """
        return MemTxResult.ACCESS_ERROR


_DEFAULT = AccessConstraints()


def constraints(ops: Any) -> tuple[AccessConstraints, AccessConstraints]:
    """The ``valid`` and ``impl`` of any ops object."""
    return getattr(ops, "valid", _DEFAULT), getattr(ops, "impl", _DEFAULT)


def endianness(ops: Any) -> Literal["little", "big"]:
    """The byte order of any ops object."""
    return "big" if getattr(ops, "endianness", "little") == "big" else "little"


def split(offset: int, size: int, valid: AccessConstraints) -> Iterator[tuple[int, int]]:
    """Cut [offset, offset + size) into accesses that a bus would make.

    Each is a power of two of at most ``valid.max_access_size`` bytes, aligned
    unless ``valid.unaligned``; ascending. They may still be smaller than
    ``valid.min_access_size``, which the device then refuses.
    """
    end = offset + size
    while offset < end:
        step = min(valid.max_access_size, 1 << ((end - offset).bit_length() - 1))
        if not valid.unaligned and offset:
            step = min(step, offset & -offset)
        yield offset, step
        offset += step


def implement(offset: int, size: int, impl: AccessConstraints) -> list[tuple[int, int, int]]:
    """How an access is made of calls that the model implements.

    Returns:
        ``(offset, size, shift)`` each: a call, and by how many bytes its value
        is shifted left in the access's own value. A shift is negative where the
        model's smallest access starts before the access's own first byte.
    """
    step = max(min(size, impl.max_access_size), impl.min_access_size)
    if impl.unaligned or offset % step == 0:
        return [(offset + at, step, at) for at in range(0, size, step)]
    # Aligned calls, which may begin before the access and end after it.
    calls = []
    start = offset & -impl.min_access_size
    while start < offset + size:
        step = impl.max_access_size
        while step > impl.min_access_size and (start % step or start + step > offset + size):
            step //= 2
        calls.append((start, step, start - offset))
        start += step
    return calls
