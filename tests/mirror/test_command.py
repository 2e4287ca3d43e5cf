"""`memlistener mirror` as a person runs it: output, exit status, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ENVIRONMENT, LONG_ENOUGH, memlistener

QUICK = ("mirror", "--fake", "--transactions", "20", "--ram", "1")


@pytest.mark.parametrize("method", ["bitmap", "manual-protect", "ring"])
def test_json_is_all_there_is_on_stdout(method: str) -> None:
    """A program can read it."""
    done = memlistener(*QUICK, "--json", "--dirty-log", method, "--seed", "3")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["transactions"], data["seed"], data["pages"]) == (20, 3, 256)
    assert (data["backend"], data["dirty_log"]) == ("fake", method)
    assert data["differing"] == 0


def test_table(tmp_path: Path) -> None:
    """For people: what was run, the figures, the verdict; and the file, if one was asked for."""
    output = tmp_path / "ram.img"
    done = memlistener(*QUICK, "--vcpus", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 vCPU, scripted, on a fake kernel, 1 MiB, policy every-commit")
    assert "pages that differ" in done.stdout
    assert done.stdout.endswith("0 of 256 pages differ.\n")
    assert output.stat().st_size == 1 << 20


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    """One line that names it, and exit status 2."""
    done = memlistener(*QUICK, "--output", str(tmp_path / "nowhere" / "ram.img"))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "nowhere/ram.img: No such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--dirty-log", "nonsense"),
        ("--policy", "nonsense"),
        ("--cpu", "real"),
        ("--ram", "0"),
        ("--vcpus", "65"),
    ],
)
def test_wrong_usage_exits_2(args: tuple[str, ...]) -> None:
    """And says what is wrong."""
    done = memlistener("mirror", *args)
    assert done.returncode == 2
    assert "Error" in done.stderr
    assert not done.stdout


def test_without_kvm_it_says_why_and_runs_the_fake() -> None:
    """One line on stderr; the result says which it was."""
    program = (
        "from memlistener import kvm, cli; "
        "kvm.available = lambda: kvm.Availability(False, 'there is no /dev/kvm'); "
        "cli.main(['mirror', '--transactions', '5', '--ram', '1', '--json'])"
    )
    done = memlistener(python=("-c", program))
    assert done.returncode == 0, done.stderr
    assert "KVM cannot be used" in done.stderr.splitlines()[0]
    assert json.loads(done.stdout)["backend"] == "fake"


@pytest.mark.kvm
def test_on_kvm() -> None:
    """The real thing, as it is started by default."""
    done = memlistener("mirror", "--transactions", "100", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(done.stdout)
    assert data["backend"] == "kvm"
    assert data["cpu"] == "long"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("backend", [pytest.param("kvm", marks=pytest.mark.kvm), "fake"])
def test_ctrl_c_ends_it_with_the_comparison(backend: str, number: signal.Signals) -> None:
    """Exit status 130, the rest copied and compared, no traceback."""
    arguments = ["mirror", "--seconds", "50", *(["--fake"] if backend == "fake" else [])]
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
        assert "round" in process.stderr.readline()
        process.send_signal(number)
        output, errors = process.communicate(timeout=LONG_ENOUGH)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert output.rstrip().endswith("pages differ.")
    assert "Interrupted. 0 of" in output
