"""Everything at once: random trees, spaces that share, attachments, logs and failures.

The tree, the listeners and what happens are random; what is heard is compared
with `tests.naive_attachments`, what is believed with the trees.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import attrs
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    DirtyClient,
    FlatView,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    RegionError,
)
from memlistener.core.kinds import RegionKind
from memlistener.core.sharing import view_root
from memlistener.testing import RecordingListener
from memlistener.testing.mutations import Mutation, mutations
from memlistener.testing.recording import Heard
from memlistener.testing.strategies import RegionPlan, TreePlan, tree_plans

from . import naive_attachments as naive
from .trees import examples, snapshot


class Boom(Exception):
    """What a failing hook raises."""


class Fuse:
    """Counts calls of hooks; the one that ``left`` says, and no other, raises."""

    left: int | None = None

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Boom


class Listener(RecordingListener):
    """Burns the fuse before it hears anything."""

    fuse: Fuse

    def _hear(
        self, hook: str, section: MemoryRegionSection | None = None, *arguments: object
    ) -> None:
        self.fuse.burn()
        super()._hear(hook, section, *arguments)


@attrs.frozen
class Attaching:
    """A change of what hangs on a region; where it does not fit it does nothing."""

    what: str
    region: int
    offset: int
    size: int
    data: int | None
    number: int

    def apply(self, regions: list[MemoryRegion]) -> None:
        region = regions[self.region]
        with contextlib.suppress(RegionError):
            if self.what == "add_eventfd":
                region.add_eventfd(self.offset, self.size, self.number, data=self.data)
            elif self.what == "del_eventfd" and region.eventfds:
                fd = region.eventfds[self.number % len(region.eventfds)]
                region.del_eventfd(fd.addr, fd.size, fd.eventfd, data=fd.data)
            elif self.what == "add_coalescing":
                region.add_coalescing(self.offset, self.size or 0x1000)
            elif self.what == "clear_coalescing":
                region.clear_coalescing()
            elif self.what == "set_log":
                region.set_log(self.data is None, DirtyClient(self.number))


@attrs.frozen
class Step:
    """One transaction, or memory-wide logging switched on or off.

    Attributes:
        toggles_log: It is the latter.
        attaching: Changes of what hangs on regions.
        changes: Changes of the tree.
        late: More of what hangs on regions, which may be hidden by now.
        nested: More of those, in a nested transaction that is taken back.
        fatal: Which call of a hook raises, if any.
    """

    toggles_log: bool
    attaching: tuple[Attaching, ...]
    changes: tuple[Mutation, ...]
    late: tuple[Attaching, ...]
    nested: tuple[Mutation, ...]
    fatal: int | None


@attrs.frozen
class ListenerPlan:
    space: int
    priority: int
    nops: bool
    eventfds: bool
    coalesced: bool
    logs: bool


@attrs.frozen
class Scenario:
    tree: TreePlan
    roots: tuple[int, ...]
    hung: tuple[Attaching, ...]
    listeners: tuple[ListenerPlan, ...]
    steps: tuple[Step, ...]


LIMIT = 0x10000
_mostly = st.sampled_from((True, True, True, False))
_rarely = st.sampled_from((False, False, False, True))


def _furnished(tree: TreePlan) -> TreePlan:
    """The tree, leaves in its root that can be seen, and roots that share it."""
    plans = list(tree.regions)

    def put(
        kind: RegionKind,
        size: int,
        into: int | None,
        addr: int = 0,
        *,
        enabled: bool = True,
        offset: int = 0,
    ) -> int:
        holder = len(plans) if into is None else into  # its own number: nowhere
        plans.append(RegionPlan(kind, size, holder, addr, 1, enabled, offset=offset))
        return len(plans) - 1

    for addr, kind in enumerate((RegionKind.IO, RegionKind.RAM, RegionKind.IO)):
        put(kind, 0x1000, 0, addr * 0x1000)
    put(RegionKind.ALIAS, LIMIT, None)
    for _ in range(2):
        holder = put(RegionKind.CONTAINER, LIMIT, None)
        put(RegionKind.ALIAS, LIMIT, holder)
    put(RegionKind.ROM_DEVICE, 0x800, holder, 0x400, enabled=False)
    put(RegionKind.ALIAS, 0x4000, None, offset=0x800)
    return TreePlan(tuple(plans))


# Of the furniture, counted from the end: a partial alias, two containers that
# show all of the tree, and an alias that does.
_ROOTS = (-1, -4, -6, -7)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    tree = _furnished(draw(tree_plans(max_regions=6, limit=LIMIT)))
    count = len(tree.regions)
    leaves = st.integers(count - 10, count - 8)
    attachings = st.builds(
        Attaching,
        what=st.sampled_from(
            [
                *("add_eventfd", "add_eventfd", "del_eventfd"),
                *("add_coalescing", "clear_coalescing", "set_log", "set_log"),
            ]
        ),
        region=st.one_of(leaves, leaves, st.integers(0, count - 1)),
        offset=st.sampled_from((0, 0x10, 0x7FE, 0xFFE)),
        size=st.sampled_from((0, 1, 2, 4, 8)),
        data=st.sampled_from((None, 0, 1)),
        number=st.integers(0, 2),
    )
    changes = mutations(tree)
    steps = st.builds(
        Step,
        toggles_log=_rarely,
        attaching=st.lists(attachings, max_size=3).map(tuple),
        changes=st.lists(changes, max_size=3).map(tuple),
        late=st.lists(attachings, max_size=1).map(tuple),
        nested=st.one_of(st.just(()), st.lists(changes, max_size=2).map(tuple)),
        fatal=st.one_of(st.none(), st.none(), st.integers(0, 30)),
    )
    listeners = st.builds(
        ListenerPlan,
        space=st.integers(0, 3),
        priority=st.sampled_from((0, 0, 10, -1)),
        nops=_rarely,
        eventfds=_mostly,
        coalesced=_mostly,
        logs=_mostly,
    )
    roots = st.one_of(st.sampled_from(_ROOTS), st.sampled_from(_ROOTS), st.integers(0, count - 1))
    return Scenario(
        tree=tree,
        roots=(0, *draw(st.lists(roots, min_size=1, max_size=3))),
        hung=draw(st.lists(attachings, min_size=1, max_size=4).map(tuple)),
        listeners=draw(st.lists(listeners, min_size=1, max_size=3).map(tuple)),
        steps=draw(st.lists(steps, min_size=1, max_size=4).map(tuple)),
    )


class Machine:
    """A scenario brought to life, and what the naive implementation says of it."""

    def __init__(self, plan: Scenario) -> None:
        self.plan = plan
        self.regions = plan.tree.build()
        for each in plan.hung:
            each.apply(self.regions)
        self.memory = MemorySystem()
        self.logging = False
        self.fuse = Fuse()
        self.spaces = [
            self.memory.create_address_space(f"space{number}", self.regions[at])
            for number, at in enumerate(plan.roots)
        ]
        self.log: list[Heard] = []
        self.listening: dict[AddressSpace, list[tuple[Listener, naive.Who]]] = {
            space: [] for space in self.spaces
        }

    def states(self) -> dict[AddressSpace, naive.State]:
        hung = {region: naive.Hung.on(region) for region in self.regions}
        return {
            space: naive.State.of(FlatView.render(space.root), hung, logging=self.logging)
            for space in self.spaces
        }

    def is_valid(self) -> bool:
        try:
            self.states()
        except RegionError:
            return False
        return True

    def take_log(self) -> list[naive.Call]:
        calls = [naive.Call.heard(each) for each in self.log]
        self.log.clear()
        return naive.comparable(calls)

    def heard(self, calls: list[naive.Call]) -> None:
        assert self.take_log() == naive.comparable(calls)

    async def register_all(self) -> None:
        # Space by space: so the order of registration is that of the spaces too.
        plans = sorted(self.plan.listeners, key=lambda each: each.space % len(self.spaces))
        for number, plan in enumerate(plans):
            space = self.spaces[plan.space % len(self.spaces)]
            who = naive.Who(
                f"listener{number}",
                plan.priority,
                number,
                nops=plan.nops,
                eventfds=plan.eventfds,
                coalesced=plan.coalesced,
                logs=plan.logs,
            )
            listener = Listener(
                who.name,
                priority=who.priority,
                log=self.log,
                nops=who.nops,
                eventfds=who.eventfds,
                coalesced=who.coalesced,
                logs=who.logs,
            )
            listener.fuse = self.fuse
            await self.memory.register(listener, space)
            self.listening[space].append((listener, who))
            self.heard(naive.register(self.states()[space], who, logging=False))

    async def unregister_all(self) -> None:
        for space, listening in self.listening.items():
            for listener, who in listening:
                await self.memory.unregister(listener)
                self.heard(naive.unregister(self.states()[space], who))
                assert not listener.ranges
                assert not listener.eventfds
                assert not listener.coalesced
                assert not listener.logged
                # And back, with all that is logged and hangs there now.
                await self.memory.register(listener, space)
                calls = naive.register(self.states()[space], who, logging=self.logging)
                self.heard(calls)

    async def run(self, step: Step) -> None:
        before, old, views = self.everything(), self.states(), self.views()
        believed = self.believed()
        refused = failed = False
        self.fuse.left = step.fatal
        try:
            if step.toggles_log:
                await self.toggle_log()
            else:
                async with self.memory.transaction():
                    self.change(step.attaching)
                    self.change(step.changes)
                    self.change(step.late)
                    await self.take_back(step.nested)
                    assert self.log == []
                    refused = not self.is_valid()
        except Boom:
            failed = True
        except RegionError:
            assert refused
        self.fuse.left = None
        if failed or refused:  # T13
            assert self.memory.broken is None
            assert self.everything() == before
            assert self.views() == views
            if not step.toggles_log:  # switched on again, it is rendered again
                assert all(one is two for one, two in zip(self.views(), views, strict=True))
            assert self.believed() == believed
            if refused:
                assert self.log == []
            self.log.clear()
            return
        if step.toggles_log:
            self.logging = not self.logging
        self.heard(self.expected(old, self.states(), step))

    async def toggle_log(self) -> None:
        if self.logging:
            await self.memory.dirty_log_stop()
        else:
            await self.memory.dirty_log_start()

    async def take_back(self, changes: tuple[Mutation, ...]) -> None:
        with contextlib.suppress(Boom):
            async with self.memory.transaction():
                self.change(changes)
                raise Boom

    def expected(
        self,
        old: dict[AddressSpace, naive.State],
        new: dict[AddressSpace, naive.State],
        step: Step,
    ) -> list[naive.Call]:
        every = [who for space in self.spaces for _, who in self.listening[space]]
        calls: list[naive.Call] = []
        if step.toggles_log and self.logging:
            calls += naive.everyone(every, "log_global_start")
        for space in self.spaces:
            listeners = [who for _, who in self.listening[space]]
            calls += naive.delivery(old[space], new[space], listeners)
        if step.toggles_log and not self.logging:
            calls += naive.everyone(every, "log_global_stop", down=True)
        return calls

    def change(self, changes: tuple[Mutation, ...] | tuple[Attaching, ...]) -> None:
        for each in changes:
            each.apply(self.regions)

    def views(self) -> list[FlatView]:
        return [space.view for space in self.spaces]

    def everything(self) -> list[object]:
        """All that is public about the regions that an address space reaches."""
        live: list[MemoryRegion] = []
        todo = [space.root for space in self.spaces]
        while todo:
            each = todo.pop()
            if each not in live:
                live.append(each)
                todo += each.subregions
                todo += [] if each.alias_target is None else [each.alias_target]
        live.sort(key=self.regions.index)
        return [snapshot(live), [naive.Hung.on(each) for each in live]]

    def believed(self) -> list[object]:
        return [
            (
                dict(each.ranges),
                set(each.eventfds),
                Counter(each.coalesced),
                dict(each.logged) if who.logs else None,  # else it hears a part of it
                each.logging,
            )
            for listening in self.listening.values()
            for each, who in listening
        ]

    def check(self) -> None:
        mask = self.memory._dirty_log.mask
        for space, state in self.states().items():
            space.view.check()
            assert space.view == FlatView.render(space.root, log_mask=mask)
            assert {
                each.start: each.dirty_log_mask for each in space.view if each.dirty_log_mask
            } == state.logged
            for listener, who in self.listening[space]:
                self.check_beliefs(space, state, listener, who)
        self.check_sharing()

    def check_beliefs(
        self, space: AddressSpace, state: naive.State, listener: Listener, who: naive.Who
    ) -> None:
        assert listener.ranges == {
            each.start: MemoryRegionSection.of(space, each) for each in space.view
        }
        if who.eventfds:
            fds = {
                (fd.addr, fd.size, fd.match_data, fd.data or 0, fd.eventfd)
                for fd in listener.eventfds
            }
            assert fds == state.eventfds
        if who.coalesced:
            assert sorted(listener.coalesced.elements()) == state.coalesced
        if who.logs:
            assert listener.logged == state.logged
            assert listener.logging is self.logging

    def check_sharing(self) -> None:
        """F7: one view for all whose roots come down to one region."""
        shared: dict[MemoryRegion | None, FlatView] = {}
        for space in self.spaces:
            root = view_root(space.root)
            assert root is space._view_root
            assert shared.setdefault(root, space.view) is space.view


@examples(dev=100, ci=2000)
@given(scenarios())
def test_the_engine(plan: Scenario) -> None:
    """F7, T3 to T10, T13: traces as the naive ones; views, beliefs and sharing as they should."""

    async def main() -> None:
        machine = Machine(plan)
        machine.check()
        await machine.register_all()
        machine.check()
        for step in plan.steps:
            await machine.run(step)
            machine.check()
        await machine.unregister_all()
        machine.check()

    trio.run(main)
