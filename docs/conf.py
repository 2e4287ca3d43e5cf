"""How Sphinx builds this documentation: `make docs`."""

from __future__ import annotations

import enum
from typing import Any

from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

import memlistener
from memlistener import kvm, testing

project = "memlistener"
author = "the memlistener authors"
copyright = "the memlistener authors"
release = version = memlistener.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"memlistener {version}"
html_show_copyright = False
pygments_style = "friendly"

# Docstrings name other things in single backquotes: a link where there is
# something to link to, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}

# No inventories are fetched, so types of other libraries lead nowhere.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(attr|collections|contextlib|enum|hypothesis|os|threading|trio|types|typing)\..*",
    ),
    ("py:.*", r"(Any|Awaitable|Callable|Chain|Iterable|Iterator|Mapping|Sequence)"),
]

# Short name -> where the API reference has it.
PUBLIC = {
    name: f"{package.__name__}.{name}"
    for package in (testing, kvm, memlistener)
    for name in package.__all__
}
# Classes that nobody constructs, though their constructors do not say so.
NOT_CONSTRUCTED = {"DirtyRanges", "FlatRange"}
CONFIG = Config(napoleon_use_ivar=True)


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link to a public name that is written short, or by the module that defines it."""
    if node.get("refdomain") != "py":
        return None
    head, _, last = node["reftarget"].rpartition(".")
    target = PUBLIC.get(last)
    if target is None:  # a member: FlatView.render, memlistener.core.flatview.FlatView.render
        owner = PUBLIC.get(head.rpartition(".")[2])
        target = f"{owner}.{last}" if owner else None
    if target is not None and target != node["reftarget"]:
        domain = env.get_domain("py")
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)
        if found is not None:
            return found
    # Not a name of the reference: a method named in passing, a word. Plain code.
    return contnode if node.get("reftype") == "obj" else None


def hide_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any
) -> Any:
    """No signature for a class whose constructor says "Use ..." something else."""
    made_elsewhere = what == "class" and (
        (obj.__init__.__doc__ or "").startswith("Use ")
        or obj.__name__ in NOT_CONSTRUCTED
        or issubclass(obj, enum.Enum)
    )
    return ("", None) if made_elsewhere else None


class Docstring(GoogleDocstring):
    """Google style without types, which are in the annotations: "X: ..." is a sentence."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list[Any]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def google_style(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What the napoleon extension does, but a property is no attribute with a type."""
    kind = "method" if what in ("property", "attribute") else what
    lines[:] = Docstring(list(lines), CONFIG, app, kind, name, obj, options).lines()


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("autodoc-process-docstring", google_style)
