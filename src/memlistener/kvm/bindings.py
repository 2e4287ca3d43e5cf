"""The one importer of the C extension, and what to say where there is none.

Importing this module never fails and loads nothing: `load` does, when somebody
first wants KVM. Everything else in the package reaches the extension through
it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any

import attrs

from memlistener.core.dirty import accelerate
from memlistener.errors import KvmUnavailableError
from memlistener.kvm.bitmaps import bitmap_functions

_EXTENSION = "memlistener.kvm._kvm"


@attrs.frozen
class Bindings:
    """The loaded extension.

    Attributes:
        ffi: cffi's ``ffi`` object: the structs of ``linux/kvm.h``.
        lib: cffi's ``lib`` object: constants and the functions of ``_source.c``.
        kick_signal: The number of the real-time signal that kicks vCPUs.
        has_x86: Whether the x86-64 part (general and segment registers, the
            TSS address) was compiled in.
    """

    ffi: Any
    lib: Any
    kick_signal: int
    has_x86: bool


_lock = threading.Lock()
_bindings: Bindings | None = None


def bindings() -> Bindings:
    """The extension, with its kick handler installed; loaded once in a process.

    Raises:
        KvmUnavailableError: The extension is not there or cannot be used; the
            message says what is missing and what to do.
    """
    global _bindings
    if _bindings is not None:
        return _bindings
    with _lock:
        if _bindings is None:
            _bindings = _load()
        return _bindings


def load() -> tuple[Any, Any]:
    """The extension's ``(ffi, lib)``.

    Raises:
        KvmUnavailableError: As `bindings` does.
    """
    loaded = bindings()
    return loaded.ffi, loaded.lib


def missing() -> str | None:
    """Why the extension cannot be used, with the mend; ``None`` if it can.

    Says nothing about ``/dev/kvm``: that is `memlistener.kvm.fds.Kvm.open`.
    """
    try:
        bindings()
    except KvmUnavailableError as error:
        return str(error)
    return None


def _load() -> Bindings:
    if not sys.platform.startswith("linux"):
        raise KvmUnavailableError(f"KVM is a part of Linux, and this is {sys.platform}")
    try:
        module = importlib.import_module(_EXTENSION)
    except ImportError as error:
        raise KvmUnavailableError(_explain(error)) from error
    signo = int(module.lib.ml_install_kick_handler())
    if signo < 0:
        raise KvmUnavailableError(
            "every real-time signal already has a handler in this process, and kicking a vCPU "
            "needs one; leave one of them at SIG_DFL"
        )
    accelerate(*bitmap_functions(module.ffi, module.lib))
    return Bindings(module.ffi, module.lib, signo, hasattr(module.lib, "ml_get_regs"))


def _explain(error: ImportError) -> str:
    if error.name == _EXTENSION:
        return (
            f"the C extension {_EXTENSION} was not built when memlistener was installed; "
            "install a C compiler and the Linux headers (linux/kvm.h), then install memlistener "
            "again from its source (in a checkout: make clean, then make demo)"
        )
    if error.name == "_cffi_backend":
        return "the Python package cffi is not installed; pip install cffi"
    return f"the C extension {_EXTENSION} does not load ({error}); install memlistener again"
