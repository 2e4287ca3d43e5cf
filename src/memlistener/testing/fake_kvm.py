"""`FakeKvm`: the kernel's side of the KVM backend, in plain Python.

It stands where ``/dev/kvm`` would (``open_vm(..., backend=FakeKvm())``), on any
operating system. Its vCPUs execute scripts (see `guest_script`) in the threads
that call ``KVM_RUN``, against the host memory behind the memslots of the
moment: a backend that replaces slots under a running vCPU makes it see the
hole. No thread is started here, and nothing happens by chance: a test can stop
a vCPU between any two instructions, look in between any two ioctls, and make
the n-th of them fail.

As with the kernel, the memory behind a slot has to stay mapped while there is
the slot: an access to any other address ends the process, where the kernel
would answer EFAULT.

What it does not play: device models, interrupts, instruction sets (a script
neither reads nor changes registers by itself), and the ioctls that
`memlistener.kvm.backend` does not have.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from memlistener.kvm import backend
from memlistener.testing.fake_bus import FakeIoEventFd, FakeZone
from memlistener.testing.fake_dirty_ring import DirtyRing
from memlistener.testing.fake_ioctls import Ioctl, IoctlRecorder
from memlistener.testing.fake_memslots import PAGE_SIZE, FakeMemslot, MemslotTable, kernel_error
from memlistener.testing.fake_vcpu import FakeVcpu, VmState
from memlistener.testing.guest_script import GuestProgram

T = TypeVar("T")

# As Linux 6.18 on x86 answers. There is no second address space (SMM).
_CAPABILITIES = {
    backend.CAP_USER_MEMORY: 1,
    backend.CAP_NR_MEMSLOTS: 32764,
    backend.CAP_COALESCED_MMIO: 2,
    backend.CAP_IOEVENTFD: 1,
    backend.CAP_READONLY_MEM: 1,
    backend.CAP_IOEVENTFD_NO_LENGTH: 1,
    backend.CAP_IMMEDIATE_EXIT: 1,
    backend.CAP_COALESCED_PIO: 1,
    backend.CAP_MANUAL_DIRTY_LOG_PROTECT2: 3,
    backend.CAP_DIRTY_LOG_RING: 1 << 20,
    backend.CAP_DIRTY_LOG_RING_ACQ_REL: 1 << 20,
}

# 64 entries that are kept for writes on the way out, and as many again.
_LEAST_RING = 128 * backend.DIRTY_GFN_SIZE

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


class FakeKvm:
    """``/dev/kvm``, played: the protocol `KvmBackend`.

    Attributes:
        vms: Every VM created, in order, closed ones too. A test reaches the
            vCPU behind the library's with ``fake.vms[0].vcpus[0]``.
    """

    # A scripted vCPU executes Python, for which it needs the GIL: it gets going a
    # hundred times slower than a real one (`memlistener.bracket.Gate`, min_run).
    min_run = 1_000_000

    def __init__(
        self,
        *,
        script: GuestProgram | None = None,
        nr_memslots: int | None = None,
        capabilities: Mapping[int, int] | None = None,
        physical_bits: int = 52,
        max_vcpus: int = 1024,
        kick_ioctls: bool = False,
        kick_waits_for_other_vms: bool = False,
        dirty_rings_overflow: bool = False,
        log_limit: int | None = None,
    ) -> None:
        """A kernel with no VMs.

        Args:
            script: Called with the id of each new vCPU, makes its program;
                None: HLT. `FakeVcpu.load` replaces it.
            nr_memslots: Short for the capability ``KVM_CAP_NR_MEMSLOTS``.
            capabilities: Answers to ``KVM_CHECK_EXTENSION`` that differ from
                the default, which is Linux 6.18's on x86; 0 takes one away.
                Without ``CAP_READONLY_MEM`` that flag is refused;
                ``CAP_MULTI_ADDRESS_SPACE`` says how many address spaces a VM
                has.
            physical_bits: The width of guest-physical addresses.
            max_vcpus: How many vCPUs a VM can have, and the limit of their ids.
            kick_ioctls: Play a kernel that has ``KVM_KICK_ALL_RUNNING_VCPUS``
                and ``KVM_RESUME_ALL_KICKED_VCPUS``.
            kick_waits_for_other_vms: Play that kernel's habit of waiting until
                the vCPUs of *every* VM have come out of ``KVM_RUN``, though it
                kicks only those of one.
            dirty_rings_overflow: Play a kernel whose vCPUs notice only when they
                enter the guest that their dirty ring is full.
            log_limit: How many ioctls `log` keeps, the newest; None: all.
        """
        self._recorder = IoctlRecorder(log_limit)
        self._left = threading.Condition(self._recorder.lock)
        self._capabilities = {**_CAPABILITIES, **(capabilities or {})}
        if nr_memslots is not None:
            self._capabilities[backend.CAP_NR_MEMSLOTS] = nr_memslots
        self._script = script
        self._physical_bits = physical_bits
        self._max_vcpus = max_vcpus
        self._kick_ioctls = kick_ioctls
        self._kick_waits_for_other_vms = kick_waits_for_other_vms
        self._dirty_rings_overflow = dirty_rings_overflow
        self._closed = False
        self.vms: list[FakeVm] = []

    # The test's side.

    @property
    def log(self) -> tuple[Ioctl, ...]:
        """Every ioctl answered so far, in the order in which they ended."""
        return self._recorder.log()

    @property
    def on_ioctl(self) -> Callable[[Ioctl], object] | None:
        """Called after every ioctl but ``KVM_RUN``, in its thread, with what is logged.

        The ioctl has taken effect (or failed) and has not returned yet; no lock
        is held. So a vCPU can take a step between the DELETE and the CREATE of
        a slot: ``fake.on_ioctl = lambda ioctl: vcpu.step()``. What the hook
        raises comes out of the ioctl.
        """
        return self._recorder.on_ioctl

    @on_ioctl.setter
    def on_ioctl(self, hook: Callable[[Ioctl], object] | None) -> None:
        self._recorder.on_ioctl = hook

    def fail(self, ioctl: str, *, nth: int = 1, errno: int = errno.ENOSPC) -> None:
        """Make the ``nth`` such ioctl from now fail with ``errno``, without effect.

        Args:
            ioctl: Its name: ``"KVM_SET_USER_MEMORY_REGION"``, ``"KVM_RUN"``, ...
            nth: Counted over all VMs and vCPUs; 1 is the next one.
            errno: The kernel's answer.

        Raises:
            ValueError: No such ioctl, or no such error.
        """
        self._recorder.fail(ioctl, nth, errno)

    def pending_failures(self) -> int:
        """How many failures asked for with `fail` have not come up yet."""
        return self._recorder.pending_failures()

    # KvmBackend.

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when the kernel lacks ``cap``."""
        self._check_open()
        return self._recorder.call(
            "KVM_CHECK_EXTENSION", lambda: self._capabilities.get(cap, 0), args={"cap": cap}
        )

    def create_vm(self) -> FakeVm:
        """``KVM_CREATE_VM``."""

        def effect() -> FakeVm:
            vm = FakeVm(self, len(self.vms))
            self.vms.append(vm)
            return vm

        self._check_open()
        return self._recorder.call(
            "KVM_CREATE_VM", effect, args={}, summary=lambda vm: self.vms.index(vm)
        )

    def close(self) -> None:
        """Close the descriptor. Idempotent; VMs live on, as they do in the kernel."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise kernel_error(errno.EBADF, "this FakeKvm is closed")


class FakeVm:
    """A VM of `FakeKvm`: the protocol `VmHandle`.

    Attributes:
        index: Its place in `FakeKvm.vms`.
        vcpus: Every vCPU created, in order, closed ones too.
    """

    def __init__(self, kvm: FakeKvm, index: int) -> None:
        """Use `FakeKvm.create_vm` instead."""
        self.index = index
        self.vcpus: list[FakeVcpu] = []
        self._kvm = kvm
        self._closed = False
        self._ring_entries = 0
        capabilities = kvm._capabilities
        memslots = MemslotTable(
            limit=capabilities[backend.CAP_NR_MEMSLOTS],
            address_spaces=max(1, capabilities.get(backend.CAP_MULTI_ADDRESS_SPACE, 0)),
            readonly_offered=bool(capabilities[backend.CAP_READONLY_MEM]),
            physical_bits=kvm._physical_bits,
        )
        self._state = VmState(index, kvm._recorder, memslots, kvm._left)

    def __repr__(self) -> str:
        return f"<FakeVm {self.index}: {len(self.vcpus)} vCPUs>"

    # The test's side.

    @property
    def ioctls(self) -> tuple[Ioctl, ...]:
        """The part of `FakeKvm.log` that is about this VM and its vCPUs."""
        return tuple(ioctl for ioctl in self._kvm.log if ioctl.vm == self.index)

    @property
    def memslots(self) -> tuple[FakeMemslot, ...]:
        """The slots there are, by address space and then by guest address."""
        with self._state.recorder.lock:
            return self._state.memslots.slots()

    @property
    def ioeventfds(self) -> tuple[FakeIoEventFd, ...]:
        """The ioeventfds there are."""
        with self._state.recorder.lock:
            return self._state.bus.ioeventfds()

    @property
    def coalesced_zones(self) -> tuple[FakeZone, ...]:
        """The zones whose writes go into the ring."""
        with self._state.recorder.lock:
            return self._state.bus.zones()

    @property
    def inside(self) -> frozenset[int]:
        """The ids of the vCPUs that are inside ``KVM_RUN``."""
        with self._state.recorder.lock:
            return frozenset(self._state.inside)

    # VmHandle.

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION`` on the VM: 0 when the kernel lacks ``cap``."""
        capabilities = self._kvm._capabilities
        return self._ioctl("KVM_CHECK_EXTENSION", lambda: capabilities.get(cap, 0), {"cap": cap})

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; see `VmHandle.set_user_memory_region`.

        Raises:
            KvmError: EINVAL or EEXIST, where the kernel would.
            OverflowError: A value does not fit into its field.
        """
        _check_fields(
            *((slot, _U32), (flags, _U32)),
            *((guest_phys_addr, _U64), (memory_size, _U64), (userspace_addr, _U64)),
        )
        new = FakeMemslot(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        self._ioctl(
            "KVM_SET_USER_MEMORY_REGION",
            lambda: self._state.memslots.update(new, self._let_vcpus_run),
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": guest_phys_addr,
                "memory_size": memory_size,
                "userspace_addr": userspace_addr,
            },
        )

    def create_vcpu(self, vcpu_id: int) -> FakeVcpu:
        """``KVM_CREATE_VCPU``.

        Raises:
            KvmError: EEXIST for an id in use (closing a vCPU does not free it),
                EINVAL for one out of range or one vCPU too many.
        """

        def effect() -> FakeVcpu:
            limit = self._kvm._max_vcpus
            if not 0 <= vcpu_id < limit or len(self.vcpus) >= limit:
                raise kernel_error(errno.EINVAL, f"vCPU {vcpu_id}: there can be {limit}")
            if any(vcpu.vcpu_id == vcpu_id for vcpu in self.vcpus):
                raise kernel_error(errno.EEXIST, f"vCPU {vcpu_id} exists")
            entries, late = self._ring_entries, self._kvm._dirty_rings_overflow
            ring = DirtyRing(entries, noticed_late=late) if entries else None
            vcpu = FakeVcpu(self._state, vcpu_id, script, ring=ring)
            self.vcpus.append(vcpu)
            return vcpu

        # The caller's code, so not under the lock.
        script = self._kvm._script(vcpu_id) if self._kvm._script is not None else ()
        return self._ioctl(
            "KVM_CREATE_VCPU", effect, {"vcpu_id": vcpu_id}, summary=lambda vcpu: vcpu.vcpu_id
        )

    def get_dirty_log(self, slot: int, pages: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: fetch and clear the bitmap of a slot.

        Raises:
            KvmError: EINVAL for an id out of range, ENOENT where nothing logs.
            ValueError: The slot has another number of pages.
        """
        return self._ioctl(
            "KVM_GET_DIRTY_LOG",
            lambda: self._state.memslots.dirty_log(slot, pages),
            {"slot": slot, "pages": pages},
        )

    def enable_cap(self, cap: int, arg: int) -> None:
        """``KVM_ENABLE_CAP``, for manual protection and dirty rings.

        Raises:
            KvmError: EINVAL or E2BIG, where the kernel would.
        """

        def effect() -> None:
            offered = self._kvm._capabilities.get(cap, 0)
            if not offered:
                raise kernel_error(errno.EINVAL, f"no capability {cap}")
            if cap == backend.CAP_MANUAL_DIRTY_LOG_PROTECT2:
                # The other flag, INITIALLY_SET, is nothing without this one; nothing
                # here wants it, so what it does is not played.
                enable = backend.DIRTY_LOG_MANUAL_PROTECT_ENABLE
                if arg & ~offered or (arg and not arg & enable):
                    raise kernel_error(errno.EINVAL, f"{arg:#x} is none of {offered:#x}")
                self._state.memslots.manual_protect = bool(arg & enable)
            elif cap in (backend.CAP_DIRTY_LOG_RING, backend.CAP_DIRTY_LOG_RING_ACQ_REL):
                if arg & (arg - 1) or arg < max(PAGE_SIZE, _LEAST_RING):
                    raise kernel_error(errno.EINVAL, f"a ring cannot have {arg:#x} bytes")
                if arg > offered:
                    raise kernel_error(errno.E2BIG, f"a ring has {offered:#x} bytes at most")
                if self._ring_entries or self.vcpus:
                    raise kernel_error(errno.EINVAL, "rings come once, and before vCPUs")
                self._ring_entries = arg // backend.DIRTY_GFN_SIZE
                self._state.memslots.rings = True
            else:
                raise kernel_error(errno.EINVAL, f"capability {cap} needs no enabling")

        self._ioctl("KVM_ENABLE_CAP", effect, {"cap": cap, "arg": arg})

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes) -> None:
        """``KVM_CLEAR_DIRTY_LOG``; see `VmHandle.clear_dirty_log`.

        Raises:
            KvmError: EINVAL for pages that are not the slot's or not a number of
                them that the kernel takes; ENOENT where nothing logs; ENXIO
                where there are rings.
            ValueError: The bitmap is too short.
        """
        self._ioctl(
            "KVM_CLEAR_DIRTY_LOG",
            lambda: self._state.memslots.clear_dirty_log(slot, first_page, pages, bitmap),
            {"slot": slot, "first_page": first_page, "pages": pages, "bitmap": bitmap},
        )

    def reset_dirty_rings(self) -> int:
        """``KVM_RESET_DIRTY_RINGS``: entries that were collected are free again.

        Raises:
            KvmError: EINVAL where there are no rings.
        """

        def effect() -> int:
            if not self._ring_entries:
                raise kernel_error(errno.EINVAL, "this VM has no dirty rings")
            return sum(vcpu.reset_ring() for vcpu in self.vcpus)

        return self._ioctl("KVM_RESET_DIRTY_RINGS", effect, {})

    def ioeventfd(
        self,
        addr: int,
        size: int,
        fd: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """``KVM_IOEVENTFD``; see `VmHandle.ioeventfd`.

        Raises:
            KvmError: As the kernel: EINVAL, EBADF, EEXIST, ENOENT.
            OverflowError: A value does not fit into its field.
        """
        _check_fields((addr, _U64), (size, _U32), (datamatch or 0, _U64))

        def effect() -> None:
            self._need(backend.CAP_IOEVENTFD)
            if not size and not deassign:
                self._need(backend.CAP_IOEVENTFD_NO_LENGTH, errno.EINVAL)
            bus = self._state.bus
            (bus.deassign if deassign else bus.assign)(addr, size, fd, datamatch, pio)

        self._ioctl(
            "KVM_IOEVENTFD",
            effect,
            {
                "addr": addr,
                "size": size,
                "fd": fd,
                "datamatch": datamatch,
                "pio": pio,
                "deassign": deassign,
            },
        )

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``; see `VmHandle.register_coalesced_mmio`.

        Raises:
            KvmError: ENOSPC where the bus is full.
            OverflowError: A value does not fit into its field.
        """
        self._zone("KVM_REGISTER_COALESCED_MMIO", addr, size, pio, self._state.bus.register)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``: of *every* zone that contains the range."""
        self._zone("KVM_UNREGISTER_COALESCED_MMIO", addr, size, pio, self._state.bus.unregister)

    def _zone(
        self, name: str, addr: int, size: int, pio: bool, effect: Callable[[FakeZone], None]
    ) -> None:
        def checked() -> None:
            self._need(backend.CAP_COALESCED_PIO if pio else backend.CAP_COALESCED_MMIO)
            effect(FakeZone(addr, size, pio))

        _check_fields((addr, _U64), (size, _U32))
        self._ioctl(name, checked, {"addr": addr, "size": size, "pio": pio})

    def coalesced_pending(self) -> bool:
        """Whether the ring holds writes."""
        return self._state.bus.pending

    def take_coalesced(self) -> list[tuple[int, bytes, bool]]:
        """Take all writes out of the ring: (address, data, whether to a port), in order."""
        with self._state.recorder.lock:
            return self._state.bus.take()

    def kick_all_running_vcpus(self) -> None:
        """``KVM_KICK_ALL_RUNNING_VCPUS``: turn vCPUs out, and wait until they are.

        From here to the resume ``KVM_RUN`` returns EINTR at once.

        Raises:
            KvmError: ENOTTY, unless the `FakeKvm` has ``kick_ioctls``.
        """
        self._ioctl("KVM_KICK_ALL_RUNNING_VCPUS", self._kick_all, {})

    def resume_all_kicked_vcpus(self) -> None:
        """``KVM_RESUME_ALL_KICKED_VCPUS``: ``KVM_RUN`` enters the guest again.

        Raises:
            KvmError: ENOTTY, unless the `FakeKvm` has ``kick_ioctls``.
        """

        def effect() -> None:
            self._check_kick_ioctls()
            self._state.kicked = False

        self._ioctl("KVM_RESUME_ALL_KICKED_VCPUS", effect, {})

    def close(self) -> None:
        """Close the descriptor. Idempotent.

        vCPUs live on, as they do in the kernel; ioeventfds and coalesced zones,
        here, do not.
        """
        with self._state.recorder.lock:
            self._closed = True
            self._state.bus.close()

    def _kick_all(self) -> None:
        self._check_kick_ioctls()
        self._state.kicked = True
        for vcpu in self.vcpus:
            vcpu.interrupt()
        # Of other VMs' vCPUs it waits for those inside now, not for those that
        # come while it waits.
        waits_for_others = self._kvm._kick_waits_for_other_vms
        others = [
            (vcpu, vcpu.entry)
            for vm in self._kvm.vms
            for vcpu in vm.vcpus
            if waits_for_others and vm is not self and vcpu.entry is not None
        ]
        self._state.left.wait_for(
            lambda: not self._state.inside and all(vcpu.entry != entry for vcpu, entry in others)
        )

    def _let_vcpus_run(self) -> None:
        """In the middle of an ioctl, with the lock held: vCPUs see what there is now."""
        self._state.recorder.lock.release()
        try:
            time.sleep(0)
        finally:
            self._state.recorder.lock.acquire()

    def _need(self, cap: int, number: int = errno.ENOTTY) -> None:
        if not self._kvm._capabilities.get(cap, 0):
            raise kernel_error(number, f"this kernel lacks capability {cap}")

    def _check_kick_ioctls(self) -> None:
        if not self._kvm._kick_ioctls:
            raise kernel_error(errno.ENOTTY, "this kernel does not have the kick ioctls")

    def _ioctl(
        self,
        name: str,
        effect: Callable[[], T],
        args: Mapping[str, Any],
        summary: Callable[[T], Any] = lambda result: result,
    ) -> T:
        if self._closed:
            raise kernel_error(errno.EBADF, f"VM {self.index} is closed")
        return self._kvm._recorder.call(
            name, effect, args=args, vm=self.index, inside=self._state.inside, summary=summary
        )


def _check_fields(*fields: tuple[int, int]) -> None:
    """What cffi refuses before there is an ioctl: each (value, largest that fits)."""
    for value, limit in fields:
        if not 0 <= value <= limit:
            raise OverflowError(f"{value:#x} does not fit into 0...{limit:#x}")
