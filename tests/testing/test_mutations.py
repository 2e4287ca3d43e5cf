"""Strategies for transactions: what they make applies, prints and can be replayed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memlistener import FlatView, RegionError
from memlistener.testing.mutations import Mutation, transactions
from memlistener.testing.strategies import TreePlan, tree_plans

CASES = tree_plans().flatmap(lambda plan: st.tuples(st.just(plan), transactions(plan)))


@given(CASES)
def test_replays(case: tuple[TreePlan, list[list[Mutation]]]) -> None:
    """The same plan and the same mutations give the same tree."""
    plan, sequence = case
    shown = []
    for _ in range(2):
        regions = plan.build()
        applied = [each.apply(regions) for one in sequence for each in one]
        try:
            shown.append((applied, str(FlatView.render(regions[0]))))
        except RegionError as error:
            shown.append((applied, type(error).__name__))
    assert shown[0] == shown[1]


@given(CASES)
def test_prints_as_what_it_is(case: tuple[TreePlan, list[list[Mutation]]]) -> None:
    """A failing example can be pasted into a test."""
    _, sequence = case
    assert eval(repr(sequence), {"Mutation": Mutation}) == sequence


def test_every_mutator_is_drawn() -> None:
    """Each kind of change turns up, and most of them take effect."""
    seen: dict[str, list[bool]] = {}

    # Always the same examples: whether a strategy draws enough is not to be luck.
    @settings(max_examples=400, derandomize=True, database=None)
    @given(CASES)
    def collect(case: tuple[TreePlan, list[list[Mutation]]]) -> None:
        plan, sequence = case
        regions = plan.build()
        for one in sequence:
            for each in one:
                seen.setdefault(each.mutator, []).append(each.apply(regions))

    collect()
    assert {
        "set_enabled",
        "set_readonly",
        "set_nonvolatile",
        "set_unmergeable",
        "set_address",
        "set_size",
        "del_subregion",
        "add_subregion_overlap",
        "set_alias_offset",
    } <= set(seen)
    assert all(any(took) for took in seen.values())
