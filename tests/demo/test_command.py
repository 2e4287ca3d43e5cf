"""`memlistener demo` as a person runs it: output, exit status, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.command import ENVIRONMENT, LONG_ENOUGH, memlistener


def test_demo_help_names_every_mode() -> None:
    """With what each of them does."""
    done = memlistener("demo", "--help")
    for mode in ("all", "split", "move", "device", "rom", "code"):
        assert f"  {mode} " in done.stdout


def test_json_is_all_there_is_on_stdout() -> None:
    """A program can read it."""
    done = memlistener("demo", "--fake", "--transactions", "20", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["transactions"] == 20
    assert data["backend"] == "fake"
    assert data["holes"] == 0


def test_table() -> None:
    """For people: what was run, the figures, the verdict."""
    done = memlistener("demo", "--fake", "--transactions", "20", "--vcpus", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "1 vCPU, scripted, on a fake kernel, policy every-commit: split, move, "
    )
    assert "transactions" in done.stdout
    assert done.stdout.endswith("every access found its memory and its value.\n")


def test_failure_shows_in_the_exit_status() -> None:
    """Without brackets holes are seen, in the same table, and the status is 1."""
    done = memlistener(
        *("demo", "--fake", "--mode", "device", "--policy", "never", "--transactions", "100")
    )
    assert done.returncode == 1, done.stdout
    assert "holes" in done.stdout
    assert "torn" in done.stdout


def test_without_kvm_it_says_why_and_runs_the_fake() -> None:
    """One line on stderr; the result says which it was."""
    program = (
        "from memlistener import kvm, cli; "
        "kvm.available = lambda: kvm.Availability(False, 'there is no /dev/kvm'); "
        "cli.main(['demo', '--transactions', '10', '--json'])"
    )
    done = memlistener(python=("-c", program))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "KVM cannot be used, so scripted vCPUs on a fake kernel run: there is no /dev/kvm"
    ]
    assert json.loads(done.stdout)["backend"] == "fake"


@pytest.mark.kvm
def test_on_kvm() -> None:
    """The real thing, as it is started by default."""
    done = memlistener("demo", "--transactions", "100", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["backend"] == "kvm"


@pytest.mark.parametrize("backend", [pytest.param("kvm", marks=pytest.mark.kvm), "fake"])
def test_ctrl_c_ends_it_with_the_table(backend: str) -> None:
    """Exit status 130, what was done so far, no traceback."""
    arguments = ["demo", "--seconds", "50", *(["--fake"] if backend == "fake" else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "memlistener", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        # The first line of progress: it is running.
        line = process.stderr.readline()
        assert "transactions" in line
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LONG_ENOUGH)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted." in output
    assert time.monotonic() - began < 10
