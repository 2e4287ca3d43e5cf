"""`VcpuRunner` over a toy: the thread, its outcomes, and what cancellation does to them."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import FrameType

import pytest
import trio
import trio.testing

from memlistener.bracket import Gate
from memlistener.errors import VcpuBusyError
from memlistener.vcpu import Serve, VcpuRunner

LONG_ENOUGH = 60.0

SPIN = object()
"""A step that stays inside until kicked, and is then tried again."""

LINGER = object()
"""A step that stays inside until kicked, and exits all the same: with the next step."""


class Toy:
    """Takes one step after the other; when there are no more, the outcome is ``"end"``.

    A step is `SPIN`, `LINGER`, or an exit: an exception is raised by
    ``enter``, a function is called by ``handle`` for the outcome, anything else
    is the outcome.
    """

    def __init__(self, *steps: object) -> None:
        self.steps = deque(steps)
        self.inside = threading.Event()
        self.kicked = threading.Event()
        self.kicks = 0
        self.settles = 0
        self.threads: set[int] = set()

    def enter(self) -> bool:
        self.threads.add(threading.get_ident())
        step = self.steps[0] if self.steps else "end"
        if step is SPIN or step is LINGER:
            self.inside.set()
            assert self.kicked.wait(LONG_ENOUGH)
            self.inside.clear()
            if step is SPIN:
                return True
            self.steps.popleft()
            step = self.steps[0]
        if isinstance(step, BaseException):
            self.steps.popleft()
            raise step
        return False

    def last_exit(self) -> tuple[str, int | None]:
        return "Toy", 0x70

    def handle(self) -> object:
        self.threads.add(threading.get_ident())
        step = self.steps.popleft() if self.steps else "end"
        return step() if callable(step) else step

    def kick(self) -> None:
        self.kicks += 1
        self.kicked.set()

    def clear_kick(self) -> None:
        self.kicked.clear()

    def settled(self, *, abandon: bool = False) -> bool:
        return True

    def settle(self, *, abandon: bool = False) -> object:
        self.settles += 1
        return None

    def describe(self) -> str:
        return "toying"

    async def wait_inside(self) -> None:
        """Wait until it is inside, in `SPIN` or `LINGER`."""
        assert await trio.to_thread.run_sync(self.inside.wait, LONG_ENOUGH)


Make = Callable[..., tuple[Toy, VcpuRunner]]


def vcpu_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("vcpu ")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert vcpu_threads() == []


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def make(gate: Gate) -> AsyncIterator[Make]:
    """Makes runners, all of which are closed afterwards."""
    runners: list[VcpuRunner] = []

    def _make(*steps: object) -> tuple[Toy, VcpuRunner]:
        toy = Toy(*steps)
        runners.append(VcpuRunner(f"vcpu {len(runners)}", toy, gate))
        return toy, runners[-1]

    yield _make
    with trio.fail_after(LONG_ENOUGH):
        for runner in runners:
            await runner.aclose()


async def run_and_cancel(runner: VcpuRunner, reached: Callable[[], Awaitable[object]]) -> object:
    """Run, and cancel it once ``reached`` is; what ``run`` raised, if not Cancelled."""
    raised: BaseException | None = None

    async def run() -> None:
        nonlocal raised
        try:
            await runner.run()
        except trio.Cancelled:
            raise
        except BaseException as error:
            raised = error

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await reached()
            nursery.cancel_scope.cancel()
    assert not runner.running
    return raised


# ---- outcomes --------------------------------------------------------------------------------


async def test_outcomes_in_order(make: Make) -> None:
    """Each run returns the next outcome; what handle() sees to itself does not end it."""
    toy, runner = make("first", lambda: None, lambda: None, "second", False)
    assert await runner.run() == "first"
    assert await runner.run() == "second"
    assert await runner.run() is False
    assert await runner.run() == "end"
    assert len(toy.threads) == 1
    assert toy.threads.isdisjoint({threading.get_ident()})


async def test_run_is_a_checkpoint(make: Make) -> None:
    """A run in a cancelled scope is cancelled, and loses nothing."""
    _, runner = make("first")
    with trio.CancelScope() as scope:
        scope.cancel()
        await runner.run()
    assert scope.cancelled_caught
    assert await runner.run() == "first"


async def test_serve_is_awaited_in_the_task(make: Make) -> None:
    """An access for trio is served by the task in run(), and the guest goes on."""
    served: list[object] = []

    async def serve() -> None:
        await trio.lowlevel.checkpoint()
        served.append(trio.lowlevel.current_task())

    _, runner = make(Serve(serve), Serve(serve), "out")
    assert await runner.run() == "out"
    assert served == [trio.lowlevel.current_task()] * 2


async def test_a_handler_that_raises(make: Make) -> None:
    """The handler's error leaves run(); the next run serves the access again, then goes on."""
    attempts: list[str] = []

    async def serve() -> None:
        await trio.lowlevel.checkpoint()
        attempts.append("served")
        if len(attempts) < 3:
            raise LookupError(str(len(attempts)))

    toy, runner = make(Serve(serve), "out")
    for number in "12":
        with pytest.raises(LookupError, match=number):
            await runner.run()
        assert not runner.running
        assert list(toy.steps) == ["out"]
    assert await runner.run() == "out"
    assert len(attempts) == 3


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
async def test_enter_raises(make: Make, error: BaseException) -> None:
    """What enter() raises comes out of run(), and the vCPU can be run again."""
    _, runner = make(error, "out")
    with pytest.raises(type(error)) as caught:
        await runner.run()
    assert caught.value is error
    assert await runner.run() == "out"


async def test_handle_raises(make: Make) -> None:
    """What handle() raises comes out of run(), and the vCPU can be run again."""

    def fail() -> object:
        raise ZeroDivisionError

    _, runner = make(fail, "out")
    with pytest.raises(ZeroDivisionError):
        await runner.run()
    assert await runner.run() == "out"


# ---- cancellation -----------------------------------------------------------------------------


async def test_b9_cancelled_in_guest(make: Make, gate: Gate) -> None:
    """B9: cancelling run() kicks the vCPU out; the next run goes on where it was."""
    toy, runner = make(SPIN, "out")
    for _ in range(3):
        assert await run_and_cancel(runner, toy.wait_inside) is None
        assert gate.statistics().vcpus_inside == 0
    assert toy.kicks >= 3
    toy.steps.popleft()
    assert await runner.run() == "out"


async def test_cancelled_in_handler(make: Make) -> None:
    """A handler that is cancelled is called again by the next run."""
    started = trio.Event()
    calls = 0

    async def serve() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            started.set()
            await trio.sleep_forever()

    toy, runner = make(Serve(serve), "out")
    assert await run_and_cancel(runner, started.wait) is None
    assert toy.kicks == 0  # it was not inside
    assert await runner.run() == "out"
    assert calls == 2


async def test_cancelled_while_an_outcome_comes_in(make: Make) -> None:
    """An outcome that comes in during cancellation is returned by the next run."""
    toy, runner = make(LINGER, "outcome", "next")
    assert await run_and_cancel(runner, toy.wait_inside) is None
    assert list(toy.steps) == ["next"]
    assert await runner.run() == "outcome"
    assert await runner.run() == "next"


async def test_cancelled_while_an_access_comes_in(make: Make) -> None:
    """An access that comes in during cancellation is served by the next run, once."""
    calls = 0

    async def serve() -> None:
        nonlocal calls
        calls += 1

    toy, runner = make(LINGER, Serve(serve), "out")
    assert await run_and_cancel(runner, toy.wait_inside) is None
    assert calls == 0
    assert await runner.run() == "out"
    assert calls == 1


async def test_cancelled_while_an_exception_comes_in(make: Make) -> None:
    """An exception that comes in during cancellation leaves that run: it is not lost."""
    error = ValueError("not lost")
    toy, runner = make(LINGER, error, "out")
    assert await run_and_cancel(runner, toy.wait_inside) is error
    assert await runner.run() == "out"


async def test_b9_cancelled_at_the_gate(make: Make, gate: Gate) -> None:
    """B9: a vCPU that waits at a held gate can be cancelled."""
    toy, runner = make("out")
    async with gate.holding():
        assert await run_and_cancel(runner, trio.testing.wait_all_tasks_blocked) is None
        assert toy.threads == set()
    assert await runner.run() == "out"


# ---- misuse -----------------------------------------------------------------------------------


async def test_run_twice(make: Make) -> None:
    """Only one task at a time runs a vCPU; the first one is not disturbed."""
    toy, runner = make(SPIN)

    async def second() -> None:
        await toy.wait_inside()
        assert runner.running
        with pytest.raises(VcpuBusyError, match="vcpu 0 is already run"):
            await runner.run()
        assert toy.inside.is_set()

    assert await run_and_cancel(runner, second) is None


async def test_check_idle(make: Make) -> None:
    """State is out of bounds while the guest runs, and not in a handler or between runs."""

    async def serve() -> None:
        runner.check_idle("in a handler")

    def on_thread() -> None:
        runner.check_idle("on the vCPU's own thread")

    toy: Toy
    runner: VcpuRunner
    toy, runner = make(Serve(serve), on_thread, SPIN)
    runner.check_idle("before")

    async def while_it_runs() -> None:
        await toy.wait_inside()
        with pytest.raises(VcpuBusyError, match="peeking while vcpu 0 runs"):
            runner.check_idle("peeking")

    assert await run_and_cancel(runner, while_it_runs) is None
    assert list(toy.steps) == [SPIN]
    runner.check_idle("after")
    await runner.aclose()
    with pytest.raises(trio.ClosedResourceError, match="vcpu 0 is closed"):
        runner.check_idle("afterwards")


# ---- pauses -----------------------------------------------------------------------------------


class Half(Toy):
    """Has half an instruction left, whose other half is what `settle` returns or raises.

    Args:
        rest: What comes of it.
        steps: As for `Toy`.
    """

    def __init__(self, rest: object, *steps: object) -> None:
        super().__init__(*steps)
        self.rest = rest
        self.is_settled = False

    def settled(self, *, abandon: bool = False) -> bool:
        return self.is_settled

    def settle(self, *, abandon: bool = False) -> object:
        if self.is_settled:
            return None
        self.is_settled = True
        self.settles += 1
        if isinstance(self.rest, BaseException):
            raise self.rest
        return None if abandon else self.rest


@pytest.mark.parametrize(
    "rest", [None, "rest", Serve(trio.lowlevel.checkpoint), ValueError("rest")]
)
async def test_a_pause_finishes_at_the_gate(gate: Gate, rest: object) -> None:
    """What comes of finishing an instruction in a pause is an outcome of the run it is part of."""
    toy = Half(rest, SPIN, "out")
    runner = VcpuRunner("vcpu 0", toy, gate)
    outcomes: list[object] = []

    async def run() -> None:
        try:
            outcomes.append(await runner.run())
        except ValueError as error:
            outcomes.append(error)

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await toy.wait_inside()
            async with gate.pausing():
                assert toy.settles == 1
                assert outcomes == []
                toy.steps.popleft()  # SPIN
                runner.check_idle("in a pause")
                assert toy.settles == 1
        passed_over = rest is None or isinstance(rest, Serve)
        assert outcomes == ["out" if passed_over else rest]
        await runner.aclose()


async def test_changing_in_a_pause_gives_up_the_rest(gate: Gate) -> None:
    """A change of registers in a pause gives up half an instruction, and what came of it."""
    toy = Half("rest", SPIN, "out")
    runner = VcpuRunner("vcpu 0", toy, gate)
    outcomes: list[object] = []

    async def run() -> None:
        outcomes.append(await runner.run())

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await toy.wait_inside()
            async with gate.pausing():
                toy.steps.popleft()
                toy.is_settled = False  # as after one access more
                runner.check_idle("in a pause", changes=True)
        assert toy.settles == 2
        assert outcomes == ["out"]
        toy.rest, toy.is_settled = ValueError("cannot be given up"), False
        with pytest.raises(ValueError, match="cannot be given up"):
            runner.check_idle("afterwards", changes=True)
        await runner.aclose()


class AtReschedule(trio.abc.Instrument):
    """Calls something at the moment when a task is made ready to run."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.task: trio.lowlevel.Task | None = None

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.call()


async def test_changing_while_run_is_about_to_return(make: Make) -> None:
    """Between an outcome and its run() state cannot be changed, or the outcome would be lost."""
    refused: list[str] = []
    runner: VcpuRunner
    toy, runner = make(LINGER, "out")

    def look() -> None:
        runner.check_idle("peeking")
        try:
            runner.check_idle("poking", changes=True)
        except VcpuBusyError as error:
            refused.append(str(error))

    instrument = AtReschedule(look)
    outcomes: list[object] = []

    async def run() -> None:
        instrument.task = trio.lowlevel.current_task()
        outcomes.append(await runner.run())

    trio.lowlevel.add_instrument(instrument)
    try:
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await toy.wait_inside()
                toy.kick()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    assert outcomes == ["out"]
    assert refused == ["poking while run() of vcpu 0 is about to return: do it afterwards"]


async def test_b5_cancelled_in_a_bracket(gate: Gate) -> None:
    """B5: a run that is cancelled while something changes is not finished; it is afterwards."""
    toy = Half("rest", "out")
    runner = VcpuRunner("vcpu 0", toy, gate)
    async with gate.holding():
        assert await run_and_cancel(runner, trio.testing.wait_all_tasks_blocked) is None
        assert toy.settles == 0
        for changes in (False, True):
            with pytest.raises(VcpuBusyError, match="a transaction is being committed"):
                runner.check_idle("peeking", changes=changes)
    async with gate.pausing():
        assert toy.settles == 1
    assert await runner.run() == "rest"
    assert await runner.run() == "out"
    await runner.aclose()


# ---- the end -----------------------------------------------------------------------------------


async def test_closed_while_in_guest(make: Make, gate: Gate) -> None:
    """Closing a running vCPU raises ClosedResourceError in its run(); its thread ends."""
    toy, runner = make(SPIN)

    async def close() -> None:
        await toy.wait_inside()
        await runner.aclose()
        assert vcpu_threads() == []

    assert isinstance(await run_and_cancel(runner, close), trio.ClosedResourceError)
    assert gate.statistics().vcpus == 0
    with pytest.raises(trio.ClosedResourceError):
        await runner.run()


async def test_closed_while_in_handler(make: Make) -> None:
    """Closing a vCPU whose handler is under way waits for nothing; run() then raises."""
    started, go = trio.Event(), trio.Event()

    async def serve() -> None:
        started.set()
        await go.wait()

    _, runner = make(Serve(serve))

    async def close() -> None:
        await started.wait()
        await runner.aclose()
        go.set()
        await trio.testing.wait_all_tasks_blocked()

    assert isinstance(await run_and_cancel(runner, close), trio.ClosedResourceError)


async def test_b10_closed_at_the_gate(make: Make, gate: Gate) -> None:
    """B10: a vCPU can be closed while the gate is held."""
    toy, runner = make("out")

    async def close() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await runner.aclose()

    async with gate.holding():
        assert isinstance(await run_and_cancel(runner, close), trio.ClosedResourceError)
    assert toy.threads == set()


async def test_close_is_shielded(make: Make) -> None:
    """A cancelled aclose() still ends the thread."""
    _, runner = make()
    with trio.CancelScope() as scope:
        scope.cancel()
        await runner.aclose()
    assert vcpu_threads() == []


async def test_close_twice(make: Make) -> None:
    """aclose() again does nothing."""
    _, runner = make()
    await runner.aclose()
    await runner.aclose()


@pytest.mark.parametrize("steps", [(), (SPIN,)], ids=["idle", "running"])
def test_two_tasks_close(steps: tuple[object, ...]) -> None:
    """Two tasks may close a vCPU at the same time, and both come back."""

    async def main() -> None:
        toy = Toy(*steps)
        runner = VcpuRunner("closed twice", toy, Gate())
        async with trio.open_nursery() as nursery:
            if steps:

                async def run() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await runner.run()

                nursery.start_soon(run)
                await toy.wait_inside()
            nursery.start_soon(runner.aclose)
            nursery.start_soon(runner.aclose)

    # In a thread: aclose() is shielded, so nothing else bounds it.
    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    thread.join(LONG_ENOUGH)
    assert not thread.is_alive()


async def test_48_at_once(make: Make, gate: Gate) -> None:
    """48 vCPUs run at the same time, are held, and stop: no thread limit is in the way."""
    toys, runners = zip(*(make(SPIN) for _ in range(48)), strict=True)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for runner in runners:
                nursery.start_soon(runner.run)
            for toy in toys:
                while not toy.inside.is_set():
                    await trio.lowlevel.checkpoint()
            assert gate.statistics().vcpus_inside == 48
            async with gate.holding():
                assert gate.statistics().vcpus_inside == 0
            nursery.cancel_scope.cancel()
    assert len({ident for toy in toys for ident in toy.threads}) == 48


async def test_what_is_served_may_end_the_run(make: Make) -> None:
    """What a `Serve` returns is the run's outcome, once; None goes on."""

    async def ends() -> str:
        await trio.lowlevel.checkpoint()
        return "ended"

    async def goes_on() -> None:
        await trio.lowlevel.checkpoint()

    _, runner = make(Serve(goes_on), Serve(ends), "out")
    assert await runner.run() == "ended"
    assert await runner.run() == "out"


class Interrupt:
    """Sends Ctrl-C before the n-th line of the runner's own code in its task."""

    CODE = (VcpuRunner.run.__code__, VcpuRunner._serve.__code__)

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interrupt:
        if frame.f_code in self.CODE and event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


def test_ctrl_c_anywhere() -> None:
    """Nothing is lost by Ctrl-C either: neither an access nor how the run ends."""
    for nth in range(1, 200):
        interrupt = Interrupt(nth)
        assert trio.run(_run_interrupted, interrupt) == (1, ["end"])
        if interrupt.left > 0:
            break
    assert nth > 20


async def _run_interrupted(interrupt: Interrupt) -> tuple[int, list[object]]:
    served = 0
    ended: list[object] = []

    async def serve() -> None:
        nonlocal served
        served += 1

    runner = VcpuRunner("toy", Toy(Serve(serve)), Gate())
    with contextlib.suppress(KeyboardInterrupt):
        sys.settrace(interrupt)
        try:
            ended.append(await runner.run())
        finally:
            sys.settrace(None)
    with contextlib.suppress(KeyboardInterrupt):
        await trio.lowlevel.checkpoint()
    if not ended:
        ended.append(await runner.run())
    await runner.aclose()
    return served, ended
