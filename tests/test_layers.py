"""The package's layers: which module may import which, and what importing it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memlistener

PACKAGE = Path(memlistener.__file__).parent
TESTS = Path(__file__).parent

# Lowest first: a module imports from its own layer and from those before it.
LAYERS = (
    ("errors",),
    ("core",),
    (
        "histogram",
        "protect",
        "ram",
        "listener",
        "eventfd",
        "dispatch",
        "instrument",
        "trace",
        "bracket",
    ),
    ("address_space", "delivery", "dirty_log", "iommu", "ram_discard", "pending", "memory", "vcpu"),
    ("", "kvm", "testing", "unicorn"),  # "": the package itself, for its public names
    ("rig",),
    ("demo", "mirror"),
    ("cli", "mtree_command", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Pure: no event loop, no C, no threads, no files, no clock.
IMPURE = {
    *("trio", "cffi", "threading", "os", "time", "io", "pathlib", "socket", "asyncio"),
    *("mmap", "ctypes", "signal", "subprocess", "random", "logging"),
}
EXTENSION = "memlistener.kvm._kvm"
STRATEGIES = {"memlistener.testing.strategies", "memlistener.testing.mutations"}
NOT_MIRRORED = {
    "__main__",  # one line: `python -m memlistener`, run by the tests of cli
    "core/mtree_lines",  # the parts of core/mtree, tested through it
    "core/mtree_link",
    "core/mtree_sections",
    "core/mtree_settle",
    "core/mtree_views",
    "testing/fake_ioctls",  # the parts of testing/fake_kvm
    "testing/fake_registers",
    "testing/guest_script",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("memlistener", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
by_module = pytest.mark.parametrize("name", MODULES)


def layer(name: str) -> str:
    """``memlistener.core.region`` -> ``core``; the package itself is ``""``."""
    return [*name.split("."), ""][1]


def imports(name: str, *, typing_too: bool = False) -> set[str]:
    """The modules that ``name`` imports when it runs, anywhere in its code."""
    tree = ast.parse(MODULES[name].read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped |= {inner for part in node.body for inner in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if node in skipped and not typing_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name: say where from"
            assert node.module is not None
            # `from memlistener import kvm` imports memlistener.kvm.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = inner & MODULES.keys()
            found |= inside
            if inside != inner:
                found.add(node.module)
    return found


def test_the_parser_sees_imports() -> None:
    """The checks below rest on this: all kinds of imports are seen."""
    assert "memlistener.errors" in imports("memlistener.core.region")
    assert "memlistener.dispatch" in imports("memlistener.kvm.run")
    assert "memlistener.memory" not in imports("memlistener.listener")
    assert len(MODULES) > 30


@by_module
def test_imports_point_downwards(name: str) -> None:
    """Design: errors, core <- ram, listener, dispatch, bracket <- memory, vcpu <- kvm <- cli."""
    assert layer(name) in RANK, f"{name} has no layer: say in LAYERS where it belongs"
    if name == "memlistener":
        return  # it gathers the public names, of all layers below kvm
    for each in imports(name):
        if each.split(".")[0] == "memlistener":
            assert RANK[layer(each)] <= RANK[layer(name)], f"{name} imports {each}"
            # Below kvm nothing uses the package's own front door.
            assert layer(each) or RANK[layer(name)] >= RANK["kvm"], f"{name} imports memlistener"


@by_module
def test_nothing_below_kvm_knows_kvm(name: str) -> None:
    """The front door, the bracket and the runner work with any accelerator."""
    if layer(name) not in ("kvm", "testing", "rig", "demo", "mirror", "cli", "__main__"):
        assert {layer(each) for each in imports(name, typing_too=True)}.isdisjoint(
            {"kvm", "testing", "unicorn", "rig", "demo", "mirror", "cli"}
        )


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) in ("core", "errors")])
def test_the_core_is_pure(name: str) -> None:
    """Core: no trio, no cffi, no threads, no files and no clock."""
    assert {each.split(".")[0] for each in imports(name)}.isdisjoint(IMPURE)


@by_module
def test_one_importer_of_the_extension(name: str) -> None:
    """kvm/bindings.py, and nobody else, knows the compiled extension and cffi."""
    text = MODULES[name].read_text()
    tree = ast.parse(text)
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    uses = EXTENSION in imports(name) or EXTENSION in strings or "._kvm" in strings
    if name == "memlistener.kvm.bindings":
        assert uses
    elif name != "memlistener.kvm._build":  # which makes it
        assert not uses
        assert "cffi" not in {each.split(".")[0] for each in imports(name)}


@by_module
def test_hypothesis_is_optional(name: str) -> None:
    """Only the strategies need it, and who asks for them; not what `testing` loads."""
    if name not in STRATEGIES:
        assert "hypothesis" not in {each.split(".")[0] for each in imports(name)}
        assert imports(name).isdisjoint(STRATEGIES) or name.endswith("plugin")


def loaded_by(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    path = str(PACKAGE.parent)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


HEAVY = {"cffi", "_cffi_backend", EXTENSION, "hypothesis", "click", "rich", "memlistener.kvm"}


def test_importing_loads_little() -> None:
    """``import memlistener`` loads neither cffi nor the extension, nor what is optional."""
    loaded = loaded_by("import memlistener")
    assert "memlistener.memory" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_kvm_loads_no_extension() -> None:
    """``from memlistener import kvm`` works where the extension could not be built."""
    loaded = loaded_by("from memlistener import kvm")
    assert "memlistener.kvm" in loaded
    assert loaded.isdisjoint({"cffi", "_cffi_backend", EXTENSION, "hypothesis"})


def test_importing_the_fake_loads_no_extension() -> None:
    """``memlistener.testing`` is for machines without KVM, and without Hypothesis."""
    loaded = loaded_by("from memlistener import testing")
    assert loaded.isdisjoint({"cffi", "_cffi_backend", EXTENSION, "hypothesis"})


@by_module
def test_every_module_has_its_tests(name: str) -> None:
    """``core/region.py`` is tested in ``tests/core/test_region.py``, and so on."""
    path = MODULES[name].relative_to(PACKAGE).with_suffix("")
    if path.name in ("__init__", "_build") or path.as_posix() in NOT_MIRRORED:
        return
    mirror = TESTS / path.parent / f"test_{path.name}.py"
    assert mirror.exists(), f"{path}.py has no {mirror.relative_to(TESTS.parent)}"


def test_what_is_not_mirrored_exists() -> None:
    """The list of exceptions is no longer than it has to be."""
    names = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES.values()}
    assert names >= NOT_MIRRORED
    mirrored = {
        each
        for each in NOT_MIRRORED
        if (TESTS / Path(each).parent / f"test_{Path(each).name}.py").exists()
    }
    assert mirrored == set()
