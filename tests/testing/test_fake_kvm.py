"""FakeKvm: holes, steps, hooks, the log, injected failures, the kick ioctls, handles."""

from __future__ import annotations

import errno
import threading

import pytest

from memlistener.kvm import backend
from memlistener.kvm.backend import KvmBackend, VcpuHandle, VmHandle
from memlistener.kvm.exits import (
    Hlt,
)
from memlistener.testing.fake_ioctls import Ioctl
from memlistener.testing.fake_kvm import FakeKvm, FakeVm
from memlistener.testing.guest_script import (
    Deaf,
    GuestScript,
    In,
    LoseSignals,
    Out,
    Read,
    Spin,
    Write,
)

from .fakes import PAGE, SLOT_IOCTL, TIMEOUT, HostMemory, Runner, errno_of, vcpu_with

# Holes, hooks, steps, the log.


def test_hole_between_delete_and_create(fake: FakeKvm, vm: FakeVm, ram: HostMemory) -> None:
    """A vCPU that steps between two ioctls of a replacement finds a hole; outside, it does not."""
    vm.set_user_memory_region(0, 0, 0, 2 * PAGE, ram.address)

    def reader() -> GuestScript:
        while True:
            yield Read(0x1000, 4)

    vcpu = vm.create_vcpu(0)
    vcpu.load(reader())
    vcpu.stepping = True
    runner = Runner(vcpu)
    vcpu.step(3)
    assert vcpu.statistics().mmio_exits == 0
    fake.on_ioctl = lambda ioctl: vcpu.step()
    vm.set_user_memory_region(0, 0, 0, 0, 0)
    fake.on_ioctl = None
    vm.set_user_memory_region(0, 0, 0, PAGE, ram.address)
    vm.set_user_memory_region(1, 0, PAGE, PAGE, ram.address + PAGE)
    assert runner.wait() == 0
    assert vcpu.mmio()[:3] == (0x1000, 4, False)
    assert vcpu.statistics().mmio_exits == 1


def test_concurrent_guest_sees_holes(vm: FakeVm, ram: HostMemory) -> None:
    """Without a bracket a vCPU that runs freely sees them too, sooner or later."""
    stop = threading.Event()

    def guest() -> GuestScript:
        while not stop.is_set():
            yield Read(0x1000, 4)

    def run() -> None:
        while vcpu.run() == 0 and vcpu.exit_reason == backend.EXIT_MMIO:
            vcpu.complete_mmio(b"\xff" * 4)
            holes.set()

    holes = threading.Event()
    vcpu = vm.create_vcpu(0)
    vcpu.load(guest())
    vm.set_user_memory_region(0, 0, 0, 2 * PAGE, ram.address)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for _ in range(20_000):
        vm.set_user_memory_region(0, 0, 0, 0, 0)
        vm.set_user_memory_region(0, 0, 0, 2 * PAGE, ram.address)
        if holes.is_set():
            break
    stop.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert holes.is_set()


def test_step_needs_stepping_and_a_thread(vm: FakeVm) -> None:
    """step() says what is wrong; a step that timed out is not taken later."""
    vcpu = vcpu_with(vm, Read(0, 1))
    with pytest.raises(RuntimeError, match="not stepping"):
        vcpu.step()
    vcpu.stepping = True
    with pytest.raises(TimeoutError, match="outside KVM_RUN> did not take a step"):
        vcpu.step(timeout=0.01)
    runner = Runner(vcpu)
    vcpu.wait_for(lambda statistics: statistics.blocked)
    assert vcpu.statistics().instructions == 0
    vcpu.stepping = False
    assert runner.wait() == 0


def test_step_into_waiting_and_kick_while_stepping(vm: FakeVm) -> None:
    """A step into a spin is over when it spins; a vCPU that waits for a step can be kicked."""
    vcpu = vcpu_with(vm, Spin(kicks=1), Spin())
    vcpu.stepping = True
    for _ in range(2):
        runner = Runner(vcpu)
        vcpu.step()
        vcpu.kick()
        assert runner.wait() == errno.EINTR
        vcpu.clear_kick()
    runner = Runner(vcpu)
    vcpu.wait_for(lambda statistics: statistics.blocked)
    vcpu.kick()
    assert runner.wait() == errno.EINTR


def test_log(fake: FakeKvm, vm: FakeVm) -> None:
    """The log has every ioctl with its arguments and outcome, and who was inside."""
    vcpu = vcpu_with(vm, Spin())
    runner = Runner(vcpu)
    vcpu.wait_inside()
    vm.set_user_memory_region(5, 0, 0x1000, PAGE, 0)
    assert errno_of(lambda: vm.set_user_memory_region(6, 0, 0x1000, PAGE, 0)) == errno.EEXIST
    vcpu.kick()
    runner.wait()
    vm.set_user_memory_region(5, 0, 0, 0, 0)

    assert [(i.name, i.vm, i.vcpu, i.result, i.errno) for i in fake.log] == [
        ("KVM_CREATE_VM", None, None, 0, 0),
        ("KVM_CREATE_VCPU", 0, None, 0, 0),
        (SLOT_IOCTL, 0, None, None, 0),
        (SLOT_IOCTL, 0, None, None, errno.EEXIST),
        ("KVM_RUN", 0, 0, 10, errno.EINTR),
        (SLOT_IOCTL, 0, None, None, 0),
    ]
    assert vm.ioctls == fake.log[1:]
    slots = [ioctl for ioctl in fake.log if ioctl.name == SLOT_IOCTL]
    assert [ioctl.inside for ioctl in slots] == [{0}, {0}, frozenset()]
    run = next(ioctl for ioctl in fake.log if ioctl.name == "KVM_RUN")
    assert run.began < slots[0].began < slots[0].ended < run.ended < slots[2].began
    assert slots[0].args["guest_phys_addr"] == 0x1000
    assert str(slots[1]) == (
        f"vm 0: {SLOT_IOCTL}(slot=0x6, flags=0x0, guest_phys_addr=0x1000, memory_size=0x1000, "
        "userspace_addr=0x0) = File exists with vCPUs [0] inside KVM_RUN"
    )


def test_log_limit() -> None:
    """A log with a limit keeps the newest, and one of 0 nothing."""
    for limit, kept in ((2, [1, 2]), (0, [])):
        fake = FakeKvm(log_limit=limit)
        for cap in range(3):
            fake.check_extension(cap)
        assert [ioctl.args["cap"] for ioctl in fake.log] == kept


def test_on_ioctl(fake: FakeKvm, vm: FakeVm) -> None:
    """The hook is called after the effect, without locks, for failures too; it may raise."""
    seen: list[tuple[Ioctl, int]] = []
    fake.on_ioctl = lambda ioctl: seen.append((ioctl, len(vm.memslots)))
    vm.set_user_memory_region(0, 0, 0, PAGE, 0)
    assert errno_of(lambda: vm.set_user_memory_region(1, 0, 0, PAGE, 0)) == errno.EEXIST
    vcpu_with(vm).run()  # KVM_RUN is not among them
    assert [(ioctl.name, ioctl.errno, slots) for ioctl, slots in seen] == [
        (SLOT_IOCTL, 0, 1),
        (SLOT_IOCTL, errno.EEXIST, 1),
        ("KVM_CREATE_VCPU", 0, 1),
    ]

    def hook(ioctl: Ioctl) -> None:
        raise LookupError(ioctl.name)

    fake.on_ioctl = hook
    with pytest.raises(LookupError, match=SLOT_IOCTL):
        vm.set_user_memory_region(0, 0, 0, 0, 0)
    assert vm.memslots == ()


def test_injected_failures(fake: FakeKvm, vm: FakeVm) -> None:
    """The n-th ioctl from now fails, once, without effect; others are not counted."""
    vm.set_user_memory_region(9, 0, 0x9000, PAGE, 0)
    fake.fail(SLOT_IOCTL, nth=2, errno=errno.ENOMEM)
    fake.fail(SLOT_IOCTL, nth=4)
    answers = []
    for slot in range(5):
        vm.check_extension(0)
        answers.append(
            errno_of(lambda: vm.set_user_memory_region(slot, 0, slot * PAGE, PAGE, 0))  # noqa: B023
        )
    assert answers == [0, errno.ENOMEM, 0, errno.ENOSPC, 0]
    assert [slot.slot for slot in vm.memslots] == [0, 2, 4, 9]
    assert fake.pending_failures() == 0


def test_injected_run_failure(fake: FakeKvm, vm: FakeVm) -> None:
    """KVM_RUN can fail too: run() returns the errno and has executed nothing."""
    vcpu = vcpu_with(vm, Out(1, 1, 1))
    fake.fail("KVM_RUN", errno=errno.EFAULT)
    assert vcpu.run() == errno.EFAULT
    assert vcpu.statistics().instructions == 0
    assert vcpu.run() == 0


def test_fail_checks_its_arguments(fake: FakeKvm) -> None:
    """A failure that could never come up is refused."""
    with pytest.raises(ValueError, match="'KVM_FLY' is none of"):
        fake.fail("KVM_FLY")
    with pytest.raises(ValueError, match="nth=0"):
        fake.fail("KVM_RUN", nth=0)
    with pytest.raises(ValueError, match="not 0"):
        fake.fail("KVM_RUN", errno=0)


# The kick ioctls.


def test_kick_ioctls_without_vcpus() -> None:
    """Both answer 0 where there is nobody to kick."""
    vm = FakeKvm(kick_ioctls=True).create_vm()
    vm.kick_all_running_vcpus()
    vm.resume_all_kicked_vcpus()
    assert [ioctl.errno for ioctl in vm.ioctls] == [0, 0]


def test_kick_ioctl_returns_when_all_are_out() -> None:
    """B15: after it nobody is inside; entries spin on EINTR until the resume."""
    vm = FakeKvm(kick_ioctls=True, script=lambda vcpu_id: [LoseSignals(9), Spin()]).create_vm()
    vcpus = [vm.create_vcpu(vcpu_id) for vcpu_id in range(3)]
    runners = [Runner(vcpu) for vcpu in vcpus]
    for vcpu in vcpus:
        vcpu.wait_for(lambda statistics: statistics.blocked)
    vm.kick_all_running_vcpus()
    assert vm.inside == frozenset()
    assert [runner.wait() for runner in runners] == [errno.EINTR] * 3
    assert vm.ioctls[-1].inside == frozenset()

    assert [vcpus[0].run() for _ in range(4)] == [errno.EINTR] * 4
    assert vcpus[0].statistics().spins == 4
    vm.resume_all_kicked_vcpus()
    runner = Runner(vcpus[0])
    vcpus[0].wait_for(lambda statistics: statistics.blocked)
    vm.kick_all_running_vcpus()
    assert runner.wait() == errno.EINTR
    assert vcpus[0].statistics().spins == 4


def test_pending_exit_completes_while_kicked() -> None:
    """The spin between kick and resume completes a pending exit, as immediate_exit does."""
    vm = FakeKvm(kick_ioctls=True).create_vm()
    vcpu = vcpu_with(vm, In(1, 1))
    assert vcpu.run() == 0
    vcpu.complete_io(b"x")
    vm.kick_all_running_vcpus()
    assert vcpu.run() == errno.EINTR
    assert vcpu.statistics().instructions == 1


def test_kick_ioctl_waits_for_a_deaf_vcpu() -> None:
    """The ioctl lasts as long as a vCPU stays inside."""
    until = threading.Event()
    vm = FakeKvm(kick_ioctls=True, script=lambda vcpu_id: [Deaf(until)]).create_vm()
    vcpu = vm.create_vcpu(0)
    runner = Runner(vcpu)
    vcpu.wait_for(lambda statistics: statistics.blocked)
    kick = threading.Thread(target=vm.kick_all_running_vcpus, daemon=True)
    kick.start()
    kick.join(0.02)
    assert kick.is_alive()
    until.set()
    kick.join(TIMEOUT)
    assert not kick.is_alive()
    assert runner.wait() == errno.EINTR


@pytest.mark.parametrize("waits", [False, True])
def test_kick_ioctl_and_other_vms(waits: bool) -> None:
    """The habit of that kernel: foreign vCPUs are not kicked, but waited for."""
    fake = FakeKvm(
        kick_ioctls=True, kick_waits_for_other_vms=waits, script=lambda vcpu_id: [Spin()]
    )
    vm, other = fake.create_vm(), fake.create_vm()
    foreign = other.create_vcpu(0)
    runner = Runner(foreign)
    foreign.wait_for(lambda statistics: statistics.blocked)
    kick = threading.Thread(target=vm.kick_all_running_vcpus, daemon=True)
    kick.start()
    kick.join(0.05 if waits else TIMEOUT)
    assert kick.is_alive() is waits
    assert other.inside == {0}
    foreign.kick()
    assert runner.wait() == errno.EINTR
    kick.join(TIMEOUT)
    assert not kick.is_alive()


# Handles.


def test_closed_handles(fake: FakeKvm, vm: FakeVm) -> None:
    """close() is idempotent; everything answers EBADF behind it, but a kick does no harm."""
    vcpu = vcpu_with(vm)
    for handle in (vcpu, vm, fake):
        handle.close()
        handle.close()
    assert vcpu.run() == errno.EBADF
    vcpu.kick()
    for call in (
        vcpu.clear_kick,
        vcpu.mmio,
        vcpu.io,
        vcpu.terminal_exit,
        vcpu.get_regs,
        vcpu.get_sregs,
        lambda: vcpu.exit_reason,
        lambda: vcpu.complete_mmio(b""),
        lambda: vcpu.complete_io(b""),
        lambda: vm.check_extension(0),
        lambda: vm.set_user_memory_region(0, 0, 0, PAGE, 0),
        lambda: vm.create_vcpu(0),
        lambda: vm.get_dirty_log(0, 1),
        vm.kick_all_running_vcpus,
        vm.resume_all_kicked_vcpus,
        fake.create_vm,
        lambda: fake.check_extension(0),
    ):
        assert errno_of(call) == errno.EBADF


def test_handles_close_in_any_order(fake: FakeKvm, vm: FakeVm, ram: HostMemory) -> None:
    """A vCPU goes on with its memory when the VM and /dev/kvm are closed."""
    vm.set_user_memory_region(0, 0, 0, PAGE, ram.address)
    vcpu = vcpu_with(vm, Write(0, 1, 7))
    fake.close()
    vm.close()
    assert (vcpu.run(), vcpu.terminal_exit()) == (0, Hlt())
    assert ram.bytes[0] == 7


def test_too_many_vcpus() -> None:
    """A VM has at most max_vcpus of them."""
    vm = FakeKvm(max_vcpus=2).create_vm()
    vm.create_vcpu(1)
    assert errno_of(lambda: vm.create_vcpu(2)) == errno.EINVAL
    vm.create_vcpu(0)
    assert [vcpu.vcpu_id for vcpu in vm.vcpus] == [1, 0]


def test_protocols() -> None:
    """The fake is held against the protocols by mypy here; at run time, the names are there."""
    kvm: KvmBackend = FakeKvm()
    vm: VmHandle = kvm.create_vm()
    vcpu: VcpuHandle = vm.create_vcpu(0)
    for protocol, handle in ((KvmBackend, kvm), (VmHandle, vm), (VcpuHandle, vcpu)):
        missing = {name for name in vars(protocol) if name[0] != "_"} - set(dir(handle))
        assert missing == set()
