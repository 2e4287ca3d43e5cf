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
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs
import trio

from memlistener.bracket import Gate, Pass
from memlistener.errors import VcpuBusyError
from memlistener.instrument import Where


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

    def last_exit(self) -> tuple[str, int | None]:
        """Why `enter` has returned, and for an access its address: for instruments.

        Called on the same thread before `handle`, where it was not merely kicked.
        """
        ...

    def handle(self) -> object:
        """See to the exit that `enter` returned for, on the same thread.

        Returns:
            None to go on, a `Serve` to have trio do it, `Failed` where serving it
            raised, or anything else to end the run with it.
        """
        ...

    def settled(self, *, abandon: bool = False) -> bool:
        """Whether `settle` has nothing to do."""
        ...

    def settle(self, *, abandon: bool = False) -> object:
        """Finish what the last exit began, so that registers are what they seem.

        Called on the trio thread, when the vCPU's own is idle or at a closed gate,
        and nobody holds it in order to change guest memory's map.

        Args:
            abandon: Finish it even where it was not served.

        Returns:
            As `handle`: what the same instruction did next, if somebody has to see to it.
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


@trio.lowlevel.disable_ki_protection
async def _call(pending: Serve) -> object:
    """Serve it. What it calls is the user's: Ctrl-C is for that as it is anywhere."""
    return await pending.call()


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
        self._pass = gate.add(
            name, backend.kick, backend.clear_kick, backend.describe, self._finish
        )
        self._home = threading.get_ident()
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
        self._left: object = None  # an outcome for a thread at the gate to report
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
        """Raise where the vCPU's state is not to be touched now; else make it what it seems.

        It may be read between runs, from a device handler that the vCPU's own
        exit called, on its own thread, and in a pause. It may be changed between
        runs, and in a pause while its thread is at the gate; an access that a
        handler did not finish is then given up, and so is an exit that no `run`
        has returned yet.

        Raises:
            VcpuBusyError: It runs, or is in the middle of an access.
            RuntimeError: From a thread that is neither trio's nor its own (rule B5:
                trio's makes no such call between two ioctls of one commit).
            trio.ClosedResourceError: It is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError(f"{what}: {self.name} is closed")
        caller = threading.get_ident()
        if caller == self._thread.ident and not changes:
            return
        if caller not in (self._home, self._thread.ident):
            raise RuntimeError(
                f"{what} of {self.name} outside trio's thread: call it there, "
                f"with trio.from_thread.run_sync"
            )
        if self._working and not (self._gate.quiet and self._gate.arrives(self._pass)):
            if self._gate.torn:
                raise VcpuBusyError(
                    f"{what} while {self.name} waits for a memory system that is broken: "
                    f"cancel its run() first"
                )
            raise VcpuBusyError(
                f"{what} while {self.name} runs: do it inside 'async with vm.paused()', cancel "
                f"its run() first, or do it in a handler of its own access, where registers can "
                f"be read"
            )
        if changes:
            if self._serving:
                raise VcpuBusyError(
                    f"{what} while an access of {self.name} is being served: the instruction "
                    f"would end by overwriting it; do it when run() has returned"
                )
            if self._running and not self._working:
                raise VcpuBusyError(
                    f"{what} while run() of {self.name} is about to return: do it afterwards"
                )
        self._settle_now(what, changes)

    def _settle_now(self, what: str, changes: bool) -> None:
        outcome = self._settle(abandon=changes)
        if not self._backend.settled(abandon=changes):
            why = (
                "the memory system is broken: it cannot be finished"
                if self._gate.torn
                else "a transaction is being committed: do it afterwards"
            )
            raise VcpuBusyError(
                f"{what} while {self.name} is in the middle of an instruction, and {why}"
            )
        if not changes:
            self._keep(outcome)
        elif isinstance(outcome, _Raised):
            raise outcome.error
        else:
            self._pending = self._outcome = self._left = None

    # ---- pauses -------------------------------------------------------------------

    def _finish(self) -> None:
        """Complete the instruction whose access was served, in a pause."""
        self._keep(self._settle())

    def _settle(self, *, abandon: bool = False) -> object:
        """`Backend.settle`, unless memory is being changed (rule B5); what came of it.

        It enters the guest's processor for a moment, which reads guest memory. What
        is not done now is done by whoever next wants to see it done.
        """
        if self._gate.changing:
            return None
        try:
            return self._backend.settle(abandon=abandon)
        except BaseException as error:
            return _Raised(error)

    def _keep(self, outcome: object) -> None:
        """``outcome`` is for the task in `run`, or for the next one."""
        if outcome is None:
            return
        if self._working:
            self._left = outcome
        else:
            self._outcome = outcome

    @trio.lowlevel.enable_ki_protection  # or Ctrl-C could come between taking and keeping
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
        began = 0 if self._gate.instruments.served is None else time.perf_counter_ns()
        try:
            ended = await _call(pending)
        finally:
            self._serving = False
        self._pending = None
        if began:
            self._tell_served("trio", began)
        return ended

    @trio.lowlevel.enable_ki_protection
    def _tell_served(self, where: Where, began: int) -> None:
        tell = self._gate.instruments.served
        if tell is not None:
            tell(self.name, where, began, time.perf_counter_ns())

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
        self._gate.depart(self._pass)
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
                outcome = self._settle()
            if isinstance(outcome, Failed | _Raised):
                if isinstance(outcome, Failed):
                    self._pending = outcome.again
                raise outcome.error from outcome.error.__cause__  # what cancelled is its context
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
        instruments = gate.instruments
        while gate.enter(mine):
            kicked = False
            left = 0
            try:
                if self._left is not None:
                    break
                kicked = backend.enter()
                if instruments.exit is not None:
                    left = time.perf_counter_ns()  # before the gate knows: no bracket yet
            finally:
                gate.leave(mine, returning=kicked)
            if left and (tell := instruments.exit) is not None:
                reason, addr = ("kicked", None) if kicked else backend.last_exit()
                tell(self.name, reason, addr, mine.entered_at, left)
            if not kicked:
                began = 0 if instruments.served is None else time.perf_counter_ns()
                todo = backend.handle()
                if todo is not None:
                    return todo
                if began:
                    self._tell_served("thread", began)
        outcome, self._left = self._left, None
        return _STOPPED if outcome is None else outcome

    def _report(self, outcome: object) -> None:
        # The run may be over, and nobody left to hear it.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._receive, outcome)

    def _receive(self, outcome: object) -> None:
        self._working = False
        self._gate.rest(self._pass)
        if outcome is not _ENDED:
            self._outcome = outcome
        self._reported.set()
        task, self._waiting = self._waiting, None
        if task is not None:
            trio.lowlevel.reschedule(task)
