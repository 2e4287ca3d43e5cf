"""`MemorySystem`, `AddressSpace` and transactions: the shell around the core.

A transaction is a stretch of one task's time in which a tree may change:

    async with memory.transaction():
        system.add_subregion(0, ram)

Mutators report what they damaged and how to take it back (`core.region`). When
the outermost transaction of the task ends, in this order:

1. every damaged window of every address space is rendered and compared; where
   nothing differs, nothing happens (rules T1, T10);
2. for each address space that changed: begin, the delete pass, the add pass, the
   new view is published by one assignment, commit (T2 to T6). All of it is
   shielded from cancellation (T14);
3. if anything raises, everything is taken back (`_undo`): the tree, then for
   each address space begin, the inverse of what each listener was told, the old
   view, commit (T13). If that raises too, the memory system is broken.

One transaction at a time: a second task waits its turn, in order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import attrs
import trio

from memlistener import dispatch
from memlistener.core.diff import Event, RegionAdd, RegionDel, RegionNop, diff
from memlistener.core.flatview import FlatView
from memlistener.core.ops import UNSPECIFIED, MemTxAttrs, MemTxResult
from memlistener.core.region import MemoryRegion
from memlistener.errors import (
    BrokenMemoryError,
    ListenerError,
    RegionError,
    TransactionError,
    UnassignedAccessError,
)
from memlistener.listener import (
    MemoryListener,
    MemoryRegionSection,
    Registration,
    insert_in_order,
)


class AddressSpace:
    """A root region and what it shows (QEMU's ``AddressSpace``).

    Make one with `MemorySystem.create_address_space`.
    """

    def __init__(
        self, memory: MemorySystem, name: str, root: MemoryRegion, *, unassigned_raises: bool
    ) -> None:
        """Use `MemorySystem.create_address_space`."""
        self._memory = memory
        self._name = name
        self._root = root
        self._unassigned_raises = unassigned_raises
        self._registrations: list[Registration] = []
        self._view = FlatView.render(root)
        self._unassigned = 0

    @property
    def name(self) -> str:
        """For people."""
        return self._name

    @property
    def root(self) -> MemoryRegion:
        """The region whose tree is shown."""
        return self._root

    @property
    def memory(self) -> MemorySystem:
        """The memory system that the address space belongs to."""
        return self._memory

    @property
    def view(self) -> FlatView:
        """The published view: as of the last commit, whole, from any thread."""
        return self._view

    @property
    def listeners(self) -> tuple[MemoryListener, ...]:
        """The registered listeners in ascending priority."""
        return tuple(each.listener for each in self._registrations)

    @property
    def unassigned_accesses(self) -> int:
        """How many accesses met nothing (rule K5), by whomever they were made."""
        return self._unassigned

    async def read(self, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED) -> bytes:
        """Read ``size`` bytes at ``addr``, as a device or a CPU would.

        Where nothing is, or a device refuses, the bytes are 0xff; use
        `read_result` to tell. Memory costs no checkpoint; async ops do what they do.

        Raises:
            RegionError: The range is not within 64 bits.
            UnassignedAccessError: Nothing is there, and the address space was
                created with ``unassigned_raises``.
        """
        data, _ = await self.read_result(addr, size, attrs)
        return data

    async def read_result(
        self, addr: int, size: int, attrs: MemTxAttrs = UNSPECIFIED
    ) -> tuple[bytes, MemTxResult]:
        """As `read`, with how it went."""
        self._check_range(addr, size)
        data, result, unassigned = await dispatch.read(self._view, addr, size, attrs)
        if unassigned:
            self.count_unassigned(addr, size, "read", unassigned)
        return data, result

    async def write(
        self, addr: int, data: bytes | bytearray | memoryview, attrs: MemTxAttrs = UNSPECIFIED
    ) -> MemTxResult:
        """Write ``data`` at ``addr``, as a device or a CPU would.

        Returns:
            How it went: what meets nothing or read-only memory vanishes.

        Raises:
            RegionError: The range is not within 64 bits.
            UnassignedAccessError: As for `read`.
        """
        raw = data if isinstance(data, bytes) else bytes(data)
        self._check_range(addr, len(raw))
        result, unassigned = await dispatch.write(self._view, addr, raw, attrs)
        if unassigned:
            self.count_unassigned(addr, len(raw), "write", unassigned)
        return result

    def map(self, addr: int, size: int) -> memoryview:
        """The memory behind [addr, addr + size): no copy, RAM and ROM only.

        The view of read-only memory is read-only. It stays valid, and the
        memory alive, whatever happens to the map afterwards.

        Raises:
            RegionError: Part of the range is not memory, or not one stretch of it.
        """
        self._check_range(addr, size)
        each = self._view.lookup(addr)
        if each is None or addr + size > each.end or not dispatch.reads_memory(each):
            what = "nothing" if each is None else repr(each)
            raise RegionError(
                f"[{addr:#x}, {addr + size:#x}) of {self._name!r} is not one stretch of "
                f"memory: at {addr:#x} there is {what}; use read() and write()"
            )
        offset = each.offset + addr - each.start
        found: memoryview = each.region.block.view[offset : offset + size]
        return found if dispatch.writes_memory(each) else found.toreadonly()

    def count_unassigned(self, addr: int, size: int, what: str, count: int = 1) -> None:
        """An access met nothing: count it, or make it an error if so asked.

        Raises:
            UnassignedAccessError: The address space was created to raise it.
        """
        self._unassigned += count
        if self._unassigned_raises:
            raise UnassignedAccessError(
                f"{what} of {size} bytes at {addr:#x} in {self._name!r}: nothing is there"
            )

    def _check_range(self, addr: int, size: int) -> None:
        if addr < 0 or size < 0 or addr + size > 1 << 64:
            raise RegionError(
                f"[{addr:#x}, {addr + size:#x}) is not within the 64 bits of {self._name!r}"
            )

    # ---- TreeOwner ----------------------------------------------------------------

    @property
    def journal(self) -> object:
        """The memory system keeps one journal for all its address spaces."""
        return self._memory

    def check_change(self, region: MemoryRegion, what: str) -> None:
        """Rule T11: only the task with the open transaction may change a live tree."""
        self._memory._check_change(region, what)

    def record(self, undo: Callable[[], None]) -> None:
        """Keep the way back from a change."""
        self._memory._journal.append(undo)

    def damage(self, low: int, high: int) -> None:
        """[low, high) has to be rendered again when the transaction ends."""
        self._memory._damage.setdefault(self, []).append((low, high))

    def detached(self, region: MemoryRegion) -> None:
        """Follow ``region`` to the transaction's end: a rollback brings it back."""
        self._memory._follow(region)

    def __repr__(self) -> str:
        return f"<AddressSpace {self._name!r} root {self._root.name!r}>"


class _Limbo:
    """Owner of what left the tree in this transaction, until the transaction ends.

    Without it a region could be taken out of the tree, changed while nobody
    looks, and be put back changed when the transaction rolls back.
    """

    def __init__(self, memory: MemorySystem) -> None:
        self._memory = memory
        self._regions: list[MemoryRegion] = []

    @property
    def journal(self) -> object:
        return self._memory

    def check_change(self, region: MemoryRegion, what: str) -> None:
        self._memory._check_change(region, what)

    def record(self, undo: Callable[[], None]) -> None:
        self._memory._journal.append(undo)

    def damage(self, low: int, high: int) -> None:
        """Nothing shows what is in limbo."""

    def detached(self, region: MemoryRegion) -> None:
        if self not in region._owners:
            region._attach_owner(self)
            self._regions.append(region)

    def clear(self) -> None:
        for region in self._regions:
            region._detach_owner(self)
        self._regions.clear()


@attrs.frozen
class _Change:
    """What a commit does to one address space."""

    space: AddressSpace
    old: FlatView
    new: FlatView
    events: Sequence[Event]


@attrs.frozen
class _Told:
    """What one listener was told successfully: for taking it back."""

    registration: Registration
    hook: str
    section: MemoryRegionSection | None


_INVERSE = {"region_add": "region_del", "region_del": "region_add"}


class MemorySystem:
    """Address spaces over trees of regions, and the transactions that change them.

    Belongs to one trio run. Reading views is free for all threads; everything
    else is for trio's thread.
    """

    def __init__(self) -> None:
        self._spaces: list[AddressSpace] = []
        self._lock = trio.Lock()
        self._depth = 0
        self._delivering = False
        self._broken: BaseException | None = None
        self._on_broken: list[Callable[[BaseException], None]] = []
        self._journal: list[Callable[[], None]] = []
        self._damage: dict[AddressSpace, list[tuple[int, int]]] = {}
        self._limbo = _Limbo(self)

    @property
    def address_spaces(self) -> tuple[AddressSpace, ...]:
        """In the order they were created, which is the order of delivery."""
        return tuple(self._spaces)

    @property
    def broken(self) -> BaseException | None:
        """Why the system refuses further use: what failed while undoing; or None."""
        return self._broken

    def create_address_space(
        self, name: str, root: MemoryRegion, *, unassigned_raises: bool = False
    ) -> AddressSpace:
        """An address space that shows ``root``, rendered at once.

        Args:
            name: For people; need not be unique.
            root: Its tree is live from now on (rule T11). Several address
                spaces may share a tree, or parts of it.
            unassigned_raises: Make an access that meets nothing an error
                instead of counting it.

        Raises:
            BrokenMemoryError: The system is broken.
        """
        self._check_usable()
        space = AddressSpace(self, name, root, unassigned_raises=unassigned_raises)
        root._attach_owner(space)
        self._spaces.append(space)
        return space

    def destroy_address_space(self, space: AddressSpace) -> None:
        """Forget an address space; its tree stays, and may be free to change.

        Raises:
            ListenerError: Listeners are still registered.
            TransactionError: A transaction is open.
        """
        if space._registrations:
            raise ListenerError(
                f"{space!r} still has listeners: unregister {list(space.listeners)!r} first"
            )
        if self._depth:
            raise TransactionError(f"{space!r} cannot be destroyed inside a transaction")
        if space in self._spaces:
            self._spaces.remove(space)
            space._root._detach_owner(space)

    # ---- transactions -----------------------------------------------------------

    def transaction(self) -> Transaction:
        """``async with memory.transaction():`` the tree may change inside.

        Nests within one task; only the outermost end tells the listeners. When
        the body raises or is cancelled, what it changed is taken back.

        Entering is a checkpoint, and waits while another task's transaction is
        open. Leaving is one too, and is shielded from cancellation.

        Raises:
            TransactionError: Opened from inside a listener's hook.
            BrokenMemoryError: The system is broken.
        """
        return Transaction(self)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise BrokenMemoryError(
                "an earlier transaction could not be undone: make a new MemorySystem"
            ) from self._broken

    def _owned(self) -> bool:
        """Whether the current task has the lock."""
        owner = self._lock.statistics().owner
        try:
            return owner is not None and owner is trio.lowlevel.current_task()
        except RuntimeError:  # not in trio: another thread, or no run at all
            return False

    def _check_change(self, region: MemoryRegion, what: str) -> None:
        self._check_usable()
        if self._delivering and self._owned():
            raise TransactionError(
                f"{what} of {region!r} inside a listener's hook: the map is being "
                f"delivered; do it in a transaction of another task afterwards"
            )
        if not self._depth or not self._owned():
            raise TransactionError(
                f"{what} of {region!r}, which is live: do it inside "
                f"'async with memory.transaction()', in the task that opened it"
            )

    def _follow(self, region: MemoryRegion) -> None:
        self._limbo.detached(region)

    async def _acquire(self, what: str) -> None:
        """The lock, or `TransactionError` where waiting for it could never end."""
        self._check_usable()
        if self._owned():
            where = "a listener's hook" if self._delivering else "an open transaction"
            raise TransactionError(f"{what} inside {where} of the same task")
        await self._lock.acquire()
        try:
            self._check_usable()
        except BaseException:
            self._lock.release()
            raise

    def _rollback(self, mark: int) -> None:
        """Take back every change of the tree since the journal had ``mark`` entries."""
        while len(self._journal) > mark:
            self._journal.pop()()

    def _forget(self) -> None:
        self._journal.clear()
        self._damage.clear()
        self._limbo.clear()

    async def _commit(self) -> None:
        """The outermost end. The tree is final, nobody has been told."""
        told: list[_Told] = []
        begun: list[_Change] = []
        try:
            changes = self._render()
            if changes:
                self._delivering = True
                for change in changes:
                    begun.append(change)
                    await self._deliver(change, told)
        except BaseException as error:
            try:
                self._rollback(0)
                await self._undo(begun, told)
            except BaseException as second:
                self._break(second)
                raise BrokenMemoryError(
                    f"a transaction failed ({error!r}) and could not be undone ({second!r}): "
                    f"the memory system is unusable"
                ) from BaseExceptionGroup("the failure, and that of undoing it", [error, second])
            raise
        finally:
            self._delivering = False

    def _render(self) -> list[_Change]:
        """Rules T1, T10: all views before the first callback, only what differs."""
        changes = []
        for space in self._spaces:
            windows = self._damage.get(space)
            if not windows:
                continue
            old = space._view
            new, events = old.updated(space._root, windows)
            if events:
                if any("region_nop" in each.hooks for each in space._registrations):
                    events = diff(old, new, nops=True)
                changes.append(_Change(space, old, new, events))
        return changes

    async def _deliver(self, change: _Change, told: list[_Told]) -> None:
        """Rules T2 to T6 for one address space."""
        space = change.space
        ascending = space._registrations
        descending = ascending[::-1]
        await self._tell(ascending, "begin", None, told)
        if ascending:
            for event in change.events:
                section = MemoryRegionSection.of(space, event.range)
                if isinstance(event, RegionDel):
                    await self._tell(descending, "region_del", section, told)
                elif isinstance(event, RegionAdd):
                    await self._tell(ascending, "region_add", section, told)
                elif isinstance(event, RegionNop):
                    await self._tell(ascending, "region_nop", section, told)
        space._view = change.new
        await self._tell(ascending, "commit", None, told)

    async def _tell(
        self,
        registrations: Sequence[Registration],
        name: str,
        section: MemoryRegionSection | None,
        told: list[_Told],
    ) -> None:
        args = () if section is None else (section,)
        for each in registrations:
            hook = each.hooks.get(name)
            if hook is not None:
                result = hook.call(*args)
                if hook.is_async:
                    await result
            # What a hook did before it raised is its own to take back.
            told.append(_Told(each, name, section))

    async def _undo(self, begun: Sequence[_Change], told: Sequence[_Told]) -> None:
        """Rule T13: begin, the inverse of what was told, the old view, commit."""
        for change in reversed(begun):
            space = change.space
            heard = [each for each in told if each.registration.space is space]
            who = [
                each
                for each in space._registrations
                if any(one.registration is each for one in heard)
            ]
            for each in who:
                await each.tell("begin")
            for one in reversed(heard):
                inverse = _INVERSE.get(one.hook)
                if inverse is not None:
                    await one.registration.tell(inverse, one.section)
            space._view = change.old
            for each in who:
                await each.tell("commit")

    def _break(self, error: BaseException) -> None:
        self._broken = error
        for callback in self._on_broken:
            callback(error)

    def when_broken(self, callback: Callable[[BaseException], None]) -> Callable[[], None]:
        """Call ``callback(error)`` should the system break: an accelerator stops its vCPUs.

        Returns:
            A function that takes the request back.
        """
        self._on_broken.append(callback)
        return lambda: self._on_broken.remove(callback)

    # ---- listeners ----------------------------------------------------------------

    async def register(self, listener: MemoryListener, space: AddressSpace) -> None:
        """Add a listener, and tell it the map as it is (rule T8).

        It hears begin, region_add for every range, commit. Shielded from
        cancellation once it has begun.

        Raises:
            ListenerError: It is registered for ``space`` already, or is none.
            TransactionError: Called inside a transaction of the same task.
        """
        if not isinstance(listener, MemoryListener):
            raise ListenerError(f"{listener!r} is not a MemoryListener: subclass it")
        if space not in self._spaces:
            raise ListenerError(f"{space!r} is not an address space of this memory system")
        await self._acquire("register")
        try:
            if listener in space.listeners:
                raise ListenerError(f"{listener!r} is registered for {space!r} already")
            registration = Registration.of(listener, space)
            await self._replay(registration, "region_add")
            insert_in_order(space._registrations, registration)
        finally:
            self._lock.release()

    async def unregister(self, listener: MemoryListener, space: AddressSpace | None = None) -> None:
        """Remove a listener, after telling it that everything goes (rule T8).

        It hears begin, region_del for every range, commit. Shielded from
        cancellation once it has begun.

        Args:
            listener: A registered listener.
            space: For which; None where it is registered for one only.

        Raises:
            ListenerError: It is not registered there, or for several.
            TransactionError: Called inside a transaction of the same task.
        """
        await self._acquire("unregister")
        try:
            found = [
                each
                for where in self._spaces
                for each in where._registrations
                if each.listener is listener and (space is None or where is space)
            ]
            if len(found) != 1:
                raise ListenerError(
                    f"{listener!r} is registered for {len(found)} address spaces here: "
                    f"{[each.space.name for each in found]}; say which one"
                )
            registration = found[0]
            await self._replay(registration, "region_del")
            registration.space._registrations.remove(registration)
        finally:
            self._lock.release()

    async def _replay(self, registration: Registration, hook: str) -> None:
        """Begin, ``hook`` for every range, commit; taken back if it raises."""
        space = registration.space
        told: list[_Told] = []
        self._delivering = True
        try:
            with trio.CancelScope(shield=True):
                try:
                    await self._tell([registration], "begin", None, told)
                    for each in space._view:
                        section = MemoryRegionSection.of(space, each)
                        await self._tell([registration], hook, section, told)
                    await self._tell([registration], "commit", None, told)
                except BaseException:
                    if told:
                        await registration.tell("begin")
                        for one in reversed(told):
                            if one.section is not None:
                                await registration.tell(_INVERSE[hook], one.section)
                        await registration.tell("commit")
                    raise
        finally:
            self._delivering = False


class Transaction:
    """What ``memory.transaction()`` returns: an async context manager, used once."""

    __slots__ = ("_mark", "_memory", "_outermost")

    def __init__(self, memory: MemorySystem) -> None:
        """Use `MemorySystem.transaction`."""
        self._memory = memory
        self._mark = -1
        self._outermost = False

    async def __aenter__(self) -> None:
        memory = self._memory
        if self._mark >= 0:
            raise TransactionError("a transaction object is used once: call transaction() again")
        if memory._owned() and not memory._delivering:
            await trio.lowlevel.checkpoint()
        else:
            await memory._acquire("a transaction")
            self._outermost = True
        memory._depth += 1
        self._mark = len(memory._journal)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        memory = self._memory
        try:
            if exc is not None:
                memory._rollback(self._mark)
            elif self._outermost:
                with trio.CancelScope(shield=True):
                    await memory._commit()
        except BaseException as error:
            if memory._broken is None and exc is not None:
                memory._break(error)
            raise
        finally:
            memory._depth -= 1
            if self._outermost:
                memory._forget()
                memory._lock.release()
