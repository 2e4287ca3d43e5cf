"""`Instrument` and `Instruments`: who is told what, and what becomes of those that raise."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
from typing import Any

import attrs
import pytest
import trio

from memlistener import Instrument
from memlistener.bracket import Gate
from memlistener.instrument import Instruments
from memlistener.vcpu import Serve, VcpuRunner

LONG_ENOUGH = 60.0

HOOKS = ("begin", "kicked", "quiesced", "ioctl", "resumed", "exit", "served")


class Watch(Instrument):
    """Overrides two hooks, and remembers what they were told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def begin(self, reason: str, at: int, waited: int) -> None:
        self.heard.append(("begin", reason))

    def resumed(self, at: int) -> None:
        self.heard.append(("resumed",))


class Everything(Instrument):
    """Remembers everything: the hook, its arguments, and the thread."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, tuple[Any, ...], str]] = []
        for name in HOOKS:
            setattr(self, name, self._remember(name))

    def _remember(self, name: str) -> Any:
        def remember(*args: Any) -> None:
            self.heard.append((name, args, threading.current_thread().name))

        return remember

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.heard]

    def args(self, name: str) -> list[tuple[Any, ...]]:
        return [args for each, args, _ in self.heard if each == name]

    def threads(self, name: str) -> set[str]:
        return {thread for each, _, thread in self.heard if each == name}


class Fails(Instrument):
    """Raises what it is given, in each `begin`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def begin(self, reason: str, at: int, waited: int) -> None:
        self.calls += 1
        raise self.error


# ---- who is told -----------------------------------------------------------------------------


def test_the_hooks_are_those_of_instruments() -> None:
    """`Instruments` has an attribute for each hook, None at first, and no other."""
    assert [name for name, each in vars(Instrument).items() if inspect.isfunction(each)] == list(
        HOOKS
    )
    instruments = Instruments()
    assert [getattr(instruments, name) for name in HOOKS] == [None] * len(HOOKS)
    assert {name for name in Instruments.__slots__ if not name.startswith("_")} == set(HOOKS)


def test_the_hooks_do_nothing_by_themselves() -> None:
    """Each can be called through super()."""
    for name in HOOKS:
        hook = getattr(Instrument(), name)
        assert hook(*[0] * len(inspect.signature(hook).parameters)) is None


def test_only_overridden_hooks_are_called() -> None:
    """What nobody overrides stays None: it costs nothing."""
    instruments = Instruments()
    instruments.add(Instrument())
    assert all(getattr(instruments, name) is None for name in HOOKS)
    watch = Watch()
    instruments.add(watch)
    assert {name for name in HOOKS if getattr(instruments, name)} == {"begin", "resumed"}
    assert instruments.begin is not None
    instruments.begin("memory", 1, 2)
    assert watch.heard == [("begin", "memory")]
    instruments.remove(watch)
    assert all(getattr(instruments, name) is None for name in HOOKS)


def test_hooks_may_hang_on_the_object() -> None:
    """A hook that is an attribute of the instance counts as overridden."""
    instruments, watch = Instruments(), Everything()
    instruments.add(watch)
    assert instruments.exit is not None
    instruments.exit("vcpu 0", "Hlt", None, 1, 2)
    assert watch.args("exit") == [("vcpu 0", "Hlt", None, 1, 2)]


def test_all_are_told_in_the_order_they_were_added() -> None:
    """And one that is added twice is told once."""
    instruments, order = Instruments(), list[str]()

    class Named(Instrument):
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self, reason: str, at: int, waited: int) -> None:
            order.append(self.name)

    first, second = Named("first"), Named("second")
    for each in (first, second, first):
        instruments.add(each)
    assert instruments.begin is not None
    instruments.begin("memory", 1, 2)
    assert order == ["first", "second"]
    instruments.remove(first)
    assert instruments.begin is not None
    instruments.begin("memory", 1, 2)
    assert order == ["first", "second", "second"]


def test_instruments_are_told_apart_by_identity() -> None:
    """Those that are equal, and have no hash, are two all the same."""

    @attrs.define
    class Count(Instrument):
        count: int = 0

        def resumed(self, at: int) -> None:
            self.count += 1

    instruments, first, second = Instruments(), Count(), Count()
    assert first == second
    instruments.add(first)
    instruments.add(second)
    assert instruments.resumed is not None
    instruments.resumed(1)
    instruments.remove(first)
    instruments.resumed(2)
    assert (first.count, second.count) == (1, 2)


def test_removing_a_stranger_says_so() -> None:
    """The error names it, and why it may be gone."""
    with pytest.raises(KeyError, match=r"Watch.* was not added, or has been removed"):
        Instruments().remove(Watch())


def test_what_is_no_instrument_is_refused() -> None:
    """A class instead of an object, say."""
    with pytest.raises(TypeError, match=r"memlistener\.Instrument, not .*Watch"):
        Instruments().add(Watch)  # type: ignore[arg-type]


def test_an_async_hook_is_refused() -> None:
    """Nobody would await it, so it is refused when it is added, and nothing is."""

    class Async(Watch):
        async def served(self, *args: object) -> None:  # type: ignore[override]
            raise AssertionError("never awaited")

    instruments = Instruments()
    with pytest.raises(TypeError, match=r"served\(\) of .*Async.* is async"):
        instruments.add(Async())
    assert instruments.begin is None


# ---- those that raise ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt()], ids=repr
)
def test_one_that_raises_is_removed_and_logged(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with its traceback; the others are told all the same."""
    instruments, fails, watch = Instruments(), Fails(error), Watch()
    instruments.add(fails)
    instruments.add(watch)
    assert instruments.begin is not None
    stale = instruments.begin
    stale("memory", 1, 2)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("memlistener.instrument", logging.ERROR)
    assert "Fails" in record.getMessage()
    assert "raised in begin() and is removed" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert record.exc_info[2] is not None
    instruments.begin("memory", 1, 2)
    assert fails.calls == 1
    assert watch.heard == [("begin", "memory")] * 2
    with pytest.raises(KeyError):
        instruments.remove(fails)
    stale("memory", 1, 2)  # as by a thread that was in the middle of it
    assert fails.calls == 2
    assert len(watch.heard) == 3


# ---- the gate --------------------------------------------------------------------------------


async def test_a_hold_of_nobody() -> None:
    """begin, quiesced, resumed; no wait."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    async with gate.holding("because"):
        assert watch.names == ["begin", "quiesced"]
    assert watch.names == ["begin", "quiesced", "resumed"]
    ((reason, began, turn),) = watch.args("begin")
    ((quiet, waited),) = watch.args("quiesced")
    ((resumed,),) = watch.args("resumed")
    assert (reason, turn, waited) == ("because", 0, 0)
    assert began <= quiet <= resumed


async def test_only_the_outermost_hold_is_a_bracket() -> None:
    """B4: holds nest; the gate closes once and opens once, for the outer one's reason."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    async with gate.holding("outer"), gate.holding("inner"):
        gate.hold_nowait("innermost")
        gate.release()
    assert watch.names == ["begin", "quiesced", "resumed"]
    assert watch.args("begin")[0][0] == "outer"


async def test_a_hold_that_does_not_wait_is_not_quiesced() -> None:
    """hold_nowait begins a bracket; the next hold knows that nobody is inside."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    gate.hold_nowait("broken")
    assert watch.names == ["begin"]
    async with gate.holding():
        assert watch.names == ["begin", "quiesced"]
    gate.release()
    assert watch.names == ["begin", "quiesced", "resumed"]


class Deaf:
    """A vCPU's thread that stays inside until it is let go, however it is kicked."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside = threading.Event()
        self.let_go = threading.Event()
        self.mine = gate.add("vcpu 7", lambda: None, lambda: None)
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        assert self.inside.wait(LONG_ENOUGH)

    def _main(self) -> None:
        assert self.gate.enter(self.mine)
        self.inside.set()
        assert self.let_go.wait(LONG_ENOUGH)
        self.gate.leave(self.mine)

    def finish(self) -> None:
        self.let_go.set()
        self.thread.join(LONG_ENOUGH)
        assert not self.thread.is_alive()
        self.gate.remove(self.mine)


async def test_two_holds_wait_for_the_same_vcpu() -> None:
    """One begin, one quiesced, after the kicks; kicks by the gate's own thread are told, too."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    deaf = Deaf(gate)
    try:
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gate.hold, "first")
                nursery.start_soon(gate.hold, "second")
                while "kick again" not in watch.threads("kicked"):
                    await trio.sleep(0.001)
                assert "quiesced" not in watch.names
                deaf.let_go.set()
    finally:
        deaf.finish()
    gate.release()
    assert "resumed" not in watch.names
    gate.release()
    assert watch.names[:2] == ["begin", "kicked"]
    assert watch.names[-2:] == ["quiesced", "resumed"]
    assert set(watch.names[1:-2]) == {"kicked"}
    assert {vcpu for vcpu, _ in watch.args("kicked")} == {"vcpu 7"}
    ((_, began, _),), ((quiet, waited),) = watch.args("begin"), watch.args("quiesced")
    assert began <= quiet - waited <= watch.args("kicked")[0][1]
    assert watch.args("kicked")[0][1] <= quiet


async def test_a_cancelled_hold_resumes_without_being_quiesced() -> None:
    """B9: the hold is taken back, and that is what is told."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    deaf = Deaf(gate)
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await gate.hold("in vain")
        assert scope.cancelled_caught
    finally:
        deaf.finish()
    assert set(watch.names) == {"begin", "kicked", "resumed"}
    assert (watch.names[0], watch.names[-1]) == ("begin", "resumed")


async def test_a_failing_instrument_does_not_harm_the_bracket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """B9: it is removed, and the gate closes and opens as if it had not been there."""
    gate = Gate()
    gate.instruments.add(Fails(ValueError("boom")))
    async with gate.holding():
        assert gate.statistics().holds == 1
    gate.hold_nowait()
    gate.release()
    assert not gate.held
    assert [each.name for each in caplog.records] == ["memlistener.instrument"]


# ---- the runner ------------------------------------------------------------------------------


class Steps:
    """A backend whose guest exits three times: served here, served in trio, the end."""

    def __init__(self) -> None:
        self.todo: list[object] = [None, Serve(trio.lowlevel.checkpoint), "end"]
        self.exits = [("Mmio", 0x1000), ("Io", 0x3F8), ("Hlt", None)]

    def enter(self) -> bool:
        return False

    def last_exit(self) -> tuple[str, int | None]:
        return self.exits.pop(0)

    def handle(self) -> object:
        return self.todo.pop(0)

    def kick(self) -> None: ...

    def clear_kick(self) -> None: ...

    def settled(self, *, abandon: bool = False) -> bool:
        return True

    def settle(self, *, abandon: bool = False) -> None: ...

    def describe(self) -> str:
        return "stepping"


async def run_steps(gate: Gate) -> object:
    runner = VcpuRunner("vcpu 3", Steps(), gate)
    try:
        with trio.fail_after(LONG_ENOUGH):
            return await runner.run()
    finally:
        await runner.aclose()


async def test_exits_and_who_served_them() -> None:
    """Each exit on the vCPU's thread, each access where it was served, in order of time."""
    gate, watch = Gate(), Everything()
    gate.instruments.add(watch)
    assert await run_steps(gate) == "end"
    here = threading.current_thread().name
    assert [(name, args[:3], thread) for name, args, thread in watch.heard if name == "exit"] == [
        ("exit", ("vcpu 3", "Mmio", 0x1000), "vcpu 3"),
        ("exit", ("vcpu 3", "Io", 0x3F8), "vcpu 3"),
        ("exit", ("vcpu 3", "Hlt", None), "vcpu 3"),
    ]
    assert [(args[:2], thread) for name, args, thread in watch.heard if name == "served"] == [
        (("vcpu 3", "thread"), "vcpu 3"),
        (("vcpu 3", "trio"), here),
    ]
    assert watch.names == ["exit", "served", "exit", "served", "exit"]
    times = [at for _, args, _ in watch.heard for at in args[-2:]]
    assert times == sorted(times)


async def test_served_alone() -> None:
    """A hook that is overridden is called whether the others are or not."""

    class Served(Instrument):
        heard: list[str]

        def served(self, vcpu: str, where: str, began: int, ended: int) -> None:
            assert began <= ended
            self.heard.append(where)

    gate, watch = Gate(), Served()
    watch.heard = []
    gate.instruments.add(watch)
    assert await run_steps(gate) == "end"
    assert watch.heard == ["thread", "trio"]


async def test_a_vcpu_survives_its_instrument(caplog: pytest.LogCaptureFixture) -> None:
    """An exit hook that raises, on the vCPU's thread, costs the instrument and nothing else."""

    class FailsAtExit(Instrument):
        def exit(self, *args: object) -> None:
            raise SystemExit

    gate = Gate()
    gate.instruments.add(FailsAtExit())
    assert await run_steps(gate) == "end"
    (record,) = caplog.records
    assert record.threadName == "vcpu 3"
    assert gate.instruments.exit is None


@pytest.mark.parametrize("hook", ["begin", "resumed", "served"])
def test_ctrl_c_is_nobody_s_error(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    """Pressed while a hook runs on trio's thread, it ends the program, not the instrument."""
    instrument = Instrument()
    here = threading.get_ident()
    pressed: list[str] = []

    def press(*_: object) -> None:
        if threading.get_ident() == here:
            pressed.append(hook)
            signal.raise_signal(signal.SIGINT)

    setattr(instrument, hook, press)
    gate = Gate()
    gate.instruments.add(instrument)

    async def main() -> None:
        async with gate.holding():
            pass
        await run_steps(gate)
        await trio.lowlevel.checkpoint()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert pressed
    assert caplog.records == []
    assert getattr(gate.instruments, hook) is not None
