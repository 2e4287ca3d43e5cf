"""What a listener would hear between two dumps of one machine."""

from __future__ import annotations

from typing import Any

import pytest

from memlistener import FlatRange
from memlistener.core.mtree import (
    ViewDump,
    format_flatviews,
)
from memlistener.core.mtree_diff import diff_dumps
from memlistener.core.mtree_views import parse_flatviews
from tests.core.test_mtree import small
from tests.corpus import SEQUENCES, Regions, sequence


@pytest.mark.parametrize("name", SEQUENCES)
def test_differences_between_dumps_are_qemus(name: str) -> None:
    """Between the view texts of two states are exactly the events that were recorded."""
    before: tuple[ViewDump, ...] | None = None
    names: dict[int, str] = {}
    for state in sequence(name):
        names |= {int(key): each["name"] for key, each in state["regions"].items()}
        built = Regions(state)
        spaces = [(each["name"], built[each["root"]]) for each in state["address_spaces"]]
        after = parse_flatviews(format_flatviews(spaces)).views
        if before is not None:
            wanted = sorted(
                (state["address_spaces"][change["space"]]["name"], kind, *recorded(each, names))
                for change in state["events"]
                for kind in ("del", "add")
                for each in change[kind]
            )
            found = sorted(
                (change.name, "del" if event.is_delete else "add", *told(event.range))
                for change in diff_dumps(before, after)
                for event in change.events
            )
            assert found == wanted, state["note"]
        before = after


def recorded(each: Any, names: dict[int, str]) -> tuple[object, ...]:
    return each["start"], each["size"], names[each["region"]], each["offset"], each["readonly"]


def told(each: FlatRange) -> tuple[object, ...]:
    return each.start, each.size, each.region.name, each.offset, each.readonly


def test_difference_has_deletes_first() -> None:
    """Where a region moves, it is deleted and added; an address space that is gone, deleted."""
    spaces = small()
    before = parse_flatviews(format_flatviews(spaces)).views
    flash = next(each for each in spaces[0][1].subregions if each.name == "flash")
    flash.set_address(0x7000)
    after = parse_flatviews(format_flatviews(spaces[:1])).views
    changes = {each.name: each.events for each in diff_dumps(before, after)}
    assert [(each.hook, each.range.start) for each in changes["memory"]] == [
        ("region_del", 0x8000),
        ("region_add", 0x7000),
    ]
    assert [each.hook for each in changes["cpu-0"]] == ["region_del"] * 4
    assert diff_dumps(after, after) == []
