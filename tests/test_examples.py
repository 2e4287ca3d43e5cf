"""Every example in docs/examples runs, and the README shows them as they are."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from memlistener import kvm

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_there_are_examples() -> None:
    """The directory has been found: no example would be as good as none failing."""
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("example", EXAMPLES, ids=names(EXAMPLES))
def test_runs(example: Path, tmp_path: Path) -> None:
    """As a user would run it, wherever that is; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example prints something"
    assert done.stderr == ""


USES_KVM = [path for path in EXAMPLES if "kvm.available()" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("example", USES_KVM, ids=names(USES_KVM))
def test_runs_without_kvm(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What falls back to FakeKvm where there is no KVM does so, here too."""
    no = kvm.Availability(False, "the test says so")
    monkeypatch.setattr(kvm, "available", lambda: no)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_some_use_kvm() -> None:
    """The search that the test above depends on finds something."""
    assert len(USES_KVM) >= 2


# A block and the link to its file, in the line before it.
BLOCK = re.compile(r"\[`(docs/examples/\w+\.py)`\][^\n]*\n\n```python\n(.*?)^```$", re.S | re.M)


def test_readme_shows_the_examples() -> None:
    """Each Python block of the README is one of the files, to the letter."""
    shown = BLOCK.findall(README)
    assert shown
    assert len(shown) == README.count("```python"), "a block without a link to its file before it"
    for path, text in shown:
        assert text == (ROOT / path).read_text(encoding="utf-8"), path


def test_readme_links_lead_somewhere() -> None:
    """Each relative link of the README names a file of the repository."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
