from __future__ import annotations

import struct
from typing import Any

import pytest

from memlistener.kvm import bindings
from memlistener.kvm.exits import (
    Debug,
    FailEntry,
    Hlt,
    InternalError,
    Shutdown,
    SystemEvent,
    Unknown,
    Unsupported,
    VcpuExit,
)
from memlistener.kvm.structs import terminal_exit

pytestmark = pytest.mark.skipif(
    bindings.missing() is not None, reason=f"no extension: {bindings.missing()}"
)


def decode(reason: int, union: bytes = b"") -> VcpuExit:
    """Decode an exit whose union starts with these bytes."""
    b = bindings.bindings()
    run: Any = b.ffi.new("struct kvm_run *")
    run.exit_reason = reason
    start = b.ffi.offsetof("struct kvm_run", "io")
    b.ffi.buffer(run)[start : start + len(union)] = union
    return terminal_exit(b, run)


@pytest.mark.parametrize(
    ("reason", "exit_"),
    [(5, Hlt()), (8, Shutdown()), (4, Debug()), (37, Unsupported(37)), (999, Unsupported(999))],
)
def test_exits_without_detail(reason: int, exit_: VcpuExit) -> None:
    """Exits that are nothing but a reason, and reasons that nobody handles."""
    assert decode(reason) == exit_


def test_unknown() -> None:
    """KVM_EXIT_UNKNOWN carries the processor's own reason."""
    assert decode(0, struct.pack("=Q", 0x8000_0021)) == Unknown(0x8000_0021)


def test_fail_entry() -> None:
    """KVM_EXIT_FAIL_ENTRY carries the reason and the CPU."""
    assert decode(9, struct.pack("=QI", 0x8000_0021, 3)) == FailEntry(0x8000_0021, 3)


def test_system_event() -> None:
    """KVM_EXIT_SYSTEM_EVENT carries its type and words."""
    assert decode(24, struct.pack("=IIQQ", 2, 2, 7, 8)) == SystemEvent(2, (7, 8))


def test_system_event_with_too_many_words() -> None:
    """A count beyond the array is cut to it."""
    event = decode(24, struct.pack("=II16Q", 1, 1000, *range(16)))
    assert event == SystemEvent(1, tuple(range(16)))


def test_internal_error() -> None:
    """KVM_EXIT_INTERNAL_ERROR carries its suberror and as many words as KVM gave."""
    error = decode(17, struct.pack("=II4Q", 3, 2, 0x11, 0x22, 0x33, 0x44))
    assert error == InternalError(3, (0x11, 0x22))
    assert isinstance(error, InternalError)
    assert error.name == "DELIVERY_EV"


def test_internal_error_with_too_many_words() -> None:
    """A count beyond the array is cut to it."""
    error = decode(17, struct.pack("=II16Q", 2, 0xFFFFFFFF, *range(16)))
    assert error == InternalError(2, tuple(range(16)))


def test_emulation_failure_has_the_instruction() -> None:
    """With the flag set, a failed emulation carries the instruction's bytes."""
    code = bytes(range(0xF0, 0xFF))
    union = struct.pack("=IIQB15s", 1, 3, 1, 4, code)
    error = decode(17, union)
    assert isinstance(error, InternalError)
    assert error.instruction == code[:4]
    assert len(error.data) == 3


@pytest.mark.parametrize(("ndata", "flags"), [(3, 0), (0, 1), (2, 1)])
def test_emulation_failure_without_the_instruction(ndata: int, flags: int) -> None:
    """Without the flag, or without the words, there are no instruction bytes."""
    error = decode(17, struct.pack("=IIQB15s", 1, ndata, flags, 4, bytes(15)))
    assert isinstance(error, InternalError)
    assert error.instruction == b""
