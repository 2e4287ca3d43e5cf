"""`VcpuRunner`: a vCPU as a trio task and a thread of its own, over any backend.

The thread lives as long as the vCPU, since KVM wants one vCPU on one thread. It
waits for the word to go, runs the guest, and reports one outcome: an access that
trio has to serve, the end of the run, or an exception. The task that called
`VcpuRunner.run` serves the access and gives the word again.

    task                              thread
    run() ── go ────────────────────> enter gate, guest, leave gate, handle ...
         <────────────────── outcome ─┘ (as often as it can by itself)
    serve the access
         ── go ────────────────────>

An access that was not served to its end, because the task was cancelled or the
handler raised, stays pending and is served again by the next `run`; an outcome
that came in while the task was being cancelled is returned by the next `run`.
Nothing is lost.

Threads are our own rather than trio's: a trio worker thread may serve anybody
between two calls, and counts against a limit of 40.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs
import trio

from memlistener.bracket import Gate, Pass
from memlistener.errors import VcpuBusyError


@attrs.frozen
class Serve:
    """An exit that needs the trio thread: what to await before going on.

    What it returns, if that is not None, ends the run.
    """

    call: Callable[[], Awaitable[object]]


class Backend(Protocol):
    """What executes guest code for a `VcpuRunner`."""

    def enter(self) -> bool:
        """Execute guest code on the calling thread until it exits.

        Returns:
            True where it was merely kicked, False where there is something to
            `handle`.
        """
        ...

    def kick(self) -> None:
        """Make `enter` return soon. From any thread, at any time; never blocks."""
        ...

    def clear_kick(self) -> None:
        """Forget a kick that came when nobody was inside."""
        ...

    def handle(self) -> object:
        """See to the exit that `enter` returned for, on the same thread.

        Returns:
            None to go on, a `Serve` to have trio do it, `Failed` where serving it
            raised, or anything else to end the run with it.
        """
        ...

    def settle(self, *, abandon: bool = False) -> Serve | None:
        """Finish what the last exit began, so that registers are what they seem.

        Called on the trio thread, when the vCPU was stopped and its thread is idle.

        Args:
            abandon: Finish it even where it was not served.

        Returns:
            An access that the same instruction made next, if trio has to serve it.
        """
        ...

    def describe(self) -> str:
        """What the vCPU is doing, for a warning that it does not stop."""
        ...


@attrs.frozen
class Failed:
    """An access that was tried on the vCPU's thread and raised.

    Attributes:
        error: Comes out of `VcpuRunner.run`.
        again: Serves the access in the next run.
    """

    error: BaseException
    again: Serve


@attrs.frozen
class _Raised:
    error: BaseException


_STOPPED = object()
_ENDED = object()


class VcpuRunner:
    """Runs one vCPU; see the module's text.

    Args:
        name: For people; also the thread's name.
        backend: Executes guest code.
        gate: Where it is stopped for a bracket.
    """

    def __init__(self, name: str, backend: Backend, gate: Gate) -> None:
        self.name = name
        self._backend = backend
        self._gate = gate
        self._pass = gate.add(name, backend.kick, backend.clear_kick, backend.describe)
        self._token = trio.lowlevel.current_trio_token()
        self._go = threading.Semaphore(0)
        self._close_lock = trio.Lock()
        self._closing = False
        self._closed = False
        self._running = False  # a task is in run()
        self._serving = False  # and serves an access
        self._working = False  # the thread has the word
        self._pending: Serve | None = None
        self._outcome: object = None
        self._reported = trio.Event()
        self._waiting: trio.lowlevel.Task | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:  # the host has no more threads
            gate.remove(self._pass)
            raise

    @property
    def running(self) -> bool:
        """Whether a task is in `run`."""
        return self._running

    def check_idle(self, what: str, *, changes: bool = False) -> None:
        """Raise where the vCPU's state is not to be touched now.

        It may be read between runs, from a device handler that the vCPU's own
        exit called, and on its own thread. It may be changed between runs; an
        access that a handler did not finish is then given up, and so is an exit
        that no `run` has returned yet.

        Raises:
            VcpuBusyError: It runs, or is in the middle of an access.
            trio.ClosedResourceError: It is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError(f"{what}: {self.name} is closed")
        on_its_thread = threading.get_ident() == self._thread.ident
        if self._working and (changes or not on_its_thread):
            raise VcpuBusyError(
                f"{what} while {self.name} runs: cancel its run() first, or do it in a handler "
                f"of its own access, where registers can be read"
            )
        if changes:
            if self._serving:
                raise VcpuBusyError(
                    f"{what} while an access of {self.name} is being served: the instruction "
                    f"would end by overwriting it; do it when run() has returned"
                )
            self._pending = None
            self._outcome = None
            self._backend.settle(abandon=True)

    async def run(self) -> Any:
        """Run the guest until it exits for good; the exit is returned.

        Cancelling it kicks the vCPU and waits until its thread has left the
        guest. A device handler's exception comes out of here.

        Raises:
            VcpuBusyError: Another task runs it already.
            trio.ClosedResourceError: The vCPU is closed, or was while it ran.
        """
        if self._running:
            raise VcpuBusyError(f"{self.name} is already run by another task")
        if self._closed:
            raise trio.ClosedResourceError(f"{self.name} is closed")
        self._running = True
        try:
            while True:
                if self._pending is not None:
                    ended = await self._serve(self._pending)
                    if ended is not None:
                        return ended
                await self._work()
                outcome = self._take_outcome()
                if isinstance(outcome, Serve):
                    self._pending = outcome
                elif isinstance(outcome, Failed | _Raised):
                    if isinstance(outcome, Failed):
                        self._pending = outcome.again
                    try:
                        raise outcome.error
                    finally:
                        del outcome  # the traceback has this frame: no cycle through it
                elif outcome is _STOPPED or outcome is _ENDED:
                    # Only closing stops a vCPU without cancelling its task.
                    raise trio.ClosedResourceError(f"{self.name} was closed while it ran")
                else:
                    return outcome
        finally:
            self._running = False

    async def _serve(self, pending: Serve) -> object:
        self._serving = True
        try:
            ended = await pending.call()
        finally:
            self._serving = False
        self._pending = None
        return ended

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        """Give the word and wait for an outcome, unless one has come in already."""
        if self._outcome is not None:
            await trio.lowlevel.checkpoint()
            return
        if self._closing:
            self._outcome = _STOPPED
            return
        self._reported = trio.Event()
        self._gate.allow(self._pass)
        self._working = True
        self._go.release()
        try:
            self._waiting = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        except BaseException:
            self._waiting = None
            await self._stop()
            outcome = self._take_outcome()
            if outcome is _STOPPED:
                self._pending = self._backend.settle()
            elif isinstance(outcome, Failed | _Raised):
                if isinstance(outcome, Failed):
                    self._pending = outcome.again
                raise outcome.error from outcome.error.__cause__  # what cancelled is its context
            else:
                self._outcome = outcome
            raise

    def _take_outcome(self) -> object:
        outcome, self._outcome = self._outcome, None
        return outcome

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _stop(self) -> None:
        """Get the thread out of the guest and wait for its outcome. Shielded."""
        self._gate.stop(self._pass)
        with trio.CancelScope(shield=True):
            while self._working:  # a second Ctrl-C may end the wait early
                with contextlib.suppress(KeyboardInterrupt):
                    await self._gate.kick_again(self._me, self._reported, what="stop")

    def _me(self) -> list[Pass]:
        return [self._pass]

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Stop the vCPU and end its thread. Idempotent; shielded from cancellation."""
        with trio.CancelScope(shield=True):
            async with self._close_lock:
                if self._closed:
                    return
                self._closing = True
                await self._stop()
                self._closed = True
                self._reported = trio.Event()
                self._go.release()
                await self._reported.wait()
                self._thread.join()
                self._gate.remove(self._pass)

    # ---- the thread ---------------------------------------------------------------

    def _main(self) -> None:
        while True:
            self._go.acquire()
            if self._closed:
                self._report(_ENDED)
                return
            self._report(self._outcome_of_run())

    def _outcome_of_run(self) -> object:
        # In a frame of its own: the thread keeps nothing of it while it waits.
        try:
            return self._execute()
        except BaseException as error:
            return _Raised(error)

    def _execute(self) -> object:
        gate, mine, backend = self._gate, self._pass, self._backend
        while gate.enter(mine):
            kicked = False
            try:
                kicked = backend.enter()
            finally:
                gate.leave(mine, returning=kicked)
            if not kicked:
                todo = backend.handle()
                if todo is not None:
                    return todo
        return _STOPPED

    def _report(self, outcome: object) -> None:
        # The run may be over, and nobody left to hear it.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._receive, outcome)

    def _receive(self, outcome: object) -> None:
        self._working = False
        if outcome is not _ENDED:
            self._outcome = outcome
        self._reported.set()
        task, self._waiting = self._waiting, None
        if task is not None:
            trio.lowlevel.reschedule(task)
