"""`MemoryListener`: who hears of changes, and in which order.

A listener is registered for one address space. Which hooks it overrides, and
which of those are ``async def``, is found out once, when it registers; a hook
that is not overridden is never called.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange
    from memlistener.core.region import MemoryRegion
    from memlistener.memory import AddressSpace


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


HOOKS = ("begin", "commit", "region_add", "region_del", "region_nop")


@attrs.frozen
class Hook:
    """One overridden hook of one listener."""

    call: Callable[..., Any]
    is_async: bool


@attrs.frozen(eq=False)
class Registration:
    """A listener, its address space, and its overridden hooks by name."""

    listener: MemoryListener
    space: AddressSpace
    priority: int
    hooks: dict[str, Hook]

    @classmethod
    def of(cls, listener: MemoryListener, space: AddressSpace) -> Registration:
        """Find out what ``listener`` overrides."""
        hooks = {}
        for name in HOOKS:
            call = getattr(listener, name)
            if getattr(call, "__func__", call) is not getattr(MemoryListener, name):
                hooks[name] = Hook(call, inspect.iscoroutinefunction(call))
        return cls(listener, space, int(listener.priority), hooks)

    async def tell(self, name: str, *args: object) -> None:
        """Call hook ``name``, where it is overridden."""
        hook = self.hooks.get(name)
        if hook is not None:
            result = hook.call(*args)
            if hook.is_async:
                await result


def insert_in_order(registrations: list[Registration], new: Registration) -> None:
    """Rule T4: ascending priority, and of equals the earlier-registered first."""
    index = len(registrations)
    while index and registrations[index - 1].priority > new.priority:
        index -= 1
    registrations.insert(index, new)
