"""`KvmRun`: KVM_RUN, and what the exits of a vCPU turn into.

MMIO and PIO exits are accesses: they are looked up in the view of the address
space and served, on the vCPU's own thread where everything they meet allows it
(memory, thread-safe ops, nothing at all), else by the task in ``run()``. All
other exits end the run and are its result.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from memlistener import dispatch
from memlistener.errors import KvmError
from memlistener.kvm import backend as kernel
from memlistener.kvm.exits import VcpuExit
from memlistener.kvm.slots import PAGE_SIZE
from memlistener.vcpu import Failed, Serve

if TYPE_CHECKING:
    from memlistener.address_space import AddressSpace
    from memlistener.core.flatview import FlatView
    from memlistener.kvm.coalesced import Coalesced

_ACCESSES = frozenset({kernel.EXIT_MMIO, kernel.EXIT_IO})


class Exits:
    """Counts what one vCPU's exits were. Written by one thread at a time."""

    __slots__ = ("by_reason", "holes", "kicked", "on_thread")

    def __init__(self) -> None:
        self.by_reason: Counter[str] = Counter()
        self.kicked = 0
        self.on_thread = 0
        self.holes = 0


class KvmRun:
    """What a `VcpuRunner` runs: KVM_RUN, and the dispatch of its exits.

    Args:
        handle: The vCPU's handle.
        space: Where its MMIO exits go.
        io: Where its PIO exits go; None for nothing there.
        name: For errors.
        coalesced: The VM's writes that come before any exit.
        smm: Where its MMIO exits go in system management mode, if elsewhere.
        readonly_memory: Whether the kernel has slots for read-only memory.
        ring_full: What empties its dirty ring when that is full.
    """

    def __init__(
        self,
        handle: kernel.VcpuHandle,
        space: AddressSpace,
        io: AddressSpace | None,
        name: str,
        *,
        coalesced: Coalesced,
        smm: AddressSpace | None = None,
        readonly_memory: bool = True,
        ring_full: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._smm = smm
        self._ring_full = ring_full
        self._handle = handle
        self._coalesced = coalesced
        self._space = space
        self._io = io
        self._name = name
        self._readonly_memory = readonly_memory
        self._seen: FlatView | None = None
        # The last exit was an access that KVM has yet to complete; and it was served.
        self._unfinished = self._served = False
        self._errno = 0
        # What the last exit was: what the handle's mmio() or io() returned, or the result.
        self._last: tuple[Any, ...] | VcpuExit | None = None
        self.closed = False  # a handler may still be under way when the VM closes
        self.exits = Exits()
        self.kick = handle.kick
        self.clear_kick = handle.clear_kick

    def enter(self) -> bool:
        """KVM_RUN. True where the vCPU was only kicked."""
        error = self._handle.run()
        self._served = self._unfinished = False  # KVM_RUN has completed it
        if not error:
            # The view in force while the guest made the access: nobody publishes
            # another one before this thread has passed the gate.
            self._seen = self._memory().view
            return False
        if error == errno.EINTR:
            self.exits.kicked += 1
            return True
        self._errno = error
        return False

    def settled(self, *, abandon: bool = False) -> bool:
        """Whether `settle` has nothing to do."""
        return self.closed or not (self._served or (abandon and self._unfinished))

    def settle(self, *, abandon: bool = False) -> object:
        """Enter KVM_RUN and leave it at once: what was served becomes complete.

        KVM writes the result of an access to the guest, and moves on its RIP,
        only when KVM_RUN is entered again. What it then finds is either the kick,
        or the next part of the same instruction.

        Args:
            abandon: Also where the access was not served: registers are about to
                be set, and the old instruction must not end on top of them.
        """
        while not self.settled(abandon=abandon):
            self._handle.kick()
            try:
                kicked = self.enter()
            finally:
                self._handle.clear_kick()
            if kicked:
                break
            if abandon and self._errno == 0:
                self._unfinished = True
                continue
            todo = self.handle()
            if todo is not None:
                return todo
        return None

    def describe(self) -> str:
        """What the vCPU is doing, for a warning that it does not stop."""
        return f"in KVM_RUN, {_in_words(self._last)}"

    def last_exit(self) -> tuple[str, int | None]:
        """The name of the last exit, and the address or port of an access."""
        if self._errno:
            return errno.errorcode.get(self._errno, str(self._errno)), None
        reason = self._handle.exit_reason
        if reason == kernel.EXIT_MMIO:
            return "Mmio", self._handle.mmio()[0]
        if reason == kernel.EXIT_IO:
            return "Io", self._handle.io()[0]
        return type(self._handle.terminal_exit()).__name__, None

    def handle(self, *, drained: bool = False) -> object:
        """Serve the exit here, or say who has to.

        Args:
            drained: The coalesced writes that came before it were served already.
        """
        if self._errno:
            error, self._errno = self._errno, 0
            raise KvmError(error, f"KVM_RUN of {self._name}: {os.strerror(error)}")
        reason = self._handle.exit_reason
        # Whoever serves it, and whenever: until then KVM waits to complete it.
        self._unfinished = reason in _ACCESSES
        if self._coalesced.active and not drained:
            try:
                if not self._coalesced.drain_here():
                    return Serve(self._drain_and_handle())
            except BaseException as error:
                return Failed(error, Serve(self._drain_and_handle()))
        seen, self._seen = self._seen, None
        if reason == kernel.EXIT_MMIO:
            return self._mmio(seen)
        if reason == kernel.EXIT_IO:
            return self._pio()
        if reason == kernel.EXIT_DIRTY_RING_FULL and self._ring_full is not None:
            self.exits.by_reason["DirtyRingFull"] += 1
            return Serve(self._ring_full)  # on trio's thread, where no slot changes meanwhile
        self._last = result = self._handle.terminal_exit()
        self.exits.by_reason[type(result).__name__] += 1
        return result

    def _drain_and_handle(self) -> Callable[[], Awaitable[object]]:
        """Serve the exit in trio, behind the coalesced writes that came before it.

        What is returned is called again where it was cancelled or raised, and
        then goes on where it was.
        """
        handled = False
        todo: object = None

        async def serve() -> object:
            nonlocal handled, todo
            if not handled:
                await self._coalesced.drain()
                if self.closed:
                    return None
                todo = self.handle(drained=True)
                handled = True
            if isinstance(todo, Failed):
                error, todo = todo.error, todo.again
                raise error
            return await todo.call() if isinstance(todo, Serve) else todo

        return serve

    def _memory(self) -> AddressSpace:
        """What the vCPU sees in the mode that it is in."""
        return self._space if self._smm is None or not self._handle.in_smm else self._smm

    def _mmio(self, seen: FlatView | None) -> object:
        self._last = addr, size, is_write, data = self._handle.mmio()
        self.exits.by_reason["Mmio"] += 1
        if seen is not None and self._is_hole(seen, addr, is_write):
            self.exits.holes += 1
        space = self._memory()
        view = space.view
        done = self._in_one_call(view, addr, size, data if is_write else None)
        if done is True:
            return None

        async def serve(view: FlatView) -> None:
            if is_write:
                await space.write_in(view, addr, data)
            else:
                answer, _ = await space.read_in(view, addr, size)
                if not self.closed:
                    self._handle.complete_mmio(answer)
            self._served = True

        if isinstance(done, BaseException):
            return Failed(done, Serve(lambda: serve(space.view)))
        return self._serve(serve, space, view, dispatch.on_thread(view, addr, size, is_write))

    def _pio(self) -> object:
        self._last = port, size, count, is_out, data = self._handle.io()
        self.exits.by_reason["Io"] += 1
        space = self._io
        if space is None:
            if not is_out:
                self._handle.complete_io(b"\xff" * (size * count))
            self._served = True
            return None
        view = space.view
        done: bool | BaseException = False
        if count == 1:
            done = self._in_one_call(view, port, size, data if is_out else None, io=True)
            if done is True:
                return None

        # A string instruction makes the same access ``count`` times. Where one of
        # them fails or is cancelled, the next run goes on with that one.
        served = 0
        answers = bytearray()

        async def serve(view: FlatView) -> None:
            nonlocal served
            while served < count:
                if is_out:
                    await space.write_in(view, port, data[served * size : (served + 1) * size])
                else:
                    answers.extend((await space.read_in(view, port, size))[0])
                served += 1
            if not is_out and not self.closed:
                self._handle.complete_io(bytes(answers))
            self._served = True

        if isinstance(done, BaseException):
            return Failed(done, Serve(lambda: serve(space.view)))
        return self._serve(serve, space, view, dispatch.on_thread(view, port, size, is_out))

    def _in_one_call(
        self, view: FlatView, addr: int, size: int, data: bytes | None, *, io: bool = False
    ) -> bool | BaseException:
        """Serve a read, or a write of ``data``, if one thread-safe call does it.

        Returns:
            Whether it was served, or what it raised.
        """
        try:
            if data is not None:
                if not dispatch.write_here(view, addr, data):
                    return False
            else:
                answer = dispatch.read_here(view, addr, size)
                if answer is None:
                    return False
                if io:
                    self._handle.complete_io(answer)
                else:
                    self._handle.complete_mmio(answer)
        except BaseException as error:
            return error
        self.exits.on_thread += 1
        self._served = True
        return True

    def _serve(
        self,
        serve: Callable[[FlatView], Coroutine[Any, Any, None]],
        space: AddressSpace,
        view: FlatView,
        here: bool,
    ) -> object:
        """Serve an access on this thread in ``view``, or in trio in the view of then."""
        in_trio = Serve(lambda: serve(space.view))
        if not here:
            return in_trio
        self.exits.on_thread += 1
        try:
            dispatch.run_on_thread(serve(view))
        except BaseException as error:
            return Failed(error, in_trio)
        return None

    def _is_hole(self, view: FlatView, addr: int, is_write: bool) -> bool:
        """Whether the kernel found no slot where the view had memory behind one."""
        each = view.lookup(addr)
        if each is None:
            return False
        if is_write:
            if not dispatch.writes_memory(each):
                return False
        elif not dispatch.reads_memory(each):
            return False
        if not self._readonly_memory and not dispatch.writes_memory(each):
            return False  # this kernel has no slots for read-only memory
        page = addr // PAGE_SIZE * PAGE_SIZE
        crooked = (each.region.block.host_address + each.offset - each.start) % PAGE_SIZE
        return not crooked and each.start <= page and page + PAGE_SIZE <= each.end


def _in_words(last: tuple[Any, ...] | VcpuExit | None) -> str:
    """The last exit, for people."""
    match last:
        case None:
            return "for the first time"
        case (addr, size, is_write, _):
            return (
                f"after an MMIO {'write' if is_write else 'read'} of {size:#x} bytes at {addr:#x}"
            )
        case (port, size, count, is_out, _):
            times = f" {count} times" if count > 1 else ""
            return f"after {'OUT' if is_out else 'IN'} of {size:#x} bytes{times} at port {port:#x}"
        case _:
            return f"after {last}"
