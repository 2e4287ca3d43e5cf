"""The extension is optional: what is built with and without it, offline and unisolated."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"
)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="KVM exists on Linux only")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, with nothing compiled in it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE-MIT", "LICENSE-APACHE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    return source


def build(source: Path, hook: str, **environment: str) -> tuple[Path, str]:
    """Call a hook of the build backend; returns what it built and what it printed."""
    out = source.parent / "out"
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (built,) = out.iterdir()
    return built, done.stdout


def why_missing(wheel: Path) -> str:
    """What the package in a wheel says about its extension."""
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r});"
        "from memlistener.kvm import bindings; print(bindings.__file__); print(bindings.missing())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    path, reason = done.stdout.splitlines()
    assert path.startswith(str(wheel))
    return reason


def assert_built_without_kvm(wheel: Path) -> None:
    """The wheel is pure Python, whole, and says what is missing."""
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "memlistener/kvm/fds.py" in names
    assert "memlistener/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]
    assert "was not built" in why_missing(wheel)


@linux_only
def test_without_a_compiler(source: Path) -> None:
    """With a compiler that fails, the package builds, without KVM, and says so."""
    wheel, printed = build(source, "build_wheel", CC="/bin/false")
    assert "building without KVM: there is no working C compiler" in printed
    assert_built_without_kvm(wheel)


@linux_only
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_without_the_header(source: Path, tmp_path: Path) -> None:
    """Without linux/kvm.h the package builds, without KVM, and names the header."""
    (tmp_path / "include" / "linux").mkdir(parents=True)
    (tmp_path / "include" / "linux" / "kvm.h").write_text("#error none\n")
    wheel, printed = build(source, "build_wheel", CC=f"cc -I{tmp_path / 'include'}")
    assert "building without KVM: linux/kvm.h is missing" in printed
    assert_built_without_kvm(wheel)


@linux_only
def test_without_cffi(source: Path, tmp_path: Path) -> None:
    """Without cffi at build time the package builds, without KVM, and names cffi."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "cffi.py").write_text("raise ImportError('not here')\n")
    wheel, printed = build(source, "build_wheel", PYTHONPATH=str(shadow))
    assert "building without KVM: cffi cannot be imported (not here)" in printed
    assert_built_without_kvm(wheel)


@linux_only
def test_when_the_compiler_fails_later(source: Path) -> None:
    """An extension that does not compile, although the probes did, is left out too."""
    with (source / "src/memlistener/kvm/_source.c").open("a") as file:
        file.write("#error broken\n")
    wheel, _ = build(source, "build_wheel")
    assert "was not built" in why_missing(wheel)


@pytest.mark.kvm
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_with_a_compiler(source: Path) -> None:
    """With everything there, the wheel has one abi3 extension, and is tagged so."""
    wheel, printed = build(source, "build_wheel")
    assert "-cp311-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["memlistener/kvm/_kvm.abi3.so"]
    assert not re.search(r"\.[ch]:\d+:\d+: warning:", printed), printed


def test_sdist_is_complete(source: Path) -> None:
    """The source distribution has what the extension is built from."""
    sdist, _ = build(source, "build_sdist", CC="/bin/false")
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kvm = {f"src/memlistener/kvm/{n}" for n in ("_build.py", "_cdef.h", "_cdef_x86.h", "_source.c")}
    assert kvm | {"setup.py", "LICENSE-MIT", "LICENSE-APACHE", "src/memlistener/py.typed"} <= names
