from __future__ import annotations

import errno
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memlistener.errors import KvmError, KvmUnavailableError
from memlistener.kvm import x86
from memlistener.kvm.backend import (
    CAP_DIRTY_LOG_RING_ACQ_REL,
    CAP_IMMEDIATE_EXIT,
    CAP_MANUAL_DIRTY_LOG_PROTECT2,
    CAP_NR_MEMSLOTS,
    EXIT_IO,
    EXIT_MMIO,
    MEM_LOG_DIRTY_PAGES,
    MEM_READONLY,
    KvmBackend,
    VcpuHandle,
    VmHandle,
)
from memlistener.kvm.exits import Hlt, InternalError, Shutdown
from memlistener.kvm.fds import Kvm, VcpuFd, VmFd
from tests.kvm.machine import LONG_ENOUGH, RAM_SIZE, Machine

pytestmark = pytest.mark.kvm

ENTRY = 0x1000
HLT = b"\xf4"
SPIN = b"\xeb\xfe"
# mov ax, 0x2000; mov ds, ax: then [0] is guest-physical 0x20000, which is not RAM.
DS_AT_0X20000 = b"\xb8\x00\x20\x8e\xd8"
DX_IS_0X3F8 = b"\xba\xf8\x03"


def in_thread(body: Callable[[], None]) -> threading.Thread:
    """Start a thread that does not outlive the tests."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, but not forever."""
    deadline = time.monotonic() + LONG_ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)


def open_descriptors() -> set[str]:
    """This process's descriptors."""
    return set(os.listdir("/proc/self/fd"))


def test_handles_are_the_protocols() -> None:
    """The three handles are what the backend's protocols ask for."""

    def check(kvm: KvmBackend, vm: VmHandle, vcpu: VcpuHandle) -> None:
        assert kvm.check_extension(CAP_IMMEDIATE_EXIT) > 0
        assert vm.check_extension(CAP_NR_MEMSLOTS) >= 32
        assert vcpu.exit_reason == 0

    with Machine() as machine:
        check(machine.kvm, machine.vm, machine.vcpu)


def test_no_device(tmp_path: Path) -> None:
    """Without the device the error says how to get it, and carries the errno."""
    with pytest.raises(KvmUnavailableError, match="modprobe") as caught:
        Kvm.open(tmp_path / "kvm")
    assert caught.value.errno == errno.ENOENT


def test_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission the error names the group to join."""

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmUnavailableError, match="kvm \\$USER") as caught:
        Kvm.open()
    assert caught.value.errno == errno.EACCES


def test_some_other_device() -> None:
    """A file that is not KVM's is named, and not left open."""
    before = open_descriptors()
    with pytest.raises(KvmUnavailableError, match="/dev/null is not KVM's device"):
        Kvm.open("/dev/null")
    assert open_descriptors() == before


def test_missing_capability() -> None:
    """A capability that cannot be done without is named."""

    class OldKernel(Kvm):
        __slots__ = ()

        def check_extension(self, cap: int) -> int:
            return 0 if cap == CAP_IMMEDIATE_EXIT else super().check_extension(cap)

    before = open_descriptors()
    with pytest.raises(KvmUnavailableError, match=r"KVM_CAP_IMMEDIATE_EXIT; use Linux 4\.13"):
        OldKernel.open()
    assert open_descriptors() == before


def test_other_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of KVM's API is refused."""
    monkeypatch.setattr("memlistener.kvm.fds._API_VERSION", 13)
    with pytest.raises(KvmUnavailableError, match="version 12 of KVM's API, not 13"):
        Kvm.open()


def test_closing() -> None:
    """Closing is idempotent, unmaps, and leaves an object that says it is closed."""
    before = open_descriptors()
    with Kvm.open() as kvm, kvm.create_vm() as vm, vm.create_vcpu(3) as vcpu:
        assert vcpu.vcpu_id == 3
        assert repr(kvm) == f"<Kvm fd={kvm.fileno():#x}>"
        assert repr(vm) == f"<VmFd fd={vm.fileno():#x}>"
        assert repr(vcpu) == f"<VcpuFd fd={vcpu.fileno():#x} id=0x3 exit_reason=0x0>"
        assert "kvm-vcpu" in Path("/proc/self/maps").read_text()
    assert open_descriptors() == before
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()
    assert repr(vm) == "<VmFd closed>"
    assert repr(vcpu) == "<VcpuFd closed id=0x3>"
    for handle in (kvm, vm, vcpu):
        assert handle.closed
        handle.close()
        with pytest.raises(ValueError, match="closed"):
            handle.fileno()


def test_closed_vcpu_is_harmless() -> None:
    """A closed vCPU can be kicked, answers EBADF to run, and otherwise raises."""
    with Machine() as machine:
        vcpu = machine.vcpu
    vcpu.kick()
    assert vcpu.run() == errno.EBADF
    for use in (vcpu.clear_kick, vcpu.mmio, vcpu.io, vcpu.terminal_exit, vcpu.get_regs):
        with pytest.raises(ValueError, match="VcpuFd is closed"):
            use()
    with pytest.raises(ValueError, match="VcpuFd is closed"):
        vcpu.complete_mmio(b"")
    with pytest.raises(ValueError, match="VcpuFd is closed"):
        vcpu.complete_io(b"")
    with pytest.raises(ValueError, match="VcpuFd is closed"):
        _ = vcpu.exit_reason


def test_forgotten_handles_are_closed() -> None:
    """A handle that nobody holds any more gives its descriptors back."""
    before = open_descriptors()
    vcpu: VcpuFd | None = Kvm.open().create_vm().create_vcpu(0)
    assert open_descriptors() > before
    assert vcpu is not None
    vcpu = None
    assert open_descriptors() == before


def test_refusals_name_the_ioctl(machine: Machine) -> None:
    """What the kernel refuses is an OSError with its errno and the ioctl's name."""
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU: File exists .*id 0x0") as caught:
        machine.vm.create_vcpu(0)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        pytest.param((1, 0, 0xF000, 0x1000, 0), errno.EEXIST, id="overlap"),
        pytest.param((1, 0, 0x20800, 0x1000, 0), errno.EINVAL, id="misaligned address"),
        pytest.param((1, 0, 0x20000, 0x800, 0), errno.EINVAL, id="misaligned size"),
        pytest.param((1, 0, 0x20000, 0x1000, 1), errno.EINVAL, id="misaligned memory"),
        pytest.param((1, 1 << 31, 0x20000, 0x1000, 0), errno.EINVAL, id="unknown flag"),
        pytest.param((0, 0, 0, 0x8000, 0), errno.EINVAL, id="resize"),
        pytest.param((0xFFFF, 0, 0x20000, 0x1000, 0), errno.EINVAL, id="slot beyond the last"),
        pytest.param((1, 0, 0x20000, 0, 0), errno.EINVAL, id="delete what is not there"),
    ],
)
def test_bad_slots(
    machine: Machine, arguments: tuple[int, int, int, int, int], number: int
) -> None:
    """A slot that the kernel refuses raises its errno and says all that was asked, in hex."""
    slot, flags, addr, size, offset = arguments
    with pytest.raises(KvmError, match=f"guest_phys_addr {addr:#x}, memory_size {size:#x}") as e:
        machine.vm.set_user_memory_region(slot, flags, addr, size, machine.host + offset)
    assert e.value.errno == number
    assert "KVM_SET_USER_MEMORY_REGION" in str(e.value)


def test_hlt(machine: Machine) -> None:
    """A guest runs and halts."""
    machine.write(ENTRY, HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()
    assert machine.vcpu.get_regs()["rip"] == ENTRY + 1


@pytest.mark.parametrize(
    ("load", "size"),
    [(b"\xa0\x00\x00", 1), (b"\xa1\x00\x00", 2), (b"\x66\xa1\x00\x00", 4)],
    ids=["8 bits", "16 bits", "32 bits"],
)
def test_mmio_read(machine: Machine, load: bytes, size: int) -> None:
    """A read of what is no memory exits, and gets the bytes it is given."""
    machine.write(ENTRY, DS_AT_0X20000 + load + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.exit_reason == EXIT_MMIO
    addr, length, is_write, data = machine.vcpu.mmio()
    assert (addr, length, is_write, len(data)) == (0x20000, size, False, size)
    with pytest.raises(ValueError, match=f"of {size:#x} bytes got {size + 1:#x}"):
        machine.vcpu.complete_mmio(bytes(size + 1))
    value = b"\x11\x22\x33\x44"[:size]
    machine.vcpu.complete_mmio(value)
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()
    assert machine.vcpu.get_regs()["rax"].to_bytes(8, "little")[:size] == value


def test_mmio_write(machine: Machine) -> None:
    """A write to what is no memory exits with its bytes, in guest order."""
    mov_eax = b"\x66\xb8" + struct.pack("<I", 0x11223344)
    store = b"\x66\xa3\x04\x00"
    machine.write(ENTRY, DS_AT_0X20000 + mov_eax + store + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.mmio() == (0x20004, 4, True, b"\x44\x33\x22\x11")
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()


def test_pio_out_and_in(machine: Machine) -> None:
    """OUT and IN exit with port, size and data, and IN gets what it is given."""
    out_al = b"\xb0\x41" + DX_IS_0X3F8 + b"\xee"
    in_eax = b"\x66\xed"
    machine.write(ENTRY, out_al + in_eax + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.exit_reason == EXIT_IO
    assert machine.vcpu.io() == (0x3F8, 1, 1, True, b"A")
    assert machine.run() == 0
    port, size, count, is_out, data = machine.vcpu.io()
    assert (port, size, count, is_out, len(data)) == (0x3F8, 4, 1, False, 4)
    with pytest.raises(ValueError, match=r"IN of 0x4 \* 0x1 bytes got 0x3"):
        machine.vcpu.complete_io(b"abc")
    machine.vcpu.complete_io(b"\x78\x56\x34\x12")
    assert machine.run() == 0
    assert machine.vcpu.get_regs()["rax"] == 0x12345678


def test_string_io(machine: Machine) -> None:
    """REP OUTS and REP INS carry every byte, however many there are to an exit."""
    rep_outsb = b"\xbe\x00\x20\xb9\x05\x00" + DX_IS_0X3F8 + b"\xfc\xf3\x6e"
    rep_insb = b"\xbf\x00\x30\xb9\x05\x00\xf3\x6c"
    machine.write(0x2000, b"hello")
    machine.write(ENTRY, rep_outsb + rep_insb + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    came, to_give = b"", b"world"
    while machine.run() == 0 and machine.vcpu.exit_reason == EXIT_IO:
        port, size, count, is_out, data = machine.vcpu.io()
        assert (port, size) == (0x3F8, 1)
        if is_out:
            assert len(data) == count
            came += data
        else:
            machine.vcpu.complete_io(to_give[:count])
            to_give = to_give[count:]
    assert machine.vcpu.terminal_exit() == Hlt()
    assert came == b"hello"
    assert machine.ram[0x3000:0x3005] == b"world"


def test_triple_fault(machine: Machine) -> None:
    """An exception without an interrupt table is a triple fault: Shutdown."""
    machine.write(ENTRY, b"\x0f\x0b")  # ud2
    x86.protected_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Shutdown()


def test_code_from_nowhere(machine: Machine) -> None:
    """Fetching code where there is no memory is an internal error: a failed emulation."""
    x86.real_mode(machine.vcpu, 0x40000)
    assert machine.run() == 0
    error = machine.vcpu.terminal_exit()
    assert isinstance(error, InternalError)
    assert error.name == "EMULATION"


def test_deleted_slot_is_a_hole(machine: Machine) -> None:
    """After its slot is deleted, memory exits as MMIO; after it is back, it is memory."""
    vm, vcpu = machine.vm, machine.vcpu
    second = 0x20000
    machine.write(ENTRY, DS_AT_0X20000 + b"\xa0\x00\x00" + HLT)
    machine.write(0x8000, b"\x5a")
    vm.set_user_memory_region(1, 0, second, 0x1000, machine.host + 0x8000)
    x86.real_mode(vcpu, ENTRY)
    assert machine.run() == 0
    assert vcpu.terminal_exit() == Hlt()
    assert vcpu.get_regs()["rax"] & 0xFF == 0x5A
    vm.set_user_memory_region(1, 0, second, 0, 0)
    x86.real_mode(vcpu, ENTRY)
    assert machine.run() == 0
    assert vcpu.exit_reason == EXIT_MMIO
    assert vcpu.mmio()[:3] == (second, 1, False)


def test_read_only_slot(machine: Machine) -> None:
    """A read-only slot is read as memory, and a write to it exits."""
    load_and_store = b"\xa0\x00\x00\xa2\x01\x00"
    machine.write(ENTRY, DS_AT_0X20000 + load_and_store + HLT)
    machine.write(0x8000, b"\x5a")
    machine.vm.set_user_memory_region(1, MEM_READONLY, 0x20000, 0x1000, machine.host + 0x8000)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    assert machine.vcpu.mmio() == (0x20001, 1, True, b"\x5a")
    assert machine.ram[0x8001] == 0


def test_dirty_log(machine: Machine) -> None:
    """The dirty log has the pages that the guest wrote, once."""
    store_pages_2_and_9 = b"\xa2\x00\x20\xa2\x00\x90"
    machine.vm.set_user_memory_region(0, MEM_LOG_DIRTY_PAGES, 0, RAM_SIZE, machine.host)
    machine.write(ENTRY, store_pages_2_and_9 + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    pages = RAM_SIZE // 0x1000
    machine.vm.get_dirty_log(0, pages)
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()
    assert machine.vm.get_dirty_log(0, pages) == struct.pack("<Q", 1 << 2 | 1 << 9)
    assert machine.vm.get_dirty_log(0, pages) == bytes(8)


def test_dirty_log_refusals(machine: Machine) -> None:
    """A slot that does not log is ENOENT, and a wrong length never reaches the kernel."""
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG.*slot 0x0") as caught:
        machine.vm.get_dirty_log(0, RAM_SIZE // 0x1000)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="slot 0x0 has 0x10 pages, not 0x1"):
        machine.vm.get_dirty_log(0, 1)
    with pytest.raises(KvmError) as caught:
        machine.vm.get_dirty_log(7, 1)
    assert caught.value.errno == errno.ENOENT


def test_manual_protection(machine: Machine) -> None:
    """With it a page is reported until it is cleared, and then when it is written again."""
    machine.vm.enable_cap(CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    machine.vm.set_user_memory_region(0, MEM_LOG_DIRTY_PAGES, 0, RAM_SIZE, machine.host)
    machine.write(ENTRY, b"\xa2\x00\x20\xa2\x00\x90" + HLT)
    pages = RAM_SIZE // 0x1000
    for _ in range(2):
        x86.real_mode(machine.vcpu, ENTRY)
        assert machine.run() == 0
        dirty = machine.vm.get_dirty_log(0, pages)
        assert struct.unpack("<Q", dirty)[0] & 0x204 == 0x204
        assert machine.vm.get_dirty_log(0, pages) == dirty
        machine.vm.clear_dirty_log(0, 0, pages, bytes(dirty))
        assert machine.vm.get_dirty_log(0, pages) == bytes(8)


def test_clear_dirty_log_refusals(machine: Machine) -> None:
    """The kernel's errors name the slot and the pages; a short bitmap never reaches it."""
    with pytest.raises(ValueError, match="a bitmap of 0x1 bytes has no 0x10 pages"):
        machine.vm.clear_dirty_log(0, 0, 16, b"\1")
    with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG.*slot 0x0, 0x10 pages from 0x1"):
        machine.vm.clear_dirty_log(0, 1, 16, bytes(8))


def test_dirty_ring() -> None:
    """A vCPU names the pages that it writes; after a reset it names them again."""
    with Machine(slot=False, ring_size=0x10000) as machine:
        machine.vm.set_user_memory_region(5, MEM_LOG_DIRTY_PAGES, 0, RAM_SIZE, machine.host)
        machine.write(ENTRY, b"\xa2\x00\x20\xa2\x00\x90" + HLT)
        for _ in range(2):
            x86.real_mode(machine.vcpu, ENTRY)
            assert machine.run() == 0
            found = machine.vcpu.collect_dirty_gfns()
            assert {(5, 2), (5, 9)} <= set(found)
            assert machine.vcpu.collect_dirty_gfns() == []
            assert machine.vm.reset_dirty_rings() == len(found)
        with pytest.raises(KvmError) as caught:
            machine.vm.get_dirty_log(5, RAM_SIZE // 0x1000)
        assert caught.value.errno == errno.ENXIO


def test_no_ring(machine: Machine) -> None:
    """Without one there is nothing to collect, and nothing to reset."""
    assert machine.vcpu.collect_dirty_gfns() == []
    with pytest.raises(KvmError, match="KVM_RESET_DIRTY_RINGS") as caught:
        machine.vm.reset_dirty_rings()
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP.*cap 223, 0x3"):
        machine.vm.enable_cap(CAP_DIRTY_LOG_RING_ACQ_REL, 3)


def test_kick_ioctls(machine: Machine) -> None:
    """The two kick ioctls of the series either work or answer ENOTTY, as mainline does."""
    errors = []
    for request in (machine.vm.kick_all_running_vcpus, machine.vm.resume_all_kicked_vcpus):
        try:
            request()
        except KvmError as error:
            errors.append((error.errno, str(error).partition("KVM_")[2].partition(":")[0]))
    assert errors in (
        [],
        [
            (errno.ENOTTY, "KICK_ALL_RUNNING_VCPUS"),
            (errno.ENOTTY, "RESUME_ALL_KICKED_VCPUS"),
        ],
    )


def test_kick_a_spinning_guest(machine: Machine) -> None:
    """A kick from another thread ends KVM_RUN, and the guest goes on where it was."""
    machine.write(ENTRY, SPIN)
    x86.real_mode(machine.vcpu, ENTRY)
    results: list[int] = []
    for _ in range(3):
        thread = in_thread(lambda: results.append(machine.vcpu.run()))
        time.sleep(0.02)
        assert thread.is_alive()
        machine.vcpu.kick()
        thread.join(LONG_ENOUGH)
        assert not thread.is_alive()
        machine.vcpu.clear_kick()
    assert results == [errno.EINTR] * 3
    assert machine.vcpu.get_regs()["rip"] == ENTRY


def test_kick_before_entry_is_not_lost(machine: Machine) -> None:
    """A kick before run() ends it at once, until it is cleared."""
    machine.write(ENTRY, SPIN)
    x86.real_mode(machine.vcpu, ENTRY)
    machine.vcpu.kick()
    assert machine.vcpu.run() == errno.EINTR
    assert machine.vcpu.run() == errno.EINTR
    machine.write(ENTRY, HLT)
    machine.vcpu.clear_kick()
    assert machine.run() == 0


def test_one_kick_is_enough(machine: Machine) -> None:
    """However a kick falls between clear_kick() and KVM_RUN, it ends that run."""
    machine.write(ENTRY, SPIN)
    x86.real_mode(machine.vcpu, ENTRY)
    rounds, cleared, ended = 500, 0, 0

    def vcpu_thread() -> None:
        nonlocal cleared, ended
        for _ in range(rounds):
            machine.vcpu.clear_kick()
            cleared += 1
            assert machine.vcpu.run() == errno.EINTR
            ended += 1

    thread = in_thread(vcpu_thread)
    for n in range(1, rounds + 1):
        wait_until(lambda n=n: cleared == n)  # type: ignore[misc]
        machine.vcpu.kick()
        wait_until(lambda n=n: ended == n)  # type: ignore[misc]
    thread.join(LONG_ENOUGH)
    assert not thread.is_alive()


def test_kick_reaches_a_thread_that_blocks_signals(machine: Machine) -> None:
    """A thread that inherited a mask of everything can be kicked all the same."""
    machine.write(ENTRY, SPIN)
    x86.real_mode(machine.vcpu, ENTRY)
    results: list[int] = []

    def blocked() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        results.append(machine.vcpu.run())

    thread = in_thread(blocked)
    time.sleep(0.02)
    machine.vcpu.kick()
    thread.join(LONG_ENOUGH)
    assert results == [errno.EINTR]


def test_kick_without_a_runner(machine: Machine) -> None:
    """Kicking is harmless when the thread has left KVM_RUN, or ended."""
    machine.write(ENTRY, HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    thread = in_thread(lambda: assert_zero(machine.run()))
    thread.join(LONG_ENOUGH)
    machine.vcpu.kick()
    machine.vcpu.kick()
    machine.vcpu.clear_kick()
    assert machine.vcpu.terminal_exit() == Hlt()


def assert_zero(result: int) -> None:
    """So that a lambda can assert."""
    assert result == 0


def test_a_second_thread_is_refused(machine: Machine) -> None:
    """While one thread is inside, another gets EBUSY instead of a run nobody could kick."""
    machine.write(ENTRY, SPIN)
    x86.real_mode(machine.vcpu, ENTRY)
    thread = in_thread(lambda: assert_eintr(machine.run()))
    wait_until(lambda: bool(machine.vcpu._tid[0]))
    assert machine.vcpu.run() == errno.EBUSY
    machine.vcpu.kick()
    thread.join(LONG_ENOUGH)
    assert not thread.is_alive()


def assert_eintr(result: int) -> None:
    """So that a lambda can assert."""
    assert result == errno.EINTR


def test_pending_mmio_is_completed_by_a_kicked_run(machine: Machine) -> None:
    """A kicked run() still takes in the data of the exit before, and loses nothing."""
    machine.write(ENTRY, DS_AT_0X20000 + b"\xa0\x00\x00" + HLT)
    x86.real_mode(machine.vcpu, ENTRY)
    assert machine.run() == 0
    machine.vcpu.complete_mmio(b"\x77")
    machine.vcpu.kick()
    assert machine.vcpu.run() == errno.EINTR
    assert machine.vcpu.get_regs()["rax"] & 0xFF == 0x77
    machine.vcpu.clear_kick()
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()


def test_registers_round_trip(machine: Machine) -> None:
    """What is written to the registers is read back, every one."""
    values = {name: 0x1111 * n for n, name in enumerate(machine.vcpu.get_regs(), 1)}
    assert len(values) == 18
    values["rflags"] = 0x2
    values["r15"] = (1 << 64) - 1
    machine.vcpu.set_regs(values)
    assert machine.vcpu.get_regs() == values


def test_system_registers_round_trip(machine: Machine) -> None:
    """What is written to the system registers is read back, segments and tables too."""
    sregs = machine.vcpu.get_sregs()
    sregs["ds"] |= {"base": 0x12340, "selector": 0x1234}
    sregs["gdt"] = {"base": 0x1000, "limit": 0x17}
    sregs["cr2"] = 0xDEAD000
    machine.vcpu.set_sregs(sregs)
    assert machine.vcpu.get_sregs() == sregs
    assert len(sregs["interrupt_bitmap"]) == 4


def test_registers_must_be_complete(machine: Machine) -> None:
    """A missing, an unknown, or an oversized field is refused by name."""
    regs = machine.vcpu.get_regs()
    with pytest.raises(ValueError, match="struct kvm_regs: missing rax, unknown tax"):
        machine.vcpu.set_regs({"tax" if k == "rax" else k: v for k, v in regs.items()})
    with pytest.raises(ValueError, match=r"kvm_regs\.rax = 0x10000000000000000 does not fit"):
        machine.vcpu.set_regs(regs | {"rax": 1 << 64})
    sregs = machine.vcpu.get_sregs()
    sregs["cs"] |= {"limit": -1}
    with pytest.raises(ValueError, match=r"kvm_sregs.cs.limit = -0x1 does not fit"):
        machine.vcpu.set_sregs(sregs)


def test_impossible_state_is_einval(machine: Machine) -> None:
    """System registers that no processor could have are the kernel's EINVAL."""
    sregs = machine.vcpu.get_sregs()
    sregs["cr0"] = 1 << 31  # paging without protection
    with pytest.raises(KvmError, match="KVM_SET_SREGS") as caught:
        machine.vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EINVAL


def test_vm_outlives_its_handle() -> None:
    """Handles may be closed in any order: a vCPU runs on without its VM's descriptor."""
    with Machine() as machine:
        machine.write(ENTRY, HLT)
        x86.real_mode(machine.vcpu, ENTRY)
        machine.vm.close()
        machine.kvm.close()
        assert machine.run() == 0
        assert machine.vcpu.terminal_exit() == Hlt()


def test_vm_needs_no_file() -> None:
    """VmFd and VcpuFd are made only from a Kvm, each with a descriptor that exec closes."""
    with Kvm.open() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert isinstance(vm, VmFd)
        for handle in (kvm, vm, vcpu):
            assert not os.get_inheritable(handle.fileno())


# ---- the bus --------------------------------------------------------------------------


def test_ioeventfd(machine: Machine) -> None:
    """A write signals without an exit; the refusals name the ioctl and what was asked."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        machine.vm.ioeventfd(0x80, 1, fd, pio=True)
        machine.write(0x1000, bytes.fromhex("e680 e680 f4"))  # out 0x80, al, twice; hlt
        x86.real_mode(machine.vcpu, 0x1000)
        assert machine.run() == 0
        assert machine.vcpu.terminal_exit() == Hlt()
        assert os.eventfd_read(fd) == 2
        with pytest.raises(KvmError, match=r"KVM_IOEVENTFD: .*addr 0x80, len 0x1, .*flags 0x2"):
            machine.vm.ioeventfd(0x80, 1, fd, pio=True)
        machine.vm.ioeventfd(0x80, 1, fd, pio=True, deassign=True)
        with pytest.raises(KvmError, match=r"KVM_IOEVENTFD: .*flags 0x7, datamatch 0x11"):
            machine.vm.ioeventfd(0x80, 1, fd, datamatch=0x11, pio=True, deassign=True)
    finally:
        os.close(fd)


def test_the_ring_goes_round(machine: Machine) -> None:
    """Entries come out in order across the end of the page, and make room again."""
    machine.vm.register_coalesced_mmio(0x80, 1, True)
    # l: out 0x80, al; inc al; loop l; hlt
    machine.write(0x1000, bytes.fromhex("e680 fec0 e2fa f4"))
    machine.vm.take_coalesced()
    for rax in (0, 100, 200):
        x86.real_mode(machine.vcpu, 0x1000)
        machine.vcpu.set_regs(machine.vcpu.get_regs() | {"rax": rax, "rcx": 100})
        assert not machine.vm.coalesced_pending()
        assert machine.run() == 0
        assert machine.vcpu.terminal_exit() == Hlt()
        assert machine.vm.coalesced_pending()
        assert machine.vm.take_coalesced() == [
            (0x80, bytes([n % 256]), True) for n in range(rax, rax + 100)
        ]
    machine.vm.unregister_coalesced_mmio(0x80, 1, True)


def test_the_ring_outlives_its_vcpu() -> None:
    """What a vCPU left in the ring is there when it is closed; nothing is when the VM is."""
    with Machine() as machine:
        machine.vm.register_coalesced_mmio(0x80, 1, True)
        machine.write(0x1000, bytes.fromhex("e680 f4"))
        x86.real_mode(machine.vcpu, 0x1000)
        assert machine.run() == 0
        machine.vcpu.close()
        assert [addr for addr, _, _ in machine.vm.take_coalesced()] == [0x80]
    assert not machine.vm.coalesced_pending()
    assert machine.vm.take_coalesced() == []
