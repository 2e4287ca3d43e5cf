"""The pytest plugin: its fixtures work in somebody else's test session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
from memlistener import MemoryRegion
from memlistener.testing import Halt

async def test_map(memory_system, record, assert_flatview, assert_trace):
    root = MemoryRegion.container("root", 1 << 32)
    space = memory_system.create_address_space("memory", root)
    listener = await record(space)
    async with memory_system.transaction():
        root.add_subregion(0, MemoryRegion.ram("ram", 0x1000))
    assert_flatview(space.view, "[0x0, 0x1000) ram 'ram' +0x0")
    assert_trace(listener, "begin\\nregion_add [0x0, 0x1000) ram+0x0\\ncommit")

def test_fake(fake_kvm):
    vm = fake_kvm(script=lambda vcpu: [Halt()]).create_vm()
    assert vm.create_vcpu(0).run() == 0
"""


def test_fixtures(tmp_path: Path) -> None:
    """All fixtures serve a test session of which memlistener knows nothing."""
    (tmp_path / "test_machine.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Named where the package is not installed but only on the path.
    plugin = ["-p", "memlistener.testing.pytest_plugin"] if not _installed() else []
    paths = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [*command, *plugin],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def _installed() -> bool:
    from importlib.metadata import entry_points

    return any(each.name == "memlistener" for each in entry_points(group="pytest11"))


def test_costs_nothing_unused() -> None:
    """Importing the plugin imports neither the rest of memlistener's testing nor trio."""
    code = (
        "import sys, importlib.util as u, memlistener.testing.pytest_plugin as p;"
        "print('hypothesis' in sys.modules, '_cffi_backend' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "False"]
