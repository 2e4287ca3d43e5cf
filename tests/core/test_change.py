"""What a change reaches, who is asked first, and the way back."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatView, MemoryRegion, RegionError, TransactionError
from memlistener.core.change import above_of, reach
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.oracles import resolve
from tests.trees import Journal, Mutation, Owner, examples, mutations, snapshot

LIMIT = 0x40  # small enough to look at every address


def shown_from(root: MemoryRegion, wanted: MemoryRegion) -> set[int]:
    """Every address below ``LIMIT`` at which a walk from the root meets ``wanted``."""
    found: set[int] = set()

    def walk(region: MemoryRegion, base: int, visible: set[int]) -> None:
        base += region.addr
        visible = {addr for addr in visible if base <= addr < base + region.size}
        if not visible or not region.enabled:
            return
        if region is wanted:
            found.update(visible)
        if region.alias_target is not None:
            target = region.alias_target
            walk(target, base - target.addr - region.alias_offset, visible)
        for child in region.subregions:
            walk(child, base, visible)

    walk(root, 0, set(range(LIMIT)))
    return found


@examples(dev=100, ci=400)
@given(tree_plans(limit=LIMIT, max_regions=10))
def test_reach(plan: TreePlan) -> None:
    """The windows of a region are exactly the addresses at which a walk meets it."""
    regions = plan.build()
    owner = Owner(regions[0])
    for region in regions:
        found = reach(region)
        assert all(each is owner for each, _, _ in found)
        inside = {addr for _, low, high in found for addr in range(max(low, 0), min(high, LIMIT))}
        assert inside == shown_from(regions[0], region)
        # And it is live exactly when the root is above it.
        assert bool(found) == (region is regions[0] or regions[0] in above_of(region))


def test_reach_names_every_way() -> None:
    """A region behind two aliases in two address spaces has a window for each."""
    ram = MemoryRegion.ram("ram", 0x1000)
    system = MemoryRegion.container("system", 0x10000)
    other = MemoryRegion.container("other", 0x10000)
    system.add_subregion(0x1000, ram)
    system.add_subregion(0x4000, MemoryRegion.alias("half", ram, offset=0x800, size=0x4000))
    whole = MemoryRegion.alias("whole", system, offset=0x4000, size=0x400)
    other.add_subregion(0x8000, whole)
    one, two = Owner(system), Owner(other)
    assert sorted((low, high, owner is one) for owner, low, high in reach(ram) if low < high) == [
        (0x1000, 0x2000, True),
        (0x4000, 0x4800, True),
        (0x8000, 0x8400, False),
    ]
    assert {owner for owner, _, _ in reach(ram)} == {one, two}


def test_reach_of_what_is_hidden() -> None:
    """A disabled container shows nothing, but what is in it is live all the same."""
    system = MemoryRegion.container("system", 0x1000)
    box = MemoryRegion.container("box", 0x1000)
    ram = MemoryRegion.ram("ram", 0x1000)
    system.add_subregion(0, box)
    box.add_subregion(0, ram)
    box.set_enabled(False)
    owner = Owner(system)
    assert [(each, high - low) for each, low, high in reach(ram)] == [(owner, 0)]
    owner.refuses = True
    with pytest.raises(TransactionError):
        ram.set_readonly(True)
    assert ram.readonly is False


def test_reach_where_ways_meet_again() -> None:
    """Two aliases of a region in one container, 40 times over: 40 steps, not 2**40."""
    ram = MemoryRegion.ram("ram", 0x1000)
    top = ram
    for _ in range(40):
        holder = MemoryRegion.container("holder", 0x1000)
        for priority in range(2):
            alias = MemoryRegion.alias("alias", top, offset=0, size=0x1000)
            holder.add_subregion_overlap(0, alias, priority)
        top = holder
    owner = Owner(top)
    assert reach(ram) == [(owner, 0, 0x1000)]


def test_what_hangs_on_a_hidden_region() -> None:
    """T9: its owner hears of it, since it may show again before anybody is told."""
    system = MemoryRegion.container("system", 0x1000)
    device = MemoryRegion.io("device", 0x100, None)
    system.add_subregion(0, device)
    device.set_enabled(False)
    owner = Owner(system)
    device.add_eventfd(0, 4, 7)
    device.add_coalescing(0, 8)
    assert owner.hung == [(device, 0), (device, 0)]


def test_reach_of_a_mirrored_container() -> None:
    """An alias of its own container's other half is walked once, and the walk ends."""
    system = MemoryRegion.container("system", 0x8000)
    ram = MemoryRegion.ram("ram", 0x1000)
    mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x4000)
    system.add_subregion(0, ram)
    system.add_subregion(0x4000, mirror)
    owner = Owner(system)
    ram.set_enabled(False)
    assert {window for window in owner.damaged if window[0] < window[1]} == {
        (0, 0x1000),
        (0x4000, 0x5000),
    }


@examples(dev=60, ci=300)
@given(tree_plans(limit=LIMIT, max_regions=10), st.lists(mutations(LIMIT), max_size=12))
def test_damage_covers_what_changed(plan: TreePlan, changes: list[Mutation]) -> None:
    """An address that shows something else after a change is in a damaged window."""
    regions = plan.build()
    owner = Owner(regions[0])
    before = [resolve(regions[0], addr) for addr in range(LIMIT)]
    for change in changes:
        change.apply(regions)
        after = [resolve(regions[0], addr) for addr in range(LIMIT)]
        for addr in range(LIMIT):
            assert before[addr] == after[addr] or owner.sees(addr), (change, addr)
        owner.take_damage()
        before = after


@examples(dev=60, ci=300)
@given(tree_plans(limit=0x4000), st.lists(mutations(0x8000), max_size=20))
def test_the_way_back(plan: TreePlan, changes: list[Mutation]) -> None:
    """T13: undoing every change, last first, gives the tree exactly as it was."""
    regions = plan.build()
    # All regions are live, so that every change is journalled.
    journal = Journal()
    for each in regions:
        Owner(each, journal)
    before, views = snapshot(regions), [FlatView.render(each) for each in regions]
    for change in changes:
        change.apply(regions)
    journal.undo_all()
    assert snapshot(regions) == before
    assert [FlatView.render(each) for each in regions] == views


def test_the_way_back_of_an_overlap() -> None:
    """T13: a region that was added without overlap, and again with, refuses overlap again."""
    system = MemoryRegion.container("system", 0x1000)
    ram = MemoryRegion.ram("ram", 0x100)
    system.add_subregion(0, ram)
    journal = Journal()
    Owner(system, journal)
    Owner(ram, journal)
    system.del_subregion(ram)
    system.add_subregion_overlap(0x10, ram, 5)
    journal.undo_all()
    assert (ram.addr, ram.priority, ram.container) == (0, 0, system)
    with pytest.raises(RegionError, match="overlaps 'ram'"):
        system.add_subregion(0xFF, MemoryRegion.ram("more", 1))


MUTATORS = {
    "add_subregion": lambda system, ram, alias, new: system.add_subregion(0x8000, new),
    "del_subregion": lambda system, ram, alias, new: system.del_subregion(ram),
    "set_enabled": lambda system, ram, alias, new: ram.set_enabled(False),
    "set_address": lambda system, ram, alias, new: ram.set_address(0x9000),
    "set_size": lambda system, ram, alias, new: ram.set_size(0x800),
    "set_alias_offset": lambda system, ram, alias, new: alias.set_alias_offset(1),
    "set_readonly": lambda system, ram, alias, new: ram.set_readonly(True),
    "set_nonvolatile": lambda system, ram, alias, new: ram.set_nonvolatile(True),
    "set_unmergeable": lambda system, ram, alias, new: ram.set_unmergeable(True),
    "set_romd_mode": lambda system, ram, alias, new: new.set_romd_mode(False),
}


@pytest.mark.parametrize("what", MUTATORS)
def test_owners_are_asked_first(what: str) -> None:
    """T11: an owner that refuses keeps every mutator from changing anything."""
    system = MemoryRegion.container("system", 0x10000)
    ram = MemoryRegion.ram("ram", 0x1000)
    alias = MemoryRegion.alias("alias", ram, offset=0, size=0x100)
    new = MemoryRegion.rom_device("new", 0x100, None)
    system.add_subregion(0, ram)
    system.add_subregion(0x4000, alias)
    if what == "set_romd_mode":
        system.add_subregion(0x6000, new)
    owner = Owner(system)
    regions = [system, ram, alias, new]
    before = snapshot(regions)
    owner.refuses = True
    with pytest.raises(TransactionError, match=what):
        MUTATORS[what](system, ram, alias, new)
    assert snapshot(regions) == before
    assert owner.damaged == []
    assert owner.journal.entries == []
    # Without the refusal the same call goes through, can be undone, and is told.
    owner.refuses = False
    MUTATORS[what](system, ram, alias, new)
    assert snapshot(regions) != before
    assert owner.damaged != []
    owner.journal.undo_all()
    assert snapshot(regions) == before


def test_a_bad_argument_asks_nobody() -> None:
    """T11: checks come before the question."""
    system = MemoryRegion.container("system", 0x1000)
    owner = Owner(system)
    with pytest.raises(RegionError):
        system.set_size(0)
    assert owner.asked == []


def test_free_trees_are_free() -> None:
    """T11: what no address space reaches can be changed by anybody."""
    system = MemoryRegion.container("system", 0x1000)
    owner = Owner(system)
    owner.refuses = True
    free = MemoryRegion.container("free", 0x1000)
    free.add_subregion(0, MemoryRegion.ram("ram", 0x100))
    free.set_size(0x2000)
    assert owner.asked == []
    assert free.size == 0x2000


def test_an_alias_makes_its_target_live() -> None:
    """T11: what shows through an alias belongs to the tree too."""
    system = MemoryRegion.container("system", 0x1000)
    ram = MemoryRegion.ram("ram", 0x1000)
    system.add_subregion(0, MemoryRegion.alias("alias", ram, offset=0, size=0x100))
    owner = Owner(system)
    ram.set_readonly(True)
    assert owner.asked == [(ram, "set_readonly")]
    assert owner.damaged[0] == (0, 0x100)


def test_a_dropped_alias_is_forgotten() -> None:
    """An alias that nobody has any more does not keep its target live."""
    ram = MemoryRegion.ram("ram", 0x1000)
    system = MemoryRegion.container("system", 0x1000)
    system.add_subregion(0, MemoryRegion.alias("alias", ram, offset=0, size=0x100))
    assert len(above_of(ram)) == 2
    del system
    gc.collect()
    assert above_of(ram) == set()


def test_what_leaves_is_reported() -> None:
    """T13: the owner is told of a region that left, so that it can follow it."""
    system = MemoryRegion.container("system", 0x1000)
    ram = MemoryRegion.ram("ram", 0x100)
    system.add_subregion(0, ram)
    owner = Owner(system)
    system.del_subregion(ram)
    assert owner.left == [ram]


def test_one_region_in_two_memory_systems() -> None:
    """Two journals cannot be kept in step, so the change is refused."""
    ram = MemoryRegion.ram("ram", 0x1000)
    systems = [MemoryRegion.container(name, 0x1000) for name in ("one", "two")]
    owners = []
    for system in systems:
        system.add_subregion(0, MemoryRegion.alias("alias", ram, offset=0, size=0x1000))
        owners.append(Owner(system))
    with pytest.raises(RegionError, match=r"'ram'.* two memory systems"):
        ram.set_enabled(False)
    assert ram.enabled
    assert owners[0].damaged == owners[1].damaged == []


def test_two_address_spaces_share_a_journal() -> None:
    """Each is told its damage; the way back is kept once."""
    ram = MemoryRegion.ram("ram", 0x1000)
    journal = Journal()
    owners = []
    for number, name in enumerate(("one", "two")):
        system = MemoryRegion.container(name, 0x10000)
        alias = MemoryRegion.alias("alias", ram, offset=0, size=0x1000)
        system.add_subregion(0x1000 * number, alias)
        owners.append(Owner(system, journal))
    ram.set_enabled(False)
    assert len(journal.entries) == 1
    assert [owner.damaged[0] for owner in owners] == [(0, 0x1000), (0x1000, 0x2000)]
