"""RAM whose backing comes and goes: who is told of what, when one refuses, and turns."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    DirtyClient,
    ListenerError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    RamBlock,
    RamDiscardListener,
    RamDiscardManager,
    RegionError,
    RegionTypeError,
    TransactionError,
)
from tests.trees import examples

PAGE = 0x1000
PAGES = 16
BASE = 0x100000


class Machine:
    """RAM of sixteen granules, a page each, and a cover that may hide some of it."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 1 << 32)
        self.ram = MemoryRegion.ram("dimm", PAGES * PAGE)
        self.manager = RamDiscardManager(self.ram, granularity=PAGE)
        self.root.add_subregion(BASE, self.ram)
        self.cover = MemoryRegion.reservation("cover", 3 * PAGE)
        self.cover.set_enabled(False)
        self.root.add_subregion_overlap(BASE, self.cover, 1)
        self.space = self.memory.create_address_space("memory", self.root)

    def section(self, first: int = 0, end: int = PAGES) -> MemoryRegionSection:
        """That shows the pages [first, end)."""
        [each] = (each for each in self.space.view if each.region is self.ram)
        return MemoryRegionSection.of(self.space, each).clipped(first * PAGE, end * PAGE)

    async def populate(self, *pages: int) -> None:
        for page in pages:
            await self.manager.populate(page * PAGE, PAGE)


Call = tuple[str, str, int, int]  # listener, hook, first page, page after the last


@attrs.define(eq=False)
class Holder(RamDiscardListener):
    """Holds pages, and knows an error in what it is told when it hears one."""

    name: str = "holder"
    log: list[Call] = attrs.field(factory=list)
    held: set[int] = attrs.field(factory=set)
    hook: Callable[[str], Any] = lambda _: None  # what a test wants to happen in one

    def populate(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        result: Awaitable[None] | None = self.hook("populate")
        pages = self._pages("populate", section)
        assert self.held.isdisjoint(pages), "populated twice"
        self.held |= pages
        return result

    def discard(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        result: Awaitable[None] | None = self.hook("discard")
        pages = self._pages("discard", section)
        assert self.held >= pages, "discarded and not populated"
        self.held -= pages
        return result

    def _pages(self, what: str, section: MemoryRegionSection) -> set[int]:
        start = section.offset_within_address_space - BASE
        first, end = start // PAGE, (start + section.size) // PAGE
        self.log.append((self.name, what, first, end))
        return {start // PAGE for start in range(start, start + section.size, PAGE)}


@pytest.fixture
def machine() -> Machine:
    return Machine()


def failing(what: str, error: BaseException) -> Callable[[str], None]:
    def hook(name: str) -> None:
        if name == what:
            raise error

    return hook


# ---- a manager ------------------------------------------------------------------------


def test_the_regions_own(machine: Machine) -> None:
    """A listener finds it by the section; all other regions have none."""
    manager = machine.manager
    assert machine.ram.ram_discard_manager is manager
    assert manager.region is machine.ram
    assert manager.granularity == PAGE
    assert machine.root.ram_discard_manager is None
    assert "'dimm'" in repr(manager)
    assert "granularity 0x1000" in repr(manager)
    with pytest.raises(RegionError, match=r"has <RamDiscardManager of .*'dimm'.* already"):
        RamDiscardManager(machine.ram)


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion.container("other", 0x200000),
        MemoryRegion.rom("other", 0x200000),
        MemoryRegion.io("other", 0x200000, None),
        MemoryRegion.alias("other", MemoryRegion.ram("r", 0x200000), offset=0, size=0x200000),
    ],
    ids=lambda region: region.kind.value,
)
def test_not_ram(region: MemoryRegion) -> None:
    """ROM has contents that nobody would bring back."""
    with pytest.raises(RegionError, match=r"'other' .* is not RAM"):
        RamDiscardManager(region)


def test_no_region() -> None:
    """Says what is none."""
    wrong: Any = "dimm"
    with pytest.raises(RegionTypeError, match="is a MemoryRegion, not 'dimm'"):
        RamDiscardManager(wrong)


async def test_live(machine: Machine) -> None:
    """Those who heard region_add took it for populated; also if it goes in this transaction."""
    ram = MemoryRegion.ram("late", PAGE)
    async with machine.memory.transaction():
        machine.root.add_subregion(0, ram)
    with pytest.raises(TransactionError, match=r"'late' .* is live in .*before add_subregion"):
        RamDiscardManager(ram, granularity=PAGE)
    async with machine.memory.transaction():
        machine.root.del_subregion(ram)
        with pytest.raises(TransactionError, match="is live"):
            RamDiscardManager(ram, granularity=PAGE)
    assert RamDiscardManager(ram, granularity=PAGE) is ram.ram_discard_manager


def test_memory_that_cannot_go() -> None:
    """Found out at once, and not at the first discard."""
    block = RamBlock.from_buffer(bytearray(PAGE))
    ram = MemoryRegion.ram("mine", PAGE, block=block)
    with pytest.raises(RegionError, match=r"'mine' .* use RamBlock"):
        RamDiscardManager(ram, granularity=PAGE)
    assert ram.ram_discard_manager is None


def test_smaller_than_the_hosts_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages are larger than 4 KiB, so are granules."""
    monkeypatch.setattr("memlistener.ram_discard.PAGE_SIZE", 0x4000)
    ram = MemoryRegion.ram("dimm", 0x10000)
    with pytest.raises(RegionError, match=r"granularity 0x1000 .* page size 0x4000"):
        RamDiscardManager(ram, granularity=PAGE)
    assert RamDiscardManager(ram, granularity=0x4000).granularity == 0x4000


def test_goes_with_its_region() -> None:
    """The two name each other, and neither outlives who uses them."""
    block = RamBlock.anonymous(PAGE)
    ram = MemoryRegion.ram("dimm", PAGE, block=block)
    gone = weakref.ref(ram)
    manager = RamDiscardManager(ram, granularity=PAGE)
    del ram, manager
    gc.collect()
    assert gone() is None
    block.close()


# ---- changes --------------------------------------------------------------------------


async def test_what_is_new(machine: Machine) -> None:
    """Of a request listeners hear what differs, in the longest runs, cut to their sections."""
    holder = Holder()
    section = machine.section(1, 8)
    await machine.manager.register(holder, section)
    await machine.populate(3, 5)
    await machine.manager.populate(0, 7 * PAGE)
    assert holder.log == [
        ("holder", "populate", 3, 4),
        ("holder", "populate", 5, 6),
        *(("holder", "populate", first, end) for first, end in [(1, 3), (4, 5), (6, 7)]),
    ]
    assert machine.manager.populated() == [(0, 7 * PAGE)]
    assert machine.manager.discarded(PAGE) == [(7 * PAGE, 9 * PAGE)]
    holder.log.clear()
    await machine.manager.populate(0, 7 * PAGE)
    await machine.manager.discard(7 * PAGE, PAGE)
    await machine.manager.discard(0, 0)
    assert holder.log == []
    await machine.manager.discard(2 * PAGE, PAGE)
    await machine.manager.discard(0, PAGES * PAGE)
    assert holder.log == [("holder", "discard", *each) for each in [(2, 3), (1, 2), (3, 7)]]
    assert machine.manager.populated() == []


async def test_the_section_says_where(machine: Machine) -> None:
    """A part of the registered one: with its address, its space and its flags."""
    heard: list[MemoryRegionSection] = []

    class Listener(RamDiscardListener):
        def populate(self, section: MemoryRegionSection) -> None:
            heard.append(section)

    section = attrs.evolve(machine.section(2, 8), readonly=True)
    await machine.manager.register(Listener(), section)
    await machine.populate(4)
    assert heard == [section.clipped(4 * PAGE, 5 * PAGE)]
    assert heard[0].offset_within_address_space == BASE + 4 * PAGE
    assert heard[0].readonly
    await machine.manager.discard(4 * PAGE, PAGE)  # which this one does not care to hear


async def test_order(machine: Machine) -> None:
    """Run by run, and for each the earlier-registered first; discards likewise."""
    log: list[Call] = []
    for name in "ab":
        await machine.manager.register(Holder(name, log), machine.section())
    await machine.populate(1)
    log.clear()
    await machine.manager.populate(0, 3 * PAGE)
    assert log == [(name, "populate", at, at + 1) for at in (0, 2) for name in "ab"]
    log.clear()
    await machine.manager.discard(0, 3 * PAGE)
    assert log == [(name, "discard", 0, 3) for name in "ab"]


async def test_bad_ranges(machine: Machine) -> None:
    """Whole granules within the region; nobody is told anything."""
    holder = Holder()
    await machine.manager.register(holder, machine.section())
    for change in (machine.manager.populate, machine.manager.discard):
        with pytest.raises(RegionError, match="multiples of its granularity 0x1000"):
            await change(0x800, PAGE)
        with pytest.raises(RegionError, match="is not within 'dimm'"):
            await change(0, (PAGES + 1) * PAGE)
    with pytest.raises(RegionError, match="is not within 'dimm'"):
        machine.manager.populated(0, (PAGES + 1) * PAGE)
    assert holder.log == []


async def test_memory_goes_after_all_were_told(machine: Machine) -> None:
    """Whoever lets go still sees its data; then it is zeros, and written for who copies it."""
    view = machine.ram.block.view
    seen: list[tuple[int, list[tuple[int, int]]]] = []
    holder = Holder(hook=lambda _: seen.append((view[PAGE], machine.manager.populated())))
    await machine.populate(0, 1, 2)
    await machine.manager.register(holder, machine.section())
    view[: 3 * PAGE] = b"\1" * 3 * PAGE
    await machine.manager.discard(PAGE, PAGE)
    assert seen == [(0, [(0, 3 * PAGE)]), (1, [(0, 3 * PAGE)])]
    assert bytes(view[: 3 * PAGE]) == b"\1" * PAGE + bytes(PAGE) + b"\1" * PAGE
    assert machine.ram.block.take_dirty(DirtyClient.MIGRATION) == [(PAGE, PAGE)]


async def test_what_was_discarded_is_left_alone(machine: Machine) -> None:
    """What somebody wrote there all the same is still there: only what goes is freed."""
    await machine.populate(1)
    machine.ram.block.view[0] = 7
    await machine.manager.discard(0, 2 * PAGE)
    assert machine.ram.block.view[0] == 7
    assert machine.ram.block.take_dirty(DirtyClient.MIGRATION) == [(PAGE, PAGE)]


async def test_the_host_refuses(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is discarded all the same, and the block can try again."""
    holder = Holder()
    await machine.manager.register(holder, machine.section())
    await machine.populate(0, 2)
    machine.ram.block.view[0] = 1
    with monkeypatch.context() as patch:
        patch.setattr(machine.ram.block, "_advice", -1)
        with pytest.raises(ExceptionGroup, match=r"discard of .*'dimm'") as info:
            await machine.manager.discard(0, 3 * PAGE)
    assert [type(each) for each in info.value.exceptions] == [OSError, OSError]
    assert holder.held == set()
    assert machine.manager.populated() == []
    machine.ram.block.discard(0, PAGE)
    assert machine.ram.block.view[0] == 0


async def test_a_region_that_shrank(machine: Machine) -> None:
    """What it no longer shows may come and go: nobody hears of it."""
    holder = Holder()
    async with machine.memory.transaction():
        machine.ram.set_size(2 * PAGE)
    await machine.manager.register(holder, machine.section(0, 2))
    await machine.manager.populate(0, PAGES * PAGE)
    assert holder.log == [("holder", "populate", 0, 2)]


# ---- failures -------------------------------------------------------------------------


@given(st.data())
@examples(dev=150, ci=600)
async def test_refused_at_every_position(data: st.DataObject) -> None:
    """Whoever refuses whichever part: all is as before, and was taken back in reverse."""
    machine = Machine()
    log: list[Call] = []
    holders = []
    numbers = st.integers(0, PAGES)
    for name in "abc":
        first, end = sorted((data.draw(numbers), data.draw(numbers)))
        holders.append(Holder(name, log))
        await machine.manager.register(holders[-1], machine.section(first, max(end, first + 1)))
    for page in data.draw(st.sets(st.integers(0, PAGES - 1))):
        await machine.populate(page)
    before = [set(each.held) for each in holders]
    populated = machine.manager.populated()
    low, high = sorted((data.draw(numbers), data.draw(numbers)))

    left = 0  # how many more are told before one refuses

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise ZeroDivisionError

    for each in holders:
        each.hook = lambda name: count(name) if name == "populate" else None
    position = 0
    while True:  # position after position, until nobody is left to refuse
        position += 1
        left = position
        log.clear()
        try:
            await machine.manager.populate(low * PAGE, (high - low) * PAGE)
        except ZeroDivisionError:
            pass
        else:
            break
        told = log[: position - 1]
        assert [hook for _, hook, _, _ in told] == ["populate"] * (position - 1)
        assert log[position - 1 :] == [(name, "discard", *at) for name, _, *at in reversed(told)]
        assert [each.held for each in holders] == before
        assert machine.manager.populated() == populated
    assert len(log) == position - 1
    assert machine.manager.discarded(low * PAGE, (high - low) * PAGE) == []


async def test_refused_and_not_taken_back(machine: Machine) -> None:
    """Nothing is lost: the refusal and the failure of undoing it come out together."""
    first = Holder("first", hook=failing("discard", OSError("stuck")))
    await machine.manager.register(first, machine.section())
    second = Holder("second", hook=failing("populate", ZeroDivisionError()))
    await machine.manager.register(second, machine.section())
    with pytest.raises(ExceptionGroup, match="took it back") as info:
        await machine.populate(0)
    assert [type(each) for each in info.value.exceptions] == [ZeroDivisionError, OSError]
    assert machine.manager.populated() == []
    assert machine.memory.broken is None


async def test_a_discard_that_raises(machine: Machine) -> None:
    """The others hear of it, the memory goes, and the exception comes out as it is."""
    bad, good = Holder(), Holder()
    for each in (bad, good):
        await machine.manager.register(each, machine.section())
    await machine.populate(0)
    machine.ram.block.view[0] = 1
    bad.hook = failing("discard", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await machine.manager.discard(0, PAGE)
    assert good.held == set()
    assert machine.ram.block.view[0] == 0
    assert machine.manager.populated() == []


# ---- registering ----------------------------------------------------------------------


async def test_register_and_unregister(machine: Machine) -> None:
    """What is populated comes at once, and goes in the end; in between changes are heard."""
    await machine.populate(0, 2, 3, 9)
    holder = Holder()
    section = machine.section(1, 8)
    await machine.manager.register(holder, section)
    assert holder.log == [("holder", "populate", 2, 4)]
    await machine.populate(6)
    holder.log.clear()
    await machine.manager.unregister(holder, section)
    assert holder.log == [("holder", "discard", 2, 4), ("holder", "discard", 6, 7)]
    await machine.populate(7)
    assert holder.held == set()
    assert machine.manager.populated(0, 4 * PAGE) == [(0, PAGE), (2 * PAGE, 2 * PAGE)]


async def test_twice(machine: Machine) -> None:
    """Once for a section, and for as many as it likes."""
    holder = Holder()
    await machine.manager.register(holder, machine.section(0, 2))
    with pytest.raises(ListenerError, match=r"is registered for .* already"):
        await machine.manager.register(holder, machine.section(0, 2))
    await machine.manager.register(holder, machine.section(2, 4))
    await machine.manager.populate(0, 4 * PAGE)
    assert holder.log == [("holder", "populate", 0, 2), ("holder", "populate", 2, 4)]
    await machine.manager.unregister(holder, machine.section(0, 2))
    with pytest.raises(ListenerError, match="is not registered for"):
        await machine.manager.unregister(holder, machine.section(0, 2))
    assert holder.held == {2, 3}


async def test_what_cannot_register(machine: Machine) -> None:
    """No listener, no section, that of another region, that of another memory system."""
    wrong: Any = object()
    with pytest.raises(ListenerError, match="is not a RamDiscardListener: subclass it"):
        await machine.manager.register(wrong, machine.section())
    for section in (wrong, Machine().section()):
        with pytest.raises(ListenerError, match=r"is not a section of .*'dimm'"):
            await machine.manager.register(Holder(), section)
    elsewhere = attrs.evolve(machine.section(), address_space=Machine().space)
    with pytest.raises(ListenerError, match="is of another memory system"):
        await machine.manager.register(Holder(), elsewhere)


async def test_refused_while_registering(machine: Machine) -> None:
    """What it was told is taken back, it is not registered, and may try again."""
    await machine.populate(0, 2, 4)
    holder = Holder()
    left = 3

    def third(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise ZeroDivisionError

    holder.hook = third
    with pytest.raises(ZeroDivisionError):
        await machine.manager.register(holder, machine.section())
    assert holder.log == [
        *(("holder", "populate", at, at + 1) for at in (0, 2)),
        *(("holder", "discard", at, at + 1) for at in (2, 0)),
    ]
    await machine.manager.register(holder, machine.section())
    assert holder.held == {0, 2, 4}


async def test_unregistered_all_the_same(machine: Machine) -> None:
    """Who cannot let go is told so once: it hears no more."""
    await machine.populate(0, 2)
    holder = Holder()
    await machine.manager.register(holder, machine.section())
    holder.hook = failing("discard", ZeroDivisionError())
    with pytest.raises(ExceptionGroup, match=r"unregister of .*'dimm'") as info:
        await machine.manager.unregister(holder, machine.section())
    assert [type(each) for each in info.value.exceptions] == [ZeroDivisionError] * 2
    with pytest.raises(ListenerError, match="is not registered"):
        await machine.manager.unregister(holder, machine.section())


# ---- turns ----------------------------------------------------------------------------


async def test_waits_for_a_transaction(machine: Machine) -> None:
    """T14: one after the other, so that no section goes while its listener is told."""
    heard: list[str] = []
    holder = Holder(hook=heard.append)
    await machine.manager.register(holder, machine.section())
    async with trio.open_nursery() as nursery:
        async with machine.memory.transaction():
            nursery.start_soon(machine.populate, 0)
            await trio.testing.wait_all_tasks_blocked()
            assert heard == []
        await trio.testing.wait_all_tasks_blocked()
        assert heard == ["populate"]


async def test_a_transaction_waits_for_it(machine: Machine) -> None:
    """T14: the other way round; meanwhile what is populated is what was."""
    go = trio.Event()
    holder = Holder(hook=lambda _: go.wait())
    await machine.manager.register(holder, machine.section())
    entered: list[bool] = []

    async def transaction() -> None:
        async with machine.memory.transaction():
            entered.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.populate, 0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(transaction)
        await trio.testing.wait_all_tasks_blocked()
        assert entered == []
        assert machine.manager.populated() == []
        go.set()
    assert entered == [True]
    assert machine.manager.populated() == [(0, PAGE)]


async def test_free_of_turns(machine: Machine) -> None:
    """RAM that is shown nowhere has nobody to wait for, in a transaction either."""
    ram = MemoryRegion.ram("free", 2 * PAGE)
    manager = RamDiscardManager(ram, granularity=PAGE)
    async with machine.memory.transaction():
        with trio.testing.assert_no_checkpoints():
            await manager.populate(0, 2 * PAGE)
            ram.block.view[0] = 1
            await manager.discard(0, PAGE)
    assert manager.populated() == [(PAGE, PAGE)]
    assert ram.block.view[0] == 0


async def test_inside_a_transaction(machine: Machine) -> None:
    """The body has the turn, and its end will have it: refused, with nothing changed."""
    holder = Holder()
    section = machine.section()
    async with machine.memory.transaction():
        for attempt in (
            machine.manager.populate(0, PAGE),
            machine.manager.discard(0, PAGE),
            machine.manager.register(holder, section),
            machine.manager.unregister(holder, section),
        ):
            with pytest.raises(TransactionError, match="inside an open transaction"):
                await attempt
    assert machine.manager.populated() == []


async def test_t12_inside_a_hook(machine: Machine) -> None:
    """T12: a hook changes nothing that is being told: no map, no RAM, no listeners."""
    section = machine.section()
    manager = machine.manager
    refused: list[str] = []

    async def attempt() -> None:
        async with trio.open_nursery() as nursery:  # in tasks that the hook waits for, too
            for call in calls:
                nursery.start_soon(expect, call)
        for call in calls:
            await expect(call)

    async def expect(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(TransactionError) as info:
            await call()
        refused.append(str(info.value))

    async def transaction() -> None:
        async with machine.memory.transaction():
            pass

    holder = Holder(hook=lambda _: attempt())
    calls = [
        lambda: manager.populate(PAGE, PAGE),
        lambda: manager.discard(0, PAGE),
        transaction,
        lambda: manager.register(Holder(), section),
        lambda: manager.unregister(holder, section),
    ]
    await manager.register(holder, section)
    await machine.populate(0)
    await manager.discard(0, PAGE)
    assert len(refused) == 2 * 2 * len(calls)
    assert sum("in a hook of a change of the same region" in each for each in refused) == 8
    assert machine.memory.broken is None
    holder.hook = lambda _: None
    await manager.unregister(holder, section)


async def test_shielded(machine: Machine) -> None:
    """T14: cancelling ends the wait for a turn, and not what began."""
    log: list[str] = []

    async def slowly(what: str) -> None:
        await trio.lowlevel.checkpoint()
        log.append(what)

    with trio.CancelScope() as scope:
        holder = Holder(hook=lambda what: [scope.cancel(), slowly(what)][1])
        await machine.manager.register(holder, machine.section())
        await machine.populate(0)
    assert scope.cancel_called
    assert machine.manager.populated() == [(0, PAGE)]
    assert log == ["populate"]
    with trio.CancelScope() as scope:
        scope.cancel()
        await machine.populate(1)
    assert scope.cancelled_caught
    assert machine.manager.populated() == [(0, PAGE)]


def test_control_c(machine: Machine) -> None:
    """It comes when the change is made, whole, and the turn given back."""
    holder = Holder(hook=lambda _: signal.raise_signal(signal.SIGINT))

    async def main() -> None:
        await machine.manager.register(holder, machine.section())
        await machine.populate(0)
        assert not machine.memory._lock.locked()
        await trio.lowlevel.checkpoint()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert machine.manager.populated() == [(0, PAGE)]
    assert holder.held == {0}


async def test_moved_while_waiting(machine: Machine) -> None:
    """The turn is that of the memory system that the region is in when it comes."""
    other = Machine()
    done: list[bool] = []

    async def populate() -> None:
        await machine.populate(0)
        done.append(True)

    async with trio.open_nursery() as nursery:
        async with other.memory.transaction():
            async with machine.memory.transaction():
                nursery.start_soon(populate)
                await trio.testing.wait_all_tasks_blocked()
                machine.root.del_subregion(machine.ram)
            other.root.add_subregion(0, machine.ram)  # it has its turn, and has not run yet
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            async with machine.memory.transaction():
                pass  # the first turn was given back
        await trio.testing.wait_all_tasks_blocked()
        assert done == [True]


async def test_gone_while_waiting(machine: Machine) -> None:
    """Nobody shows it any more: there is nobody to tell."""
    async with trio.open_nursery() as nursery, machine.memory.transaction():
        nursery.start_soon(machine.populate, 0)
        await trio.testing.wait_all_tasks_blocked()
        machine.root.del_subregion(machine.ram)
        assert machine.manager.populated() == []
    assert machine.manager.populated() == [(0, PAGE)]
    async with machine.memory.transaction():
        pass  # the turn was given back


# ---- a listener on top ----------------------------------------------------------------


class Pins(MemoryListener, RamDiscardListener):
    """What VFIO does: RAM is pinned where it shows, and only what is populated."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()
        self.left = -1  # how many more are pinned before one fails

    async def region_add(self, section: MemoryRegionSection) -> None:
        manager = section.region.ram_discard_manager
        if manager is not None:
            await manager.register(self, section)

    async def region_del(self, section: MemoryRegionSection) -> None:
        manager = section.region.ram_discard_manager
        if manager is not None:
            await manager.unregister(self, section)

    def populate(self, section: MemoryRegionSection) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError
        pages = self._pages(section)
        assert self.pinned.isdisjoint(pages)
        self.pinned |= pages

    def discard(self, section: MemoryRegionSection) -> None:
        pages = self._pages(section)
        assert self.pinned >= pages
        self.pinned -= pages

    def _pages(self, section: MemoryRegionSection) -> set[int]:
        return {addr // PAGE for addr in range(section.offset_within_address_space, section.end)}


def shown(space: AddressSpace, ram: MemoryRegion, populated: set[int]) -> set[int]:
    """The pages of a space at which a populated page of ``ram`` shows."""
    return {
        (each.start + at) // PAGE
        for each in space.view
        if each.region is ram
        for at in range(0, each.size, PAGE)
        if (each.offset + at) // PAGE in populated
    }


async def test_pins(machine: Machine) -> None:
    """region_add registers and pins, region_del unpins; a hidden part is not pinned."""
    pins = Pins()
    await machine.manager.populate(0, 5 * PAGE)
    await machine.memory.register(pins, machine.space)
    first = BASE // PAGE
    assert pins.pinned == {first + page for page in range(5)}
    async with machine.memory.transaction():
        machine.cover.set_enabled(True)
    assert pins.pinned == {first + 3, first + 4}
    await machine.manager.discard(0, 4 * PAGE)
    assert pins.pinned == {first + 4}
    await machine.populate(2, 8)
    assert pins.pinned == {first + 4, first + 8}
    async with machine.memory.transaction():
        machine.cover.set_enabled(False)
    assert pins.pinned == {first + 2, first + 4, first + 8}
    await machine.memory.unregister(pins)
    assert pins.pinned == set()


async def test_t13_pins_of_a_failed_transaction(machine: Machine) -> None:
    """T13: who cannot pin fails the transaction, and what was pinned is again."""
    pins = Pins()
    await machine.memory.register(pins, machine.space)
    await machine.populate(0, 2, 4, 6)
    before = set(pins.pinned)
    pins.left = 2
    with pytest.raises(MemoryError):
        async with machine.memory.transaction():
            machine.ram.set_address(2 * BASE)
    assert pins.pinned == before
    assert machine.memory.broken is None
    await machine.populate(8)
    assert pins.pinned == {*before, BASE // PAGE + 8}


@given(st.data())
@examples(dev=60, ci=300)
async def test_pins_against_naive_sets(data: st.DataObject) -> None:
    """Whatever is populated, discarded, moved, hidden, or fails: pinned is what shows of it."""
    machine = Machine()
    window = MemoryRegion.alias("window", machine.ram, offset=0, size=4 * PAGE)
    spaces = [machine.space]
    async with machine.memory.transaction():
        machine.root.add_subregion(4 * BASE, window)
    spaces.append(machine.memory.create_address_space("device", window))
    pins = [Pins() for _ in spaces]
    for each, space in zip(pins, spaces, strict=True):
        await machine.memory.register(each, space)
    naive: set[int] = set()
    view = machine.ram.block.view
    numbers = st.integers(0, PAGES)
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["populate", "discard", "cover", "window"]))
        first, end = sorted((data.draw(numbers), data.draw(numbers)))
        pages = set(range(first, end))
        victim = data.draw(st.sampled_from(pins))
        victim.left = data.draw(st.integers(-1, 4))
        try:
            if what == "populate":
                await machine.manager.populate(first * PAGE, len(pages) * PAGE)
                naive |= pages
                for page in pages:
                    view[page * PAGE] = 1
            elif what == "discard":
                await machine.manager.discard(first * PAGE, len(pages) * PAGE)
                naive -= pages
            else:
                async with machine.memory.transaction():
                    if what == "cover":
                        machine.cover.set_enabled(data.draw(st.booleans()))
                        machine.cover.set_address(BASE + first * PAGE)
                    else:
                        window.set_alias_offset(first * PAGE)
        except MemoryError:
            assert what != "discard"
        victim.left = -1
        assert machine.memory.broken is None
        for each, space in zip(pins, spaces, strict=True):
            assert each.pinned == shown(space, machine.ram, naive)
        assert {
            page
            for offset, size in machine.manager.populated()
            for page in range(offset // PAGE, (offset + size) // PAGE)
        } == naive
        assert {page for page in range(PAGES) if view[page * PAGE]} == naive
