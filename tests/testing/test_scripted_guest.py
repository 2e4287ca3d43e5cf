"""Guest scripts: accesses, exits and their answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memlistener.kvm import backend
from memlistener.kvm.exits import (
    FailEntry,
    Hlt,
    InternalError,
    Shutdown,
    SystemEvent,
    Unsupported,
    VcpuExit,
)
from memlistener.testing.fake_kvm import FakeVm
from memlistener.testing.guest_script import (
    Exit,
    Fetch,
    GuestScript,
    Halt,
    In,
    LoseSignals,
    Out,
    Read,
    Spin,
    Write,
)

from .fakes import PAGE, HostMemory, vcpu_with

# Accesses and exits.


def test_memory_access(vm: FakeVm, ram: HostMemory) -> None:
    """Accesses within slots go to host memory, and reads are sent to the script."""

    def guest() -> GuestScript:
        value = yield Read(0xFFE, 4)  # over the seam of two slots
        yield Write(0x2000, 8, value * 2)
        code = yield Fetch(0x1000, 2)
        yield Write(0x2008, 2, code)

    ram.bytes[0xFFE:0x1002] = b"\x01\x02\x03\x04"
    vm.set_user_memory_region(0, 0, 0, PAGE, ram.address)
    vm.set_user_memory_region(1, 0, PAGE, 2 * PAGE, ram.address + PAGE)
    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    assert (vcpu.run(), vcpu.terminal_exit()) == (0, Hlt())
    assert ram.bytes[0x2000:0x200A] == bytes.fromhex("02040608 00000000 0304")
    assert vcpu.statistics().instructions == 5


def test_readonly_slot(vm: FakeVm, ram: HostMemory) -> None:
    """Reads and fetches from a read-only slot work; a write exits as MMIO."""
    ram.bytes[:2] = b"ab"
    vm.set_user_memory_region(0, 2, 0, PAGE, ram.address)
    vcpu = vcpu_with(vm, Read(0, 1), Fetch(1), Write(0, 2, 0x7978))
    assert (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_MMIO)
    assert vcpu.mmio() == (0, 2, True, b"xy")
    assert ram.bytes[:2] == b"ab"


def test_wide_access_exits_in_fragments(vm: FakeVm) -> None:
    """An access is cut at pages and then into eights, and completes with the last part."""
    got = []

    def guest() -> GuestScript:
        got.append((yield Read(0xFFC, 16)))

    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    seen = []
    while (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_MMIO):
        addr, length, is_write, _ = vcpu.mmio()
        seen.append((addr, length, is_write))
        vcpu.complete_mmio(bytes([len(seen)]) * length)
    assert seen == [(0xFFC, 4, False), (0x1000, 8, False), (0x1008, 4, False)]
    assert got == [int.from_bytes(b"\1" * 4 + b"\2" * 8 + b"\3" * 4, "little")]
    assert vcpu.statistics().mmio_exits == 3


def test_string_io(vm: FakeVm) -> None:
    """REP INS and REP OUTS are one exit for all their elements."""
    got = []

    def guest() -> GuestScript:
        got.append((yield In(0x60, 2, 3)))
        yield Out(0x61, 1, 0x030201, count=3)

    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    assert vcpu.run() == 0
    assert vcpu.io()[:4] == (0x60, 2, 3, False)
    vcpu.complete_io(b"abcdef")
    assert vcpu.run() == 0
    assert vcpu.io() == (0x61, 1, 3, True, b"\1\2\3")
    assert got == [int.from_bytes(b"abcdef", "little")]


def test_answers_are_checked(vm: FakeVm) -> None:
    """The wrong answer to an exit raises, instead of reaching the guest."""
    vcpu = vcpu_with(vm, Read(0, 4), Write(0, 4, 1), In(0, 1))
    with pytest.raises(ValueError, match="reason 0"):
        vcpu.mmio()
    assert vcpu.run() == 0
    with pytest.raises(ValueError, match="wants 4 bytes, not 3"):
        vcpu.complete_mmio(b"abc")
    with pytest.raises(ValueError, match="reason 6, not 2"):
        vcpu.complete_io(b"a")
    assert vcpu.run() == 0
    with pytest.raises(ValueError, match="was a write"):
        vcpu.complete_mmio(b"abcd")


def test_fetch_from_a_hole(vm: FakeVm, ram: HostMemory) -> None:
    """A fetch where no slot is cannot be emulated, until there is one."""
    vcpu = vcpu_with(vm, Fetch(0x1000))
    for _ in range(2):
        assert (vcpu.run(), vcpu.exit_reason) == (0, 17)
        assert vcpu.terminal_exit() == InternalError(1)
    vm.set_user_memory_region(0, 0, 0x1000, PAGE, ram.address)
    assert (vcpu.run(), vcpu.terminal_exit()) == (0, Hlt())
    assert vcpu.statistics().internal_errors == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Hlt(), 5),
        (Shutdown(), 8),
        (FailEntry(0x80000021), 9),
        (SystemEvent(1), 24),
        (Unsupported(99), 99),
    ],
)
def test_terminal_exits(vm: FakeVm, value: VcpuExit, reason: int) -> None:
    """Any exit can be scripted, with the kernel's number; the next run goes on behind it."""
    vcpu = vcpu_with(vm, Exit(value), Out(1, 1, 2))
    assert (vcpu.run(), vcpu.exit_reason, vcpu.terminal_exit()) == (0, reason, value)
    assert (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_IO)


def test_ended_script_halts_for_ever(vm: FakeVm) -> None:
    """Behind the end of a program there are only HLTs."""
    vcpu = vcpu_with(vm, Halt())
    assert [(vcpu.run(), vcpu.terminal_exit()) for _ in range(3)] == [(0, Hlt())] * 3


def test_script_error_leaves_run(vm: FakeVm) -> None:
    """What a script raises comes out of run(), and the vCPU is outside again."""

    def guest() -> GuestScript:
        value = yield In(1, 1)
        assert value == 7, "the device lied"

    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    assert vcpu.run() == 0
    vcpu.complete_io(b"\x08")
    with pytest.raises(AssertionError, match="the device lied"):
        vcpu.run()
    assert vm.inside == frozenset()
    assert "the device lied" in vm.ioctls[-1].result
    assert (vcpu.run(), vcpu.terminal_exit()) == (0, Hlt())


def test_not_an_instruction(vm: FakeVm) -> None:
    """A script of something else is a TypeError that shows it."""
    vcpu = vcpu_with(vm, "nop")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'nop' is no guest instruction"):
        vcpu.run()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Read(0, 0),
        lambda: Read(-1, 1),
        lambda: Read(2**64 - 1, 2),
        lambda: Write(0, 1, 256),
        lambda: Write(0, 1, -1),
        lambda: In(0x10000, 1),
        lambda: In(0, 3),
        lambda: In(0, 4, 0x401),
        lambda: Out(0, 2, 0x10000),
        lambda: Spin(0),
        lambda: LoseSignals(0),
    ],
)
def test_impossible_instructions(make: Callable[[], object]) -> None:
    """An instruction that no processor could execute is not made."""
    with pytest.raises(ValueError, match=r"\S"):
        make()
