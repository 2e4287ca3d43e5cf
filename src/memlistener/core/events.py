"""What a listener hears, as frozen values.

One class for each hook, with what is needed to call it: the order in which
listeners hear it (rule T4), the arguments behind the section, and the event
that takes it back (rule T13). Views are compared into these (`core.diff`), the
shell delivers them, unit tests compare them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeAlias

import attrs

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange
    from memlistener.core.ioeventfd import IoEventFd


@attrs.frozen
class RegionDel:
    """A range of the old view is not in the new one."""

    range: FlatRange
    hook: ClassVar[str] = "region_del"
    descending: ClassVar[bool] = True
    is_delete: ClassVar[bool] = True

    def inverse(self) -> Event:
        """The range comes back."""
        return RegionAdd(self.range)


@attrs.frozen
class RegionAdd:
    """A range of the new view was not in the old one."""

    range: FlatRange
    hook: ClassVar[str] = "region_add"
    descending: ClassVar[bool] = False
    is_delete: ClassVar[bool] = False

    def inverse(self) -> Event:
        """The range goes again."""
        return RegionDel(self.range)


@attrs.frozen
class RegionNop:
    """A range is in both views; its dirty-log mask may differ."""

    range: FlatRange
    hook: ClassVar[str] = "region_nop"
    descending: ClassVar[bool] = False
    is_delete: ClassVar[bool] = False

    def inverse(self) -> None:
        """Nothing to take back."""


@attrs.frozen
class LogStart:
    """Clients began to log writes to a range that stays.

    Attributes:
        range: As it is in the new view.
        old: The mask before: a bit for each `DirtyClient`.
        new: The mask after.
    """

    range: FlatRange
    old: int
    new: int
    hook: ClassVar[str] = "log_start"
    descending: ClassVar[bool] = False
    is_delete: ClassVar[bool] = False

    def inverse(self) -> Event:
        """They do not log it after all."""
        return LogStop(self.range, self.new, self.old)


@attrs.frozen
class LogStop:
    """Clients no longer log writes to a range; attributes as of `LogStart`."""

    range: FlatRange
    old: int
    new: int
    hook: ClassVar[str] = "log_stop"
    descending: ClassVar[bool] = True
    is_delete: ClassVar[bool] = False

    def inverse(self) -> Event:
        """They still log it."""
        return LogStart(self.range, self.new, self.old)


@attrs.frozen(repr=False)
class CoalescedAdd:
    """Writes to [addr, addr + size), absolute, may be delivered late and together."""

    range: FlatRange
    addr: int
    size: int
    hook: ClassVar[str] = "coalesced_io_add"
    descending: ClassVar[bool] = False
    is_delete: ClassVar[bool] = False

    def inverse(self) -> Event:
        """They may not after all."""
        return CoalescedDel(self.range, self.addr, self.size)

    def __repr__(self) -> str:
        return f"<CoalescedAdd [{self.addr:#x}, {self.addr + self.size:#x}) of {self.range}>"


@attrs.frozen(repr=False)
class CoalescedDel:
    """Writes to [addr, addr + size), absolute, are to be delivered at once again."""

    range: FlatRange
    addr: int
    size: int
    hook: ClassVar[str] = "coalesced_io_del"
    descending: ClassVar[bool] = True
    is_delete: ClassVar[bool] = True

    def inverse(self) -> Event:
        """They may still wait."""
        return CoalescedAdd(self.range, self.addr, self.size)

    def __repr__(self) -> str:
        return f"<CoalescedDel [{self.addr:#x}, {self.addr + self.size:#x}) of {self.range}>"


@attrs.frozen
class EventfdAdd:
    """A write to ``fd.addr``, absolute, is to signal an eventfd.

    Delivered in descending priority, and deleted in ascending: this is QEMU's,
    odd as it looks (rule T4).
    """

    range: FlatRange
    fd: IoEventFd
    hook: ClassVar[str] = "eventfd_add"
    descending: ClassVar[bool] = True
    is_delete: ClassVar[bool] = False

    def inverse(self) -> Event:
        """It is not to."""
        return EventfdDel(self.range, self.fd)


@attrs.frozen
class EventfdDel:
    """A write to ``fd.addr``, absolute, no longer signals an eventfd."""

    range: FlatRange
    fd: IoEventFd
    hook: ClassVar[str] = "eventfd_del"
    descending: ClassVar[bool] = False
    is_delete: ClassVar[bool] = True

    def inverse(self) -> Event:
        """It still does."""
        return EventfdAdd(self.range, self.fd)


Event: TypeAlias = (
    RegionDel
    | RegionAdd
    | RegionNop
    | LogStart
    | LogStop
    | CoalescedAdd
    | CoalescedDel
    | EventfdAdd
    | EventfdDel
)
