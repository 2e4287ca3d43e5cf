"""KVM_RUN and registers on FakeKvm and on the real kernel; kicks on FakeKvm."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from memlistener.kvm import backend
from memlistener.kvm.backend import KvmBackend, VcpuHandle
from memlistener.kvm.exits import (
    Hlt,
)
from memlistener.testing.fake_kvm import FakeKvm, FakeVm
from memlistener.testing.fake_vcpu import FakeVcpu
from memlistener.testing.guest_script import (
    Deaf,
    GuestScript,
    Halt,
    In,
    LoseSignals,
    Out,
    Read,
    Spin,
    Write,
)

from .fakes import TIMEOUT, HostMemory, Runner, errno_of, vcpu_with

# KVM_RUN: both kernels.

# Real mode, ds = 0x10000 where no slot is, es = 0xf000, whose last page in a slot is its first.
GUEST_CODE = bytes.fromhex(
    "66a1fe0f"  # mov eax, [0xffe]
    "66a31000"  # mov [0x10], eax
    "ba3412ecee"  # mov dx, 0x1234; in al, dx; out dx, al
    "2666a1fe0f"  # mov eax, es:[0xffe]
    "2666a3fe0f"  # mov es:[0xffe], eax
    "f4f4"  # hlt; hlt
)


def guest_script() -> GuestScript:
    """The same in instructions of the fake."""
    eax = yield Read(0x10FFE, 4)
    yield Write(0x10010, 4, eax)
    al = yield In(0x1234, 1)
    yield Out(0x1234, 1, al)
    eax = yield Read(0xFFFE, 4)
    yield Write(0xFFFE, 4, eax)
    yield Halt()
    yield Halt()


def prepare(vcpu: VcpuHandle, ram: HostMemory) -> None:
    if isinstance(vcpu, FakeVcpu):
        vcpu.load(guest_script())
    ram.bytes[0x1000 : 0x1000 + len(GUEST_CODE)] = GUEST_CODE
    sregs = vcpu.get_sregs()
    for name, base in (("cs", 0), ("ds", 0x10000), ("es", 0xF000)):
        sregs[name] |= {"base": base, "selector": base >> 4}
    vcpu.set_sregs(sregs)
    vcpu.set_regs(vcpu.get_regs() | {"rip": 0x1000})


def test_pending_exits_complete_before_eintr(kernel: KvmBackend, ram: HostMemory) -> None:
    """Entry completes what is pending, then looks at immediate_exit; fragments win over it."""
    ram.bytes[0xFFFE:0x10000] = b"\xf4\xf4"
    vm = kernel.create_vm()
    vm.set_user_memory_region(0, 0, 0, 0x10000, ram.address)
    vcpu = vm.create_vcpu(0)
    prepare(vcpu, ram)
    answers = iter((b"\x11\x22", b"\x33\x44", b"\x99", b"\xaa\xbb"))
    trace: list[Any] = []
    try:
        for kicked in (True, False, *(True, True, False) * 7):
            if kicked:
                vcpu.kick()
            result = vcpu.run()
            vcpu.clear_kick()
            if result:
                trace.append(result)
                continue
            if vcpu.exit_reason == backend.EXIT_MMIO:
                trace.append(vcpu.mmio() if vcpu.mmio()[2] else vcpu.mmio()[:3])
                if not vcpu.mmio()[2]:
                    vcpu.complete_mmio(next(answers))
            elif vcpu.exit_reason == backend.EXIT_IO:
                trace.append(vcpu.io() if vcpu.io()[3] else vcpu.io()[:4])
                if not vcpu.io()[3]:
                    vcpu.complete_io(next(answers))
            else:
                trace.append(vcpu.terminal_exit())
    finally:
        vcpu.close()
        vm.close()
    eintr = errno.EINTR
    assert trace == [
        eintr,
        (0x10FFE, 2, False),
        (0x11000, 2, False),  # though kicked
        eintr,
        (0x10010, 4, True, b"\x11\x22\x33\x44"),
        eintr,
        eintr,
        (0x1234, 1, 1, False),
        eintr,
        eintr,
        (0x1234, 1, 1, True, b"\x99"),
        eintr,
        eintr,
        (0x10000, 2, False),
        eintr,
        eintr,
        (0x10000, 2, True, b"\xaa\xbb"),
        eintr,
        eintr,
        Hlt(),
        eintr,
        eintr,
        Hlt(),
    ]
    assert ram.bytes[0xFFFE:0x10000] == b"\xf4\xf4"


def test_reset_registers(kernel: KvmBackend) -> None:
    """Every register comes out of reset as on Linux 6.18, on the second vCPU too."""
    vm = kernel.create_vm()
    try:
        for vcpu_id in range(2):
            vcpu = vm.create_vcpu(vcpu_id)
            reference = FakeKvm().create_vm().create_vcpu(vcpu_id)
            assert vcpu.get_regs() == reference.get_regs()
            assert vcpu.get_sregs() == reference.get_sregs()
            vcpu.close()
    finally:
        vm.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({"cr0": 0x80000010}, errno.EINVAL),
        ({"cr0": 0x20000010}, errno.EINVAL),
        ({"cs.l": 1}, errno.EINVAL),
        ({"efer": 0x400}, errno.EINVAL),
        ({"efer": 0x100}, 0),
        ({"efer": 0x500, "cr0": 0x80000011}, errno.EINVAL),
        ({"efer": 0x100, "cr0": 0x80000011, "cr4": 0x20}, errno.EINVAL),
        ({"efer": 0x500, "cr0": 0x80000011, "cr4": 0x20, "cs.l": 1}, 0),
    ],
)
def test_special_registers_are_checked(
    kernel: KvmBackend, changes: dict[str, int], expected: int
) -> None:
    """Modes that no processor has are EINVAL, and leave the registers alone."""
    vm = kernel.create_vm()
    vcpu = vm.create_vcpu(0)
    try:
        before = vcpu.get_sregs()
        sregs = vcpu.get_sregs()
        for name, value in changes.items():
            if name == "cs.l":
                sregs["cs"]["l"] = value
            else:
                sregs[name] = value
        assert errno_of(lambda: vcpu.set_sregs(sregs)) == expected
        assert vcpu.get_sregs() == (before if expected else sregs)
    finally:
        vcpu.close()
        vm.close()


def test_register_fields_are_checked(kernel: KvmBackend) -> None:
    """Missing, unknown and oversized fields raise ValueError; rflags bit 1 is always set."""
    vm = kernel.create_vm()
    vcpu = vm.create_vcpu(0)
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        with pytest.raises(ValueError, match="unknown eax"):
            vcpu.set_regs(regs | {"eax": 0})
        with pytest.raises(ValueError, match="missing rax"):
            vcpu.set_regs({name: value for name, value in regs.items() if name != "rax"})
        with pytest.raises(ValueError, match="rax = 0x10000000000000000 does not fit"):
            vcpu.set_regs(regs | {"rax": 2**64})
        with pytest.raises(ValueError, match=r"kvm_sregs\.cs: missing base"):
            vcpu.set_sregs(sregs | {"cs": {k: v for k, v in sregs["cs"].items() if k != "base"}})
        vcpu.set_regs(regs | {"rflags": 0, "r15": 2**64 - 1})
        assert vcpu.get_regs() == regs | {"r15": 2**64 - 1}
    finally:
        vcpu.close()
        vm.close()


def test_vcpu_ids(kernel: KvmBackend) -> None:
    """An id is taken for good, even when its vCPU is closed; there is a highest one."""
    vm = kernel.create_vm()
    try:
        vm.create_vcpu(1).close()
        assert errno_of(lambda: vm.create_vcpu(1)) == errno.EEXIST
        assert errno_of(lambda: vm.create_vcpu(1 << 20)) == errno.EINVAL
    finally:
        vm.close()


def test_unknown_capability_and_kick_ioctls(kernel: KvmBackend) -> None:
    """A capability nobody knows is 0; without the kick ioctls, ENOTTY."""
    vm = kernel.create_vm()
    try:
        assert kernel.check_extension(0x7FFF) == vm.check_extension(0x7FFF) == 0
        kick = errno_of(vm.kick_all_running_vcpus)
        if kick == 0 and not isinstance(vm, FakeVm):
            vm.resume_all_kicked_vcpus()
            pytest.skip("this kernel has the kick ioctls")
        assert (kick, errno_of(vm.resume_all_kicked_vcpus)) == (errno.ENOTTY, errno.ENOTTY)
    finally:
        vm.close()


@pytest.mark.kvm
def test_default_capabilities() -> None:
    """The fake claims nothing that the real kernel, where it is as new, does not have."""
    from memlistener.kvm.fds import Kvm

    fake = FakeKvm()
    with Kvm.open() as kvm:
        if not kvm.check_extension(backend.CAP_DIRTY_LOG_RING_ACQ_REL):
            pytest.skip("an older kernel")
        for name, cap in vars(backend).items():
            if name.startswith("CAP_"):
                assert bool(fake.check_extension(cap)) == bool(kvm.check_extension(cap)), name


# KVM_RUN: kicks.


def test_kick_before_run(vm: FakeVm) -> None:
    """immediate_exit makes run() return EINTR before anything is executed."""
    vcpu = vcpu_with(vm, Out(1, 1, 1))
    vcpu.kick()
    assert [vcpu.run(), vcpu.run()] == [errno.EINTR] * 2
    assert vcpu.statistics().instructions == 0
    assert vcpu.exit_reason == 0
    vcpu.clear_kick()
    assert (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_IO)


def test_kick_takes_a_spinning_vcpu_out(vm: FakeVm) -> None:
    """A busy guest stays inside until it is kicked, and again after that."""
    vcpu = vcpu_with(vm, Spin())
    for _ in range(2):
        runner = Runner(vcpu)
        vcpu.wait_for(lambda statistics: statistics.blocked)
        assert vm.inside == {0}
        vcpu.kick()
        assert runner.wait() == errno.EINTR
        assert vm.inside == frozenset()
        assert vcpu.exit_reason == 10
        vcpu.clear_kick()
    statistics = vcpu.statistics()
    assert (statistics.runs, statistics.eintrs, statistics.kicks) == (2, 2, 2)
    assert statistics.instructions == 0


def test_spin_that_ends(vm: FakeVm) -> None:
    """After its kicks a spin is over, and the next run goes on behind it."""
    vcpu = vcpu_with(vm, Spin(kicks=2), Out(1, 1, 1))
    for _ in range(2):
        runner = Runner(vcpu)
        vcpu.wait_for(lambda statistics: statistics.blocked)
        vcpu.kick()
        assert runner.wait() == errno.EINTR
        vcpu.clear_kick()
    assert (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_IO)


def test_lost_signal_needs_a_second_kick(vm: FakeVm) -> None:
    """B2: immediate_exit alone does not take out a vCPU whose signal was lost."""
    vcpu = vcpu_with(vm, LoseSignals(2), Spin())
    runner = Runner(vcpu)
    vcpu.wait_for(lambda statistics: statistics.blocked)
    for lost in (1, 2):
        vcpu.kick()
        statistics = vcpu.wait_for(lambda statistics, n=lost: statistics.signals_lost == n)  # type: ignore[misc]
        assert statistics.inside
    vcpu.kick()
    assert runner.wait() == errno.EINTR


def test_deaf_vcpu_honours_the_kick_afterwards(vm: FakeVm) -> None:
    """B8: an uninterruptible vCPU stays inside; the pending kick is honoured when it ends."""
    until = threading.Event()
    vcpu = vcpu_with(vm, Deaf(until), Out(1, 1, 1))
    runner = Runner(vcpu)
    vcpu.wait_for(lambda statistics: statistics.blocked)
    vcpu.kick()
    with pytest.raises(TimeoutError, match="inside KVM_RUN"):
        vcpu.wait_for(lambda statistics: not statistics.inside, timeout=0.02)
    until.set()
    assert runner.wait() == errno.EINTR
    assert vcpu.statistics().instructions == 1


def test_a_signal_does_not_outlive_its_run(vm: FakeVm) -> None:
    """A kick that came when the thread was leaving is forgotten with clear_kick()."""
    vcpu = vcpu_with(vm, Out(1, 1, 1), Out(1, 1, 1))
    assert vcpu.run() == 0
    vcpu.kick()
    vcpu.clear_kick()
    assert vcpu.run() == 0


def test_second_thread_gets_ebusy(vm: FakeVm) -> None:
    """One thread is inside a vCPU; a second one is turned away, as by VcpuFd."""
    vcpu = vcpu_with(vm, Spin())
    runner = Runner(vcpu)
    vcpu.wait_inside()
    assert vcpu.run() == errno.EBUSY
    vcpu.kick()
    assert runner.wait() == errno.EINTR


def test_register_access_waits_for_the_vcpu(vm: FakeVm) -> None:
    """KVM_GET_REGS waits, like every vCPU ioctl, until nobody is inside."""
    vcpu = vcpu_with(vm, Spin())
    runner = Runner(vcpu)
    vcpu.wait_inside()
    reader = threading.Thread(target=vcpu.get_regs, daemon=True)
    reader.start()
    reader.join(0.02)
    assert reader.is_alive()
    vcpu.kick()
    assert runner.wait() == errno.EINTR
    reader.join(TIMEOUT)
    assert not reader.is_alive()


def test_script_sees_its_own_registers(vm: FakeVm) -> None:
    """A guest can look at the registers that it was started with."""
    seen = []

    def guest() -> GuestScript:
        seen.append(vcpu.get_regs()["rip"])
        yield Halt()

    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    assert vcpu.run() == 0
    assert seen == [0xFFF0]


def test_48_vcpus_run_and_stop() -> None:
    """Many vCPUs are inside at once, and all come out when kicked."""
    vm = FakeKvm(script=lambda vcpu_id: [Spin()]).create_vm()
    vcpus = [vm.create_vcpu(vcpu_id) for vcpu_id in range(48)]
    runners = [Runner(vcpu) for vcpu in vcpus]
    for vcpu in vcpus:
        vcpu.wait_inside()
    assert vm.inside == set(range(48))
    for vcpu in vcpus:
        vcpu.kick()
    assert [runner.wait() for runner in runners] == [errno.EINTR] * 48
