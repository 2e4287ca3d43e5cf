"""The seam between the KVM backend and a kernel: three handles, as protocols.

`memlistener.kvm.fds` implements them over real file descriptors and
`memlistener.testing.FakeKvm` in plain Python. They mirror the kernel's own
hierarchy (``/dev/kvm``, a VM, a vCPU) and its ioctls one to one; everything
that decides something lives above them. A request that the kernel refuses
raises ``OSError`` with the kernel's errno.
"""

from __future__ import annotations

from typing import Any, Protocol

from memlistener.kvm.exits import VcpuExit

# Values of kvm_run.exit_reason that the run loop tells apart.
EXIT_IO = 2
EXIT_MMIO = 6
EXIT_DIRTY_RING_FULL = 31

# Flags of struct kvm_userspace_memory_region.
MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2

# Capabilities (KVM_CAP_*) that the backend asks about.
CAP_USER_MEMORY = 3
CAP_NR_MEMSLOTS = 10
CAP_COALESCED_MMIO = 15
CAP_IOEVENTFD = 36
CAP_READONLY_MEM = 81
CAP_IOEVENTFD_NO_LENGTH = 100
CAP_MULTI_ADDRESS_SPACE = 118
CAP_IMMEDIATE_EXIT = 136
CAP_COALESCED_PIO = 162
CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
CAP_DIRTY_LOG_RING = 192
CAP_DIRTY_LOG_RING_ACQ_REL = 223

# Flags of CAP_MANUAL_DIRTY_LOG_PROTECT2.
DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1

# struct kvm_dirty_gfn: what an entry of a dirty ring takes, in bytes.
DIRTY_GFN_SIZE = 16


class VcpuHandle(Protocol):
    """A vCPU's file descriptor and its mapped ``struct kvm_run``."""

    def run(self) -> int:
        """``KVM_RUN``: enter the guest, with the GIL released.

        Returns:
            0 when the guest exited (see `exit_reason`), else the errno: EINTR
            when the vCPU was kicked.
        """
        ...

    def clear_kick(self) -> None:
        """Set ``immediate_exit`` to 0."""
        ...

    def kick(self) -> None:
        """Set ``immediate_exit`` to 1, then signal the thread inside `run`.

        Never blocks, may be called from any thread and at any time, and does
        no harm where no thread is inside.
        """
        ...

    @property
    def exit_reason(self) -> int:
        """``kvm_run.exit_reason`` of the last exit."""
        ...

    @property
    def in_smm(self) -> bool:
        """Whether the vCPU was in system management mode at the last exit."""
        ...

    def mmio(self) -> tuple[int, int, bool, bytes]:
        """The last MMIO exit: (physical address, length, is_write, data).

        ``data`` is ``length`` bytes in guest order; meaningful for writes.
        """
        ...

    def complete_mmio(self, data: bytes) -> None:
        """Give the bytes that the last MMIO read returns to the guest."""
        ...

    def io(self) -> tuple[int, int, int, bool, bytes]:
        """The last PIO exit: (port, size, count, is_out, data).

        ``data`` is ``size * count`` bytes; meaningful for OUT.
        """
        ...

    def complete_io(self, data: bytes) -> None:
        """Give the ``size * count`` bytes that the last IN returns to the guest."""
        ...

    def terminal_exit(self) -> VcpuExit:
        """The last exit, when it was neither MMIO nor PIO, as a value."""
        ...

    def collect_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what is new in the vCPU's dirty ring: (slot, page within it) each.

        To be followed by `VmHandle.reset_dirty_rings`, which makes the entries
        free again, and the pages such that a write to them is seen.
        """
        ...

    def skip_dirty_gfns(self, none: int = 0) -> int:
        """Pass over entries of a ring that has overflowed, up to where the kernel is.

        Args:
            none: How many, where the kernel has written no entry that would show
                where it is.

        Returns:
            How many: `VmHandle.reset_dirty_rings` counts them, too.
        """
        ...

    def get_regs(self) -> dict[str, int]:
        """``KVM_GET_REGS``: every field of ``struct kvm_regs`` by name."""
        ...

    def set_regs(self, regs: dict[str, int]) -> None:
        """``KVM_SET_REGS``: all fields must be given."""
        ...

    def get_sregs(self) -> dict[str, Any]:
        """``KVM_GET_SREGS``: segments and tables as nested dicts."""
        ...

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        """``KVM_SET_SREGS``: all fields must be given."""
        ...

    def close(self) -> None:
        """Unmap ``kvm_run`` and close the descriptor. Idempotent."""
        ...


class VmHandle(Protocol):
    """A VM's file descriptor."""

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION`` on the VM: 0 when the kernel lacks ``cap``."""
        ...

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; ``memory_size`` 0 deletes the slot.

        ``slot`` carries the address-space id in its upper 16 bits.
        """
        ...

    def create_vcpu(self, vcpu_id: int) -> VcpuHandle:
        """``KVM_CREATE_VCPU``."""
        ...

    def enable_cap(self, cap: int, arg: int) -> None:
        """``KVM_ENABLE_CAP`` on the VM.

        ``CAP_DIRTY_LOG_RING`` or its sibling, ``arg`` being the size of a ring in
        bytes, comes before the first vCPU.
        """
        ...

    def get_dirty_log(self, slot: int, pages: int) -> bytes | bytearray:
        """``KVM_GET_DIRTY_LOG``: fetch the bitmap of a slot.

        It is cleared, and writes to its pages count again, unless
        ``CAP_MANUAL_DIRTY_LOG_PROTECT2`` was enabled: then that is left to
        `clear_dirty_log`.

        Args:
            slot: The slot, with the address-space id in its upper 16 bits.
            pages: The slot's length in pages of 4 KiB.

        Returns:
            The bitmap, one bit a page, in 64-bit little-endian words.
        """
        ...

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes) -> None:
        """``KVM_CLEAR_DIRTY_LOG``: the pages that ``bitmap`` names count again.

        Args:
            slot: As for `get_dirty_log`.
            first_page: Where the bitmap begins; a multiple of 64.
            pages: How many it has: a multiple of 64, or all up to the slot's end.
            bitmap: Bits that `get_dirty_log` has given.
        """
        ...

    def reset_dirty_rings(self) -> int:
        """``KVM_RESET_DIRTY_RINGS``: give the kernel back what was collected.

        Returns:
            How many entries, over all vCPUs' rings.
        """
        ...

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
        """``KVM_IOEVENTFD``: have a write signal an eventfd, without an exit.

        Args:
            addr: Guest-physical address or port; the write has to begin there.
            size: Its width, 1, 2, 4 or 8 bytes; 0 for any.
            fd: The eventfd.
            datamatch: The value that has to be written; None for any.
            pio: Whether ``addr`` is a port.
            deassign: Take the same back. The descriptor may be another one of the
                same eventfd.
        """
        ...

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``: writes to a zone go into the ring, without an exit.

        Where the ring is full they exit.
        """
        ...

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``: of *every* zone that contains the range."""
        ...

    def coalesced_pending(self) -> bool:
        """Whether the ring holds writes. Cheap, and from any thread."""
        ...

    def take_coalesced(self) -> list[tuple[int, bytes, bool]]:
        """Take all writes out of the ring: (address, data, whether to a port), in order.

        By one thread at a time. There is a ring once there is a vCPU.
        """
        ...

    def kick_all_running_vcpus(self) -> None:
        """``KVM_KICK_ALL_RUNNING_VCPUS``; mainline kernels answer ENOTTY."""
        ...

    def resume_all_kicked_vcpus(self) -> None:
        """``KVM_RESUME_ALL_KICKED_VCPUS``; mainline kernels answer ENOTTY."""
        ...

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        ...


class KvmBackend(Protocol):
    """``/dev/kvm``, or what plays it."""

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when the kernel lacks ``cap``."""
        ...

    def create_vm(self) -> VmHandle:
        """``KVM_CREATE_VM``, with what the architecture needs before a vCPU runs."""
        ...

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        ...
