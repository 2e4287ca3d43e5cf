"""`Coalesced`: the writes that a VM's vCPUs leave in a ring instead of exiting (rule K6).

The kernel appends a write to a coalesced zone to one ring for the whole VM, and
the guest runs on. A device is to see writes in the guest's order all the same,
so the ring is *drained*, its writes dispatched one by one:

- before any exit of any vCPU is dispatched: on the vCPU's own thread where all
  of the writes can be served there, else by the task in ``run()``;
- before a transaction begins (`MemorySystem.before_transaction`), and again for
  a zone that goes (`KvmIoListener.coalesced_io_del`): it was the old map that the
  guest wrote to;
- when somebody asks (`Vm.flush_coalesced`), and at the end of the VM.

Writes move from the ring to a queue, and leave the queue when they have been
served. What a handler raises comes out of whoever drains, and the write stays at
the head: like an exit's access it is served again, by whoever drains next. In
the hook of a zone that goes it comes out of the next one only.

Drainers take turns, so that no two interleave. An exit waits for its turn: it is
later than what somebody else is still serving. A transaction does not: the
handler that is being served may be waiting for the lock that the transaction
has. What is left is then *bound* to the view of the moment, and will be served
there, in its order, whatever the map has become. A handler's own transactions
bind nothing: writes that the guest made after the one that changes the map are
for the map as it is after it.
"""

from __future__ import annotations

import collections
import contextlib
import threading

import attrs
import trio

from memlistener import dispatch
from memlistener.address_space import AddressSpace
from memlistener.core.flatview import FlatView
from memlistener.errors import KvmError
from memlistener.kvm import backend as kernel


@attrs.frozen
class Zone:
    """A coalesced zone.

    Attributes:
        addr: First address, or port.
        size: Bytes.
        pio: Whether ``addr`` is a port.
    """

    addr: int
    size: int
    pio: bool

    def possible(self) -> bool:
        """Whether the kernel could also unregister it: its sizes are ints, its sums wrap."""
        return self.size < 1 << 31 and self.addr + self.size < 1 << 64

    def contains(self, other: Zone) -> bool:
        """Whether ``other`` lies inside."""
        return (
            self.pio == other.pio
            and self.addr <= other.addr
            and other.addr + other.size <= self.addr + self.size
        )


@attrs.define(eq=False)
class _Write:
    addr: int
    data: bytes
    pio: bool
    view: FlatView | None = None  # None: that of the moment when it is served


class Coalesced:
    """The coalesced zones of one VM, and the writes that wait to be served.

    Belongs to trio's thread, but for `drain_here`.

    Args:
        vm: The VM's handle.
        space: Where writes to memory go.
        io: Where writes to ports go.

    Attributes:
        active: Whether there may be anything to drain: exits look at this first.
    """

    def __init__(
        self, vm: kernel.VmHandle, space: AddressSpace, io: AddressSpace | None = None
    ) -> None:
        self._vm = vm
        self._spaces = {False: space, True: space if io is None else io}
        self.active = False
        self._wanted: collections.Counter[Zone] = collections.Counter()
        self._registered: dict[Zone, None] = {}
        # Held for moments only: the queue and the ring's near end, `_registered`, `active`.
        self._mutex = threading.Lock()
        self._queue: collections.deque[_Write] = collections.deque()
        # Held while a handler runs. Nobody ever blocks on it: tasks park, threads leave
        # it to their task.
        self._turn = threading.Lock()
        self._parked = trio.lowlevel.ParkingLot()
        self._waiting = 0
        self._token = trio.lowlevel.current_trio_token()
        self._owner: trio.lowlevel.Task | None = None  # of the turn, if it is a task
        self._outside: list[trio.Nursery] = []  # the owner's, from before its turn

    # ---- zones --------------------------------------------------------------------------

    @property
    def zones(self) -> tuple[Zone, ...]:
        """Those that the kernel has."""
        return tuple(self._registered)

    def add(self, zone: Zone) -> None:
        """``KVM_REGISTER_COALESCED_MMIO``, where nobody has done so for the same zone.

        Raises:
            KvmError: The kernel refused; nothing has changed.
        """
        if zone not in self._registered and zone.possible():
            self._register(zone)
        self._wanted[zone] += 1

    def remove(self, zone: Zone) -> None:
        """``KVM_UNREGISTER_COALESCED_MMIO``, where nobody else wants the same zone.

        The kernel takes away every zone around it as well; those come back.
        Writes that are in the ring stay there: drain it.

        Raises:
            KvmError: The kernel refused; all zones are wanted as before. One that it
                would not take back exits.
        """
        if self._wanted[zone] == 1 and zone in self._registered:
            self._vm.unregister_coalesced_mmio(zone.addr, zone.size, zone.pio)
            around = [each for each in self._registered if each.contains(zone)]
            with self._mutex:
                for each in around:
                    del self._registered[each]
            try:
                for each in around:
                    if each != zone:
                        self._register(each)
            except BaseException:
                self._register_what_can_be()
                raise
        self._wanted[zone] -= 1
        if not self._wanted[zone]:
            del self._wanted[zone]

    def put_back(self, zone: Zone) -> None:
        """Take back `remove`. Where the kernel refuses, the writes exit, which is as right."""
        self._wanted[zone] += 1
        self._register_what_can_be()

    def _register_what_can_be(self) -> None:
        for each in self._wanted:
            if each not in self._registered and each.possible():
                with contextlib.suppress(KvmError):
                    self._register(each)

    def _register(self, zone: Zone) -> None:
        with self._mutex:  # first: the ring may be written to before the ioctl returns
            self._registered[zone] = None
            self.active = True
        try:
            self._vm.register_coalesced_mmio(zone.addr, zone.size, zone.pio)
        except BaseException:
            with self._mutex:
                del self._registered[zone]
                self._update_active()
            raise

    def _update_active(self) -> None:
        """With the mutex held: see whether an exit still has to look."""
        self.active = bool(self._registered or self._queue or self._vm.coalesced_pending())

    # ---- draining -------------------------------------------------------------------------

    def drain_here(self) -> bool:
        """Drain on the calling thread, a vCPU's, before its exit is dispatched.

        Returns:
            False where `drain` has to do it: another drainer is at it, or a write
            is for a device that is not thread-safe.

        Raises:
            Exception: What a handler raised.
        """
        with self._mutex:
            if not self._queue and not self._vm.coalesced_pending():
                return True
        # Tasks that wait come first: else threads might never let them.
        if self._waiting or not self._turn.acquire(blocking=False):
            return False
        try:
            self._fetch()
            while (found := self._next()) is not None:
                write, view = found
                if not dispatch.write_here(view, write.addr, write.data):
                    if not dispatch.on_thread(view, write.addr, len(write.data), True):
                        return False
                    space = self._spaces[write.pio]
                    dispatch.run_on_thread(space.write_in(view, write.addr, write.data))
                self._served()
            return True
        finally:
            self._end_turn()

    # Control-C in between would leave the turn taken for ever.
    @trio.lowlevel.enable_ki_protection
    async def drain(self) -> None:
        """Wait for the turn, then serve all writes that the guest has made so far.

        Within a handler that is being served from here it does nothing: what
        follows is served when the handler is done.

        Raises:
            Exception: What a handler raised.
        """
        if self._is_inside():
            return
        while not self._try_turn():
            self._waiting += 1
            try:
                # Again: whose turn it was may have missed that we wait.
                if self._try_turn():
                    break
                await self._parked.park()
            finally:
                self._waiting -= 1
        await self._serve_all()

    async def drain_at_end(self) -> None:
        """Serve all writes, behind one that raises, too: nobody will be back for them.

        Raises:
            Exception: What a handler raised; several in an `ExceptionGroup`.
        """
        errors: list[Exception] = []
        while True:
            try:
                await self.drain()
                break
            except Exception as error:
                errors.append(error)
                self._served()
        if len(errors) > 1:
            raise ExceptionGroup("several coalesced writes could not be served", errors)
        if errors:
            raise errors[0]

    @trio.lowlevel.enable_ki_protection
    async def drain_before_change(self) -> None:
        """The map may be about to change: serve all writes, or bind them to it as it is.

        They are bound where another drainer is at work.

        Raises:
            Exception: What a handler raised.
        """
        if not self.active or self._is_inside():
            return
        if self._try_turn():
            await self._serve_all()
        else:
            self.bind()

    def bind(self) -> None:
        """Have all writes made so far served in the view of now, whenever that is."""
        self._fetch()
        with self._mutex:
            for each in self._queue:
                if each.view is None:
                    each.view = self._spaces[each.pio].view

    def _fetch(self) -> None:
        with self._mutex:
            self._queue.extend(_Write(*each) for each in self._vm.take_coalesced())

    def _next(self) -> tuple[_Write, FlatView] | None:
        # Under the mutex: binding comes before the map changes, and this sees the
        # one before the other.
        with self._mutex:
            if not self._queue:
                return None
            first = self._queue[0]
            view = self._spaces[first.pio].view if first.view is None else first.view
            return first, view

    def _served(self) -> None:
        with self._mutex:
            self._queue.popleft()

    async def _serve_all(self) -> None:
        """In one's turn, which ends."""
        self._owner = trio.lowlevel.current_task()
        self._outside = self._owner.child_nurseries.copy()
        try:
            self._fetch()
            while (found := self._next()) is not None:
                write, view = found
                await self._spaces[write.pio].write_in(view, write.addr, write.data)
                self._served()
        finally:
            self._owner = None
            self._outside = []
            self._end_turn()

    # ---- turns ------------------------------------------------------------------------------

    def _try_turn(self) -> bool:
        return self._turn.acquire(blocking=False)

    def _end_turn(self) -> None:
        with self._mutex:
            self._update_active()
        self._turn.release()
        if self._waiting:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._parked.unpark)

    def _is_inside(self) -> bool:
        """Whether the current task is in a handler that is being served here, or is waited for."""
        owner = self._owner
        task = trio.lowlevel.current_task()
        if owner is None or task is owner:
            return owner is not None
        while (nursery := task.parent_nursery) is not None:
            task = nursery.parent_task
            if task is owner:
                return nursery not in self._outside
        return False
