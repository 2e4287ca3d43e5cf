"""The I/O bus of a `FakeVm`: ioeventfds, coalesced zones and the ring behind them.

Pure but for the eventfds: no locks and no threads; `FakeVm` calls in with its
lock held. The checks, their order and their errnos are those of Linux on x86,
and so is how a device is found for a write, oddities included. A property test
runs the same requests here and on /dev/kvm.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
from collections.abc import Iterator

import attrs

from memlistener.testing.fake_memslots import PAGE_SIZE, kernel_error

# The ring is one page: two indices, and 170 entries of which one always stays free.
RING_CAPACITY = (PAGE_SIZE - 8) // 24 - 1
# NR_IOBUS_DEVS. ioeventfds do not count, but find no room either when it is reached.
MAX_ZONES = 1000

_U64 = (1 << 64) - 1
_ONE = (1).to_bytes(8, "little")


@attrs.frozen
class FakeIoEventFd:
    """An ioeventfd, as ``struct kvm_ioeventfd`` describes it.

    Attributes:
        addr: Where the write has to begin.
        size: Its width; 0 for any.
        datamatch: The value that has to be written; None for any.
        pio: Whether ``addr`` is a port.
        eventfd: Which eventfd: equal for descriptors of the same one.
    """

    addr: int = attrs.field(repr=hex)
    size: int
    datamatch: int | None
    pio: bool
    eventfd: object = attrs.field(repr=False)


@attrs.frozen
class FakeZone:
    """A coalesced zone, as ``struct kvm_coalesced_mmio_zone`` describes it.

    Attributes:
        addr: First address, or port.
        size: Bytes.
        pio: Whether ``addr`` is a port.
    """

    addr: int = attrs.field(repr=hex)
    size: int = attrs.field(repr=hex)
    pio: bool

    def contains(self, addr: int, size: int) -> bool:
        """Whether [addr, addr + size) is inside, in the kernel's 64-bit sums."""
        end = (addr + size) & _U64
        return addr <= end and self.addr <= addr and end <= (self.addr + self.size) & _U64


@attrs.define(eq=False)
class _Device:
    """What is on the bus; ``fd`` is our own descriptor of an ioeventfd's eventfd."""

    what: FakeIoEventFd | FakeZone
    fd: int = -1

    def order(self, addr: int, size: int) -> int:
        """How an access compares with the device: 0 where it is inside."""
        what = self.what
        if addr < what.addr:
            return -1
        if what.size:  # without a width only the beginning counts
            return int((addr + size) & _U64 > (what.addr + what.size) & _U64)
        return int(addr > what.addr)


class FakeBus:
    """The MMIO and the PIO bus of one VM."""

    def __init__(self) -> None:
        """Nothing on either."""
        # As the kernel keeps them: each inserted before the first that it comes before.
        self._devices: dict[bool, list[_Device]] = {False: [], True: []}
        self._ring: collections.deque[tuple[int, bytes, bool]] = collections.deque()

    def ioeventfds(self) -> tuple[FakeIoEventFd, ...]:
        """Every ioeventfd, MMIO first."""
        return tuple(each.what for each in self._all() if isinstance(each.what, FakeIoEventFd))

    def zones(self) -> tuple[FakeZone, ...]:
        """Every coalesced zone, MMIO first."""
        return tuple(each.what for each in self._all() if isinstance(each.what, FakeZone))

    def _all(self) -> Iterator[_Device]:
        yield from self._devices[False]
        yield from self._devices[True]

    # KVM_IOEVENTFD.

    def assign(self, addr: int, size: int, fd: int, datamatch: int | None, pio: bool) -> None:
        """``KVM_IOEVENTFD``: the device holds a descriptor of its own.

        Raises:
            KvmError: EINVAL, EBADF, EEXIST or ENOSPC, as the kernel.
        """
        if size not in (0, 1, 2, 4, 8):
            raise kernel_error(errno.EINVAL, f"a write of {size:#x} bytes")
        if addr + size > _U64:  # the kernel's sum wraps
            raise kernel_error(errno.EINVAL, f"{addr:#x} + {size:#x} is past the end")
        if not size and datamatch is not None:
            raise kernel_error(errno.EINVAL, "no width, and a value to match")
        new = FakeIoEventFd(addr, size, datamatch, pio, _eventfd(fd))
        for other in self.ioeventfds():
            if other.pio == pio and other.addr == addr and _clash(other, new):
                raise kernel_error(errno.EEXIST, f"{new} clashes with {other}")
        self._check_room(new)
        self._insert(_Device(new, os.dup(fd)))

    def deassign(self, addr: int, size: int, fd: int, datamatch: int | None, pio: bool) -> None:
        """``KVM_IOEVENTFD`` with the flag ``DEASSIGN``.

        Raises:
            KvmError: EBADF, EINVAL for no eventfd, ENOENT for none such.
        """
        old = FakeIoEventFd(addr, size, datamatch, pio, _eventfd(fd))
        for each in self._devices[pio]:
            if each.what == old:
                os.close(each.fd)
                self._devices[pio].remove(each)
                return
        raise kernel_error(errno.ENOENT, f"there is no {old}")

    # KVM_(UN)REGISTER_COALESCED_MMIO.

    def register(self, zone: FakeZone) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``.

        Raises:
            KvmError: ENOSPC: the bus is full.
        """
        self._check_room(zone)
        self._insert(_Device(zone))

    def unregister(self, zone: FakeZone) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``: of all zones in which ``zone`` is."""
        if zone.size < 1 << 31:  # the kernel takes it for an int
            self._devices[zone.pio] = [
                each
                for each in self._devices[zone.pio]
                if not (
                    isinstance(each.what, FakeZone) and each.what.contains(zone.addr, zone.size)
                )
            ]

    # The guest's side, and the ring.

    def write(self, addr: int, data: bytes, pio: bool) -> bool:
        """A guest's write that no memslot takes; False: nor does the bus, so it exits."""
        for each in self._candidates(addr, len(data), self._devices[pio]):
            what = each.what
            if isinstance(what, FakeZone):
                if what.contains(addr, len(data)) and len(self._ring) < RING_CAPACITY:
                    self._ring.append((addr, data, pio))
                    return True
            elif _hit(what, addr, data):
                with contextlib.suppress(BlockingIOError):  # saturated
                    os.write(each.fd, _ONE)
                return True
        return False

    @property
    def pending(self) -> bool:
        """Whether the ring holds writes."""
        return bool(self._ring)

    def take(self) -> list[tuple[int, bytes, bool]]:
        """Empty the ring."""
        found = list(self._ring)
        self._ring.clear()
        return found

    def close(self) -> None:
        """Let go of all eventfds; what the ring holds stays."""
        for each in self._all():
            if each.fd >= 0:
                os.close(each.fd)
        self._devices = {False: [], True: []}

    def _check_room(self, new: FakeIoEventFd | FakeZone) -> None:
        if sum(isinstance(each.what, FakeZone) for each in self._devices[new.pio]) == MAX_ZONES:
            raise kernel_error(errno.ENOSPC, f"no room for {new}: {MAX_ZONES} zones are there")

    def _insert(self, new: _Device) -> None:
        devices = self._devices[new.what.pio]
        at = 0
        # "Comes before": begins no later, and (without a width: or) ends before.
        while at < len(devices) and new.order(devices[at].what.addr, devices[at].what.size) <= 0:
            at += 1
        devices.insert(at, new)

    @staticmethod
    def _candidates(addr: int, size: int, devices: list[_Device]) -> Iterator[_Device]:
        # A binary search in a list that is sorted only as far as nothing nests.
        # What it misses there exits, on the kernel too.
        low, count = 0, len(devices)
        while count:
            middle = low + count // 2
            order = devices[middle].order(addr, size)
            if order == 0:
                while middle and devices[middle - 1].order(addr, size) == 0:
                    middle -= 1
                while middle < len(devices) and devices[middle].order(addr, size) == 0:
                    yield devices[middle]
                    middle += 1
                return
            if order > 0:
                low = middle + 1
                count -= 1
            count //= 2


def _clash(one: FakeIoEventFd, other: FakeIoEventFd) -> bool:
    """Whether one write could signal both, of two at the same address."""
    if not one.size or not other.size:
        return True
    if one.size != other.size:
        return False
    return None in (one.datamatch, other.datamatch) or one.datamatch == other.datamatch


def _hit(what: FakeIoEventFd, addr: int, data: bytes) -> bool:
    if addr != what.addr or what.size not in (0, len(data)):
        return False
    return what.datamatch in (None, int.from_bytes(data, "little"))


def _eventfd(fd: int) -> object:
    """Which eventfd a descriptor is of: other descriptors of it give the same."""
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError) as error:
        raise kernel_error(errno.EBADF, f"{fd} is not open") from error
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            info = file.read()
    except FileNotFoundError:  # not on Linux: there are no eventfds, so take what there is
        return status.st_dev, status.st_ino
    if "eventfd-count:" not in info:
        raise kernel_error(errno.EINVAL, f"{fd} is no eventfd")
    found = re.search(r"eventfd-id: *(\d+)", info)
    return found[1] if found else (status.st_dev, status.st_ino)
