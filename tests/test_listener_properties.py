"""Random trees, spaces, listeners and transactions, against `tests.naive`."""

from __future__ import annotations

import attrs
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import AddressSpace, FlatView, MemoryRegion, MemorySystem, RegionError
from memlistener.testing import RecordingListener
from memlistener.testing.recording import Heard
from memlistener.testing.strategies import TreePlan, tree_plans

from . import naive
from .trees import Mutation, examples, mutations, snapshot


class Unwanted(Exception):
    """Raised by the bodies of transactions that are to be undone."""


@attrs.frozen
class ListenerPlan:
    """A listener, and for which of the address spaces."""

    space: int
    priority: int
    nops: bool


@attrs.frozen
class Step:
    """One transaction: changes, then those of a nested one, which may be undone."""

    changes: tuple[Mutation, ...]
    nested: tuple[Mutation, ...]
    fails: bool
    nested_fails: bool


@attrs.frozen
class Scenario:
    """A tree, the regions (modulo) that are roots, who listens, and what happens.

    Random trees show little, as most of what is in them is hidden or cut off. The
    furniture is a row of leaves in the root, of these priorities, and a window onto
    the row; so that there is something to hide, to split and to leave alone.
    """

    tree: TreePlan
    furniture: tuple[int, ...]
    roots: tuple[int, ...]
    listeners: tuple[ListenerPlan, ...]
    steps: tuple[Step, ...]


_LIMITS = (1 << 16, 1 << 64)
_rarely = st.sampled_from((False, False, False, True))


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    limit = draw(st.sampled_from(_LIMITS))
    changes = st.lists(mutations(limit), min_size=1, max_size=4).map(tuple)
    step = st.builds(
        Step,
        changes=changes,
        nested=st.one_of(st.just(()), changes),
        fails=_rarely,
        nested_fails=_rarely,
    )
    listener = st.builds(
        ListenerPlan,
        space=st.sampled_from((0, 0, 1, 2)),
        priority=st.sampled_from((0, 0, 10, -1)),
        nops=_rarely,
    )
    return Scenario(
        tree=draw(tree_plans(limit=limit, max_regions=9)),
        furniture=draw(st.lists(st.sampled_from((-3, 0, 3)), max_size=6).map(tuple)),
        # The first space shows the whole tree, the others start anywhere.
        roots=(0, *draw(st.lists(st.integers(-1, 9), max_size=2))),
        listeners=draw(st.lists(listener, min_size=1, max_size=4).map(tuple)),
        steps=draw(st.lists(step, min_size=1, max_size=5).map(tuple)),
    )


def furnished(regions: list[MemoryRegion], priorities: tuple[int, ...]) -> list[MemoryRegion]:
    root = regions[0]
    leaves = [
        MemoryRegion.ram("ram", 0x1000),
        MemoryRegion.rom("rom", 0x1000),
        MemoryRegion.rom_device("romd", 0x1000, None),
        MemoryRegion.io("io", 0x1000, None),
        MemoryRegion.reservation("reservation", 0x1000),
        MemoryRegion.ram("ram, apart", 0x1000),
    ][: len(priorities)]
    for number, (leaf, priority) in enumerate(zip(leaves, priorities, strict=True)):
        root.add_subregion_overlap(number * 0x1000, leaf, priority)
    window = MemoryRegion.alias("window", root, offset=0x800, size=0x4000)
    return [*regions, *leaves, window]


class Machine:
    """A scenario brought to life, and what the naive implementation says of it."""

    def __init__(self, plan: Scenario) -> None:
        self.plan = plan
        self.regions = furnished(plan.tree.build(), plan.furniture)
        self.memory = MemorySystem()
        self.spaces = [
            self.memory.create_address_space(f"space{number}", self.regions[at % len(self.regions)])
            for number, at in enumerate(plan.roots)
        ]
        self.log: list[Heard] = []
        self.listening: dict[AddressSpace, list[tuple[RecordingListener, naive.Who]]] = {
            space: [] for space in self.spaces
        }

    def truth(self) -> dict[AddressSpace, list[naive.Range]]:
        """What the trees show now, rendered afresh."""
        return {space: naive.Range.all_of(FlatView.render(space.root)) for space in self.spaces}

    def is_valid(self) -> bool:
        """Whether the trees can be rendered: no alias shows itself."""
        try:
            self.truth()
        except RegionError:
            return False
        return True

    def take_log(self) -> list[naive.Call]:
        calls = [naive.Call.heard(each) for each in self.log]
        self.log.clear()
        return calls

    async def register_all(self) -> None:
        for number, plan in enumerate(self.plan.listeners):
            space = self.spaces[plan.space % len(self.spaces)]
            who = naive.Who(f"listener{number}", plan.priority, plan.nops)
            listener = RecordingListener(
                who.name, priority=who.priority, log=self.log, nops=who.hears_nops
            )
            await self.memory.register(listener, space)
            self.listening[space].append((listener, who))
            assert self.take_log() == naive.replay(self.truth()[space], who, "region_add")

    async def unregister_all(self) -> None:
        for space, listening in self.listening.items():
            for listener, who in listening:
                await self.memory.unregister(listener)
                assert self.take_log() == naive.replay(self.truth()[space], who, "region_del")
                assert listener.ranges == {}

    async def run(self, step: Step) -> None:
        before = snapshot(self.regions)
        old = self.truth()
        refused = raised = False
        try:
            async with self.memory.transaction():
                self.change(step.changes)
                halfway = snapshot(self.regions)
                try:
                    async with self.memory.transaction():
                        self.change(step.nested)
                        if step.nested_fails:
                            raise Unwanted
                except Unwanted:
                    self.check_undone(halfway)
                assert self.log == []
                if step.fails:
                    raise Unwanted
                refused = not self.is_valid()
        except Unwanted:
            raised = True
        except RegionError:
            raised = refused
        assert raised == (step.fails or refused)
        if raised:
            assert self.log == []
            self.check_undone(before)
        new = self.truth()
        expected = []
        for space in self.spaces:
            listeners = [who for _, who in self.listening[space]]
            expected += naive.delivery(old[space], new[space], listeners)
        assert self.take_log() == expected

    def change(self, changes: tuple[Mutation, ...]) -> None:
        for each in changes:
            each.apply(self.regions)

    def check_undone(self, before: list[tuple[object, ...]]) -> None:
        """Nothing is left of a failed transaction, except where nobody could see it (T11)."""
        now = snapshot(self.regions)
        live = set(self.live())
        for one, two in zip(before, now, strict=True):
            if one[0] in live:
                assert one == two

    def live(self) -> list[MemoryRegion]:
        """All regions that an address space reaches."""
        found: list[MemoryRegion] = []
        todo = [space.root for space in self.spaces]
        while todo:
            each = todo.pop()
            if each in found:
                continue
            found.append(each)
            todo += each.subregions
            if each.alias_target is not None:
                todo.append(each.alias_target)
        return found

    def check(self) -> None:
        for space in self.spaces:
            space.view.check()
            assert space.view == FlatView.render(space.root)
            view = [list(_section(each)) for each in naive.Range.all_of(space.view)]
            for listener, _ in self.listening[space]:
                believed = [
                    list(naive.section_values(listener.ranges[start]))
                    for start in sorted(listener.ranges)
                ]
                assert believed == view


def _section(each: naive.Range) -> tuple[object, ...]:
    section = naive.Call.about(naive.Who("", 0), "", each).section
    assert section is not None
    return section


@examples(dev=100, ci=1000)
@given(scenarios())
def test_listeners_hear_what_the_rules_say(plan: Scenario) -> None:
    """T3 to T8, T10, T13, F8: traces as the naive ones, replayed events give the view."""

    async def main() -> None:
        machine = Machine(plan)
        await machine.register_all()
        machine.check()
        for step in plan.steps:
            await machine.run(step)
            machine.check()
        await machine.unregister_all()

    trio.run(main)


async def test_an_alias_replaced_by_its_like() -> None:
    """F6, T10: nothing is to be told, and the next change does not leave a cut behind."""
    root = MemoryRegion.container("root", 0x10000)
    region = MemoryRegion.io("region", 0x1000, None)
    region.set_unmergeable(True)
    one, two = (MemoryRegion.alias(name, region, offset=0, size=0x1000) for name in ("one", "two"))
    root.add_subregion(0, one)
    memory = MemorySystem()
    space = memory.create_address_space("memory", root)
    async with memory.transaction():
        root.del_subregion(one)
        root.add_subregion(0, two)
    over = MemoryRegion.io("over", 0x100, None)
    async with memory.transaction():
        root.add_subregion_overlap(0x400, over, 1)
    async with memory.transaction():
        root.del_subregion(over)
    assert space.view == FlatView.render(root)
