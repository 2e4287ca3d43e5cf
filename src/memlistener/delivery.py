"""Telling listeners what changed, in the right order, and taking it back.

`Delivery` is one commit's. It remembers every call that succeeded, which is all
that is needed to undo: for each address space begin, the inverse of what each
listener was told, last first, the old view, commit (rule T13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from memlistener.core.events import (
    CoalescedAdd,
    CoalescedDel,
    Event,
    EventfdAdd,
    EventfdDel,
    LogStart,
    LogStop,
)
from memlistener.listener import Hook, MemoryRegionSection, Registration

if TYPE_CHECKING:
    from memlistener.address_space import AddressSpace
    from memlistener.pending import SpaceChange

Hooks = Mapping[str, Sequence[Hook]]
# Tuples: a union of types would be made anew for each event.
_EVENTFD = (EventfdAdd, EventfdDel)
_LOG = (LogStart, LogStop)
_COALESCED = (CoalescedAdd, CoalescedDel)


class Delivery:
    """One commit: what was told to whom so far."""

    def __init__(self) -> None:
        self._begun: list[SpaceChange] = []
        self._told: list[tuple[AddressSpace, Hook, Event | None]] = []

    async def deliver(self, change: SpaceChange) -> None:
        """Rules T2 to T6 and T9 for one address space."""
        space = change.space
        hooks = space._hooks
        self._begun.append(change)
        if change.quiet:
            space._publish(change.new, change.root)
            await self.events(space, hooks, change.events)
            await self.events(space, hooks, change.eventfds)
            return
        await self.plain(space, hooks, "begin")
        await self.events(space, hooks, change.events)
        space._publish(change.new, change.root)
        await self.events(space, hooks, change.eventfds)
        await self.plain(space, hooks, "commit")

    async def plain(self, space: AddressSpace, hooks: Hooks, name: str) -> None:
        """A hook without arguments, in ascending priority."""
        for hook in hooks.get(name, ()):
            result = hook.call()
            if result is not None:
                await hook.finish(result)
            # What a hook did before it raised is its own to take back.
            self._told.append((space, hook, None))

    async def events(self, space: AddressSpace, hooks: Hooks, events: Iterable[Event]) -> None:
        """Range by range, and for each listener by listener (rule T3)."""
        for event in events:
            concerned = hooks.get(event.hook)
            if not concerned:
                continue
            args = arguments(space, event)
            for hook in reversed(concerned) if event.descending else concerned:
                result = hook.call(*args)
                if result is not None:
                    await hook.finish(result)
                self._told.append((space, hook, event))

    async def undo(self) -> None:
        """Rule T13: everybody who was told anything is told the opposite."""
        for change in reversed(self._begun):
            space = change.space
            heard = [(hook, event) for where, hook, event in self._told if where is space]
            who: list[Registration] = []
            if not change.quiet:
                told = {hook.registration for hook, _ in heard}
                who = [each for each in space._registrations if each in told]
            for each in who:
                await each.tell("begin")
            await self._inverse(space, heard)
            space._publish(change.old, change.old_root)
            for each in who:
                await each.tell("commit")

    async def undo_replay(self, registration: Registration) -> None:
        """Take back what one listener heard while it was being registered."""
        if self._told:
            await registration.tell("begin")
            await self._inverse(
                registration.space, [(hook, event) for _, hook, event in self._told]
            )
            await registration.tell("commit")

    @staticmethod
    async def _inverse(space: AddressSpace, heard: Sequence[tuple[Hook, Event | None]]) -> None:
        for hook, event in reversed(heard):
            if hook.name == "log_global_start":
                await hook.registration.tell("log_global_stop")
            inverse = None if event is None else event.inverse()
            if inverse is not None:
                await hook.registration.tell(inverse.hook, *arguments(space, inverse))


def arguments(space: AddressSpace, event: Event) -> tuple[object, ...]:
    """What the hook of ``event`` is called with."""
    if isinstance(event, _EVENTFD):
        fd = event.fd
        each = event.range
        section = MemoryRegionSection(
            each.region,
            space,
            fd.addr - each.start + each.offset,
            fd.addr,
            fd.size,
        )
        return section, fd.match_data, fd.data or 0, fd.eventfd
    section = MemoryRegionSection.of(space, event.range)
    if isinstance(event, _LOG):
        return section, event.old, event.new
    if isinstance(event, _COALESCED):
        return section, event.addr, event.size
    return (section,)
