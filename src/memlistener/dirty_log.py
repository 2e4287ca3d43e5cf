"""Memory-wide dirty logging: the order in which listeners hear of it.

What a listener does when told is its own business: the KVM listener fetches the
kernel's bitmaps. What is here is who is told, when, and what is taken back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from memlistener.address_space import AddressSpace
from memlistener.core.change import reach
from memlistener.core.dirty import DirtyClient
from memlistener.core.kinds import BACKED, LIMIT, LOG_SHIFT
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError, RegionTypeError, TransactionError
from memlistener.listener import MemoryRegionSection, Registration

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange
    from memlistener.memory import MemorySystem

_GLOBAL = 1 << DirtyClient.MIGRATION


class DirtyLog:
    """The memory-wide part of a `MemorySystem`'s dirty logging."""

    def __init__(self, memory: MemorySystem) -> None:
        self._memory = memory
        self.started = False
        self.clients = 0  # who logs all memory
        self.mask = 0  # the same for FlatView.render: what every range of memory logs

    def _registrations(self) -> list[Registration]:
        """All of them, in ascending priority; of equals the earlier-registered first."""
        every = [each for space in self._memory._spaces for each in space._registrations]
        return sorted(every, key=lambda each: (each.priority, each.number))

    def _listeners(self) -> list[Registration]:
        """As `_registrations`, but of a listener of several spaces only the first."""
        found: dict[int, Registration] = {}
        for each in self._registrations():
            found.setdefault(id(each.listener), each)
        return list(found.values())

    async def start(self) -> None:
        """See `MemorySystem.dirty_log_start`."""
        memory = self._memory
        if memory._owned():
            raise TransactionError("dirty_log_start inside a transaction of the same task")
        async with memory.transaction():
            if self.started:
                raise TransactionError("dirty logging is on already: stop it first")
            told: list[Registration] = []
            with trio.CancelScope(shield=True):
                try:
                    with self._telling():
                        for each in self._listeners():
                            await each.tell("log_global_start")
                            told.append(each)
                    memory._pending.journal.append(self._off)
                    self._on()
                    await memory._commit()
                except BaseException as error:
                    if memory.broken is None:
                        await memory._recover(error, _nothing, lambda: self._stop(told, []))
                    raise
                memory._pending.forget()

    async def stop(self) -> None:
        """See `MemorySystem.dirty_log_stop`."""
        memory = self._memory
        if memory._owned():
            raise TransactionError("dirty_log_stop inside a transaction of the same task")
        async with memory.transaction():
            if not self.started:
                raise TransactionError("dirty logging is not on")
            with trio.CancelScope(shield=True):
                memory._pending.journal.append(self._on)
                self._off()
                await memory._commit()
                memory._pending.forget()
                told: list[Registration] = []
                try:
                    await self._stop(self._listeners(), told)
                except BaseException as error:
                    await memory._recover(error, _nothing, lambda: self._resume(told))
                    raise

    async def _stop(self, registrations: list[Registration], told: list[Registration]) -> None:
        with self._telling():
            for each in reversed(registrations):
                await each.tell("log_global_stop")
                told.append(each)

    async def _resume(self, told: list[Registration]) -> None:
        """Take back a stop: those who heard log_global_stop, then the ranges."""
        with self._telling():
            for each in reversed(told):
                await each.tell("log_global_start")
        self._on()
        await self._memory._commit()
        self._memory._pending.forget()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """While hooks are called: they may open no transaction (rule T12)."""
        self._memory._delivering = True
        try:
            yield
        finally:
            self._memory._delivering = False

    def _on(self) -> None:
        self._set(True)

    def _off(self) -> None:
        self._set(False)

    def _set(self, started: bool) -> None:
        self.started = started
        self.clients = _GLOBAL if started else 0
        self.mask = self.clients << LOG_SHIFT
        for space in self._memory._spaces:
            self._memory._pending.damage(space, 0, LIMIT)

    async def sync(self, region: MemoryRegion | None) -> None:
        """See `MemorySystem.dirty_log_sync`."""
        if region is not None:
            _check_memory(region)
        await self._memory._acquire("dirty_log_sync")
        try:
            with trio.CancelScope(shield=True), self._telling():
                registrations = self._registrations()
                shown = None if region is None else _showing(region)
                synced: set[int] = set()  # a listener of several spaces is one
                for each in registrations:
                    if "log_sync_global" in each.hooks:
                        if id(each.listener) not in synced:
                            synced.add(id(each.listener))
                            await each.tell("log_sync_global")
                    elif "log_sync" in each.hooks:
                        ranges = each.space._view if shown is None else shown.get(each.space, ())
                        for logged in ranges:
                            if logged.dirty_log_mask:
                                section = MemoryRegionSection.of(each.space, logged)
                                await each.tell("log_sync", section)
                if region is None:
                    for each in self._listeners():
                        await each.tell("log_global_after_sync")
        finally:
            self._memory._release()

    async def clear(self, region: MemoryRegion, offset: int, size: int) -> None:
        """See `MemorySystem.dirty_log_clear`."""
        _check_memory(region)
        for what, value in (("offset", offset), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise RegionTypeError(f"{what} in {region!r} is an int, not {value!r}")
        if offset < 0 or size < 0:
            raise RegionError(f"[{offset:#x}, {offset + size:#x}) is no range of {region!r}")
        await self._memory._acquire("dirty_log_clear")
        try:
            with trio.CancelScope(shield=True), self._telling():
                showing = _showing(region)
                for each in self._registrations():
                    if "log_clear" not in each.hooks:
                        continue
                    for shown in showing.get(each.space, ()):
                        low = max(offset, shown.offset)
                        high = min(offset + size, shown.offset + shown.size)
                        if low < high:
                            section = MemoryRegionSection.of(each.space, shown)
                            await each.tell("log_clear", section.clipped(low, high))
        finally:
            self._memory._release()


def _showing(region: MemoryRegion) -> dict[AddressSpace, list[FlatRange]]:
    """The ranges that show ``region``, ascending, by address space: nothing else is looked at."""
    found: dict[AddressSpace, dict[int, FlatRange]] = {}
    for space, low, high in reach(region):
        if low < high and isinstance(space, AddressSpace):
            ranges = found.setdefault(space, {})
            for each in space.view.overlapping(max(low, 0), min(high, LIMIT)):
                if each.region is region:
                    ranges[each.start] = each
    return {space: [ranges[start] for start in sorted(ranges)] for space, ranges in found.items()}


def _check_memory(region: MemoryRegion) -> None:
    if not isinstance(region, MemoryRegion):
        raise RegionTypeError(f"what logs writes is a MemoryRegion, not {region!r}")
    if region.kind not in BACKED:
        raise RegionError(f"{region!r} has no memory whose writes could be logged")


def _nothing() -> None:
    pass
