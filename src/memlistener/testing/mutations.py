"""Hypothesis strategies for sequences of transactions over a tree.

A `Mutation` is a frozen value that names a mutator and the number of the region
it is called on, so a failing example prints as a list of calls and can be
replayed. A mutation that does not fit the tree of the moment (deleting what is
in no container) does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import attrs
from hypothesis import strategies as st

from memlistener.core.kinds import RegionKind
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError
from memlistener.testing.strategies import TreePlan, addresses, sizes


@attrs.frozen
class Mutation:
    """One call of a mutator.

    Attributes:
        mutator: Its name.
        region: The number of the region in `TreePlan.build`'s list.
        arguments: What it is called with; for ``add_subregion_overlap`` the
            middle one is the number of the subregion.
    """

    mutator: str
    region: int
    arguments: tuple[int | bool, ...] = ()

    def apply(self, regions: Sequence[MemoryRegion]) -> bool:
        """Make the change; False where it does not fit and nothing changed.

        Raises:
            TransactionError: The tree is live and no transaction is open.
        """
        region = regions[self.region]
        with contextlib.suppress(RegionError):
            if self.mutator == "del_subregion":
                if region.container is None:
                    return False
                region.container.del_subregion(region)
            elif self.mutator == "add_subregion_overlap":
                addr, child, priority = self.arguments
                region.add_subregion_overlap(addr, regions[child], priority)
            else:
                getattr(region, self.mutator)(*self.arguments)
            return True
        return False


def mutations(plan: TreePlan) -> st.SearchStrategy[Mutation]:
    """Changes to the tree that ``plan`` builds."""
    limit = plan.regions[0].size
    every = st.integers(0, len(plan.regions) - 1)
    below = st.integers(1, len(plan.regions) - 1) if len(plan.regions) > 1 else every
    flags = ("set_enabled", "set_readonly", "set_nonvolatile", "set_unmergeable")
    kinds = [
        st.builds(
            Mutation,
            st.sampled_from(("set_enabled", *flags)),
            every,
            st.tuples(st.booleans()),
        ),
        st.builds(Mutation, st.just("set_address"), below, st.tuples(addresses(limit))),
        st.builds(Mutation, st.just("set_size"), below, st.tuples(sizes(limit))),
        st.builds(Mutation, st.just("del_subregion"), below),
        st.builds(
            Mutation,
            st.just("add_subregion_overlap"),
            every,
            st.tuples(addresses(limit), below, st.integers(-2, 2)),
        ),
    ]
    for kind, mutator, arguments in (
        (RegionKind.ALIAS, "set_alias_offset", st.tuples(addresses(limit))),
        (RegionKind.ROM_DEVICE, "set_romd_mode", st.tuples(st.booleans())),
    ):
        those = [n for n, each in enumerate(plan.regions) if each.kind is kind]
        if those:
            chosen: st.SearchStrategy[Mutation] = st.builds(
                Mutation, st.just(mutator), st.sampled_from(those), arguments
            )
            kinds.append(chosen)
    return st.one_of(kinds)


def transactions(
    plan: TreePlan, *, max_transactions: int = 6, max_mutations: int = 4
) -> st.SearchStrategy[list[list[Mutation]]]:
    """Sequences of transactions, each a list of changes."""
    one = st.lists(mutations(plan), min_size=1, max_size=max_mutations)
    return st.lists(one, min_size=1, max_size=max_transactions)
