"""Adds the KVM extension to the build where it can be compiled, and else says why not.

Everything else is in pyproject.toml. The extension is probed for *before* the
build rather than dropped when it fails, so that a build without it is an
ordinary pure-Python one and its wheel is tagged so.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from setuptools import setup

# Importing setuptools is what puts its own distutils in place, so this comes second.
from distutils.ccompiler import new_compiler  # isort: skip
from distutils.sysconfig import customize_compiler, get_python_inc  # isort: skip


def _compiles(source: str) -> bool:
    """Whether the C compiler (``$CC`` included) accepts a few lines of C."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "probe.c")
        path.write_text(source)
        include_dirs = [get_python_inc(), get_python_inc(plat_specific=True)]
        try:
            compiler = new_compiler()
            customize_compiler(compiler)
            compiler.compile([str(path)], output_dir=directory, include_dirs=include_dirs)
        except Exception:  # setuptools keeps moving these; and whatever it is, it does not compile
            return False
    return True


def _reason_to_leave_kvm_out() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"KVM exists on Linux only, not on {sys.platform}"
    try:
        import cffi  # noqa: F401
    except ImportError as error:
        return f"cffi cannot be imported ({error})"
    if not _compiles("#include <Python.h>\n"):
        return "there is no working C compiler with Python's headers"
    # KVM_CAP_IMMEDIATE_EXIT (Linux 4.13) is the newest thing that cannot be done without.
    if not _compiles("#include <linux/kvm.h>\nint probe = KVM_CAP_IMMEDIATE_EXIT;\n"):
        return "linux/kvm.h is missing, or older than Linux 4.13"
    return None


reason = _reason_to_leave_kvm_out()
if reason is None:
    setup(
        cffi_modules=["src/memlistener/kvm/_build.py:ffibuilder"],
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
else:
    print(f"memlistener: building without KVM: {reason}; everything else works", file=sys.stderr)
    setup()
