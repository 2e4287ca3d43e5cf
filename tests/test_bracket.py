"""The gate alone, with plain threads for vCPUs: nothing of KVM, nothing of `VcpuRunner`.

Rules B1 to B14 of the bracket, as far as they are the gate's.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing

from memlistener.bracket import Gate, Pass

LONG_ENOUGH = 60.0


class Guest:
    """A thread that is inside the gate until it is kicked out, again and again.

    Args:
        gate: Its gate.
        name: For the log.
        log: What happened, in order: ``"kick a"``, ``"in a"``, ``"out a"``.
        lose: How many kicks have no effect.
        leaves: Called after a kick was noticed, before it leaves.
    """

    def __init__(
        self,
        gate: Gate,
        name: str = "a",
        log: list[str] | None = None,
        *,
        lose: int = 0,
        leaves: Callable[[], object] = lambda: None,
    ) -> None:
        self.gate = gate
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.lose = lose
        self.leaves = leaves
        self.on_kick: Callable[[], object] = lambda: None
        self.kicked = threading.Event()
        self.arrived = threading.Event()
        self.got_in = threading.Semaphore(0)
        self.entries = 0
        self.mine = gate.add(name, self._kick, self.kicked.clear, lambda: f"{name} is busy")
        self.thread = threading.Thread(target=self._main, daemon=True)

    def is_inside(self) -> bool:
        """Whether it is inside now (a method: it changes between two looks)."""
        return self.mine.inside

    def start(self) -> None:
        """Start the thread, without waiting for it to get in."""
        self.thread.start()

    def start_inside(self) -> None:
        """Start the thread, and wait until it is inside."""
        self.start()
        self.wait_inside()

    def wait_inside(self) -> None:
        """Wait until it has got in once more."""
        assert self.got_in.acquire(timeout=LONG_ENOUGH)

    def finish(self) -> None:
        """Stop the thread and take the vCPU away."""
        if self.thread.ident is not None:
            self.gate.stop(self.mine)
            self.kicked.set()
            self.thread.join(LONG_ENOUGH)
            assert not self.thread.is_alive()
        self.gate.remove(self.mine)

    def _kick(self) -> None:
        self.log.append(f"kick {self.name}")
        self.on_kick()
        if self.lose:
            self.lose -= 1
        else:
            self.kicked.set()

    def _main(self) -> None:
        self.arrived.set()
        while self.gate.enter(self.mine):
            self.entries += 1
            self.log.append(f"in {self.name}")
            self.got_in.release()
            assert self.kicked.wait(LONG_ENOUGH)
            self.leaves()
            self.log.append(f"out {self.name}")
            self.gate.leave(self.mine, returning=True)


Spawn = Callable[..., Guest]


def is_held(gate: Gate) -> bool:
    """Whether the gate is held now (a function: it changes between two looks)."""
    return gate.held


def is_changing(gate: Gate) -> bool:
    """Whether somebody may be changing something now."""
    return gate.changing


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def spawn(gate: Gate) -> Iterator[Spawn]:
    """Makes guests of the gate, all of which are finished afterwards."""
    guests: list[Guest] = []

    def make(*args: object, on: Gate = gate, **options: object) -> Guest:
        guest = Guest(on, *args, **options)  # type: ignore[arg-type]
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        guest.finish()


class Warnings(logging.Handler):
    """What the gate says in its log, and an event at the n-th time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.count = count
        self.enough = trio.Event()
        self.token = trio.lowlevel.current_trio_token()

    def emit(self, record: logging.LogRecord) -> None:
        """Called on a thread of the gate's own."""
        self.texts.append(record.getMessage())
        if len(self.texts) == self.count:
            self.token.run_sync_soon(self.enough.set)


# ---- B1 to B4 --------------------------------------------------------------------------


async def test_b1_the_gate_closes_before_anybody_is_kicked(gate: Gate, spawn: Spawn) -> None:
    """B1: at the first kick the gate is held already."""
    held: list[bool] = []
    guest = spawn()
    guest.on_kick = lambda: held.append(gate.held)
    guest.start_inside()
    async with gate.holding():
        assert not guest.is_inside()
    assert held
    assert all(held)


async def test_b1_nobody_gets_in_while_it_is_held(gate: Gate, spawn: Spawn) -> None:
    """B1: who comes to a held gate waits there, and is let in by the release."""
    log: list[str] = []
    first, second = spawn("a", log), spawn("b", log)
    first.start_inside()
    await gate.hold()
    second.start()
    assert second.arrived.wait(LONG_ENOUGH)
    for _ in range(100):
        await trio.lowlevel.checkpoint()
        assert gate.statistics().vcpus_inside == 0
    log.append("release")
    gate.release()
    first.wait_inside()
    second.wait_inside()
    released = log.index("release")
    # Where CPUs are short it is kicked more than once.
    assert list(dict.fromkeys(log[:released])) == ["in a", "kick a", "out a"]
    assert sorted(log[released + 1 :]) == ["in a", "in b"]


async def test_b2_kicked_again_until_out(gate: Gate, spawn: Spawn) -> None:
    """B2: a kick without effect is repeated until the vCPU acknowledges."""
    guest = spawn(lose=3)
    guest.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        await gate.hold()
    assert not guest.is_inside()
    assert guest.mine.kicks >= 4
    assert gate.statistics().kicks == guest.mine.kicks
    gate.release()


async def test_b2_a_stale_kick_is_cleared_on_entry(gate: Gate, spawn: Spawn) -> None:
    """B2: a kick that came when nobody was inside does not hit the next run."""
    guest = spawn()
    guest.mine.kick()
    assert guest.kicked.is_set()
    guest.start_inside()
    assert not guest.kicked.is_set()
    assert guest.is_inside()


async def test_b3_all_are_kicked_before_any_is_awaited(gate: Gate, spawn: Spawn) -> None:
    """B3: nobody leaves before all are kicked; that does not stop the hold."""
    log: list[str] = []
    names = "abcd"
    all_kicked = threading.Barrier(len(names))
    guests = [spawn(name, log, leaves=lambda: all_kicked.wait(LONG_ENOUGH)) for name in names]
    for guest in guests:
        guest.start_inside()
    log.clear()
    with trio.fail_after(LONG_ENOUGH):
        await gate.hold()
    first_out = min(log.index(f"out {name}") for name in names)
    assert sorted(set(log[:first_out])) == [f"kick {name}" for name in names]
    all_kicked.abort()
    for guest in guests:
        guest.leaves = lambda: None
    gate.release()


async def test_b4_holds_are_counted(gate: Gate, spawn: Spawn) -> None:
    """B4: the inner release lets nobody in, the outer one does."""
    guest = spawn()
    guest.start_inside()
    async with gate.holding():
        async with gate.holding():
            assert not guest.is_inside()
        assert is_held(gate)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
            assert not guest.is_inside()
        assert guest.entries == 1
    assert not is_held(gate)
    guest.wait_inside()


async def test_b4_two_tasks_share_a_hold(gate: Gate, spawn: Spawn) -> None:
    """B4: the gate stays closed until the last of several tasks releases it."""
    guest = spawn()
    guest.start_inside()
    both = trio.Event()
    go = trio.Event()
    holding = 0

    async def hold() -> None:
        nonlocal holding
        async with gate.holding():
            holding += 1
            if holding == 2:
                both.set()
            await go.wait()
            assert not guest.is_inside()

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            nursery.start_soon(hold)
            await both.wait()
            go.set()
    assert guest.mine.kicks >= 1
    guest.wait_inside()


async def test_b4_resumed_before_the_next_kick(gate: Gate, spawn: Spawn) -> None:
    """B4: between two kicks of a vCPU it was let in."""
    log: list[str] = []
    guests = [spawn(name, log) for name in "ab"]
    for guest in guests:
        guest.start_inside()
    for _ in range(50):
        async with gate.holding():
            log.append("held")
    for name in "ab":
        entered, bracket_over = False, True
        for what in log:
            if what == f"in {name}":
                entered = True
            elif what == "held":
                bracket_over = True
            elif what == f"kick {name}":
                assert entered or not bracket_over
                entered, bracket_over = False, False
    assert log.count("held") == 50


# ---- B6 to B9 --------------------------------------------------------------------------


async def test_b6_elsewhere_counts_as_stopped(gate: Gate, spawn: Spawn) -> None:
    """B6: who is not inside, and does not come to the gate, is neither kicked nor waited for."""
    guest = spawn()  # its thread is not even started
    with trio.fail_after(LONG_ENOUGH):
        await gate.hold()
    assert guest.mine.kicks == 0
    gate.release()


async def test_b7_nothing_is_held_while_waiting(gate: Gate, spawn: Spawn) -> None:
    """B7: while a hold waits, the gate answers, others leave, come and go, and trio runs."""
    stuck = threading.Event()
    kicked = trio.Event()
    late = spawn("late", leaves=lambda: stuck.wait(LONG_ENOUGH))
    late.on_kick = kicked.set
    other = spawn("other")
    late.start_inside()
    other.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await kicked.wait()
            while other.is_inside():
                await trio.lowlevel.checkpoint()
            assert late.is_inside()
            assert gate.statistics().vcpus_inside == 1
            newcomer = gate.add("new", lambda: None, lambda: None)
            gate.remove(newcomer)
            stuck.set()
    assert not late.is_inside()
    gate.release()


async def test_b8_a_late_vcpu_is_named_again_and_again(spawn: Spawn) -> None:
    """B8: past the deadline a warning names the vCPU and what it does; then another one."""
    gate = Gate(deadline=0.01)
    stuck = threading.Event()
    guest = spawn("vcpu 7", on=gate, leaves=lambda: stuck.wait(LONG_ENOUGH))
    guest.start_inside()
    logger = logging.getLogger("memlistener.bracket")
    warnings = Warnings(2)
    logger.addHandler(warnings)
    done = trio.Event()

    async def hold() -> None:
        await gate.hold()
        done.set()

    try:
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold)
                await warnings.enough.wait()
                assert not done.is_set()  # it has not gone on without the vCPU
                assert is_held(gate)  # nor given up
                stuck.set()
    finally:
        stuck.set()
        logger.removeHandler(warnings)
    assert done.is_set()
    assert not guest.is_inside()
    for text in warnings.texts:
        assert "vcpu 7 (vcpu 7 is busy; inside for 0." in text
    kicks = [int(re.findall(r"kicked (\d+) times?\)", text)[0]) for text in warnings.texts]
    assert 1 <= kicks[0] < kicks[1] <= guest.mine.kicks
    assert gate.statistics().late == len(warnings.texts) >= 2
    gate.release()


async def test_b8_nobody_is_named_who_comes_out(
    gate: Gate, spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """B8: there is no warning about vCPUs that leave when they are kicked."""
    guest = spawn()
    guest.start_inside()
    for _ in range(20):
        async with gate.holding():
            pass
    assert caplog.records == []
    assert gate.statistics().late == 0


async def test_b9_cancelled_while_waiting(gate: Gate, spawn: Spawn) -> None:
    """B9: a hold that is cancelled while it waits is taken back."""
    stuck = threading.Event()
    kicked = trio.Event()
    late = spawn("late", leaves=lambda: stuck.wait(LONG_ENOUGH))
    late.on_kick = kicked.set
    other = spawn("other")
    late.start_inside()
    other.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await kicked.wait()
            assert is_held(gate)
            nursery.cancel_scope.cancel()
    assert not is_held(gate)
    other.wait_inside()  # though the late one is still inside
    assert late.is_inside()
    stuck.set()
    late.wait_inside()


async def test_b9_a_cancelled_hold_leaves_the_others(gate: Gate, spawn: Spawn) -> None:
    """B9: cancelling one of two waiting holds takes back that one only."""
    stuck = threading.Event()
    kicked = trio.Event()
    late = spawn("late", leaves=lambda: stuck.wait(LONG_ENOUGH))
    late.on_kick = kicked.set
    late.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await kicked.wait()
            async with trio.open_nursery() as inner:
                inner.start_soon(gate.hold)
                await trio.testing.wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            assert is_held(gate)
            stuck.set()
    assert is_held(gate)
    assert not late.is_inside()
    gate.release()
    assert not is_held(gate)
    late.wait_inside()


async def test_b9_the_body_raises(gate: Gate, spawn: Spawn) -> None:
    """B9: an error inside a hold lets the vCPUs go."""
    guest = spawn()
    guest.start_inside()
    with pytest.raises(KeyError):
        async with gate.holding():
            raise KeyError
    guest.wait_inside()


async def test_b9_a_kick_that_raises(gate: Gate) -> None:
    """B9: an error from a kick takes the hold back too."""

    def broken() -> None:
        raise OSError("no signal")

    mine = gate.add("a", broken, lambda: None)
    assert gate.enter(mine)
    with pytest.raises(OSError, match="no signal"):
        await gate.hold()
    assert not is_held(gate)
    gate.leave(mine)
    gate.remove(mine)


# ---- B10, B13, B14 ------------------------------------------------------------------------


async def test_b10_added_during_a_hold(gate: Gate, spawn: Spawn) -> None:
    """B10: a vCPU that is added while the gate is held does not run before the release."""
    async with gate.holding():
        guest = spawn()
        guest.start()
        assert guest.arrived.wait(LONG_ENOUGH)
        async with gate.holding():  # waits for everybody who is inside
            assert guest.entries == 0
        assert guest.entries == 0
    guest.wait_inside()


async def test_b10_finishing_while_a_hold_waits(gate: Gate, spawn: Spawn) -> None:
    """B10: a vCPU that leaves for good and is removed does not hang the hold."""
    stuck = threading.Event()
    kicked = trio.Event()
    late = spawn("late", leaves=lambda: stuck.wait(LONG_ENOUGH))
    late.on_kick = kicked.set
    late.start_inside()
    finishing = gate.add("finishing", lambda: None, lambda: None)
    assert gate.enter(finishing)
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await kicked.wait()
            gate.leave(finishing)
            gate.remove(finishing)
            stuck.set()
    assert gate.statistics().vcpus_inside == 0
    assert gate.statistics().vcpus == 1
    gate.release()


async def test_b10_removed_while_owed(gate: Gate, spawn: Spawn) -> None:
    """B10: the next hold does not wait for a vCPU that was stopped and then removed."""
    guest = spawn("a")
    guest.start_inside()
    other = gate.add("other", lambda: None, lambda: None)
    assert gate.enter(other)
    gate.leave(other, returning=True)  # owed a run now
    gate.remove(other)
    with trio.fail_after(LONG_ENOUGH):
        await gate.hold()
    gate.release()


async def test_b10_stopped_at_the_gate(gate: Gate, spawn: Spawn) -> None:
    """B10: a vCPU that is told to stop while it waits at the gate does not wait on."""
    guest = spawn()
    async with gate.holding():
        guest.start()
        assert guest.arrived.wait(LONG_ENOUGH)
        gate.stop(guest.mine)
        guest.thread.join(LONG_ENOUGH)
        assert not guest.thread.is_alive()
    assert guest.entries == 0


async def test_stop_is_taken_back(gate: Gate) -> None:
    """After allow() a stopped vCPU can enter again; before, it cannot."""
    mine = gate.add("a", lambda: None, lambda: None)
    gate.stop(mine)
    assert not gate.enter(mine)
    gate.allow(mine)
    assert gate.enter(mine)
    gate.leave(mine)
    gate.remove(mine)


async def test_stop_kicks_who_is_inside(gate: Gate, spawn: Spawn) -> None:
    """A vCPU that is told to stop while inside comes out and does not return."""
    guest = spawn()
    guest.start_inside()
    gate.stop(guest.mine)
    guest.thread.join(LONG_ENOUGH)
    assert not guest.thread.is_alive()
    assert guest.mine.kicks == 1


async def test_b13_gates_are_independent(gate: Gate, spawn: Spawn) -> None:
    """B13: holding one gate neither kicks nor waits for another gate's vCPUs."""
    other_gate = Gate()
    mine, other = spawn("a"), spawn("b", on=other_gate, lose=1 << 30)
    mine.start_inside()
    other.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with gate.holding():
            assert not mine.is_inside()
            assert other.is_inside()
            assert not other_gate.held
    assert other.mine.kicks == 0


@pytest.mark.parametrize("count", [1, 3, 8])
async def test_b14_stopped_vcpus_run_before_the_next_hold(
    gate: Gate, spawn: Spawn, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B14: without patience, each vCPU gets in between every two brackets of a tight loop."""
    monkeypatch.setattr(gate, "_patience", 0)
    guests = [spawn(f"{number}") for number in range(count)]
    for guest in guests:
        guest.start_inside()
    with trio.fail_after(60):
        for done in range(1, 51):
            async with gate.holding():
                for guest in guests:
                    assert not guest.is_inside()
                    assert guest.entries >= done
    assert gate.statistics().holds == 50


async def test_b14_no_wait_for_who_went_elsewhere(gate: Gate) -> None:
    """B14: a vCPU that left for a device handler is owed nothing."""
    mine = gate.add("a", lambda: None, lambda: None)
    assert gate.enter(mine)
    gate.leave(mine, returning=False)
    with trio.fail_after(LONG_ENOUGH):
        for _ in range(3):
            async with gate.holding():
                pass
    gate.remove(mine)


async def test_b14_inside_a_hold_nobody_is_waited_for(gate: Gate, spawn: Spawn) -> None:
    """B14: a nested hold does not wait for the vCPUs that the outer one keeps out."""
    guest = spawn()
    guest.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with gate.holding(), gate.holding():
            assert not guest.is_inside()


async def test_b14_cancelled_before_the_hold(
    gate: Gate, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9, B14: a hold that is cancelled before it is made leaves the gate open."""
    mine = gate.add("slow", lambda: None, lambda: None)
    assert gate.enter(mine)
    gate.leave(mine, returning=True)  # owed, and not coming
    monkeypatch.setattr(gate, "_patience", 0)
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await trio.testing.wait_all_tasks_blocked()
            assert not is_held(gate)
            nursery.cancel_scope.cancel()
    assert not is_held(gate)
    gate.remove(mine)
    with trio.fail_after(LONG_ENOUGH):
        await gate.hold()
    gate.release()


async def test_b14_a_hold_does_not_wait_for_who_cannot_come_in(gate: Gate) -> None:
    """B14, B4: a hold that waits for vCPUs to have their turn ends the wait when another begins.

    The other one may be waiting for the first: `vm.paused()` around a transaction,
    against a transaction of another task.
    """
    passes = [gate.add(name, lambda: None, lambda: None) for name in "ab"]
    for each in passes:
        assert gate.enter(each)
        gate.leave(each, returning=True)  # stopped, and waiting for a CPU
    gate._patience = 0
    lock = trio.Lock()

    async def transaction() -> None:
        async with lock:
            with trio.CancelScope(shield=True):
                await gate.hold()
                gate.release()

    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transaction)
            await trio.testing.wait_all_tasks_blocked()
            gate.hold_nowait()
            async with lock:
                gate.release()
    for each in passes:
        gate.remove(each)


# ---- pauses -------------------------------------------------------------------------------


async def pause_until(gate: Gate, entered: trio.Event, go: trio.Event) -> None:
    async with gate.pausing():
        entered.set()
        await go.wait()


async def test_a_pause_waits_for_those_on_their_way(gate: Gate, spawn: Spawn) -> None:
    """A pause is entered when each thread is at the gate or idle; a hold does not wait so long."""
    guest = spawn()  # whose thread has the word, and is yet to come
    idle = gate.add("idle", lambda: None, lambda: None)
    reporting = gate.add("reporting", lambda: None, lambda: None)
    for each in (guest.mine, reporting):
        gate.depart(each)
    entered, go = trio.Event(), trio.Event()
    with trio.fail_after(LONG_ENOUGH):
        async with gate.holding():
            pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause_until, gate, entered, go)
            await trio.testing.wait_all_tasks_blocked()
            assert is_held(gate)
            guest.start()
            assert await trio.to_thread.run_sync(guest.arrived.wait, LONG_ENOUGH)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not entered.is_set()
            gate.rest(reporting)
            await entered.wait()
            assert gate.quiet
            assert gate.arrives(guest.mine)
            assert not guest.is_inside()
            go.set()
    guest.wait_inside()
    for each in (idle, reporting):
        gate.remove(each)


async def test_a_pause_waits_for_whom_is_removed(gate: Gate) -> None:
    """B10: a vCPU that goes away while a pause waits for it is not waited for."""
    mine = gate.add("a", lambda: None, lambda: None)
    gate.depart(mine)
    entered, go = trio.Event(), trio.Event()
    go.set()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause_until, gate, entered, go)
            await trio.testing.wait_all_tasks_blocked()
            assert not entered.is_set()
            gate.remove(mine)
    assert entered.is_set()


async def test_a_pause_finishes_instructions(gate: Gate) -> None:
    """Each pause has all vCPUs finish, after it waited for brackets; one in a bracket has none."""
    finished: list[str] = []

    def add(name: str) -> Pass:
        return gate.add(name, lambda: None, lambda: None, finish=lambda: finished.append(name))

    passes = [add(name) for name in "ab"]
    async with gate.pausing():
        assert finished == ["a", "b"]
        async with gate.pausing():
            assert finished == ["a", "b"] * 2
    finished.clear()
    entered, go = trio.Event(), trio.Event()
    go.set()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery, gate.holding():
            assert gate.changing
            async with gate.pausing(wait=False):
                assert not gate.quiet
                assert gate.changing
            nursery.start_soon(pause_until, gate, entered, go)
            await trio.testing.wait_all_tasks_blocked()
            assert not entered.is_set()
            assert finished == []
    assert entered.is_set()
    assert finished == ["a", "b"]
    assert not gate.held
    for each in passes:
        gate.remove(each)


async def test_a_hold_that_waits_changes_nothing_yet(gate: Gate, spawn: Spawn) -> None:
    """B5: a hold counts as a change when vCPUs are out, and no longer when it is cancelled."""
    stuck, kicked = threading.Event(), trio.Event()
    late = spawn("late", leaves=lambda: stuck.wait(LONG_ENOUGH))
    late.on_kick = kicked.set
    late.start_inside()
    with trio.fail_after(LONG_ENOUGH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.hold)
            await kicked.wait()
            assert (is_held(gate), is_changing(gate)) == (True, False)
            nursery.cancel_scope.cancel()
        assert (is_held(gate), is_changing(gate)) == (False, False)
        stuck.set()
        await gate.hold()
        assert (is_held(gate), is_changing(gate)) == (True, True)
        gate.release()
        assert (is_held(gate), is_changing(gate)) == (False, False)


class Interrupt:
    """Sends Ctrl-C before the n-th line of the gate's own code."""

    CODE = tuple(
        each.__code__
        for each in (Gate.hold, Gate.release, Gate._close, Gate._open, Gate.pause, Gate.unpause)
    )

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interrupt:
        if frame.f_code in self.CODE and event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.mark.parametrize("context", [Gate.holding, Gate.pausing])
def test_b9_interrupted_anywhere(context: Callable[[Gate], Any]) -> None:
    """B9: Ctrl-C in a hold or a release leaves neither the gate held nor a vCPU parked."""
    interrupted = 0
    for nth in range(1, 200):
        gate = Gate()
        interrupt = Interrupt(nth)
        try:
            trio.run(_hold_once, gate, interrupt, context)
        except KeyboardInterrupt:
            interrupted += 1
        assert not is_held(gate)
        assert not gate.changing
        if interrupt.left > 0:
            break
    assert interrupted > 10


async def _hold_once(gate: Gate, interrupt: Interrupt, context: Callable[[Gate], Any]) -> None:
    mine = gate.add("a", lambda: left.set(), lambda: None)
    left = threading.Event()
    thread = threading.Thread(target=_in_and_out, args=(gate, mine, left), daemon=True)
    thread.start()
    try:
        sys.settrace(interrupt)
        try:
            async with context(gate):
                pass
        finally:
            sys.settrace(None)
        await trio.lowlevel.checkpoint()
    finally:
        left.set()
        thread.join(LONG_ENOUGH)
        assert not thread.is_alive()  # it was not parked for ever


def _in_and_out(gate: Gate, mine: Pass, left: threading.Event) -> None:
    for _ in range(2):
        gate.enter(mine)
        left.wait(LONG_ENOUGH)
        gate.leave(mine, returning=True)


async def test_statistics(gate: Gate, spawn: Spawn) -> None:
    """Holds, kicks, vCPUs and waiting times are counted; nested holds are one."""
    guest = spawn()
    guest.start_inside()
    before = gate.statistics()
    assert (before.holds, before.kicks, before.vcpus, before.vcpus_inside) == (0, 0, 1, 1)
    async with gate.holding(), gate.holding():
        during = gate.statistics()
        assert (during.holds, during.vcpus_inside) == (1, 0)
        assert during.kicks >= 1
        assert during.wait_max > 0
        assert during.wait_median <= during.wait_p99 <= during.wait_max


async def test_kicks_of_removed_vcpus_still_count(gate: Gate) -> None:
    """A vCPU that is gone has been kicked all the same."""
    mine = gate.add("a", lambda: gate.leave(mine), lambda: None)
    assert gate.enter(mine)
    await gate.hold()
    gate.release()
    gate.remove(mine)
    gate.remove(mine)  # and again does no harm
    assert gate.statistics().kicks == 1
    assert gate.statistics().vcpus == 0
