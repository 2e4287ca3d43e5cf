"""The instruction set of `FakeKvm`'s virtual CPUs: frozen values, one each.

A guest program is any iterable of these, or a generator that yields them. A
generator is sent what its last instruction read, so that a guest can compute::

    def checksum(vcpu_id: int) -> GuestScript:
        total = 0
        for addr in range(0x8000, 0x9000, 8):
            total += yield Read(addr, 8)
        yield Write(0x2000, 8, total % 2**64)

What reads nothing is sent 0. A program that has ended executes HLT for ever,
and an exception raised inside a generator comes out of the `FakeVcpu.run` that
was executing it: that is how an assertion in a guest fails its test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias

import attrs

from memlistener.kvm.exits import Hlt, VcpuExit

_ADDRESS_LIMIT = 1 << 64
# KVM's buffer for string I/O, behind struct kvm_run, is one page.
_IO_BUFFER = 0x1000


def _check_span(instance: Read | Write | Fetch, _attribute: Any, size: int) -> None:
    if size < 1:
        raise ValueError(f"an access needs a size of at least 1, not {size}")
    if not 0 <= instance.addr <= _ADDRESS_LIMIT - size:
        raise ValueError(f"no guest access of {size} bytes at {instance.addr:#x}")


def _check_port(instance: In | Out, _attribute: Any, size: int) -> None:
    if size not in (1, 2, 4):
        raise ValueError(f"a port access has 1, 2 or 4 bytes, not {size}")
    if not 0 <= instance.port <= 0xFFFF:
        raise ValueError(f"no port {instance.port:#x}")
    if instance.count < 1 or instance.count * size > _IO_BUFFER:
        raise ValueError(f"{instance.count} accesses of {size} bytes do not fit into one exit")


def _check_value(instance: Write | Out, _attribute: Any, value: int) -> None:
    size = instance.size * (instance.count if isinstance(instance, Out) else 1)
    if not 0 <= value < 1 << (8 * size):
        raise ValueError(f"{value:#x} does not fit into {size} bytes")


@attrs.frozen
class Read:
    """Load ``size`` bytes at ``addr``; sends the little-endian value back."""

    addr: int
    size: int = attrs.field(validator=_check_span)


@attrs.frozen
class Write:
    """Store ``value``, ``size`` bytes little-endian, at ``addr``."""

    addr: int
    size: int = attrs.field(validator=_check_span)
    value: int = attrs.field(validator=_check_value)


@attrs.frozen
class Fetch:
    """Fetch ``size`` bytes of code at ``addr``; sends the value back.

    Where there is no memslot KVM cannot emulate: the run ends with an
    `InternalError` of suberror 1, and the next run tries the same fetch again.
    """

    addr: int
    size: int = attrs.field(default=1, validator=_check_span)


@attrs.frozen
class In:
    """``IN`` (``count`` > 1: ``REP INS``); sends the value of all its bytes back."""

    port: int
    size: int = attrs.field(validator=_check_port)
    count: int = 1


@attrs.frozen
class Out:
    """``OUT`` (``count`` > 1: ``REP OUTS``, ``value`` being all its bytes)."""

    port: int
    size: int = attrs.field(validator=_check_port)
    count: int = attrs.field(default=1, kw_only=True)
    value: int = attrs.field(validator=_check_value)


@attrs.frozen
class Exit:
    """Leave ``KVM_RUN`` with ``value``; the next run goes on behind it."""

    value: VcpuExit


def Halt() -> Exit:
    """``HLT``, without an interrupt controller in the kernel: exits with `Hlt`."""
    return Exit(Hlt())


@attrs.frozen
class Spin:
    """A loop that accesses nothing: stays inside ``KVM_RUN`` until kicked.

    Attributes:
        kicks: After so many kicks the loop is over, and the next run goes on
            behind it. None is ``jmp .``: it never is.
    """

    kicks: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(1))
    )


@attrs.frozen
class LoseSignals:
    """Make the next ``count`` signals that find the vCPU inside have no effect.

    ``immediate_exit`` stays set, as in the kernel, where it is looked at on
    entry only. A backend that kicks once and waits for ever shows itself.
    """

    count: int = attrs.field(default=1, validator=attrs.validators.ge(1))


@attrs.frozen
class Deaf:
    """Stay inside ``KVM_RUN``, uninterruptibly, until ``until`` is set.

    What a thread does that waits in the kernel for a page from a slow disk. A
    kick stays pending and is honoured afterwards.
    """

    until: threading.Event


Instruction: TypeAlias = Read | Write | Fetch | In | Out | Exit | Spin | LoseSignals | Deaf

GuestScript: TypeAlias = Generator[Instruction, int, None]
"""What a guest program written as a generator function returns."""

GuestProgram: TypeAlias = Callable[[int], Iterable[Instruction]]
"""Makes the script of a new vCPU, given its id."""
