"""Rule T13: a listener that raises, in every hook, at every position, undoing included."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import trio
import trio.testing

from memlistener import (
    BrokenMemoryError,
    FlatView,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
)
from memlistener.testing import RecordingListener
from memlistener.testing.recording import Heard

from .trees import snapshot

INVERSE = {"region_add": "region_del", "region_del": "region_add"}
Believed: TypeAlias = list[dict[int, MemoryRegionSection]]


class Boom(Exception):
    """What a failing hook raises; ``args`` is which call it was."""


class Fuse:
    """Counts the calls of all hooks of a machine; those that are in ``fatal`` raise."""

    def __init__(self) -> None:
        self.calls = 0
        self.fatal: set[int] = set()
        self.raised: list[Boom] = []
        self.witnesses: list[Fragile] = []
        self.heard_then: dict[str, int] = {}  # what each had heard when it blew

    def burn(self) -> None:
        call = self.calls
        self.calls += 1
        if call in self.fatal:
            self.heard_then = {each.name: len(each.heard) for each in self.witnesses}
            self.raised.append(Boom(call))
            raise self.raised[-1]

    def set(self, *fatal: int) -> None:
        self.calls, self.fatal = 0, set(fatal)


class Fragile(RecordingListener):
    """A recorder that raises when the fuse says so, and then has heard nothing."""

    def __init__(self, name: str, priority: int, fuse: Fuse, *, nops: bool = False) -> None:
        super().__init__(name, priority=priority, nops=nops)
        self.fuse = fuse

    def begin(self) -> None:
        self.fuse.burn()
        super().begin()

    def commit(self) -> None:
        self.fuse.burn()
        super().commit()

    def region_add(self, section: MemoryRegionSection) -> None:
        self.fuse.burn()
        super().region_add(section)

    def region_del(self, section: MemoryRegionSection) -> None:
        self.fuse.burn()
        super().region_del(section)

    def _region_nop(self, section: MemoryRegionSection) -> None:
        self.fuse.burn()
        super()._region_nop(section)


class Slow(Fragile):
    """The same with hooks that wait before they do anything."""

    async def begin(self) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().begin()

    async def commit(self) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().commit()

    async def region_add(self, section: MemoryRegionSection) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().region_add(section)

    async def region_del(self, section: MemoryRegionSection) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().region_del(section)


class Machine:
    """Three address spaces over one tree, and five listeners, two of equal priority."""

    def __init__(self) -> None:
        self.fuse = Fuse()
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 0x10000)
        self.ram = MemoryRegion.ram("ram", 0x4000)
        self.low = MemoryRegion.alias("low", self.ram, offset=0, size=0x2000)
        self.device = MemoryRegion.io("device", 0x1000, None)
        self.bios = MemoryRegion.rom("bios", 0x1000)
        self.root.add_subregion(0, self.low)
        self.root.add_subregion_overlap(0x8000, self.device, 1)
        self.root.add_subregion(0xF000, self.bios)
        self.dma_root = MemoryRegion.alias("dma", self.root, offset=0, size=0x8000)
        self.quiet_root = MemoryRegion.container("quiet", 0x1000)
        memory, dma, quiet = (
            self.memory.create_address_space(root.name, root)
            for root in (self.root, self.dma_root, self.quiet_root)
        )
        self.spaces = [memory, dma, quiet]
        self.listeners: list[Fragile] = [
            Fragile("first", 0, self.fuse),
            Slow("second", 0, self.fuse),
            Fragile("third", 10, self.fuse, nops=True),
            Fragile("dma", 0, self.fuse),
            Fragile("quiet", 0, self.fuse),
        ]
        self.fuse.witnesses = self.listeners
        self.heard_by = dict(zip(self.listeners, [memory] * 3 + [dma, quiet], strict=True))

    async def start(self) -> None:
        for listener, space in self.heard_by.items():
            await self.memory.register(listener, space)
            listener.clear()
        self.fuse.set()

    async def change(self) -> None:
        """Deletes, adds, and a range that stays, in two of the three spaces."""
        async with self.memory.transaction():
            self.low.set_alias_offset(0x1000)
            self.root.del_subregion(self.device)
            self.root.add_subregion_overlap(0x1000, self.device, 1)
            self.ram.set_nonvolatile(True)

    @property
    def regions(self) -> list[MemoryRegion]:
        return [
            *(self.root, self.ram, self.low, self.device),
            *(self.bios, self.dma_root, self.quiet_root),
        ]

    def views(self) -> list[FlatView]:
        return [space.view for space in self.spaces]

    def believed(self) -> Believed:
        return [dict(listener.ranges) for listener in self.listeners]

    def check(self) -> None:
        """The views are those of the trees, and listeners believe in them."""
        for space in self.spaces:
            space.view.check()
            assert space.view == FlatView.render(space.root)
        for listener, space in self.heard_by.items():
            assert listener.ranges == {
                each.start: MemoryRegionSection.of(space, each) for each in space.view
            }


def undoing(heard: list[Heard]) -> list[Heard]:
    """What has to follow after exactly this was heard."""
    if not heard:
        return []
    name = heard[0].listener
    inverse = [
        Heard(INVERSE[each.hook], each.section, name)
        for each in reversed(heard)
        if each.hook in INVERSE
    ]
    return [Heard("begin", None, name), *inverse, Heard("commit", None, name)]


async def whole_story() -> tuple[int, dict[str, list[Heard]]]:
    """How many calls of hooks the change is, and what each listener hears."""
    machine = Machine()
    await machine.start()
    await machine.change()
    machine.check()
    return machine.fuse.calls, {each.name: each.heard for each in machine.listeners}


async def test_the_change_reaches_every_hook() -> None:
    """T13: the scenario is worth failing in: several spaces, every hook, and one bystander."""
    calls, heard = await whole_story()
    hooks = {each.hook for one in heard.values() for each in one}
    assert hooks == {"begin", "region_del", "region_add", "region_nop", "commit"}
    assert [bool(one) for one in heard.values()] == [True] * 4 + [False]
    assert calls == sum(map(len, heard.values()))


async def test_failing_in_every_hook_at_every_position() -> None:
    """T13: trees, views and beliefs are as before; the told hear the inverse, no others."""
    calls, story = await whole_story()
    for fatal in range(calls):
        machine = Machine()
        await machine.start()
        before, views = snapshot(machine.regions), machine.views()
        believed = machine.believed()
        machine.fuse.set(fatal)
        with pytest.raises(Boom) as info:
            await machine.change()
        assert info.value is machine.fuse.raised[0]
        assert info.value.__cause__ is None
        assert snapshot(machine.regions) == before
        assert machine.views() == views
        assert machine.believed() == believed
        assert sum(machine.fuse.heard_then.values()) == fatal
        for listener in machine.listeners:
            # The story up to where it broke off, then the same backwards.
            heard, count = listener.heard, machine.fuse.heard_then[listener.name]
            assert _hooks(heard[:count]) == _hooks(story[listener.name][:count])
            assert heard[count:] == undoing(heard[:count])
        assert machine.memory.broken is None
        # And nothing is left behind: the same change goes through now.
        machine.fuse.set()
        for listener in machine.listeners:
            listener.clear()
        await machine.change()
        machine.check()
        assert {each.name: _hooks(each.heard) for each in machine.listeners} == {
            name: _hooks(heard) for name, heard in story.items()
        }


def _hooks(heard: list[Heard]) -> list[str]:
    return [str(each) for each in heard]


async def test_spaces_that_were_complete_are_undone_too() -> None:
    """T13: the last call fails; the first space was told everything, commit included."""
    calls, story = await whole_story()
    machine = Machine()
    await machine.start()
    machine.fuse.set(calls - 1)
    with pytest.raises(Boom):
        await machine.change()
    first = machine.listeners[0]
    whole = len(story["first"])
    assert _hooks(first.heard[:whole]) == _hooks(story["first"])
    assert _hooks(first.heard[whole:]) == _hooks(undoing(first.heard[:whole]))


async def test_undoing_is_heard_in_order_of_priority() -> None:
    """T13, T4: begin and commit of an undoing ascend like any others."""
    calls, _ = await whole_story()
    machine = Machine()
    await machine.start()
    log: list[Heard] = []
    for listener in machine.listeners:
        listener.heard = log
    machine.fuse.set(calls - 1)
    with pytest.raises(Boom):
        await machine.change()
    machine.check()
    begins = [each.listener for each in log if each.hook == "begin"]
    commits = [each.listener for each in log if each.hook == "commit"]
    assert begins[:4] == ["first", "second", "third", "dma"]
    assert begins[4:] == ["dma", "first", "second", "third"]
    assert commits[:3] == ["first", "second", "third"]
    assert commits[3:] == ["dma", "first", "second", "third"]


async def test_views_while_undoing() -> None:
    """T13, T2: the old view is back before the undoing's commit, also where it was replaced."""
    seen: list[tuple[str, FlatView]] = []
    machine = Machine()
    await machine.start()
    space = machine.spaces[0]

    class Watching(MemoryListener):
        def begin(self) -> None:
            seen.append(("begin", space.view))

        def commit(self) -> None:
            seen.append(("commit", space.view))

    await machine.memory.register(Watching(), space)
    seen.clear()
    calls, _ = await whole_story()
    old = space.view
    machine.fuse.set(calls - 1)
    with pytest.raises(Boom):
        await machine.change()
    assert [hook for hook, _ in seen] == ["begin", "commit", "begin", "commit"]
    assert seen[0][1] is old
    new = seen[1][1]
    assert new != old
    assert seen[2][1] is new
    assert seen[3][1] == old


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, trio.TooSlowError])
async def test_any_error_of_a_listener(error: type[BaseException]) -> None:
    """T13: what leaves the transaction is the listener's own error, of whatever kind."""
    machine = Machine()
    await machine.start()
    before, raised = snapshot(machine.regions), error()

    class Raising(MemoryListener):
        armed = False

        async def commit(self) -> None:
            if self.armed:
                self.armed = False
                raise raised

    raising = Raising()
    await machine.memory.register(raising, machine.spaces[1])
    raising.armed = True
    with pytest.raises(error) as info:
        await machine.change()
    assert info.value is raised
    assert snapshot(machine.regions) == before
    machine.check()


async def test_undoing_is_shielded() -> None:
    """T13, T14: a cancelled task undoes in full; the listener's error is what it ends with."""
    machine = Machine()
    await machine.start()
    calls, _ = await whole_story()
    scope = trio.CancelScope()

    class Cancelling(MemoryListener):
        def commit(self) -> None:
            scope.cancel()

    await machine.memory.register(Cancelling(), machine.spaces[0])
    machine.fuse.set(calls - 1)
    scope = trio.CancelScope()
    with pytest.raises(Boom), scope:
        await machine.change()
    assert scope.cancel_called
    machine.check()


# ---- undoing that fails ---------------------------------------------------------------


async def undo_calls(fatal: int) -> int:
    """How many calls of hooks follow after call number ``fatal`` fails."""
    machine = Machine()
    await machine.start()
    machine.fuse.set(fatal)
    with pytest.raises(Boom):
        await machine.change()
    return machine.fuse.calls - fatal - 1


async def test_failing_while_undoing_at_every_position() -> None:
    """T13: then the system is broken, says both errors, and calls back."""
    calls, _ = await whole_story()
    tried = 0
    for fatal in (1, calls // 2, calls - 1):
        for second in range(await undo_calls(fatal)):
            machine = Machine()
            await machine.start()
            told: list[BaseException] = []
            machine.memory.when_broken(told.append)
            before = snapshot(machine.regions)
            machine.fuse.set(fatal, fatal + 1 + second)
            with pytest.raises(BrokenMemoryError) as info:
                await machine.change()
            one, two = machine.fuse.raised
            group = info.value.__cause__
            assert isinstance(group, BaseExceptionGroup)
            assert group.exceptions == (one, two)
            assert machine.memory.broken is two
            assert told == [two]
            assert snapshot(machine.regions) == before
            tried += 1
    assert tried > calls


async def broken_machine() -> Machine:
    machine = Machine()
    await machine.start()
    machine.fuse.set(5, 6)
    with pytest.raises(BrokenMemoryError):
        await machine.change()
    machine.fuse.set()
    for listener in machine.listeners:
        listener.clear()
    return machine


async def test_a_broken_system_refuses_further_use() -> None:
    """T13: transactions, changes, listeners and new address spaces raise; nobody is called."""
    machine = await broken_machine()
    memory = machine.memory
    before = snapshot(machine.regions)
    for _ in range(2):
        with pytest.raises(BrokenMemoryError, match="make a new MemorySystem") as info:
            async with memory.transaction():
                raise AssertionError("a transaction of a broken system was opened")
        assert info.value.__cause__ is memory.broken
    with pytest.raises(BrokenMemoryError):
        machine.low.set_size(0x1000)
    with pytest.raises(BrokenMemoryError):
        await memory.register(RecordingListener(), machine.spaces[0])
    with pytest.raises(BrokenMemoryError):
        await memory.unregister(machine.listeners[0])
    with pytest.raises(BrokenMemoryError):
        memory.create_address_space("new", MemoryRegion.container("new", 0x1000))
    assert snapshot(machine.regions) == before
    assert all(listener.heard == [] for listener in machine.listeners)


async def test_who_waits_for_a_turn_when_the_system_breaks() -> None:
    """T13, T14: gets the error instead of the turn."""
    machine = Machine()
    await machine.start()
    machine.fuse.set(5, 6)
    refused: list[int] = []

    async def wait(number: int) -> None:
        with pytest.raises(BrokenMemoryError):
            async with machine.memory.transaction():
                raise AssertionError("got in")
        refused.append(number)

    async def break_it(nursery: trio.Nursery) -> None:
        async with machine.memory.transaction():
            for number in range(2):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            machine.low.set_alias_offset(0x1000)

    async with trio.open_nursery() as nursery:
        with pytest.raises(BrokenMemoryError):
            await break_it(nursery)
    assert refused == [0, 1]


async def test_who_no_longer_wants_to_know() -> None:
    """T13: when_broken gives back a way to take the request back."""
    machine = Machine()
    await machine.start()
    told: list[str] = []
    machine.memory.when_broken(lambda _: told.append("one"))
    forget = machine.memory.when_broken(lambda _: told.append("two"))
    machine.memory.when_broken(lambda _: told.append("three"))
    forget()
    forget()  # again does no harm
    machine.fuse.set(5, 6)
    with pytest.raises(BrokenMemoryError):
        await machine.change()
    assert told == ["one", "three"]


async def test_who_asked_twice() -> None:
    """T13: taking the same request back again leaves the other one alone."""
    machine = Machine()
    await machine.start()
    told: list[BaseException] = []
    forget = machine.memory.when_broken(told.append)
    machine.memory.when_broken(told.append)
    forget()
    forget()
    machine.fuse.set(5, 6)
    with pytest.raises(BrokenMemoryError):
        await machine.change()
    assert len(told) == 1


async def test_a_failure_that_could_be_undone_breaks_nothing() -> None:
    """T13: and calls nobody back."""
    machine = Machine()
    await machine.start()
    told: list[BaseException] = []
    machine.memory.when_broken(told.append)
    machine.fuse.set(5)
    with pytest.raises(Boom):
        await machine.change()
    assert told == []
    assert machine.memory.broken is None


async def test_registering_that_cannot_be_undone() -> None:
    """T13, T8: what the listener holds is no longer known, so the system is broken."""
    machine = Machine()
    await machine.start()
    late = Fragile("late", 0, machine.fuse)
    machine.fuse.set(2, 3)
    with pytest.raises(BrokenMemoryError):
        await machine.memory.register(late, machine.spaces[0])
    assert machine.memory.broken is machine.fuse.raised[1]
    assert late not in machine.spaces[0].listeners


async def test_unregistering_that_cannot_be_undone() -> None:
    """T13, T8: the listener stays registered with a torn map, so the system is broken."""
    machine = Machine()
    await machine.start()
    machine.fuse.set(2, 3)
    with pytest.raises(BrokenMemoryError):
        await machine.memory.unregister(machine.listeners[0])
    assert machine.memory.broken is machine.fuse.raised[1]
