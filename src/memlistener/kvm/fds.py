"""Three handles over file descriptors: ``/dev/kvm``, a VM, a vCPU.

They are the protocols of `memlistener.kvm.backend`, made real, and mirror the
kernel's hierarchy and its ioctls one to one. Nothing here decides anything.

Who owns what: a handle owns its descriptor, and `VcpuFd` its mapping of
``struct kvm_run``. Guest memory stays the caller's, who must keep it mapped
until the slot is deleted or the VM is closed. The kernel keeps a VM alive while
one of its vCPUs is open, so handles may be closed in any order.

Any thread may call anything, with two limits that the kernel sets: while a
thread is inside `VcpuFd.run`, every other ioctl on that vCPU waits for it to
come out (`kick` is no ioctl, and does not); and a handle must not be closed
while another thread is about to use its descriptor.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from memlistener.errors import KvmError, KvmUnavailableError
from memlistener.kvm.backend import (
    CAP_COALESCED_MMIO,
    CAP_DIRTY_LOG_RING,
    CAP_DIRTY_LOG_RING_ACQ_REL,
    CAP_IMMEDIATE_EXIT,
    CAP_USER_MEMORY,
    DIRTY_GFN_SIZE,
)
from memlistener.kvm.bindings import Bindings, bindings
from memlistener.kvm.exits import VcpuExit
from memlistener.kvm.structs import dict_to_struct, struct_to_dict, terminal_exit

_API_VERSION: Final = 12

_IN_SMM: Final = 1  # KVM_RUN_X86_SMM

# Three pages that Intel's processors need for real mode, in the customary place: they end where
# a BIOS of 256 KiB begins. There the kernel may refuse a slot that overlaps them, with EEXIST.
_TSS_ADDR: Final = 0xFFFBD000

# Exits on the hot path are unpacked from the mapped bytes in one call, at under half the
# price of reading five cffi members. _source.c checks these layouts at build time.
_IO: Final = struct.Struct("=BBHIQ")  # direction, size, port, count, data_offset
_MMIO: Final = struct.Struct("=Q8sI?")  # phys_addr, data, len, is_write
# An entry of the ring of coalesced writes; before the first one are two 32-bit indices.
_COALESCED: Final = struct.Struct("=QII8s")  # phys_addr, len, pio, data
_RING_HEADER: Final = 8
_RING_ENTRIES: Final = (mmap.PAGESIZE - _RING_HEADER) // _COALESCED.size


class _Fd:
    """A descriptor that is closed once."""

    __slots__ = ("__weakref__", "_b", "_fd", "_lib")

    def __init__(self, fd: int, b: Bindings) -> None:
        self._fd = fd
        self._b = b
        self._lib = b.lib

    def fileno(self) -> int:
        """The file descriptor.

        Raises:
            ValueError: The handle is closed.
        """
        if self._fd < 0:
            raise self._closed_error()
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may not have come as far as setting _fd.
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        where = "closed" if self._fd < 0 else f"fd={self._fd:#x}"
        return f"<{type(self).__name__} {where}{self._details()}>"

    def _details(self) -> str:
        return ""

    def _closed_error(self) -> ValueError:
        return ValueError(f"{type(self).__name__} is closed")

    def _ioctl(self, name: str, function: Callable[..., int], *args: Any, detail: str = "") -> int:
        """Call one of the typed ioctls on this descriptor.

        Returns:
            What the ioctl returned: 0 or a positive number.

        Raises:
            KvmError: The kernel refused; with its errno, and the ioctl's name in the text.
        """
        while True:
            result = function(self.fileno(), *args)
            if result >= 0:
                return result
            if result != -errno.EINTR:  # as os.read and its like do (PEP 475)
                text = f"{name}: {os.strerror(-result)}"
                raise KvmError(-result, f"{text} ({detail})" if detail else text)


class Kvm(_Fd):
    """``/dev/kvm``: what the kernel offers, and the making of VMs."""

    __slots__ = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "/dev/kvm") -> Self:
        """Open KVM's device and see that it offers what cannot be done without.

        Raises:
            KvmUnavailableError: KVM cannot be used; the message names what is
                missing and the mend. ``errno`` is set where the kernel gave one.
        """
        b = bindings()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or errno.EIO
            raise KvmUnavailableError(number, _why_not_open(os.fspath(path), number)) from error
        kvm = cls(fd, b)
        try:
            kvm._check(os.fspath(path))
        except BaseException:
            kvm.close()
            raise
        return kvm

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when the kernel lacks ``cap``."""
        return self._ioctl(
            "KVM_CHECK_EXTENSION", self._lib.ml_check_extension, cap, detail=f"cap {cap}"
        )

    def create_vm(self) -> VmFd:
        """``KVM_CREATE_VM``, and on x86 ``KVM_SET_TSS_ADDR``, which real mode needs.

        Raises:
            KvmError: The kernel refused.
        """
        mmap_size = self._ioctl("KVM_GET_VCPU_MMAP_SIZE", self._lib.ml_get_vcpu_mmap_size)
        vm = VmFd(self._ioctl("KVM_CREATE_VM", self._lib.ml_create_vm), self._b, mmap_size)
        if self._b.has_x86:
            try:
                vm._ioctl("KVM_SET_TSS_ADDR", self._lib.ml_set_tss_addr, _TSS_ADDR)
            except BaseException:
                vm.close()
                raise
        return vm

    def _check(self, path: str) -> None:
        try:
            version = self._ioctl("KVM_GET_API_VERSION", self._lib.ml_get_api_version)
        except KvmError as error:
            raise KvmUnavailableError(error.errno, f"{path} is not KVM's device") from error
        if version != _API_VERSION:
            raise KvmUnavailableError(
                f"{path} speaks version {version} of KVM's API, not {_API_VERSION}; "
                "use Linux 2.6.22 or later"
            )
        for cap, name, since in (
            (CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "2.6.23"),
            (CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "4.13"),
        ):
            if not self.check_extension(cap):
                raise KvmUnavailableError(f"{path} lacks {name}; use Linux {since} or later")


def _why_not_open(path: str, number: int) -> str:
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return (
            f"{path} is not there: load the module (modprobe kvm_intel or kvm_amd); if that fails, "
            "switch virtualization (VT-x, AMD-V) on in the firmware, or nested virtualization in "
            "the hypervisor around this machine; in a container, pass the device in "
            f"(--device {path})"
        )
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"no permission to open {path}: join the group that owns it (usually: "
            "sudo usermod -aG kvm $USER) and log in again"
        )
    return f"{path} cannot be opened: {os.strerror(number)}"


class VmFd(_Fd):
    """A VM: its memslots, its dirty log, its bus, and the making of vCPUs."""

    __slots__ = ("_mmap_size", "_ring", "_ring_size", "_slot_lock", "_slot_pages")

    # The ring of coalesced writes and a view of the same bytes, once there is a vCPU; None before
    # that and once closed. All vCPUs show the one ring of their VM.
    _ring: tuple[Any, memoryview] | None

    def __init__(self, fd: int, b: Bindings, mmap_size: int) -> None:
        super().__init__(fd, b)
        self._mmap_size = mmap_size
        self._ring_size = 0  # bytes of each vCPU's dirty ring
        # The kernel writes a dirty bitmap as long as the slot, not as long as the caller
        # believes the slot to be; the lock keeps the two from parting.
        self._slot_lock = threading.Lock()
        self._slot_pages: dict[int, int] = {}
        self._ring = None

    def close(self) -> None:
        """Close the descriptor, and unmap the ring. Idempotent."""
        self._ring = None
        super().close()

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION`` on the VM: 0 when the kernel lacks ``cap``."""
        return self._ioctl(
            "KVM_CHECK_EXTENSION", self._lib.ml_check_extension, cap, detail=f"cap {cap}"
        )

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; ``memory_size`` 0 deletes the slot.

        The memory at ``userspace_addr`` stays the caller's, and has to stay
        mapped until the slot is deleted or the VM is closed.

        Args:
            slot: The slot, with the address-space id in its upper 16 bits.
            flags: ``MEM_LOG_DIRTY_PAGES``, ``MEM_READONLY``.
            guest_phys_addr: Guest-physical address, page-aligned.
            memory_size: Bytes, a multiple of the page size.
            userspace_addr: Host-virtual address, page-aligned.

        Raises:
            KvmError: EEXIST on overlap, EINVAL on misalignment or a resize, and
                the kernel's others.
        """
        with self._slot_lock:
            try:
                self._ioctl(
                    "KVM_SET_USER_MEMORY_REGION",
                    self._lib.ml_set_user_memory_region,
                    slot,
                    flags,
                    guest_phys_addr,
                    memory_size,
                    userspace_addr,
                )
            except KvmError as error:
                raise KvmError(
                    error.errno,
                    f"{error.strerror} (slot {slot:#x}, flags {flags:#x}, "
                    f"guest_phys_addr {guest_phys_addr:#x}, memory_size {memory_size:#x}, "
                    f"userspace_addr {userspace_addr:#x})",
                ) from None
            if memory_size:
                self._slot_pages[slot] = memory_size // mmap.PAGESIZE
            else:
                self._slot_pages.pop(slot, None)

    def create_vcpu(self, vcpu_id: int) -> VcpuFd:
        """``KVM_CREATE_VCPU``, with its ``struct kvm_run`` mapped.

        Raises:
            KvmError: EEXIST when there is a vCPU with this id, EINVAL when the
                id is beyond what the kernel allows.
        """
        fd = self._ioctl(
            "KVM_CREATE_VCPU", self._lib.ml_create_vcpu, vcpu_id, detail=f"id {vcpu_id:#x}"
        )
        vcpu = VcpuFd(fd, self._b, vcpu_id, self._mmap_size, self._ring_size)
        if self._ring is None:
            try:
                self._map_ring(fd)
            except BaseException:
                vcpu.close()
                raise
        return vcpu

    def enable_cap(self, cap: int, arg: int) -> None:
        """``KVM_ENABLE_CAP``; see `VmHandle.enable_cap`.

        Raises:
            KvmError: EINVAL where the kernel lacks ``cap``, or ``arg`` is none that it takes.
        """
        self._ioctl(
            "KVM_ENABLE_CAP", self._lib.ml_enable_cap, cap, arg, detail=f"cap {cap}, {arg:#x}"
        )
        if cap in (CAP_DIRTY_LOG_RING, CAP_DIRTY_LOG_RING_ACQ_REL):
            self._ring_size = arg

    def get_dirty_log(self, slot: int, pages: int) -> bytes | bytearray:
        """``KVM_GET_DIRTY_LOG``: fetch the bitmap of a slot; see `VmHandle.get_dirty_log`.

        Args:
            slot: The slot, with the address-space id in its upper 16 bits.
            pages: The slot's length in pages.

        Returns:
            The bitmap, one bit a page, in 64-bit little-endian words.

        Raises:
            KvmError: ENOENT when there is no such slot, or it does not log.
            ValueError: The slot is of another length.
        """
        with self._slot_lock:
            known = self._slot_pages.get(slot, pages)
            if pages != known:
                raise ValueError(f"slot {slot:#x} has {known:#x} pages, not {pages:#x}")
            bitmap = bytearray((pages + 63) // 64 * 8)
            self._ioctl(
                "KVM_GET_DIRTY_LOG",
                self._lib.ml_get_dirty_log,
                slot,
                self._b.ffi.from_buffer(bitmap),
                detail=f"slot {slot:#x}",
            )
            return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes) -> None:
        """``KVM_CLEAR_DIRTY_LOG``; see `VmHandle.clear_dirty_log`.

        Raises:
            KvmError: EINVAL where the pages are not the slot's, or their number is none that
                the kernel takes; ENOENT when there is no such slot, or it does not log.
            ValueError: The bitmap is too short for so many pages.
        """
        if len(bitmap) * 8 < pages:
            raise ValueError(f"a bitmap of {len(bitmap):#x} bytes has no {pages:#x} pages")
        padded = bitmap + bytes(-len(bitmap) % 8)  # the kernel reads words
        self._ioctl(
            "KVM_CLEAR_DIRTY_LOG",
            self._lib.ml_clear_dirty_log,
            slot,
            first_page,
            pages,
            self._b.ffi.from_buffer(padded),
            detail=f"slot {slot:#x}, {pages:#x} pages from {first_page:#x}",
        )

    def reset_dirty_rings(self) -> int:
        """``KVM_RESET_DIRTY_RINGS``: give the kernel back what was collected.

        Raises:
            KvmError: EINVAL where the VM has no rings.
        """
        return self._ioctl("KVM_RESET_DIRTY_RINGS", self._lib.ml_reset_dirty_rings)

    # ---- the bus: ioeventfds and coalesced writes -------------------------------------

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
        """``KVM_IOEVENTFD``: have a write signal an eventfd; see `VmHandle.ioeventfd`.

        Raises:
            KvmError: EINVAL for a width that is none, or a descriptor that is no
                eventfd; EBADF for one that is not open; EEXIST where the same
                write signals something already; ENOENT for taking back what is
                not there.
        """
        flags = 0
        if datamatch is not None:
            flags |= self._lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            flags |= self._lib.KVM_IOEVENTFD_FLAG_PIO
        if deassign:
            flags |= self._lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._ioctl(
            "KVM_IOEVENTFD",
            self._lib.ml_ioeventfd,
            addr,
            size,
            fd,
            flags,
            datamatch or 0,
            detail=f"addr {addr:#x}, len {size:#x}, fd {fd}, flags {flags:#x}, "
            f"datamatch {datamatch or 0:#x}",
        )

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``: writes to a zone go into the ring, without an exit.

        Raises:
            KvmError: ENOSPC when the bus is full.
        """
        self._ioctl(
            "KVM_REGISTER_COALESCED_MMIO",
            self._lib.ml_register_coalesced_mmio,
            addr,
            size,
            pio,
            detail=f"addr {addr:#x}, size {size:#x}, pio {pio:d}",
        )

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``: of *every* zone that contains the range."""
        self._ioctl(
            "KVM_UNREGISTER_COALESCED_MMIO",
            self._lib.ml_unregister_coalesced_mmio,
            addr,
            size,
            pio,
            detail=f"addr {addr:#x}, size {size:#x}, pio {pio:d}",
        )

    def _map_ring(self, vcpu: int) -> None:
        page = self.check_extension(CAP_COALESCED_MMIO)
        if page:
            mapping = mmap.mmap(vcpu, mmap.PAGESIZE, offset=page * mmap.PAGESIZE)
            self._ring = self._b.ffi.from_buffer(mapping), memoryview(mapping)

    def coalesced_pending(self) -> bool:
        """Whether the ring holds writes. Cheap, and from any thread."""
        ring = self._ring
        return ring is not None and self._lib.ml_coalesced_count(ring[0], _RING_ENTRIES) != 0

    def take_coalesced(self) -> list[tuple[int, bytes, bool]]:
        """Take all writes out of the ring: (address, data, whether to a port), in order.

        By one thread at a time.
        """
        if self._ring is None:
            return []
        ring, view = self._ring
        count = self._lib.ml_coalesced_count(ring, _RING_ENTRIES)
        if not count:
            return []
        first = int.from_bytes(view[:4], sys.byteorder)
        found = []
        for number in range(first, first + count):
            addr, length, pio, data = _COALESCED.unpack_from(
                view, _RING_HEADER + number % _RING_ENTRIES * _COALESCED.size
            )
            found.append((addr, data[:length], bool(pio)))
        self._lib.ml_coalesced_take(ring, _RING_ENTRIES, count)
        return found

    # ---- the kick ioctls --------------------------------------------------------------

    def kick_all_running_vcpus(self) -> None:
        """``KVM_KICK_ALL_RUNNING_VCPUS``; mainline kernels answer ENOTTY."""
        self._ioctl("KVM_KICK_ALL_RUNNING_VCPUS", self._lib.ml_kick_all_running_vcpus)

    def resume_all_kicked_vcpus(self) -> None:
        """``KVM_RESUME_ALL_KICKED_VCPUS``; mainline kernels answer ENOTTY."""
        self._ioctl("KVM_RESUME_ALL_KICKED_VCPUS", self._lib.ml_resume_all_kicked_vcpus)


class VcpuFd(_Fd):
    """A vCPU, its mapped ``struct kvm_run``, and its dirty ring where the VM has them."""

    __slots__ = (
        "_found",
        "_id",
        "_ml_run",
        "_next",
        "_ring",
        "_ring_entries",
        "_run",
        "_tid",
        "_union",
        "_view",
    )

    # None once closed. The mapping has no owner but the references to it, so a kick that is
    # under way in another thread while this one closes finishes before it is unmapped.
    _run: Any
    _view: memoryview | None
    _ring: Any

    def __init__(
        self, fd: int, b: Bindings, vcpu_id: int, mmap_size: int, ring_size: int = 0
    ) -> None:
        super().__init__(fd, b)
        self._id = vcpu_id
        self._view = None
        self._run = None
        self._ring = None
        self._ring_entries = ring_size // DIRTY_GFN_SIZE
        self._tid = b.ffi.new("int *", 0)  # who is inside KVM_RUN; ml_run and ml_kick keep it
        self._ml_run = b.lib.ml_run
        # Where the members that describe an exit lie: a union, so all at one offset.
        self._union = b.ffi.offsetof("struct kvm_run", "io")
        try:
            mapping = mmap.mmap(fd, mmap_size)
            if ring_size:
                offset = b.lib.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
                self._ring = b.ffi.from_buffer(mmap.mmap(fd, ring_size, offset=offset))
                self._next = b.ffi.new("uint32_t *", 0)
                self._found = b.ffi.new("uint64_t[]", 2 * self._ring_entries)
        except BaseException:
            self.close()
            raise
        self._view = memoryview(mapping)
        self._run = b.ffi.from_buffer("struct kvm_run *", mapping)

    @property
    def vcpu_id(self) -> int:
        """The id that the vCPU was created with."""
        return self._id

    def close(self) -> None:
        """Unmap ``kvm_run`` and close the descriptor. Idempotent."""
        self._run = None
        self._view = None
        self._ring = None
        super().close()

    def _details(self) -> str:
        if self._run is None:
            return f" id={self._id:#x}"
        return f" id={self._id:#x} exit_reason={self._run.exit_reason:#x}"

    def run(self) -> int:
        """``KVM_RUN``: enter the guest, with the GIL released.

        Returns:
            0 when the guest exited (see `exit_reason`), else the errno: EINTR
            when the vCPU was kicked, EBUSY when another thread is inside
            already, EBADF when the handle is closed.
        """
        return self._ml_run(self._fd, self._tid)  # type: ignore[no-any-return]

    def clear_kick(self) -> None:
        """Set ``immediate_exit`` to 0."""
        run = self._run
        if run is None:
            raise self._closed_error()
        run.immediate_exit = 0

    def kick(self) -> None:
        """Set ``immediate_exit`` to 1, then signal the thread inside `run`.

        Never blocks, may be called from any thread and at any time, and does
        no harm where no thread is inside or the handle is closed. A kick before
        `run` makes it return EINTR at once, until `clear_kick`.

        The signal may not get through when the process has too many pending
        (RLIMIT_SIGPENDING), so whoever waits for the vCPU repeats its kick.
        """
        run = self._run
        if run is not None:
            self._lib.ml_kick(run, self._tid)

    @property
    def exit_reason(self) -> int:
        """``kvm_run.exit_reason`` of the last exit."""
        run = self._run
        if run is None:
            raise self._closed_error()
        return run.exit_reason  # type: ignore[no-any-return]

    @property
    def in_smm(self) -> bool:
        """Whether the vCPU was in system management mode at the last exit."""
        run = self._run
        if run is None:
            raise self._closed_error()
        return bool(run.flags & _IN_SMM)

    def mmio(self) -> tuple[int, int, bool, bytes]:
        """The last MMIO exit: (physical address, length, is_write, data).

        ``data`` is ``length`` bytes in guest order; meaningful for writes.
        """
        view = self._view
        if view is None:
            raise self._closed_error()
        phys_addr, data, length, is_write = _MMIO.unpack_from(view, self._union)
        return phys_addr, length, is_write, data[:length]

    def complete_mmio(self, data: bytes) -> None:
        """Give the bytes that the last MMIO read returns to the guest.

        Raises:
            ValueError: ``data`` is not as long as the read.
        """
        view = self._view
        if view is None:
            raise self._closed_error()
        length = _MMIO.unpack_from(view, self._union)[2]
        if len(data) != length:
            raise ValueError(f"an MMIO read of {length:#x} bytes got {len(data):#x}")
        start = self._union + 8
        view[start : start + length] = data

    def io(self) -> tuple[int, int, int, bool, bytes]:
        """The last PIO exit: (port, size, count, is_out, data).

        ``data`` is ``size * count`` bytes; meaningful for OUT.
        """
        view = self._view
        if view is None:
            raise self._closed_error()
        is_out, size, port, count, start = _IO.unpack_from(view, self._union)
        return port, size, count, is_out, view[start : start + size * count].tobytes()

    def complete_io(self, data: bytes) -> None:
        """Give the ``size * count`` bytes that the last IN returns to the guest.

        Raises:
            ValueError: ``data`` is not as long as that.
        """
        view = self._view
        if view is None:
            raise self._closed_error()
        _, size, _, count, start = _IO.unpack_from(view, self._union)
        length = size * count
        if len(data) != length:
            raise ValueError(f"an IN of {size:#x} * {count:#x} bytes got {len(data):#x}")
        view[start : start + length] = data

    def terminal_exit(self) -> VcpuExit:
        """The last exit, when it was neither MMIO nor PIO, as a value."""
        run = self._run
        if run is None:
            raise self._closed_error()
        return terminal_exit(self._b, run)

    def collect_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what is new in the dirty ring; see `VcpuHandle.collect_dirty_gfns`.

        One thread at a time, for all of a VM's vCPUs.
        """
        ring = self._ring
        if ring is None:
            return []
        found = self._found
        count = self._lib.ml_collect_dirty_gfns(ring, self._ring_entries, self._next, found)
        values = iter(self._b.ffi.unpack(found, 2 * count))
        return list(zip(values, values, strict=True))

    def skip_dirty_gfns(self, none: int = 0) -> int:
        """Pass over entries of a ring that has overflowed; see `VcpuHandle.skip_dirty_gfns`."""
        ring = self._ring
        if ring is None:
            return 0
        return self._lib.ml_skip_dirty_gfns(  # type: ignore[no-any-return]
            ring, self._ring_entries, self._next, none
        )

    def get_regs(self) -> dict[str, int]:
        """``KVM_GET_REGS``: every field of ``struct kvm_regs`` by name."""
        return self._get("KVM_GET_REGS", "ml_get_regs", "struct kvm_regs")

    def set_regs(self, regs: dict[str, int]) -> None:
        """``KVM_SET_REGS``: all fields must be given.

        Raises:
            ValueError: A field is missing, unknown, or does not fit.
        """
        self._set("KVM_SET_REGS", "ml_set_regs", "struct kvm_regs", regs)

    def get_sregs(self) -> dict[str, Any]:
        """``KVM_GET_SREGS``: segments and tables as nested dicts."""
        return self._get("KVM_GET_SREGS", "ml_get_sregs", "struct kvm_sregs")

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        """``KVM_SET_SREGS``: all fields must be given.

        Raises:
            ValueError: A field is missing, unknown, or does not fit.
            KvmError: EINVAL when the processor could not be in such a state.
        """
        self._set("KVM_SET_SREGS", "ml_set_sregs", "struct kvm_sregs", sregs)

    def _get(self, name: str, function: str, ctype: str) -> dict[str, Any]:
        self._need_x86()
        cdata = self._b.ffi.new(f"{ctype} *")
        self._ioctl(name, getattr(self._lib, function), cdata)
        return struct_to_dict(cdata, self._b.ffi.typeof(ctype))

    def _set(self, name: str, function: str, ctype: str, values: dict[str, Any]) -> None:
        self._need_x86()
        cdata = self._b.ffi.new(f"{ctype} *")
        dict_to_struct(cdata, self._b.ffi.typeof(ctype), values, ctype)
        self._ioctl(name, getattr(self._lib, function), cdata)

    def _need_x86(self) -> None:
        if not self._b.has_x86:
            raise NotImplementedError("registers can be read and written on x86-64 only")
