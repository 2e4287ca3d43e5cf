"""`MemorySystem`, `AddressSpace` and transactions: the shell around the core.

A transaction is a stretch of one task's time in which a tree may change:

    async with memory.transaction():
        system.add_subregion(0, ram)

Mutators report what they damaged and how to take it back (`pending`). When the
outermost transaction of the task ends, in this order:

1. every damaged window of every address space is rendered and compared; where
   nothing differs, nothing happens (rules T1, T10);
2. for each address space that changed: begin, the delete pass, the add pass, the
   new view is published by one assignment, commit (T2 to T6). All of it is
   shielded from cancellation (T14);
3. if anything raises, everything is taken back (`delivery`): the tree, then for
   each address space begin, the inverse of what each listener was told, the old
   view, commit (T13). If that raises too, the memory system is broken.

One transaction at a time: a second task waits its turn, in order of arrival.
Control-C is kept out of all this (`enable_ki_protection`), and out of each mutator
(`protect`), which it could leave half done: it arrives between two of them in the
body of a transaction, which rolls back, or afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType

import trio

from memlistener import protect
from memlistener.address_space import AddressSpace, Sharing
from memlistener.core.change import owners_around
from memlistener.core.diff import replay, replay_reversed
from memlistener.core.events import Event
from memlistener.core.flatview import FlatView
from memlistener.core.identity import Identity
from memlistener.core.region import MemoryRegion
from memlistener.core.sharing import view_root
from memlistener.delivery import Delivery
from memlistener.dirty_log import DirtyLog
from memlistener.errors import (
    BrokenMemoryError,
    ListenerError,
    RegionError,
    RegionTypeError,
    TransactionError,
)
from memlistener.listener import (
    MemoryListener,
    Registration,
    hooks_by_name,
    insert_in_order,
)
from memlistener.pending import Pending

# Those that have, or had, address spaces. Nearly always there is one, and then
# nobody has to look whether a tree is another's too.
_systems: weakref.WeakSet[MemorySystem] = weakref.WeakSet()


class MemorySystem(Identity):
    """Address spaces over trees of regions, and the transactions that change them.

    Belongs to one trio run. Reading views is free for all threads; everything
    else is for trio's thread.
    """

    def __init__(self) -> None:
        self._spaces: list[AddressSpace] = []
        self._lock = trio.Lock()
        self._owner: trio.lowlevel.Task | None = None  # who has the lock
        self._open: list[Transaction] = []  # the outermost first; all of one task
        self._delivering = False
        self._outside: list[trio.Nursery] = []  # the owner's, from before it had the lock
        self._created = itertools.count()
        self._sharing = Sharing()
        self._broken: BaseException | None = None
        self._on_broken: list[Callable[[BaseException], None]] = []
        self._before: list[Callable[[], Awaitable[None]]] = []
        self._pending = Pending(self)
        self._dirty_log = DirtyLog(self)

    @property
    def address_spaces(self) -> tuple[AddressSpace, ...]:
        """In the order they were created, which is the order of delivery."""
        return tuple(self._spaces)

    @property
    def broken(self) -> BaseException | None:
        """Why the system refuses further use: what failed while undoing; or None."""
        return self._broken

    @property
    def waits_for_us(self) -> bool:
        """Whether no transaction can begin before the current task has done something.

        It has one open, or is registering a listener; or the task that has or is waits
        in a nursery for this one.
        """
        return self._owned() or self._owner_waits()

    @property
    def delivers_to_us(self) -> bool:
        """Whether the current task is in a listener's hook, or one that a hook waits for."""
        return self._delivering and self.waits_for_us

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
            TransactionError: A transaction is open, or a listener is being registered.
            RegionError: The tree cannot be rendered (an alias shows itself), or
                parts of it are shown by another memory system.
            BrokenMemoryError: The system is broken.
        """
        self._check_usable()
        if not isinstance(root, MemoryRegion):
            raise RegionTypeError(f"root of address space {name!r} is a MemoryRegion, not {root!r}")
        if not isinstance(name, str):
            raise RegionTypeError(f"an address space's name is a str, not {name!r}")
        if self._owner is not None:
            raise TransactionError(
                f"address space {name!r} cannot be created inside a transaction, or while a "
                f"listener is being registered: do it before"
            )
        _systems.add(self)
        for owner in owners_around(root) if len(_systems) > 1 else ():
            if isinstance(owner, AddressSpace) and owner.memory is not self:
                raise RegionError(
                    f"address space {name!r} of {root!r} would show what {owner!r} of another "
                    f"memory system shows: they could not change it in one transaction; "
                    f"destroy_address_space() that one first"
                )
        space = AddressSpace(
            self, name, root, number=next(self._created), unassigned_raises=unassigned_raises
        )
        space._view_root = view_root(root)
        for other in self._sharing.of(space._view_root):  # rule F7
            space._view = other._view
            break
        else:
            space._view = FlatView.render(root, log_mask=self._dirty_log.mask)
        root._attach_owner(space)
        self._spaces.append(space)
        self._sharing.add(space)
        return space

    def destroy_address_space(self, space: AddressSpace) -> None:
        """Forget an address space; its tree stays, and may be free to change.

        Raises:
            ListenerError: Listeners are still registered, or it is not an address
                space of this memory system, or no longer.
            TransactionError: A transaction is open.
        """
        self._check_member(space)
        if space._registrations:
            raise ListenerError(
                f"{space!r} still has listeners: unregister {list(space.listeners)!r} first"
            )
        if self._owner is not None:
            raise TransactionError(
                f"{space!r} cannot be destroyed inside a transaction, or while a listener is "
                f"being registered"
            )
        self._spaces.remove(space)
        self._sharing.remove(space)
        space._root._detach_owner(space)

    def _check_member(self, space: AddressSpace) -> None:
        if space not in self._spaces:
            raise ListenerError(
                f"{space!r} is not an address space of this memory system: it was destroyed, or "
                f"is another's"
            )

    # ---- transactions -----------------------------------------------------------

    def transaction(self) -> Transaction:
        """``async with memory.transaction():`` the tree may change inside.

        Nests within one task; only the outermost end tells the listeners. When
        the body raises or is cancelled, what it changed is taken back: what it
        changed of live trees, that is. A region that no address space reaches is
        free, and keeps what was done to it.

        Entering is a checkpoint, and waits while another task's transaction is
        open. Leaving is shielded from cancellation; it gives way to other tasks
        only where a listener's hook does.

        Raises:
            TransactionError: Opened from inside a listener's hook, or by a task
                that such a hook waits for; or left while one within it is open.
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
        if self._owner is None:
            return False
        try:
            return self._owner is trio.lowlevel.current_task()
        except RuntimeError:  # not in trio: another thread, or no run at all
            return False

    def _check_change(self, region: MemoryRegion, what: str) -> None:
        self._check_usable()
        if self._delivering and self._owned():
            raise TransactionError(
                f"{what} of {region!r} inside a listener's hook: the map is being "
                f"delivered; do it in a transaction of another task afterwards"
            )
        if not self._open or not self._owned():
            raise TransactionError(
                f"{what} of {region!r}, which is live: do it inside "
                f"'async with memory.transaction()', in the task that opened it"
            )

    async def _acquire(self, what: str) -> None:
        """The lock, or `TransactionError` where waiting for it could never end."""
        self._check_usable()
        if self._owned():
            where = "a listener's hook" if self._delivering else "an open transaction"
            raise TransactionError(f"{what} inside {where} of the same task")
        if self._delivering and self._owner_waits():
            raise TransactionError(
                f"{what} in a task that a listener's hook started and waits for: it would wait "
                f"for the hook to end, and the hook for it"
            )
        if self._before:
            for callback in tuple(self._before):
                await callback()
        await self._lock.acquire()
        self._owner = trio.lowlevel.current_task()
        self._outside = self._owner.child_nurseries.copy()
        try:
            self._check_usable()
        except BaseException:
            self._release()
            raise

    def _owner_waits(self) -> bool:
        """Whether the current task is in a nursery that the owner of the lock has to wait for."""
        task = trio.lowlevel.current_task()
        while (nursery := task.parent_nursery) is not None:
            task = nursery.parent_task
            if task is self._owner:
                return nursery not in self._outside
        return False

    def _release(self) -> None:
        self._owner = None
        self._outside = []
        self._lock.release()

    async def _commit(self) -> None:
        """The outermost end. The tree is final, nobody has been told."""
        delivery = Delivery()
        try:
            changes = self._pending.changes(self._dirty_log.mask)
            self._pending.settle()
            if changes:
                self._delivering = True
                for change in changes:
                    await delivery.deliver(change)
        except BaseException as error:
            await self._recover(error, self._pending.rollback, delivery.undo)
            raise
        finally:
            self._delivering = False

    async def _recover(
        self,
        error: BaseException,
        restore: Callable[[], None],
        undo: Callable[[], Awaitable[None]],
    ) -> None:
        """Take everything back after ``error``, or break (rule T13)."""
        try:
            restore()
            await undo()
        except BaseException as second:
            self._break(second)
            raise BrokenMemoryError(
                f"a change of the map failed ({error!r}) and could not be undone ({second!r}): "
                f"the memory system is unusable"
            ) from BaseExceptionGroup("the failure, and that of undoing it", [error, second])

    def _break(self, error: BaseException) -> None:
        self._broken = error
        with contextlib.ExitStack() as stack:  # all of them, even where one raises
            for callback in reversed(self._on_broken):
                stack.callback(callback, error)

    def when_broken(self, callback: Callable[[BaseException], None]) -> Callable[[], None]:
        """Call ``callback(error)`` should the system break: an accelerator stops its vCPUs.

        Returns:
            A function that takes the request back; again does no harm.
        """
        request = partial(callback)  # one of its own: a callback may be asked for twice
        self._on_broken.append(request)

        def forget() -> None:
            if request in self._on_broken:
                self._on_broken.remove(request)

        return forget

    def before_transaction(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Await ``callback()`` before a task waits for its turn to open a transaction.

        And before whatever else waits for the same turn: to register a listener,
        to sync dirty logs. An accelerator then serves what the guest has written
        to the map as it is. The callback may open transactions, which call it
        again; what it raises leaves `transaction`, and nothing has begun.

        Returns:
            A function that takes the request back.
        """
        self._before.append(callback)
        return lambda: self._before.remove(callback)

    # ---- listeners ----------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
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
        await self._acquire("register")
        try:
            self._check_member(space)
            if any(each is listener for each in space.listeners):
                raise ListenerError(f"{listener!r} is registered for {space!r} already")
            registration = Registration.of(listener, space)
            await self._replay(registration, replay(space._view), starting=True)
            insert_in_order(space._registrations, registration)
            space._hooks = hooks_by_name(space._registrations)
        finally:
            self._release()

    @trio.lowlevel.enable_ki_protection
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
                if found:
                    names = [each.space.name for each in found]
                    raise ListenerError(
                        f"{listener!r} is registered for several address spaces: say which of "
                        f"{names}"
                    )
                target = "any address space here" if space is None else repr(space)
                raise ListenerError(f"{listener!r} is not registered for {target}")
            registration = found[0]
            where = registration.space
            await self._replay(registration, replay_reversed(where._view), starting=False)
            where._registrations.remove(registration)
            where._hooks = hooks_by_name(where._registrations)
        finally:
            self._release()

    def forget(self, listener: MemoryListener, space: AddressSpace) -> None:
        """Drop a listener that no longer wants to be told anything, not even that.

        At any time, also while another task's transaction is open; nothing
        happens where it is not registered.
        """
        space._registrations[:] = [
            each for each in space._registrations if each.listener is not listener
        ]
        space._hooks = hooks_by_name(space._registrations)

    async def _replay(
        self, registration: Registration, events: list[Event], *, starting: bool
    ) -> None:
        """Begin, ``events``, commit, for one listener; taken back if it raises (T8)."""
        space = registration.space
        hooks = {name: (hook,) for name, hook in registration.hooks.items()}
        delivery = Delivery()
        self._delivering = True
        try:
            with trio.CancelScope(shield=True):
                try:
                    await delivery.plain(space, hooks, "begin")
                    if starting and self._dirty_log.started and not self._has(registration):
                        await delivery.plain(space, hooks, "log_global_start")
                    await delivery.events(space, hooks, events)
                    await delivery.plain(space, hooks, "commit")
                except BaseException as error:
                    await self._recover(error, _nothing, lambda: delivery.undo_replay(registration))
                    raise
        finally:
            self._delivering = False

    def _has(self, registration: Registration) -> bool:
        """Whether its listener is registered already: then it knows that all memory is logged."""
        return any(
            each.listener is registration.listener
            for space in self._spaces
            for each in space._registrations
        )

    # ---- dirty logging ------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def dirty_log_start(self) -> None:
        """Log writes to all memory, for `DirtyClient.MIGRATION`.

        Calls log_global_start of every listener, in ascending priority; where
        one raises, those before it get log_global_stop in reverse, and nothing
        has changed. Then a transaction turns logging on, range by range.

        Raises:
            TransactionError: It is on already, or inside a transaction.
        """
        await self._dirty_log.start()

    @trio.lowlevel.enable_ki_protection
    async def dirty_log_stop(self) -> None:
        """A transaction turns logging off, then log_global_stop is called.

        Raises:
            TransactionError: It is not on, or inside a transaction.
        """
        await self._dirty_log.stop()

    @trio.lowlevel.enable_ki_protection
    async def dirty_log_sync(self, region: MemoryRegion | None = None) -> None:
        """Have the listeners bring dirty bits up to date, onto the `RamBlock` of each.

        log_sync goes to every range that logs; log_sync_global once to each
        listener that has it.

        Args:
            region: Only ranges of this region; None for all memory, which ends
                with log_global_after_sync.

        Raises:
            RegionError: The region has no memory.
            TransactionError: Inside a transaction of the same task.
        """
        await self._dirty_log.sync(region)

    @trio.lowlevel.enable_ki_protection
    async def dirty_log_clear(self, region: MemoryRegion, offset: int, size: int) -> None:
        """Dirty bits of [offset, offset + size) of a region were taken: count anew.

        log_clear goes to every range that shows a part of it, clipped to it.

        Raises:
            RegionError: The region has no memory, or the range is negative.
            TransactionError: Inside a transaction of the same task.
        """
        await self._dirty_log.clear(region, offset, size)


def _nothing() -> None:
    pass


class Transaction:
    """What ``memory.transaction()`` returns: an async context manager, used once."""

    __slots__ = ("_mark", "_memory", "_outermost")

    def __init__(self, memory: MemorySystem) -> None:
        """Use `MemorySystem.transaction`."""
        self._memory = memory
        self._mark = -1
        self._outermost = False

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> None:
        memory = self._memory
        if self._mark >= 0:
            raise TransactionError("a transaction object is used once: call transaction() again")
        if memory._owned() and not memory._delivering:
            await trio.lowlevel.checkpoint()
        else:
            await memory._acquire("a transaction")
            self._outermost = True
        memory._open.append(self)
        self._mark = len(memory._pending.journal)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        memory = self._memory
        opened = memory._open
        if self not in opened:  # one around it was left first, and took all back
            if exc is None:
                raise TransactionError(_LEFT_EARLY)
            return
        inner = opened[-1] is not self
        try:
            if exc is not None or inner:
                memory._pending.rollback(self._mark)
            elif self._outermost and memory._pending.damaged:
                await memory._commit()
        except BaseException as error:
            if memory._broken is None and (exc is not None or inner):
                memory._break(error)
            raise
        finally:
            del opened[opened.index(self) :]
            if self._outermost:
                memory._pending.forget()
                memory._release()
        if inner and exc is None:
            raise TransactionError(_LEFT_EARLY)


_LEFT_EARLY = (
    "a transaction was left while one within it was open: the changes of both were taken back; "
    "use 'async with', which leaves them in order"
)
protect.apply()
