"""`MemoryListener`: who hears of changes, and in which order.

A listener is registered for one address space. Which hooks it overrides, and
which of those are ``async def``, is found out once, when it registers; a hook
that is not overridden is never called.
"""

from __future__ import annotations

import enum
import inspect
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import attrs
import trio

from memlistener.errors import ListenerError

if TYPE_CHECKING:
    from memlistener.address_space import AddressSpace
    from memlistener.core.flatview import FlatRange
    from memlistener.core.region import MemoryRegion


class ListenerPriority(enum.IntEnum):
    """Where a listener stands among others (``MEMORY_LISTENER_PRIORITY_*``).

    Adds are heard in ascending order and deletes in descending order: an
    accelerator maps memory before the device back ends that use it, and unmaps
    it after them. Any int will do; these are the usual ones.
    """

    MIN = 0
    ACCEL = 10
    DEV_BACKEND = 20


@attrs.frozen(eq=True)
class MemoryRegionSection:
    """A stretch of one region, and where an address space shows it.

    QEMU's ``MemoryRegionSection``: what region_add and region_del are about.

    Attributes:
        region: The region; never a container or an alias.
        address_space: In which it shows.
        offset_within_region: First byte in the region.
        offset_within_address_space: First address.
        size: Bytes.
        readonly: Whether the guest cannot write it there.
        nonvolatile: Whether it outlives the machine.
        unmergeable: Whether it stays apart from its neighbours.
    """

    region: MemoryRegion
    address_space: AddressSpace
    offset_within_region: int
    offset_within_address_space: int
    size: int
    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False

    @classmethod
    def of(cls, space: AddressSpace, each: FlatRange) -> MemoryRegionSection:
        """The section for a range of the space's view."""
        return cls(
            each.region,
            space,
            each.offset,
            each.start,
            each.size,
            each.readonly,
            each.nonvolatile,
            each.unmergeable,
        )

    def clipped(self, low: int, high: int) -> MemoryRegionSection:
        """The part that shows [low, high) of the region."""
        return attrs.evolve(
            self,
            offset_within_region=low,
            offset_within_address_space=(
                self.offset_within_address_space + low - self.offset_within_region
            ),
            size=high - low,
        )

    @property
    def end(self) -> int:
        """One past the last address in the address space."""
        return self.offset_within_address_space + self.size

    def __repr__(self) -> str:
        return (
            f"<MemoryRegionSection {self.address_space.name!r} "
            f"[{self.offset_within_address_space:#x}, {self.end:#x}) "
            f"{self.region.name!r} +{self.offset_within_region:#x}"
            f"{' readonly' if self.readonly else ''}>"
        )


class MemoryListener:
    """Base class of listeners (QEMU's ``MemoryListener``): override what you need.

    Every hook may be plain or ``async def``. The per-range hooks are best plain:
    queue there, act in `commit`. A hook that raises fails the transaction, which
    is undone (rule T13): each listener gets `begin`, the inverse of what it was
    told, `commit`. So a hook either does its work or leaves things as they were.

    Opening a transaction from a hook raises `TransactionError`.

    Attributes:
        priority: See `ListenerPriority`.
    """

    priority: int = ListenerPriority.MIN

    def begin(self) -> Awaitable[None] | None:
        """The map is about to change; the old view is still the one to be seen."""

    def commit(self) -> Awaitable[None] | None:
        """The map has changed; the new view is the one to be seen.

        What was deleted stays alive until this returns (rule T15).
        """

    def region_add(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """``section`` is in the new view and was not in the old one."""

    def region_del(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """``section`` was in the old view and is not in the new one."""

    def region_nop(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """``section`` is in both views. Overriding this makes each commit O(n)."""

    def eventfd_add(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> Awaitable[None] | None:
        """A write to the section, of ``data`` if ``match_data``, is to signal ``eventfd``.

        The section's size is the width of the write, 0 for any. Comes after both
        passes, and without begin and commit where nothing else changed (rule T9).
        """

    def eventfd_del(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> Awaitable[None] | None:
        """The write no longer signals ``eventfd``."""

    def coalesced_io_add(
        self, section: MemoryRegionSection, addr: int, size: int
    ) -> Awaitable[None] | None:
        """Writes to [addr, addr + size), absolute, may be delivered late and together."""

    def coalesced_io_del(
        self, section: MemoryRegionSection, addr: int, size: int
    ) -> Awaitable[None] | None:
        """Writes to [addr, addr + size), absolute, are to be delivered at once again."""

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> Awaitable[None] | None:
        """Clients began to log writes: the mask of `DirtyClient` bits grew to ``new``.

        A range that is added with logging on already is not told twice: but at
        registration it is, with ``old`` 0 (rules T6, T8).
        """

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> Awaitable[None] | None:
        """Clients no longer log writes: the mask shrank to ``new``."""

    def log_sync(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """Bring the section's dirty bits up to date: mark them on its `RamBlock`."""

    def log_sync_global(self) -> Awaitable[None] | None:
        """As `log_sync`, for everything at once. A listener has the one or the other."""

    def log_clear(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """The section's dirty bits were taken: writes from now on count again."""

    def log_global_start(self) -> Awaitable[None] | None:
        """Logging of all memory is about to start."""

    def log_global_stop(self) -> Awaitable[None] | None:
        """Logging of all memory has stopped."""

    def log_global_after_sync(self) -> Awaitable[None] | None:
        """A memory-wide sync is complete."""


HOOKS = tuple(name for name, member in vars(MemoryListener).items() if inspect.isfunction(member))


@attrs.frozen(eq=False)
class Hook:
    """One overridden hook of one listener."""

    name: str
    call: Callable[..., Any]
    is_async: bool
    registration: Registration

    async def finish(self, result: Any) -> None:
        """Await what the hook returned, if it is to be awaited, shielded (rule T14).

        Only here can a delivery be cancelled, so only here is the shield paid for.
        """
        if self.is_async or inspect.isawaitable(result):
            with trio.CancelScope(shield=True):
                await result


@attrs.define(eq=False)
class Registration:
    """A listener, its address space, and its overridden hooks by name."""

    listener: MemoryListener
    space: AddressSpace
    priority: int
    number: int = attrs.field(factory=itertools.count().__next__)  # in the order of making
    hooks: dict[str, Hook] = attrs.field(factory=dict)

    @classmethod
    def of(cls, listener: MemoryListener, space: AddressSpace) -> Registration:
        """Find out what ``listener`` overrides.

        Raises:
            ListenerError: It overrides both log_sync and log_sync_global, or its
                priority is no int.
        """
        priority = listener.priority
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ListenerError(f"priority of {listener!r} is an int, not {priority!r}")
        registration = cls(listener, space, int(priority))
        for name in HOOKS:
            call = getattr(listener, name)
            if getattr(call, "__func__", call) is not getattr(MemoryListener, name):
                is_async = inspect.iscoroutinefunction(call)
                registration.hooks[name] = Hook(name, call, is_async, registration)
        if "log_sync" in registration.hooks and "log_sync_global" in registration.hooks:
            raise ListenerError(
                f"{listener!r} has both log_sync and log_sync_global: keep the one that it "
                f"can do better"
            )
        return registration

    async def tell(self, name: str, *args: object) -> None:
        """Call hook ``name``, where it is overridden."""
        hook = self.hooks.get(name)
        if hook is not None:
            result = hook.call(*args)
            if result is not None:
                await hook.finish(result)


def hooks_by_name(registrations: Iterable[Registration]) -> dict[str, tuple[Hook, ...]]:
    """Who overrides what: a hook that nobody overrides is not there."""
    found: dict[str, tuple[Hook, ...]] = {}
    for each in registrations:
        for name, hook in each.hooks.items():
            found[name] = (*found.get(name, ()), hook)
    return found


def insert_in_order(registrations: list[Registration], new: Registration) -> None:
    """Rule T4: ascending priority, and of equals the earlier-registered first."""
    index = len(registrations)
    while index and registrations[index - 1].priority > new.priority:
        index -= 1
    registrations.insert(index, new)
