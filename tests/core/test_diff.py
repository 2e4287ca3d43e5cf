"""Old ranges, new ranges, and what a listener hears of the difference."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatRange, FlatView, MemoryRegion
from memlistener.core.diff import RegionAdd, RegionDel, RegionNop, diff
from memlistener.core.events import LogStart, LogStop
from memlistener.core.kinds import LOG_SHIFT, NONVOLATILE, READONLY, ROMD_MODE, UNMERGEABLE
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.trees import examples, replay

RAM = MemoryRegion.ram("ram", 0x10000)
OTHER = MemoryRegion.ram("ram", 0x10000)
OLD = FlatRange(0x1000, 0x1000, RAM, 0x1000, ROMD_MODE)
CHANGES = {
    "region": OLD._replace(region=OTHER),
    "address": OLD._replace(start=0x1800),
    "size": OLD._replace(size=0x800),
    "offset": OLD._replace(offset=0),
    "romd_mode": OLD._replace(flags=0),
    "readonly": OLD._replace(flags=ROMD_MODE | READONLY),
    "nonvolatile": OLD._replace(flags=ROMD_MODE | NONVOLATILE),
    "unmergeable": OLD._replace(flags=ROMD_MODE | UNMERGEABLE),
}


def logging(mask: int) -> FlatRange:
    return OLD._replace(flags=OLD.flags | mask << LOG_SHIFT)


@pytest.mark.parametrize("what", CHANGES)
def test_a_range_that_changed(what: str) -> None:
    """T5: any difference deletes the whole old range and adds the whole new one."""
    new = CHANGES[what]
    assert diff([OLD], [new]) == [RegionDel(OLD), RegionAdd(new)]
    assert diff([new], [OLD]) == [RegionDel(new), RegionAdd(OLD)]
    assert diff([OLD], [new], nops=True) == [RegionDel(OLD), RegionAdd(new)]


def test_a_range_that_stays() -> None:
    """T7: it is of interest only to those who ask."""
    equal = FlatRange(*OLD)
    assert equal is not OLD
    assert diff([OLD], [equal]) == []
    assert diff([OLD], [equal], nops=True) == [RegionNop(equal)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0, 1, [LogStart(logging(1), 0, 1)]),
        (1, 0, [LogStop(logging(0), 1, 0)]),
        (1, 3, [LogStart(logging(3), 1, 3)]),
        (1, 2, [LogStart(logging(2), 1, 2), LogStop(logging(2), 1, 2)]),
    ],
)
def test_only_the_logging_changed(
    before: int, after: int, expected: list[LogStart | LogStop]
) -> None:
    """T5: region_nop, then log_start for bits gained, then log_stop for bits lost."""
    old, new = logging(before), logging(after)
    assert diff([old], [new]) == expected
    assert diff([old], [new], nops=True) == [RegionNop(new), *expected]


def test_added_with_logging_on() -> None:
    """T6: a range that is added while logging is on gets no log_start."""
    assert diff([], [logging(1)]) == [RegionAdd(logging(1))]
    assert diff([logging(1)], []) == [RegionDel(logging(1))]
    moved = logging(1)._replace(offset=0)
    assert diff([OLD], [moved]) == [RegionDel(OLD), RegionAdd(moved)]


def test_two_passes() -> None:
    """T2, T3: all deletes, ascending, and then all adds, ascending."""
    ranges = [OLD._replace(start=number * 0x1000) for number in range(6)]
    moved = [each._replace(offset=0) for each in ranges]
    old = [ranges[0], ranges[1], ranges[3], ranges[4]]
    new = [moved[1], ranges[2], ranges[3], moved[4], ranges[5]]
    assert diff(old, new) == [
        RegionDel(ranges[0]),
        RegionDel(ranges[1]),
        RegionDel(ranges[4]),
        RegionAdd(moved[1]),
        RegionAdd(ranges[2]),
        RegionAdd(moved[4]),
        RegionAdd(ranges[5]),
    ]
    assert RegionNop(ranges[3]) in diff(old, new, nops=True)


@pytest.mark.parametrize("event", [RegionDel(OLD), RegionAdd(OLD), RegionNop(OLD)])
def test_events_are_frozen(event: RegionDel | RegionAdd | RegionNop) -> None:
    """What was delivered once can be delivered again, inverted."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.range = OLD  # type: ignore[misc]
    assert event == type(event)(FlatRange(*OLD))
    assert event.is_delete is isinstance(event, RegionDel)


@examples(dev=40, ci=200)
@given(tree_plans(limit=0x4000), tree_plans(limit=0x4000), st.booleans())
def test_any_two_views(one: TreePlan, two: TreePlan, same_regions: bool) -> None:
    """T5: events replayed into the old map give the new one; reversed, the old one again."""
    regions = one.build()
    old = FlatView.render(regions[0])
    new = FlatView.render(two.build()[0] if not same_regions else regions[-1])
    believed = {each.start: each for each in old}
    replay(diff(old, new), believed)
    assert believed == {each.start: each for each in new}
    replay(diff(new, old), believed)
    assert believed == {each.start: each for each in old}
    everything = diff(old, new, nops=True)
    stay = [each.range for each in everything if isinstance(each, RegionNop)]
    assert stay == [each for each in new if each in set(old)]
    assert [each for each in everything if not isinstance(each, RegionNop)] == diff(old, new)
