"""`KvmIoListener`: ioeventfds and coalesced ranges -> the bus of a VM (rule K6).

All of it makes things faster and nothing else: a write for which the kernel has
no ioeventfd and no zone exits, and `dispatch` does with it what is right. So
what a kernel lacks is left to exits, and whatever could not be put back after a
failure is too; only an ioeventfd that stays where it should not be would be wrong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

import attrs

from memlistener.address_space import AddressSpace
from memlistener.core.ops import endianness
from memlistener.errors import KvmError
from memlistener.eventfd import descriptor
from memlistener.kvm import backend as kernel
from memlistener.kvm.coalesced import Coalesced, Zone
from memlistener.listener import ListenerPriority, MemoryListener, MemoryRegionSection


@attrs.define(eq=False)
class _Assigned:
    """An ioeventfd that the map has, and the kernel too unless it has to wait.

    Attributes:
        section: Where it shows.
        data: The value to match, as the map has it; None for any.
        eventfd: What the map has it signal.
        fd: A descriptor of our own of that: what is taken back needs one, and
            the owner may have closed his.
        waits: Whether the kernel has another in its place, which is to go yet.
    """

    section: MemoryRegionSection
    data: int | None
    eventfd: Any
    fd: int = -1
    waits: bool = False

    @property
    def datamatch(self) -> int | None:
        """The value to match as the kernel sees it: in its own byte order."""
        if self.data is None:
            return None
        order = endianness(self.section.region.ops)
        return int.from_bytes(self.data.to_bytes(self.section.size, order), sys.byteorder)

    def clashes(self, other: _Assigned) -> bool:
        """Whether the kernel would not have both: one write could signal either."""
        mine, theirs = self.section, other.section
        if mine.offset_within_address_space != theirs.offset_within_address_space:
            return False
        if not mine.size or not theirs.size:
            return True
        if mine.size != theirs.size:
            return False
        return None in (self.data, other.data) or self.datamatch == other.datamatch

    def belongs_with(self, other: _Assigned) -> bool:
        """Whether the region that shows here has ``other`` at the same place, and so both stay."""
        return any(
            fd.addr == self.section.offset_within_region
            and (fd.size, fd.data) == (other.section.size, other.data)
            and fd.eventfd == other.eventfd
            for fd in self.section.region.eventfds
        )

    def is_at(self, section: MemoryRegionSection, data: int | None, eventfd: Any) -> bool:
        """Whether it is this one that goes.

        The region may be another by now: where one shows in place of another with
        the same ioeventfd, nothing has changed that anybody would hear of.
        """
        mine = self.section
        return (
            mine.offset_within_address_space == section.offset_within_address_space
            and mine.size == section.size
            and self.data == data
            and bool(self.eventfd == eventfd)
        )

    def __str__(self) -> str:
        value = "" if self.data is None else f", value {self.data:#x}"
        return f"ioeventfd {self.eventfd!r} at {self.section!r}{value}"


class KvmIoListener(MemoryListener):
    """Keeps the bus of a VM as an address space wants it.

    Args:
        vm: The VM's handle.
        coalesced: Its coalesced zones.
        pio: Whether the address space is that of the I/O ports.
    """

    priority = ListenerPriority.ACCEL

    def __init__(self, vm: kernel.VmHandle, coalesced: Coalesced, *, pio: bool) -> None:
        self._vm = vm
        self._coalesced = coalesced
        self._pio = pio
        self._has_ioeventfds = bool(vm.check_extension(kernel.CAP_IOEVENTFD))
        self._has_any_width = bool(vm.check_extension(kernel.CAP_IOEVENTFD_NO_LENGTH))
        self._coalesces = bool(
            vm.check_extension(kernel.CAP_COALESCED_PIO if pio else kernel.CAP_COALESCED_MMIO)
        )
        self._assigned: list[_Assigned] = []
        self._closing = False

    # ---- ioeventfds ---------------------------------------------------------------------

    def eventfd_add(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> None:
        """``KVM_IOEVENTFD``, at once: it may come without a commit (rule T9).

        Rule T9 orders by value, so one may come before the one goes that the
        kernel would not have beside it: then it waits, and its writes exit.

        Raises:
            KvmError: The kernel refused, or never could: a value without a width
                (EINVAL), another of the same region that the same write would
                signal (EEXIST), no open descriptor.
        """
        if self._closing or not self._has_ioeventfds:
            return
        new = _Assigned(section, data if match_data else None, eventfd)
        if not section.size:
            if match_data:
                raise KvmError(
                    errno.EINVAL,
                    f"{new}: KVM matches values of writes of one width only; "
                    f"give it a size of 1, 2, 4 or 8",
                )
            if not self._has_any_width:
                return
        for other in self._assigned:
            if new.clashes(other):
                if new.belongs_with(other):
                    raise KvmError(
                        errno.EEXIST,
                        f"KVM_IOEVENTFD: {new} and {other}: one write could signal either; give "
                        f"both a value and one width, or both another width",
                    )
                new.waits = True
        new.fd = self._own_descriptor(new)
        if not new.waits:
            try:
                self._ioctl(new)
            except BaseException:
                os.close(new.fd)
                raise
        self._assigned.append(new)

    def eventfd_del(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> None:
        """``KVM_IOEVENTFD`` with the flag to deassign.

        Raises:
            KvmError: The kernel refused; nothing has changed.
        """
        wanted = data if match_data else None
        for old in self._assigned:
            if old.is_at(section, wanted, eventfd):
                break
        else:
            return  # left to exits, or the VM closes
        if not old.waits:
            self._ioctl(old, deassign=True)
        self._assigned.remove(old)
        try:
            for each in self._assigned:
                if each.waits and not any(
                    each.clashes(other) for other in self._assigned if not other.waits
                ):
                    self._ioctl(each)
                    each.waits = False
        except BaseException:
            self._assigned.append(old)
            if not old.waits:
                try:
                    self._ioctl(old)
                except KvmError:
                    old.waits = True
            raise
        os.close(old.fd)

    def _own_descriptor(self, new: _Assigned) -> int:
        try:
            return os.dup(descriptor(new.eventfd))
        except Exception as error:
            number = getattr(error, "errno", None) or errno.EBADF
            raise KvmError(number, f"{new} has no open file descriptor: {error}") from error

    def _ioctl(self, each: _Assigned, *, deassign: bool = False) -> None:
        section = each.section
        try:
            self._vm.ioeventfd(
                section.offset_within_address_space,
                section.size,
                each.fd,
                datamatch=each.datamatch,
                pio=self._pio,
                deassign=deassign,
            )
        except OSError as error:
            number = error.errno or errno.EIO
            text = f"KVM_IOEVENTFD: {each}: {os.strerror(number)}"
            if number == errno.EINVAL:
                text += "; is that an eventfd, and does it end below 2**64?"
            raise KvmError(number, text) from error

    # ---- coalesced ranges ---------------------------------------------------------------

    def coalesced_io_add(self, section: MemoryRegionSection, addr: int, size: int) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``.

        A range of 2 GiB or more, or at the very end of 64 bits, is left to exits.

        Raises:
            KvmError: The kernel refused.
        """
        if self._closing or not self._coalesces:
            return
        try:
            self._coalesced.add(Zone(addr, size, self._pio))
        except OSError as error:
            raise self._refused(
                "KVM_REGISTER_COALESCED_MMIO", section, addr, size, error
            ) from error

    async def coalesced_io_del(self, section: MemoryRegionSection, addr: int, size: int) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``; what the ring holds is served in the old view.

        The handlers run inside this hook. One that opens a transaction cannot do
        so here (rule T12), and none may fail a transaction, which may be one that
        is being undone. So where a handler raises, its write stays, bound to the
        old view, and those behind it: the next exit, transaction or flush serves
        it again, and raises what it then raises.

        Raises:
            KvmError: The kernel refused.
        """
        if self._closing or not self._coalesces:
            return
        zone = Zone(addr, size, self._pio)
        try:
            self._coalesced.remove(zone)
        except OSError as error:
            raise self._refused(
                "KVM_UNREGISTER_COALESCED_MMIO", section, addr, size, error
            ) from error
        try:
            await self._coalesced.drain_before_change()
        except Exception:
            self._coalesced.bind()
        except BaseException:  # Control-C
            self._coalesced.put_back(zone)
            raise

    def _refused(
        self, ioctl: str, section: MemoryRegionSection, addr: int, size: int, error: OSError
    ) -> KvmError:
        number = error.errno or errno.EIO
        return KvmError(
            number,
            f"{ioctl}: [{addr:#x}, {addr + size:#x}) of {section!r}: {os.strerror(number)}; "
            f"{len(self._coalesced.zones)} zones are registered",
        )

    # ---- the end ------------------------------------------------------------------------

    def detach(self, space: AddressSpace) -> None:
        """The VM closes: hear nothing any more. What is on the bus goes with its descriptor."""
        self._closing = True
        space.memory.forget(self, space)
        while self._assigned:
            with contextlib.suppress(OSError):
                os.close(self._assigned.pop().fd)
