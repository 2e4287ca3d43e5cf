"""QEMU's own answers for real machines: their flat views, and how those changed."""

from __future__ import annotations

import pytest

from memlistener import FlatView
from memlistener.core.diff import RegionAdd, RegionDel, diff
from tests import corpus
from tests.corpus import Regions, printed_kind, range_of, ranges_by_space
from tests.trees import Journal, Owner


@pytest.mark.parametrize("name", corpus.cases())
def test_a_machine_renders_as_in_qemu(name: str) -> None:
    """F1 to F6: every address space of a real machine shows what QEMU shows."""
    machine = corpus.cases()[name]
    regions = Regions(machine)
    recorded = ranges_by_space(machine)
    assert len(recorded) == len(machine["address_spaces"]) > 0
    assert any(recorded)
    for space, ranges in zip(machine["address_spaces"], recorded, strict=True):
        view = FlatView.render(regions[space["root"]])
        view.check()
        assert [regions.range(each) for each in view] == [range_of(each) for each in ranges]
        assert [
            (each.region.name, printed_kind(each), each.romd_mode, each.region.priority)
            for each in view
        ] == [
            (each["name"], each["kind"], each.get("romd_mode", True), each["priority"])
            for each in ranges
        ]


def test_the_corpus_has_what_it_should() -> None:
    """The committed copy is whole: a test over an empty one would show nothing."""
    machines = corpus.cases()
    assert len(machines) == 89
    assert {name: len(corpus.sequence(name)) for name in corpus.SEQUENCES} == {
        "seq_a64_poke": 19,
        "seq_pc": 11,
        "seq_pc_poke": 77,
        "seq_q35": 14,
        "seq_rv64_poke": 19,
    }


def test_a_case_is_built_as_described() -> None:
    """`Regions` gives each region the subregions and attributes that the file says."""
    machine = corpus.cases()["pc-basic.fw"]
    regions = Regions(machine)
    made = {number: regions[number] for number in regions.by_id}
    for number, region in made.items():
        plan = machine["regions"][str(number)]
        assert [regions.ids[each] for each in region.subregions] == [
            each for each in plan["order"] if each in made
        ]
        assert (region.name, region.size, region.addr) == (
            plan["name"],
            plan["size"],
            plan["addr"],
        )
        assert (region.enabled, region.readonly) == (plan["enabled"], plan["readonly"])


@pytest.mark.parametrize("name", corpus.SEQUENCES)
def test_a_machine_changes_as_in_qemu(name: str) -> None:
    """T3, T5: each step of a real machine gives QEMU's deletes and adds, and no other."""
    states = corpus.sequence(name)
    regions = Regions(states[0])
    journal = Journal()
    owners: list[Owner] = []
    views: list[FlatView] = []
    for state in states:
        regions.become(state)
        spaces = state["address_spaces"]
        recorded = {each["space"]: each for each in state["events"]}
        for number, space in enumerate(spaces):
            if number == len(owners):
                # New in this state: it starts empty, and all it shows is added.
                owners.append(Owner(regions[space["root"]], journal))
                views.append(FlatView())
                owners[number].damage(0, 1 << 64)
            owner, old = owners[number], views[number]
            assert owner.root is regions[space["root"]]
            new, events = old.updated(owner.root, owner.take_damage())
            new.check()
            assert new == FlatView.render(owner.root), state["note"]
            assert events == diff(old, new), state["note"]
            expected = recorded.get(number, {"del": [], "add": []})
            dels = [regions.range(each.range) for each in events if isinstance(each, RegionDel)]
            adds = [regions.range(each.range) for each in events if isinstance(each, RegionAdd)]
            assert dels == [range_of(each) for each in expected["del"]], state["note"]
            assert adds == [range_of(each) for each in expected["add"]], state["note"]
            if "nop" in expected:
                assert len(new) - len(adds) == expected["nop"], state["note"]
            views[number] = new
