from __future__ import annotations

import json
import os
import signal
from typing import Any

import attrs
import click
import pytest
import trio
from rich.table import Table

from memlistener import KvmUnavailableError, kvm
from memlistener.rig import command
from memlistener.rig.table import as_table


@attrs.frozen
class Outcome:
    exit_status: int = 0
    heading: str = "what was run"
    verdict: str = "all is well"

    def as_table(self) -> Table:
        return as_table([[("rounds", "7", "", False)]])

    def as_json(self) -> dict[str, Any]:
        return {"rounds": 7}


def test_table_stands_between_heading_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """For people."""
    command.show(Outcome(), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("what was run", "all is well")
    assert "rounds" in "".join(lines[1:-1])


def test_json_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs."""
    command.show(Outcome(), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rounds": 7}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_scenario_to_stop(number: signal.Signals) -> None:
    """It ends in its own time, and its result is not lost."""

    async def scenario(stop: trio.Event) -> str:
        os.kill(os.getpid(), number)
        with trio.fail_after(60):
            await stop.wait()
        return "so far"

    assert command.run(scenario) == "so far"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KvmUnavailableError("this kernel has no dirty ring"), "this kernel has no dirty ring"),
        (OSError(28, "No space left on device", "ram.img"), "ram.img: No space left on device"),
    ],
)
def test_what_is_missing_is_said_without_a_traceback(error: OSError, text: str) -> None:
    """However deep in nurseries it came up; the exit status is that of wrong usage."""

    async def scenario(stop: trio.Event) -> None:
        async with trio.open_nursery():
            raise error

    with pytest.raises(command.NotAvailable) as caught:
        command.run(scenario)
    assert caught.value.message == text
    assert caught.value.exit_code == 2


def test_other_errors_are_nobodys_fault_but_ours() -> None:
    """They keep their traceback."""

    async def scenario(stop: trio.Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        command.run(scenario)
    assert caught.group_contains(ZeroDivisionError)


@pytest.mark.parametrize(
    ("given", "transactions", "seconds"),
    [(None, None, 5.0), (None, 100, None), (3.0, None, 3.0), (3.0, 100, 3.0)],
)
def test_who_limits_transactions_does_not_limit_the_time(
    given: float | None, transactions: int | None, seconds: float | None
) -> None:
    """The default is for who says nothing."""
    assert command.seconds_or_default(given, transactions, 5.0) == seconds


@pytest.mark.parametrize("usable", [True, False])
def test_without_kvm_the_fake_runs_and_says_so(
    usable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, and none where the fake was asked for."""
    monkeypatch.setattr(kvm, "available", lambda: kvm.Availability(usable, "no /dev/kvm"))
    assert command.fake_or_no_kvm(True)
    assert capsys.readouterr().err == ""
    assert command.fake_or_no_kvm(False) is not usable
    assert capsys.readouterr().err.count("no /dev/kvm") == (not usable)


def test_options_are_those_of_the_command_line() -> None:
    """What they give a command, and what they refuse."""
    given: dict[str, Any] = {}

    @click.command
    @command.policy
    @command.vcpus(4)
    @command.seconds(5.0)
    @command.transactions
    @command.fake
    @command.as_json
    def run(**options: Any) -> None:
        given.update(options)

    run.main(["--policy", "never", "--vcpus", "4", "--json"], standalone_mode=False)
    assert given == {
        **{"policy": "never", "vcpus": 4, "seconds": None, "transactions": None},
        **{"fake": False, "as_json": True},
    }
    with pytest.raises(click.BadParameter, match="4"):
        run.main(["--vcpus", "5"], standalone_mode=False)
