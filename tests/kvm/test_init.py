from __future__ import annotations

import subprocess
import sys

import pytest

from memlistener import kvm
from memlistener.errors import KvmUnavailableError
from memlistener.kvm import fds

# Makes the extension and cffi as absent as where neither could be built.
_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("memlistener.kvm._kvm", "_cffi_backend", "cffi"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names() -> None:
    """Everything that is announced is there, and sorted."""
    assert all(hasattr(kvm, name) for name in kvm.__all__)
    assert kvm.__all__ == sorted(kvm.__all__)


def test_import_loads_neither_cffi_nor_the_extension() -> None:
    """Importing memlistener and memlistener.kvm loads nothing compiled."""
    code = (
        "import sys, memlistener, memlistener.kvm;"
        "print([m for m in sys.modules if 'cffi' in m or m.endswith('_kvm')])"
    )
    assert python(code) == "[]"


def test_without_the_extension() -> None:
    """Without the extension everything imports, and available() says what to install."""
    code = _WITHOUT + (
        "from memlistener import kvm\n"
        "usable = kvm.available()\n"
        "assert not usable\n"
        "assert not usable.usable\n"
        "print(usable)"
    )
    assert "install" in python(code) or sys.platform != "linux"


def test_without_the_extension_a_vm_runs_on_the_fake() -> None:
    """Without the extension a VM runs on FakeKvm, and open_vm() on the real one explains."""
    code = _WITHOUT + (
        "import trio\n"
        "from memlistener import MemoryRegion, MemorySystem, kvm\n"
        "from memlistener.errors import KvmUnavailableError\n"
        "from memlistener.testing import FakeKvm, Read\n"
        "async def main():\n"
        "    root = MemoryRegion.ram('ram', 0x1000)\n"
        "    space = MemorySystem().create_address_space('memory', root)\n"
        "    fake = FakeKvm(script=lambda vcpu_id: [Read(0, 4)])\n"
        "    async with kvm.open_vm(space, backend=fake) as vm:\n"
        "        print(await (await vm.create_vcpu()).run())\n"
        "    try:\n"
        "        async with kvm.open_vm(space):\n"
        "            pass\n"
        "    except KvmUnavailableError as error:\n"
        "        print(str(error) == str(kvm.available()))\n"
        "trio.run(main)\n"
    )
    assert python(code).split() == ["Hlt()", "True"]


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where KVM cannot be used, available() is false and has the error's text."""

    def refuse() -> fds.Kvm:
        raise KvmUnavailableError("no, and do this")

    monkeypatch.setattr(fds.Kvm, "open", refuse)
    availability = kvm.available()
    assert not availability
    assert availability == kvm.Availability(False, "no, and do this")
    assert str(availability) == "no, and do this"


@pytest.mark.kvm
def test_available() -> None:
    """Where KVM can be used, available() is true, and leaves nothing open."""
    availability = kvm.available()
    assert availability
    assert availability.usable
    assert availability.reason
