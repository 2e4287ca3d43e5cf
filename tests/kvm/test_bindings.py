from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from memlistener.errors import KvmUnavailableError
from memlistener.kvm import backend, bindings, fds

needs_extension = pytest.mark.skipif(
    bindings.missing() is not None, reason=f"no extension: {bindings.missing()}"
)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing() -> None:
    """Importing the bindings and the handles loads neither the extension nor cffi."""
    code = (
        "import sys, memlistener.kvm.bindings, memlistener.kvm.fds, memlistener.kvm.x86;"
        "print([m for m in sys.modules if m.startswith('cffi') or m.endswith('_kvm')])"
    )
    assert run_python(code) == "[]"


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension, load() raises and missing() says what to install."""
    monkeypatch.setattr(bindings, "_bindings", None)
    monkeypatch.setattr(bindings, "_EXTENSION", "memlistener.kvm._absent")
    reason = bindings.missing()
    assert reason is not None
    assert "linux/kvm.h" in reason or "part of Linux" in reason
    with pytest.raises(KvmUnavailableError) as caught:
        bindings.load()
    assert str(caught.value) == reason


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the platform is the reason")
def test_missing_cffi_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cffi's runtime the mend is to install cffi."""

    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named '_cffi_backend'", name="_cffi_backend")

    monkeypatch.setattr(bindings, "_bindings", None)
    monkeypatch.setattr("memlistener.kvm.bindings.importlib.import_module", import_module)
    assert "pip install cffi" in (bindings.missing() or "")


def test_other_systems_have_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another operating system that is the reason given."""
    monkeypatch.setattr(bindings, "_bindings", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (bindings.missing() or "")


@needs_extension
def test_load_is_done_once() -> None:
    """The extension is loaded, and its signal chosen, once in a process."""
    assert bindings.bindings() is bindings.bindings()
    ffi, lib = bindings.load()
    assert ffi is bindings.bindings().ffi
    assert lib is bindings.bindings().lib
    assert bindings.missing() is None


@needs_extension
def test_constants_agree_with_the_header() -> None:
    """Every number in backend.py is the one in linux/kvm.h."""
    _, lib = bindings.load()
    assert lib.KVM_API_VERSION == fds._API_VERSION
    checked = 0
    for name, value in vars(backend).items():
        if name.startswith(("CAP_", "MEM_", "EXIT_")):
            assert getattr(lib, f"KVM_{name}") == value, name
            checked += 1
    assert checked >= 15


@needs_extension
def test_every_declared_constant_can_be_read() -> None:
    """Reading a constant makes cffi compare it with the header's."""
    _, lib = bindings.load()
    names = [name for name in dir(lib) if name.startswith("KVM_")]
    assert len(names) > 20
    for name in names:
        assert isinstance(getattr(lib, name), int)


@needs_extension
def test_kvm_run_layout() -> None:
    """The exits' members lie where the hot path unpacks them."""
    ffi, _ = bindings.load()
    start = ffi.offsetof("struct kvm_run", "io")
    assert ffi.offsetof("struct kvm_run", "mmio") == start
    assert ffi.offsetof("struct kvm_run", "io", "data_offset") == start + 8
    assert ffi.offsetof("struct kvm_run", "mmio", "is_write") == start + 20
    assert ffi.offsetof("struct kvm_run", "immediate_exit") == 1


@needs_extension
def test_kick_signal_is_a_free_real_time_signal() -> None:
    """The kick's signal is a real-time one, and Python's own handlers stay as they are."""
    code = (
        "import signal; from memlistener.kvm import bindings;"
        "before = [signal.getsignal(s) for s in signal.valid_signals()];"
        "n = bindings.bindings().kick_signal;"
        "assert before == [signal.getsignal(s) for s in signal.valid_signals()];"
        "signal.raise_signal(n); print(n)"  # would end the process if the handler were not there
    )
    assert signal.SIGRTMIN < int(run_python(code)) <= signal.SIGRTMAX


@needs_extension
def test_a_taken_signal_is_left_alone() -> None:
    """A real-time signal that has a handler is passed over."""
    first = bindings.bindings().kick_signal
    code = (
        "import signal; from memlistener.kvm import bindings; seen = [];"
        f"signal.signal({first}, lambda *args: seen.append(1));"
        "n = bindings.bindings().kick_signal;"
        f"signal.raise_signal({first}); print(n, seen)"
    )
    assert run_python(code) == f"{first + 1} [1]"


@needs_extension
def test_no_signal_left() -> None:
    """When every real-time signal is taken, KVM is unavailable and the message says why."""
    code = (
        "import signal; from memlistener.kvm import bindings;"
        "[signal.signal(s, signal.SIG_IGN)"
        " for s in range(signal.SIGRTMIN, signal.SIGRTMAX + 1)];"
        "print(bindings.missing())"
    )
    assert "real-time signal" in run_python(code)
