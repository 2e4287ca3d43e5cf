"""Memslots of FakeKvm, against a naive model and against the real kernel."""

from __future__ import annotations

import contextlib
import errno

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.kvm import backend
from memlistener.kvm.backend import KvmBackend, VmHandle
from memlistener.testing.fake_kvm import FakeKvm, FakeVm
from memlistener.testing.fake_memslots import FakeMemslot, MemslotTable
from memlistener.testing.guest_script import (
    Read,
    Write,
)

from .fakes import PAGE, HostMemory, errno_of, vcpu_with

# Memslots.

SlotRequest = tuple[int, int, int, int, int]

# Each builds on those before it: (slot, flags, gpa, size, hva), errno.
SLOT_REQUESTS: list[tuple[SlotRequest, int]] = [
    ((0, 0, 0, 2 * PAGE, 0), 0),
    ((0, 0, 0, 2 * PAGE, 0), 0),  # nothing to change
    ((0, 0, 0, 3 * PAGE, 0), errno.EINVAL),  # a resize
    ((0, 0, 0, 2 * PAGE, PAGE), errno.EINVAL),  # other host memory
    ((0, 2, 0, 2 * PAGE, 0), errno.EINVAL),  # READONLY in place
    ((0, 1, 0, 2 * PAGE, 0), 0),  # flags only
    ((0, 1, PAGE, 2 * PAGE, 0), 0),  # a move onto a part of itself
    ((1, 0, 2 * PAGE, PAGE, 0), errno.EEXIST),
    ((1, 0, 0, 2 * PAGE, 0), errno.EEXIST),
    ((1, 0, 0, PAGE, 0), 0),
    ((1, 0, PAGE, PAGE, 0), errno.EEXIST),  # a move onto another
    ((2, 0, 0, 0, 0), errno.EINVAL),  # a deletion of what is not there
    ((1, 0, 1, 0, 0), errno.EINVAL),  # deletions are checked like anything else
    ((1, 0, 0, 0, 1), errno.EINVAL),
    ((1, 8, 0, 0, 0), errno.EINVAL),
    ((1, 0, 2**64 - PAGE, 0, 0), 0),
    ((2, 0, 1, PAGE, 0), errno.EINVAL),
    ((2, 0, 0x10000, PAGE + 1, 0), errno.EINVAL),
    ((2, 0, 0x10000, PAGE, 1), errno.EINVAL),
    ((2, 8, 0x10000, PAGE, 0), errno.EINVAL),
    ((32763, 0, 0x10000, PAGE, 0), 0),
    ((32764, 0, 0x20000, PAGE, 0), errno.EINVAL),  # the limit
    ((0x10002, 0, 0x20000, PAGE, 0), errno.EINVAL),  # there is one address space
    ((2, 0, 2**64 - PAGE, PAGE, 0), errno.EINVAL),  # the sum wraps to 0
    ((2, 0, 2**52, PAGE, 0), errno.EINVAL),  # beyond physical addresses
    ((2, 0, 0x20000, PAGE, 2**47), errno.EINVAL),  # beyond user space
    ((2, 0, 2**44, 2**43, 0), errno.EINVAL),  # KVM_MEM_MAX_NR_PAGES and one
]


def test_memslot_errnos(kernel: KvmBackend) -> None:
    """The kernel's refusals, one by one, have the same errno on both kernels."""
    if kernel.check_extension(backend.CAP_NR_MEMSLOTS) != 32764:
        pytest.skip("this kernel has another number of memslots")
    vm = kernel.create_vm()
    try:
        answers = [
            (request, errno_of(lambda: vm.set_user_memory_region(*request)))  # noqa: B023
            for request, _ in SLOT_REQUESTS
        ]
    finally:
        vm.close()
    assert answers == SLOT_REQUESTS


def pages(limit: int) -> st.SearchStrategy[int]:
    return st.integers(0, limit).map(lambda page: page * PAGE)


slot_requests = st.tuples(
    st.sampled_from([0, 1, 2, 3, 3, 32763, 32764, 0xFFFF, 0x10000]),
    st.sampled_from([0, 0, 0, 1, 2, 3, 8]),
    pages(12) | st.sampled_from([1, 2**51, 2**52 - PAGE, 2**52, 2**64 - PAGE]),
    pages(5) | st.sampled_from([0, 0, PAGE + 1, 2**51]),
    st.sampled_from([0, 0, 0, 0x100000, 0x800]),
)


class NaiveSlots:
    """The rules of the manual, with nothing sorted and everything compared."""

    def __init__(self) -> None:
        self.slots: dict[int, SlotRequest] = {}

    def update(self, request: SlotRequest) -> int:
        slot, flags, start, size, host = request
        if flags > 3 or start % PAGE or size % PAGE or host % PAGE or slot >= 32764:
            return errno.EINVAL
        if start + size >= 2**64 or size > 2**43 - PAGE:
            return errno.EINVAL
        old = self.slots.get(slot)
        if not size:
            return 0 if self.slots.pop(slot, None) else errno.EINVAL
        if old and (old[3] != size or old[4] != host or (old[1] ^ flags) & 2):
            return errno.EINVAL
        if not old or old[2] != start:
            for other in self.slots.values():
                if other[0] != slot and start < other[2] + other[3] and other[2] < start + size:
                    return errno.EEXIST
            if start + size > 2**52:
                return errno.EINVAL
        self.slots[slot] = request
        return 0


@given(requests=st.lists(slot_requests, max_size=30))
def test_memslots_against_a_naive_model(requests: list[SlotRequest]) -> None:
    """Any sequence of requests gives the errnos and the slots of the model."""
    model = NaiveSlots()
    table = MemslotTable(limit=32764, address_spaces=1, readonly_offered=True, physical_bits=52)
    for request in requests:
        assert errno_of(lambda: table.update(FakeMemslot(*request))) == model.update(request)  # noqa: B023
        table.check()
        assert {slot.slot: attrs.astuple(slot) for slot in table.slots()} == model.slots


clear_requests = st.tuples(
    st.sampled_from([0, 1, 2, 3, 32764]),
    st.sampled_from([0, 0, 64, 1, 128]),
    st.sampled_from([0, 1, 2, 3, 5, 63, 64, 65]),
)


@pytest.mark.kvm
@given(
    requests=st.lists(slot_requests, max_size=20),
    cleared=st.lists(clear_requests, min_size=20, max_size=20),
    log=st.sampled_from(["bitmap", "manual", "ring"]),
)
def test_memslots_against_the_real_kernel(
    requests: list[SlotRequest], cleared: list[tuple[int, int, int]], log: str
) -> None:
    """Any sequence of requests gives the real kernel's errnos, dirty logs included."""
    from memlistener.kvm.fds import Kvm

    def play(vm: VmHandle) -> list[int]:
        answers = []
        sizes: dict[int, int] = {}
        if log == "manual":
            vm.enable_cap(backend.CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
        if log == "ring":
            vm.enable_cap(backend.CAP_DIRTY_LOG_RING_ACQ_REL, 0x10000)
        for request, clear in zip(requests, cleared, strict=False):
            answers.append(errno_of(lambda: vm.clear_dirty_log(*clear, bytes(16))))  # noqa: B023
            slot, _, _, size, _ = request
            answers.append(errno_of(lambda: vm.set_user_memory_region(*request)))  # noqa: B023
            if not answers[-1]:
                sizes[slot] = size // PAGE
            length = sizes.get(slot) or 1
            if length < 1000:
                answers.append(errno_of(lambda: vm.get_dirty_log(slot, length)))  # noqa: B023
        return answers

    with Kvm.open() as kvm, contextlib.closing(kvm.create_vm()) as real:
        assert play(FakeKvm().create_vm()) == play(real)


@pytest.mark.kvm
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    backend.CAP_MANUAL_DIRTY_LOG_PROTECT2,
                    backend.CAP_DIRTY_LOG_RING,
                    backend.CAP_DIRTY_LOG_RING_ACQ_REL,
                    backend.CAP_USER_MEMORY,
                ]
            ),
            st.sampled_from([0, 1, 2, 3, 4, 8, 0x800, 0x1000, 0x1800, 0x10000, 1 << 20, 1 << 21]),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_capabilities_against_the_real_kernel(
    requests: list[tuple[int, int]], with_vcpu: bool
) -> None:
    """What can be enabled when, with which argument; and whether there are rings then."""
    from memlistener.kvm.fds import Kvm

    def play(vm: VmHandle) -> list[int]:
        vcpu = vm.create_vcpu(0) if with_vcpu else None
        answers = [errno_of(lambda: vm.enable_cap(*each)) for each in requests]  # noqa: B023
        answers.append(errno_of(vm.reset_dirty_rings))
        if vcpu is not None:
            vcpu.close()
        return answers

    with Kvm.open() as kvm, contextlib.closing(kvm.create_vm()) as real:
        assert play(FakeKvm().create_vm()) == play(real)


def test_memslot_fields_overflow(vm: FakeVm) -> None:
    """What does not fit into the kernel's struct is the caller's mistake, not EINVAL."""
    with pytest.raises(OverflowError, match="0x10000000000000000"):
        vm.set_user_memory_region(0, 0, 2**64, PAGE, 0)


def test_readonly_needs_its_capability() -> None:
    """Without KVM_CAP_READONLY_MEM the flag is unknown."""
    vm = FakeKvm(capabilities={backend.CAP_READONLY_MEM: 0}).create_vm()
    assert errno_of(lambda: vm.set_user_memory_region(0, 2, 0, PAGE, 0)) == errno.EINVAL
    assert vm.check_extension(backend.CAP_READONLY_MEM) == 0


def test_nr_memslots() -> None:
    """The number of slots is configurable, and is what the capability says."""
    fake = FakeKvm(nr_memslots=2)
    vm = fake.create_vm()
    assert fake.check_extension(backend.CAP_NR_MEMSLOTS) == 2
    vm.set_user_memory_region(1, 0, 0, PAGE, 0)
    assert errno_of(lambda: vm.set_user_memory_region(2, 0, PAGE, PAGE, 0)) == errno.EINVAL


def test_second_address_space(ram: HostMemory) -> None:
    """Address spaces are separate: the same ids and addresses, other memory."""
    vm = FakeKvm(capabilities={backend.CAP_MULTI_ADDRESS_SPACE: 2}).create_vm()
    vm.set_user_memory_region(0, 0, 0, PAGE, ram.address)
    vm.set_user_memory_region(0x10000, 0, 0, PAGE, ram.address + PAGE)
    assert errno_of(lambda: vm.set_user_memory_region(0x20000, 0, 0, PAGE, 0)) == errno.EINVAL
    vcpu = vcpu_with(vm, Write(0, 1, 1))
    assert vcpu.run() == 0
    vcpu.load([Write(0, 1, 2)])
    vcpu.address_space_id = 1
    assert vcpu.run() == 0
    assert (ram.bytes[0], ram.bytes[PAGE]) == (1, 2)


# Dirty logging.


def test_dirty_log(vm: FakeVm, ram: HostMemory) -> None:
    """Writes mark pages, reads do not; fetching clears; a move keeps, a new start forgets."""
    vm.set_user_memory_region(3, 1, 0x10000, 0x10000, ram.address)
    vcpu = vcpu_with(vm, Write(0x10FFF, 2, 0xAABB), Read(0x15000, 4), Write(0x1F000, 1, 0))
    assert vcpu.run() == 0
    assert vm.get_dirty_log(3, 16) == (0x8003).to_bytes(8, "little")
    assert vm.get_dirty_log(3, 16) == bytes(8)

    vcpu.load([Write(0x12000, 1, 0)])
    assert vcpu.run() == 0
    vm.set_user_memory_region(3, 1, 0x40000, 0x10000, ram.address)
    assert vm.get_dirty_log(3, 16) == (0x4).to_bytes(8, "little")

    vcpu.load([Write(0x42000, 1, 0)])
    assert vcpu.run() == 0
    vm.set_user_memory_region(3, 0, 0x40000, 0x10000, ram.address)
    assert errno_of(lambda: vm.get_dirty_log(3, 16)) == errno.ENOENT
    vm.set_user_memory_region(3, 1, 0x40000, 0x10000, ram.address)
    assert vm.get_dirty_log(3, 16) == bytes(8)


def test_dirty_log_errors(vm: FakeVm) -> None:
    """ENOENT for no slot, EINVAL for no such slot id, ValueError for a wrong length."""
    assert errno_of(lambda: vm.get_dirty_log(0, 1)) == errno.ENOENT
    assert errno_of(lambda: vm.get_dirty_log(0x10000, 1)) == errno.EINVAL
    vm.set_user_memory_region(0, 1, 0, 65 * PAGE, 0)
    assert len(vm.get_dirty_log(0, 65)) == 16
    with pytest.raises(ValueError, match="0x41 pages, not 0x40"):
        vm.get_dirty_log(0, 64)


def test_manual_protection(vm: FakeVm, ram: HostMemory) -> None:
    """A page is reported again and again, until it is cleared."""
    vm.enable_cap(backend.CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    vm.set_user_memory_region(0, 1, 0, 16 * PAGE, ram.address)
    assert vcpu_with(vm, Write(0, 1, 1), Write(2 * PAGE, 1, 1)).run() == 0
    for _ in range(2):
        assert vm.get_dirty_log(0, 16) == (0b101).to_bytes(8, "little")
    vm.clear_dirty_log(0, 0, 16, (0b011).to_bytes(8, "little"))
    assert vm.get_dirty_log(0, 16) == (0b100).to_bytes(8, "little")
    with pytest.raises(ValueError, match="has no 0x10 pages"):
        vm.clear_dirty_log(0, 0, 16, b"\1")


def test_ring(vm: FakeVm, ram: HostMemory) -> None:
    """Each write to a protected page is an entry; collecting protects nothing, resetting does."""
    vm.enable_cap(backend.CAP_DIRTY_LOG_RING_ACQ_REL, 0x1000)
    vm.set_user_memory_region(3, 1, 0, 16 * PAGE, ram.address)
    vcpu = vcpu_with(vm, Write(PAGE, 1, 1), Write(PAGE, 1, 1), Write(0, 1, 1))
    assert vcpu.run() == 0
    assert vcpu.collect_dirty_gfns() == [(3, 1), (3, 0)]
    vcpu.load([Write(PAGE, 1, 1)])
    assert vcpu.run() == 0
    assert vcpu.collect_dirty_gfns() == []
    assert vm.reset_dirty_rings() == 2
    vcpu.load([Write(PAGE, 1, 1)])
    assert vcpu.run() == 0
    assert vcpu.collect_dirty_gfns() == [(3, 1)]


def test_full_ring(vm: FakeVm, ram: HostMemory) -> None:
    """64 entries before its end a ring is full, and the vCPU does not run before a reset."""
    vm.enable_cap(backend.CAP_DIRTY_LOG_RING, 0x1000)
    vm.set_user_memory_region(0, 1, 0, 16 * PAGE, ram.address)
    # A slot that is made anew logs all of its pages anew.
    vcpu = vcpu_with(vm)
    for _ in range(12):
        vcpu.load([Write(page * PAGE, 1, 1) for page in range(16)])
        assert vcpu.run() == 0
        vm.set_user_memory_region(0, 0, 0, 0, 0)
        vm.set_user_memory_region(0, 1, 0, 16 * PAGE, ram.address)
    for _ in range(2):
        vcpu.load([Write(0, 1, 1)])
        assert (vcpu.run(), vcpu.exit_reason) == (0, backend.EXIT_DIRTY_RING_FULL)
    assert len(vcpu.collect_dirty_gfns()) == 192
    assert vcpu.run() == 0
    assert vcpu.exit_reason == backend.EXIT_DIRTY_RING_FULL
    assert vm.reset_dirty_rings() == 192
    assert vcpu.run() == 0
    assert vcpu.collect_dirty_gfns() == [(0, 0)]
