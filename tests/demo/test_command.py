"""`memlistener demo` as a person runs it: output, exit status, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chrome_trace import Trace, torn
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


BACKENDS = pytest.mark.parametrize("backend", [pytest.param("kvm", marks=pytest.mark.kvm), "fake"])


@BACKENDS
def test_trace_shows_the_run(backend: str, tmp_path: Path) -> None:
    """Every bracket with its ioctls, and no vCPU in the guest meanwhile; stdout as without."""
    path = tmp_path / "trace.json"
    done = memlistener(
        *("demo", "--transactions", "50", "--json", "--trace", str(path)),
        *(["--fake"] if backend == "fake" else []),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["transactions"] == 50
    assert f"The trace is in {path}: open it with https://ui.perfetto.dev" in done.stderr
    trace = Trace(path.read_text(encoding="utf-8"))
    trace.check()
    brackets = trace.brackets()
    assert len(brackets) == 51  # one made the first map
    assert all(each.ioctls for each in brackets)
    assert sum(len(each.ioctls) for each in brackets) == len(trace.ioctls)
    assert sorted(trace.vcpus) == ["vcpu 0", "vcpu 1"]
    assert torn(trace, [each.quiet for each in brackets]) == []


def test_trace_that_cannot_be_written(tmp_path: Path) -> None:
    """A usage error that says why, before anything runs."""
    for path in (tmp_path / "nowhere" / "trace.json", tmp_path):
        done = memlistener("demo", "--fake", "--seconds", "50", "--trace", str(path))
        assert done.returncode == 2
        assert done.stdout == ""
        assert "'--trace'" in done.stderr
        assert str(path) in done.stderr
        assert "No such file or directory" in done.stderr or "is a directory" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_trace_on_a_full_disk() -> None:
    """The run goes on and its result is printed; the status says that something is missing."""
    done = memlistener(
        *("demo", "--fake", "--transactions", "100", "--json", "--trace", "/dev/full")
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["transactions"] == 100
    assert "The trace in /dev/full is not complete: [Errno 28]" in done.stderr


@BACKENDS
def test_ctrl_c_ends_it_with_the_table(backend: str, tmp_path: Path) -> None:
    """Exit status 130, what was done so far, no traceback, and a trace that has an end."""
    path = tmp_path / "trace.json"
    arguments = ["demo", "--seconds", "50", "--trace", str(path)]
    arguments += ["--fake"] if backend == "fake" else []
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
    assert Trace(path.read_text(encoding="utf-8")).brackets()
    assert time.monotonic() - began < 10
