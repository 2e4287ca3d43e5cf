"""RAM whose backing comes and goes: who decides it, and who has to hear of it.

A memory device such as virtio-mem is one RAM region whose owner plugs and unplugs
parts of it: it populates granules and discards them. The tree does not change by
that, nor do views and memslots: a guest that touches what is discarded finds zeros.
But whoever has RAM pinned or mapped elsewhere, as VFIO has for its devices, must do
it for what is populated only, and let go before the memory does:

    class Pins(MemoryListener, RamDiscardListener):
        async def region_add(self, section):
            manager = section.region.ram_discard_manager
            if manager is not None:
                await manager.register(self, section)  # calls populate for what is there
            elif section.region.kind is RegionKind.RAM:
                self.populate(section)

        async def region_del(self, section):
            ...  # the same, with unregister and discard

        def populate(self, section):
            ...  # pin it

        def discard(self, section):
            ...  # unpin it

A change has its turn as a transaction has, and its hooks are called as a listener's
are. So while they are, no section that somebody registered for can go.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from memlistener.address_space import AddressSpace
from memlistener.core.change import reach
from memlistener.core.identity import Identity
from memlistener.core.kinds import RegionKind
from memlistener.core.ram_discard import DEFAULT_GRANULARITY, PopulatedGranules
from memlistener.core.region import MemoryRegion
from memlistener.errors import ListenerError, RegionError, RegionTypeError, TransactionError
from memlistener.listener import MemoryRegionSection
from memlistener.ram import PAGE_SIZE

if TYPE_CHECKING:
    from memlistener.memory import MemorySystem


class RamDiscardListener:
    """Base class of those who hear of it (QEMU's ``RamDiscardListener``).

    Both hooks may be plain or ``async def``. Their sections are within the one that
    was registered, and as long as can be: what came as one may go in parts, and what
    came in parts as one. Who needs pieces of one size cuts them by
    `RamDiscardManager.granularity`, at multiples of it in the region.
    """

    def populate(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """The section is about to be used; raise to refuse, having done nothing."""

    def discard(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """The section's memory is about to go: let go of it. Must not fail."""


_Part: TypeAlias = tuple[RamDiscardListener, MemoryRegionSection]


@attrs.frozen(eq=False)
class _Registration:
    listener: RamDiscardListener
    section: MemoryRegionSection

    def parts(self, runs: Iterable[tuple[int, int]]) -> Iterable[_Part]:
        """What the listener has to hear of the runs."""
        start = self.section.offset_within_region
        for low, high in runs:
            low, high = max(low, start), min(high, start + self.section.size)
            if low < high:
                yield self.listener, self.section.clipped(low, high)


class RamDiscardManager(Identity):
    """Which parts of a RAM region are populated (QEMU's ``RamDiscardManager``).

    Nothing is at first. The manager stays the region's, as
    `MemoryRegion.ram_discard_manager`.

    Args:
        region: RAM that no address space shows yet: who hears of its region_add has
            to find the manager.
        granularity: What is populated and discarded at a time, in bytes: a power of
            two, and a multiple of the page size.

    Raises:
        RegionError: ``region`` is not RAM (of an alias, use the target), has a
            manager, or has memory that cannot be discarded; or the granularity does
            not divide its size, or is none.
        TransactionError: An address space shows the region.
        OSError: Its memory has to be mapped now, and the host refuses.
    """

    def __init__(self, region: MemoryRegion, *, granularity: int = DEFAULT_GRANULARITY) -> None:
        if not isinstance(region, MemoryRegion):
            raise RegionTypeError(f"what is populated is a MemoryRegion, not {region!r}")
        if region.kind is not RegionKind.RAM:
            raise RegionError(f"{region!r} is not RAM: nothing of it can be populated")
        if region.ram_discard_manager is not None:
            raise RegionError(f"{region!r} has {region.ram_discard_manager!r} already")
        if live := reach(region):
            raise TransactionError(
                f"{region!r} is live in {live[0][0]!r}, whose listeners take all of it for "
                f"populated: make its RamDiscardManager before add_subregion()"
            )
        granules = PopulatedGranules(region.name, region.size, granularity)
        if granularity % PAGE_SIZE:
            raise RegionError(
                f"granularity {granularity:#x} of {region!r} is not a multiple of the page "
                f"size {PAGE_SIZE:#x}"
            )
        if not getattr(region.block, "discardable", False):
            raise RegionError(
                f"{region!r}: its block {region.block!r} cannot be discarded: use "
                f"RamBlock.anonymous, RamBlock.memfd, or RamBlock.file with shared=True"
            )
        self._region = region
        self._granules = granules
        self._registrations: list[_Registration] = []
        self._changing = False
        region._ram_discard_manager = self

    @property
    def region(self) -> MemoryRegion:
        """Whose RAM."""
        return self._region

    @property
    def granularity(self) -> int:
        """What is populated and discarded at a time, in bytes."""
        return self._granules.granularity

    def populated(self, offset: int = 0, size: int | None = None) -> list[tuple[int, int]]:
        """The populated runs of a range: ``(offset, size)`` in the region, ascending.

        While listeners are being told of a change, these are the ones before it.

        Args:
            offset: Where to begin, in bytes.
            size: How far to go, in bytes; None for all the rest.

        Raises:
            RegionError: The range is not within what can be populated.
        """
        return self._runs(offset, size, populated=True)

    def discarded(self, offset: int = 0, size: int | None = None) -> list[tuple[int, int]]:
        """As `populated`, the runs that are not; none: all of the range is populated."""
        return self._runs(offset, size, populated=False)

    def _runs(self, offset: int, size: int | None, *, populated: bool) -> list[tuple[int, int]]:
        low, high = self._granules.within(offset, size)
        return [
            (first, end - first)
            for first, end in self._granules.runs(low, high, populated=populated)
        ]

    # ---- changes ------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def populate(self, offset: int, size: int) -> None:
        """The range is going to be used: tell the listeners what of it was discarded.

        In ascending order, and of each run those who registered earlier first. Where
        one refuses, those before it are told to discard, in reverse, and nothing has
        changed. Takes its turn with transactions; shielded from cancellation from
        then on. The memory itself is not touched: it holds zeros after a discard, and
        otherwise what it was made with.

        Args:
            offset: In the region, a multiple of the granularity.
            size: In bytes, likewise.

        Raises:
            RegionError: The range is not of whole granules of the region.
            TransactionError: In a transaction of the same task, or in a hook.
            Exception: What a listener raised.
        """
        low, high = self._granules.request("populate", offset, size)
        async with self._change("populate"):
            missing = self._granules.runs(low, high, populated=False)
            await _tell_populate(self._parts(missing))
            self._granules.mark(low, high, populated=True)

    @trio.lowlevel.enable_ki_protection
    async def discard(self, offset: int, size: int) -> None:
        """The range is no longer used: tell the listeners, then give the memory back.

        In the same order as `populate`, and in its turn as that. One that raises
        keeps it neither from the others nor from being done; its exception comes out
        afterwards, several as an ``ExceptionGroup``. The memory reads as zeros then,
        and counts as written (`RamBlock.discard`).

        Raises:
            RegionError: As for `populate`.
            TransactionError: As for `populate`.
            OSError: The host did not take the memory. The range is discarded all the
                same; the block's own ``discard`` tries again.
        """
        low, high = self._granules.request("discard", offset, size)
        async with self._change("discard"):
            going = self._granules.runs(low, high, populated=True)
            errors = await _tell_discard(self._parts(going))
            self._granules.mark(low, high, populated=False)
            for first, end in going:
                try:
                    self._region.block.discard(first, end - first)
                except OSError as error:
                    errors.append(error)
        self._raise("discard", errors)

    def _parts(self, runs: Iterable[tuple[int, int]]) -> list[_Part]:
        """Who is to hear what: run by run, and for each listener by listener."""
        return [part for run in runs for each in self._registrations for part in each.parts([run])]

    # ---- listeners ----------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def register(self, listener: RamDiscardListener, section: MemoryRegionSection) -> None:
        """Hear of a section, and at once of what is populated of it.

        For a ``region_add``, and refused in a transaction's body as well as in the
        hooks of a change. Where the listener refuses a part it is told to discard
        those before, in reverse, and is not registered.

        Raises:
            ListenerError: It is no `RamDiscardListener`, is registered for the
                section already, or the section is of another region, or of another
                memory system than others.
            TransactionError: In a transaction of the same task, other than in a hook
                of its listeners; or in a hook of a change of this region.
            Exception: What the listener raised.
        """
        if not isinstance(listener, RamDiscardListener):
            raise ListenerError(f"{listener!r} is not a RamDiscardListener: subclass it")
        if getattr(section, "region", None) is not self._region:
            raise ListenerError(f"{section!r} is not a section of {self._region!r}")
        async with self._registering("register", section):
            if self._find(listener, section) is not None:
                raise ListenerError(f"{listener!r} is registered for {section!r} already")
            memory = self._memory()
            if memory is not None and memory is not section.address_space.memory:
                raise ListenerError(
                    f"{section!r} is of another memory system than {self._region!r}: a change "
                    f"could not take its turn in both"
                )
            registration = _Registration(listener, section)
            there = self._granules.runs(0, self._granules.size, populated=True)
            await _tell_populate(registration.parts(there))
            self._registrations.append(registration)

    @trio.lowlevel.enable_ki_protection
    async def unregister(self, listener: RamDiscardListener, section: MemoryRegionSection) -> None:
        """Hear no more of a section, after a discard of all that is populated of it.

        For a ``region_del``. A listener that raises is unregistered all the same.

        Raises:
            ListenerError: It is not registered for the section.
            TransactionError: As for `register`.
        """
        async with self._registering("unregister", section):
            registration = self._find(listener, section)
            if registration is None:
                raise ListenerError(f"{listener!r} is not registered for {section!r}")
            there = self._granules.runs(0, self._granules.size, populated=True)
            errors = await _tell_discard(registration.parts(there))
            self._registrations.remove(registration)
        self._raise("unregister", errors)

    def _find(
        self, listener: RamDiscardListener, section: MemoryRegionSection
    ) -> _Registration | None:
        for each in self._registrations:
            if each.listener is listener and each.section == section:
                return each
        return None

    # ---- turns --------------------------------------------------------------------

    def _memory(self) -> MemorySystem | None:
        """Whose transactions move the region; None where nobody can have heard of it."""
        if self._registrations:
            return self._registrations[0].section.address_space.memory
        for owner, _, _ in reach(self._region):
            if isinstance(owner, AddressSpace):
                return owner.memory
        return None

    @contextlib.asynccontextmanager
    async def _change(self, what: str) -> AsyncIterator[None]:
        """The memory system's turn, in which hooks are called."""
        memory = self._memory()
        while memory is not None:
            await memory._acquire(f"{what} of {self._region!r}")
            now = self._memory()
            if now is None or now is memory:
                break
            memory._release()  # the region went to another system while we waited
            memory = now
        self._changing = True
        try:
            with _telling(memory):
                yield
        finally:
            self._changing = False
            if memory is not None:
                memory._release()

    @contextlib.asynccontextmanager
    async def _registering(self, what: str, section: MemoryRegionSection) -> AsyncIterator[None]:
        """As `_change`; a transaction that is being delivered to us has the turn already."""
        memory = section.address_space.memory
        if memory.delivers_to_us:
            if self._changing:
                raise TransactionError(
                    f"{what} for {section!r} in a hook of a change of the same region: its "
                    f"listeners are being told"
                )
            yield
            return
        await memory._acquire(f"{what} for {section!r}")
        try:
            with _telling(memory):
                yield
        finally:
            memory._release()

    def _raise(self, what: str, errors: list[BaseException]) -> None:
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup(f"{what} of {self._region!r}", errors)

    def __repr__(self) -> str:
        return f"<RamDiscardManager of {self._region!r} granularity {self.granularity:#x}>"


@contextlib.contextmanager
def _telling(memory: MemorySystem | None) -> Iterator[None]:
    """While hooks are called: they may open no transaction (rule T12)."""
    if memory is None:
        yield
        return
    memory._delivering = True
    try:
        yield
    finally:
        memory._delivering = False


async def _tell_populate(parts: Iterable[_Part]) -> None:
    """All, or none and the exception."""
    told: list[_Part] = []
    try:
        for listener, section in parts:
            await _call(listener.populate, section)
            told.append((listener, section))
    except BaseException as error:
        errors = await _tell_discard(reversed(told))
        if errors:
            raise BaseExceptionGroup(
                "populate, and the discards that took it back", [error, *errors]
            ) from None
        raise


async def _tell_discard(parts: Iterable[_Part]) -> list[BaseException]:
    """All of them, whatever one raises."""
    errors: list[BaseException] = []
    for listener, section in parts:
        try:
            await _call(listener.discard, section)
        except BaseException as error:
            errors.append(error)
    return errors


async def _call(
    hook: Callable[[MemoryRegionSection], Awaitable[None] | None], section: MemoryRegionSection
) -> None:
    result = hook(section)
    if inspect.isawaitable(result):
        with trio.CancelScope(shield=True):  # rule T14
            await result
