"""Ways up are kept for as long as they are true, and rendering may start at the top of a sight."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from memlistener import MemoryRegion
from memlistener.core import ways
from memlistener.core.change import reach
from memlistener.core.kinds import LIMIT, NONVOLATILE
from memlistener.core.render import render
from memlistener.core.ways import Sight, Way, way_of
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.trees import Journal, Mutation, Owner, examples, mutations

SPAN = 0x4000


class Following(Owner):
    """Owns what left the tree too: so every change of that has a way back."""

    def detached(self, region: MemoryRegion) -> None:
        if self not in region._owners:
            region._attach_owner(self)


def content(way: Way) -> tuple[object, ...]:
    """All of a way but when it was found, in no order."""
    places = {
        (
            place.first,
            place.last,
            frozenset(sight._replace(epoch=0) for sight in place.sights),
            frozenset(sight._replace(epoch=0) for sight in place.deciding),
        )
        for place in way.places
    }
    return places, set(way.owners), way.mixed


def found_anew(region: MemoryRegion, regions: list[MemoryRegion]) -> Way:
    """A way that nobody kept; that it was looked for is not to be seen afterwards."""
    marks = [each._passed for each in regions]
    found = ways._walk(region)
    for each, mark in zip(regions, marks, strict=True):
        each._passed = mark
    return found


@examples(dev=150, ci=600)
@given(st.data())
def test_what_is_kept_is_true(data: st.DataObject) -> None:
    """Whatever changed, or was taken back, a way is what a walk from scratch finds."""
    plan = data.draw(tree_plans(limit=SPAN, max_regions=12))
    regions = plan.build()
    journal = Journal()
    roots = data.draw(st.sets(st.sampled_from(range(len(regions))), max_size=2)) | {0}
    for root in sorted(roots):
        Following(regions[root], journal)
    some = st.lists(st.sampled_from(regions), max_size=4)
    for _ in range(data.draw(st.integers(1, 8))):
        for each in data.draw(some):
            way_of(each)
        if journal.entries and data.draw(st.sampled_from((False, False, True))):
            journal.entries.pop()()
        else:
            data.draw(mutations(SPAN)).apply(regions)
        for each in regions:
            if each._way is not None and each._way.epoch == ways._epoch:
                assert content(each._way) == content(found_anew(each, regions))


@examples(dev=100, ci=500)
@given(
    tree_plans(limit=SPAN, max_regions=12),
    st.lists(mutations(SPAN), max_size=4),
    st.lists(st.tuples(st.integers(0, SPAN), st.integers(1, SPAN)), min_size=1, max_size=4),
)
def test_rendering_starts_at_the_top(
    plan: TreePlan, changes: list[Mutation], windows: list[tuple[int, int]]
) -> None:
    """F1 to F5: in a sight, its top shows what the whole tree does."""
    regions = plan.build()
    owner = Owner(regions[0])
    for change in changes:
        change.apply(regions)
    for region in regions:
        for place in way_of(region).places:
            for sight in place.sights:
                assert sight.owner() is owner
                top = sight.top()
                assert top is not None
                for at, size in windows:
                    low = max(sight.low + at, 0)
                    high = min(sight.low + at + size, sight.high, LIMIT)
                    if low < high:
                        whole = render(regions[0], low, high)
                        part = render(top, low, high, sight.top_base, sight.flags)
                        assert part == whole


def chain() -> tuple[MemoryRegion, MemoryRegion, MemoryRegion, MemoryRegion]:
    """A system, a bus in it, a device's container in that, and its registers."""
    system = MemoryRegion.container("system", 0x10000)
    bus = MemoryRegion.container("bus", 0x8000)
    box = MemoryRegion.container("box", 0x1000)
    device = MemoryRegion.io("device", 0x100, None)
    system.add_subregion(0x4000, bus)
    bus.add_subregion(0x2000, box)
    box.add_subregion(0x200, device)
    return system, bus, box, device


def only_sight(region: MemoryRegion) -> Sight:
    (place,) = way_of(region).places
    (sight,) = place.sights
    return sight


def test_a_sight() -> None:
    """Where a region shows, and the lowest region that can be rendered in its stead."""
    system, bus, box, _ = chain()
    owner = Owner(system)
    sight = only_sight(box)
    assert (sight.owner(), sight.base, sight.low, sight.high) == (owner, 0x6000, 0x6000, 0x7000)
    assert (sight.top(), sight.top_base, sight.flags) == (box, 0x6000 - 0x2000, 0)
    # Something else in the bus reaches in: that is rendered too.
    other = MemoryRegion.ram("other", 0x100)
    bus.add_subregion_overlap(0x2F80, other, -1)
    bus.set_readonly(True)
    system.set_nonvolatile(True)
    sight = only_sight(box)
    assert (sight.top(), sight.top_base) == (bus, 0)
    assert sight.flags == NONVOLATILE
    other.set_enabled(False)
    assert only_sight(box).top() is box


def test_leaves_do_not_end_an_epoch() -> None:
    """What changes most leaves the ways as they are: that is what they are kept for."""
    system, _, box, device = chain()
    Owner(system)
    device.set_enabled(False)
    kept = way_of(box)
    for _ in range(2):
        device.set_enabled(True)
        device.set_address(0x300)
        device.set_size(0x80)
        device.set_enabled(False)
        assert way_of(box) is kept
        assert only_sight(box).holds


def test_what_is_on_the_way_ends_an_epoch() -> None:
    """And so does a sibling of it, which may reach in now."""
    system, bus, box, _ = chain()
    Owner(system)
    for changing in (system, bus, box):
        kept = only_sight(box)
        changing.set_size(changing.size - 1)
        assert not kept.holds
    sibling = MemoryRegion.ram("sibling", 0x100)
    changes: list[Callable[[], None]] = [
        lambda: bus.add_subregion(0, sibling),
        lambda: sibling.set_enabled(False),
        lambda: bus.del_subregion(sibling),
    ]
    for change in changes:
        kept = only_sight(box)
        change()
        assert not kept.holds


def test_a_new_alias_is_a_new_way() -> None:
    """It shows its target from the moment that it is in a tree."""
    system, _, box, device = chain()
    owner = Owner(system)
    assert reach(device) == [(owner, 0x6200, 0x6300)]
    alias = MemoryRegion.alias("alias", box, offset=0, size=0x1000)
    assert reach(device) == [(owner, 0x6200, 0x6300)]
    system.add_subregion(0xC000, alias)
    assert sorted(low for _, low, _ in reach(device)) == [0x6200, 0xC200]


def test_nothing_is_kept_alive() -> None:
    """A machine that was dropped is gone, though a region that it showed has a way to it."""
    _, _, box, device = chain()
    system = MemoryRegion.container("dropped", 0x1000)
    system.add_subregion(0, MemoryRegion.alias("alias", box, offset=0, size=0x1000))
    owner = Owner(system)
    assert reach(device) == [(owner, 0x200, 0x300)]
    dropped, gone = weakref.ref(owner), weakref.ref(system)
    del system, owner
    gc.collect()
    assert dropped() is None
    assert gone() is None
    assert reach(device) == []
    device.set_size(0x80)
    assert device.size == 0x80


class Busy(Owner):
    """Another thread's change of its own tree comes in between whenever it is asked."""

    @property
    def journal(self) -> Journal:
        ways._epoch = next(ways._epochs)
        return super().journal


def test_an_epoch_that_ends_during_a_walk() -> None:
    """Marks that were left on the way are of the old one, so what was found is not kept."""
    system, _, box, device = chain()
    owner = Busy(system)
    assert not only_sight(box).holds
    assert way_of(box) is not way_of(box)
    assert reach(device) == [(owner, 0x6200, 0x6300)]
