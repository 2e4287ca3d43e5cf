"""The command, run as a person runs it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import memlistener as memlistener_package

# The package under test, wherever this process has it from.
PACKAGES = Path(memlistener_package.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGES), "COLUMNS": "100"}
LONG_ENOUGH = 60.0


def memlistener(*args: str, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(python or ("-m", "memlistener")), *args],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH,
        check=False,
    )
