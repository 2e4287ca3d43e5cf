"""The bus of FakeKvm, against the real kernel and by itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.errors import KvmError
from memlistener.kvm import backend, x86
from memlistener.kvm.backend import KvmBackend, VmHandle
from memlistener.testing import FakeIoEventFd, FakeKvm, FakeVm, FakeZone, Out, Write
from memlistener.testing.fake_bus import MAX_ZONES, RING_CAPACITY

from .fakes import errno_of, vcpu_with


class Eventfds:
    """Two eventfds, a second descriptor of the first, and what is no eventfd."""

    def __init__(self) -> None:
        self.one, self.two = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.again = os.dup(self.one)
        self.pipe = os.pipe()
        self.by_name = {
            "one": self.one,
            "two": self.two,
            "again": self.again,
            "pipe": self.pipe[0],
            "closed": 1 << 20,
        }

    def close(self) -> None:
        for fd in (self.one, self.two, self.again, *self.pipe):
            os.close(fd)

    def counts(self) -> tuple[int, int]:
        """How often each was signalled since the last time."""
        return _count(self.one), _count(self.two)


def _count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds are Linux's")


@pytest.fixture
def fds() -> Iterator[Eventfds]:
    found = Eventfds()
    yield found
    found.close()


@attrs.frozen
class Request:
    """One ioctl on the bus."""

    what: str
    addr: int
    size: int
    pio: bool
    fd: str = "one"
    datamatch: int | None = None

    def make(self, vm: VmHandle, fds: Eventfds) -> int:
        """Its errno."""
        if self.what == "register":
            return errno_of(lambda: vm.register_coalesced_mmio(self.addr, self.size, self.pio))
        if self.what == "unregister":
            return errno_of(lambda: vm.unregister_coalesced_mmio(self.addr, self.size, self.pio))
        return errno_of(
            lambda: vm.ioeventfd(
                self.addr,
                self.size,
                fds.by_name[self.fd],
                datamatch=self.datamatch,
                pio=self.pio,
                deassign=self.what == "deassign",
            )
        )


eventfd_requests = st.builds(
    Request,
    st.sampled_from(["assign", "assign", "assign", "deassign"]),
    st.sampled_from([0x1000, 0x1000, 0x1000, 0x1004, 2**64 - 4, 2**64 - 1]),
    st.sampled_from([0, 1, 2, 4, 4, 4, 8, 3, 2**32 - 1]),
    st.booleans(),
    st.sampled_from(["one", "one", "two", "again", "pipe", "closed"]),
    st.sampled_from([None, None, 0, 5, 2**64 - 1]),
)


@pytest.mark.kvm
@given(st.lists(eventfd_requests, max_size=40))
def test_ioeventfds_like_the_kernel(requests: list[Request]) -> None:
    """Random sequences have the same errnos, one by one, on both kernels."""
    from memlistener.kvm.fds import Kvm

    fds = Eventfds()
    fake = FakeKvm().create_vm()
    try:
        with Kvm.open() as kvm, kvm.create_vm() as real:
            for number, request in enumerate(requests):
                answers = request.make(fake, fds), request.make(real, fds)
                assert answers[0] == answers[1], (number, request)
    finally:
        fake.close()
        fds.close()


WINDOW = 0x40
BASE = 0x100000

zones = st.integers(0, 12).flatmap(
    lambda start: st.tuples(st.just(start * 4), st.sampled_from([0, 1, 4, 8, 16, WINDOW]))
)
bus_requests = st.one_of(
    st.builds(
        lambda what, zone, pio: Request(what, zone[0], zone[1], pio),
        st.sampled_from(["register", "register", "unregister"]),
        zones,
        st.booleans(),
    ),
    st.builds(
        Request,
        st.sampled_from(["assign", "assign", "deassign"]),
        st.integers(0, 15).map(lambda n: n * 4),
        st.sampled_from([0, 1, 2, 4, 8]),
        st.booleans(),
        st.sampled_from(["one", "two"]),
        st.sampled_from([None, 0x11]),
    ),
)
probes = st.lists(
    st.tuples(st.integers(0, WINDOW - 8), st.sampled_from([1, 2, 4]), st.booleans()),
    min_size=1,
    max_size=12,
)


@pytest.mark.kvm
@given(st.lists(bus_requests, max_size=12), probes)
def test_writes_like_the_kernel(
    requests: list[Request], writes: list[tuple[int, int, bool]]
) -> None:
    """What becomes of a guest's write: signal, ring or exit, also where zones nest."""
    from tests.kvm.machine import Machine

    fds = Eventfds()
    fake = FakeKvm().create_vm()
    program = [
        Out(addr, size, value=0x11) if pio else Write(BASE + addr, size, 0x11)
        for addr, size, pio in writes
    ]
    vcpu = vcpu_with(fake, *program)
    try:
        with Machine() as machine:
            machine.write(0x1000, real_mode_code(program))
            x86.real_mode(machine.vcpu, 0x1000)
            sregs = machine.vcpu.get_sregs()
            sregs["ds"]["base"] = BASE  # out of RAM
            machine.vcpu.set_sregs(sregs)
            for request in requests:
                placed = request if request.pio else attrs.evolve(request, addr=BASE + request.addr)
                assert placed.make(fake, fds) == placed.make(machine.vm, fds), request
            told = [run_to_halt(fake, vcpu, fds), run_to_halt(machine.vm, machine.vcpu, fds)]
            assert told[0] == told[1]
    finally:
        fake.close()
        fds.close()


def real_mode_code(program: list[Out | Write]) -> bytes:
    """Code: mov dx, port; mov al/ax/eax, value; out  or  mov [offset], value  ...; hlt."""
    code = bytearray()
    for each in program:
        prefix = b"\x66" if each.size == 4 else b""
        value = each.value.to_bytes(each.size, "little")
        move, out, store = (
            (b"\xb0", b"\xee", b"\xc6") if each.size == 1 else (b"\xb8", b"\xef", b"\xc7")
        )
        if isinstance(each, Out):
            code += b"\xba" + each.port.to_bytes(2, "little") + prefix + move + value + prefix + out
        else:
            code += prefix + store + b"\x06" + (each.addr - BASE).to_bytes(2, "little") + value
    return bytes(code + b"\xf4")


def run_to_halt(
    vm: VmHandle, vcpu: backend.VcpuHandle, fds: Eventfds
) -> list[tuple[object, tuple[int, int], list[tuple[int, bytes, bool]]]]:
    """All exits up to HLT, each with what had come without an exit before it."""
    found = []
    for _ in range(100):
        assert vcpu.run() == 0
        if vcpu.exit_reason == backend.EXIT_MMIO:
            exit: object = vcpu.mmio()
        elif vcpu.exit_reason == backend.EXIT_IO:
            exit = vcpu.io()
        else:
            exit = vcpu.terminal_exit()
        found.append((exit, fds.counts(), vm.take_coalesced()))
        if vcpu.exit_reason not in (backend.EXIT_MMIO, backend.EXIT_IO):
            return found
    raise AssertionError("the guest does not halt")


def test_unregistering_takes_all_around(kernel: KvmBackend, fds: Eventfds) -> None:
    """Every zone that contains the range goes, those inside it stay: by the room they leave."""
    vm = kernel.create_vm()
    try:
        for start in range(MAX_ZONES - 2):
            vm.register_coalesced_mmio(0x100000 + start * 16, 16, False)
        vm.register_coalesced_mmio(0x1000, 0x1000, False)
        vm.register_coalesced_mmio(0x1800, 0x10, False)
        assert errno_of(lambda: vm.register_coalesced_mmio(0, 1, False)) == errno.ENOSPC
        vm.register_coalesced_mmio(0, 1, True)  # the other bus has room
        assert errno_of(lambda: vm.ioeventfd(0x2000, 4, fds.one)) == errno.ENOSPC
        vm.unregister_coalesced_mmio(0x1000, 0x1001, False)  # in no zone
        assert errno_of(lambda: vm.register_coalesced_mmio(0, 1, False)) == errno.ENOSPC
        vm.unregister_coalesced_mmio(0x1800, 0x10, False)  # in two
        vm.register_coalesced_mmio(0, 1, False)
        vm.ioeventfd(0x2000, 4, fds.one)  # which takes no room
        vm.register_coalesced_mmio(0, 1, False)
        assert errno_of(lambda: vm.register_coalesced_mmio(0, 1, False)) == errno.ENOSPC
    finally:
        vm.close()


def test_what_is_there(vm: FakeVm, fds: Eventfds) -> None:
    """A test can see what is on the bus; closing the VM lets go of the eventfds."""
    open_before = len(os.listdir("/proc/self/fd"))
    vm.ioeventfd(0x1000, 4, fds.one, datamatch=7)
    vm.ioeventfd(0x10, 0, fds.two, pio=True)
    vm.register_coalesced_mmio(0x2000, 0x10, False)
    assert [(each.addr, each.size, each.datamatch, each.pio) for each in vm.ioeventfds] == [
        (0x1000, 4, 7, False),
        (0x10, 0, None, True),
    ]
    assert isinstance(vm.ioeventfds[0], FakeIoEventFd)
    assert vm.coalesced_zones == (FakeZone(0x2000, 0x10, False),)
    vm.close()
    assert [*vm.ioeventfds, *vm.coalesced_zones] == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_the_eventfd_outlives_its_descriptor(vm: FakeVm) -> None:
    """As in the kernel, an ioeventfd needs no open descriptor to be signalled."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    other = os.dup(fd)
    vm.ioeventfd(0x1000, 1, fd)
    os.close(fd)
    vcpu = vcpu_with(vm, Write(0x1000, 1, 0))
    assert vcpu.run() == 0
    assert _count(other) == 1
    os.close(other)
    vm.close()


def test_a_full_ring_exits(vm: FakeVm) -> None:
    """169 writes fit, the next one exits."""
    vm.register_coalesced_mmio(0x1000, 0x10, False)
    vcpu = vcpu_with(vm, *[Write(0x1000, 4, n) for n in range(RING_CAPACITY + 1)])
    assert not vm.coalesced_pending()
    assert vcpu.run() == 0
    assert vm.coalesced_pending()
    assert vcpu.mmio() == (0x1000, 4, True, RING_CAPACITY.to_bytes(4, "little"))
    taken = vm.take_coalesced()
    assert [int.from_bytes(data, "little") for _, data, _ in taken] == list(range(RING_CAPACITY))
    assert not vm.coalesced_pending()


def test_parts_of_an_access(vm: FakeVm) -> None:
    """The parts of a wide write go to the bus until one is refused; those behind it exit."""
    vm.register_coalesced_mmio(0x1000, 8, False)
    vm.register_coalesced_mmio(0x1010, 8, False)
    vcpu = vcpu_with(vm, Write(0x1000, 24, 0))
    assert vcpu.run() == 0
    assert vcpu.mmio()[:2] == (0x1008, 8)
    assert vcpu.run() == 0
    assert vcpu.mmio()[:2] == (0x1010, 8)
    assert [addr for addr, _, _ in vm.take_coalesced()] == [0x1000]


def test_parts_of_an_out(vm: FakeVm) -> None:
    """A string OUT goes where its first access goes."""
    vm.register_coalesced_mmio(0x10, 1, True)
    vcpu = vcpu_with(vm, Out(0x10, 1, count=3, value=0x030201))
    assert vcpu.run() == 0
    assert vcpu.statistics().pio_exits == 0
    assert vm.take_coalesced() == [(0x10, bytes([n]), True) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("cap", "number"),
    [
        (backend.CAP_IOEVENTFD, errno.ENOTTY),
        (backend.CAP_IOEVENTFD_NO_LENGTH, errno.EINVAL),
        (backend.CAP_COALESCED_MMIO, errno.ENOTTY),
        (backend.CAP_COALESCED_PIO, errno.ENOTTY),
    ],
)
def test_kernels_that_lack_it(cap: int, number: int, fds: Eventfds) -> None:
    """What a capability stands for is refused without it."""
    vm = FakeKvm(capabilities={cap: 0}).create_vm()
    answers = {
        backend.CAP_IOEVENTFD: errno_of(lambda: vm.ioeventfd(0, 4, fds.one)),
        backend.CAP_IOEVENTFD_NO_LENGTH: errno_of(lambda: vm.ioeventfd(8, 0, fds.one)),
        backend.CAP_COALESCED_MMIO: errno_of(lambda: vm.register_coalesced_mmio(0, 4, False)),
        backend.CAP_COALESCED_PIO: errno_of(lambda: vm.register_coalesced_mmio(0, 4, True)),
    }
    assert answers.pop(cap) == number
    answers.pop(backend.CAP_IOEVENTFD_NO_LENGTH, None)  # which ioeventfds rest on
    assert set(answers.values()) == {0} or cap == backend.CAP_IOEVENTFD
    vm.close()


def test_fields(vm: FakeVm) -> None:
    """What does not fit into its field is refused before there is an ioctl."""
    with pytest.raises(OverflowError):
        vm.ioeventfd(1 << 64, 4, 0)
    with pytest.raises(OverflowError):
        vm.register_coalesced_mmio(0, 1 << 32, False)
    assert vm.ioctls == ()


def test_failures_can_be_played(fake: FakeKvm, vm: FakeVm, fds: Eventfds) -> None:
    """The n-th of each ioctl can be made to fail, without effect."""
    fake.fail("KVM_IOEVENTFD", errno=errno.ENOMEM)
    fake.fail("KVM_REGISTER_COALESCED_MMIO")
    with pytest.raises(KvmError) as caught:
        vm.ioeventfd(0, 4, fds.one)
    assert caught.value.errno == errno.ENOMEM
    assert errno_of(lambda: vm.register_coalesced_mmio(0, 4, False)) == errno.ENOSPC
    assert (vm.ioeventfds, vm.coalesced_zones) == ((), ())
