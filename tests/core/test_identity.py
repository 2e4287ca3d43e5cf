"""What cannot be copied, and views, which need not be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from memlistener import FlatView, MemoryRegion, MemorySystem, RamBlock

SYSTEM = MemorySystem()
RAM = MemoryRegion.ram("ram", 0x1000)
SPACE = SYSTEM.create_address_space("space", RAM)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(
    "what", [SYSTEM, RAM, SPACE, RamBlock.memfd(0x1000)], ids=lambda what: type(what).__name__
)
def test_no_copies(copied: Callable[[object], object], what: object) -> None:
    """A second one would not be in the tree, or own the same file descriptor."""
    with pytest.raises(TypeError, match=f"{type(what).__name__}.* is an identity, not a value"):
        copied(what)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_views(copied: Callable[[FlatView], FlatView]) -> None:
    """A view never changes, so it is its own copy."""
    view = FlatView.render(RAM)
    assert copied(view) is view


def test_views_are_not_pickled() -> None:
    """It names regions."""
    with pytest.raises(TypeError, match="is an identity, not a value"):
        pickle.dumps(FlatView.render(RAM))
