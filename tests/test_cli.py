from __future__ import annotations

import pytest

from tests.command import memlistener


@pytest.mark.parametrize("module", ["memlistener", "memlistener.cli"])
def test_help(module: str) -> None:
    """Both ways to start it name the subcommands."""
    done = memlistener("--help", python=("-m", module))
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "mirror" in done.stdout


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_missing_extra_is_explained(missing: str) -> None:
    """One line, with the mend, and exit status 2."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None; "
        f"import memlistener.cli as cli; cli.main(['demo'])"
    )
    done = memlistener(python=("-c", program))
    assert done.returncode == 2
    assert done.stderr == (
        f"memlistener: the command needs {missing}: pip install 'memlistener[cli]'\n"
    )


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("demo", "--mode", "nonsense"),
        ("demo", "--vcpus", "0"),
        ("demo", "--seconds", "0"),
        ("demo", "--transactions", "-1"),
    ],
)
def test_wrong_usage_exits_2(args: tuple[str, ...]) -> None:
    """And says what is wrong."""
    done = memlistener(*args)
    assert done.returncode == 2
    assert "Error" in done.stderr
    assert not done.stdout
