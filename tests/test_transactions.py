"""Transactions: rules T1, T2, T10 to T12, T14 and T15. T13 is in test_rollback.py."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing

import memlistener.memory as memory_module
from memlistener import (
    DirtyClient,
    FlatView,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    RegionError,
    TransactionError,
)
from memlistener.testing import RecordingListener

from .trees import snapshot


class Machine:
    """Two address spaces: "memory" shows RAM and a window, "dma" part of "memory"."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 0x10000)
        self.ram = MemoryRegion.ram("ram", 0x2000)
        self.flash = MemoryRegion.rom_device("flash", 0x1000, None)
        self.window = MemoryRegion.alias("window", self.ram, offset=0x1000, size=0x1000)
        self.eventfd = 7
        self.device = io("device")
        self.device.add_eventfd(0x10, 4, self.eventfd)
        self.device.add_coalescing(0x40, 0x10)
        self.root.add_subregion(0x3000, self.device)
        self.root.add_subregion(0, self.ram)
        self.root.add_subregion(0x4000, self.flash)
        self.root.add_subregion(0x8000, self.window)
        self.dma_root = MemoryRegion.alias("dma", self.root, offset=0x8000, size=0x8000)
        self.space = self.memory.create_address_space("memory", self.root)
        self.dma = self.memory.create_address_space("dma", self.dma_root)

    @property
    def regions(self) -> list[MemoryRegion]:
        return [self.root, self.ram, self.device, self.flash, self.window, self.dma_root]

    async def listen(self, *, dma: bool = False) -> RecordingListener:
        listener = RecordingListener()
        await self.memory.register(listener, self.dma if dma else self.space)
        listener.clear()
        return listener

    def check(self) -> None:
        for space in (self.space, self.dma):
            space.view.check()
            assert space.view == FlatView.render(space.root)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def io(name: str, size: int = 0x1000) -> MemoryRegion:
    return MemoryRegion.io(name, size, None)


class Unwanted(Exception):
    """Raised by bodies whose changes are to be taken back."""


async def taken_back(
    machine: Machine,
    *changes: Callable[[Machine], None],
    error: BaseException | None = None,
) -> None:
    """A transaction with a body that makes the changes and then raises; and so does leaving."""
    error = Unwanted() if error is None else error

    async def fail() -> None:
        async with machine.memory.transaction():
            for each in changes:
                each(machine)
            raise error

    with pytest.raises(type(error)) as info:
        await fail()
    assert info.value is error


# Every mutator, on a region of the machine that it does change.
MUTATORS: dict[str, Callable[[Machine], None]] = {
    "add_subregion": lambda m: m.root.add_subregion(0x6000, io("new")),
    "add_subregion_overlap": lambda m: m.root.add_subregion_overlap(0x100, io("new"), 1),
    "del_subregion": lambda m: m.root.del_subregion(m.window),
    "set_enabled": lambda m: m.window.set_enabled(False),
    "set_address": lambda m: m.window.set_address(0x9000),
    "set_size": lambda m: m.window.set_size(0x800),
    "set_alias_offset": lambda m: m.window.set_alias_offset(0x800),
    "set_readonly": lambda m: m.ram.set_readonly(True),
    "set_nonvolatile": lambda m: m.ram.set_nonvolatile(True),
    "set_unmergeable": lambda m: m.ram.set_unmergeable(True),
    "set_romd_mode": lambda m: m.flash.set_romd_mode(False),
}
# Those that change what hangs on a region, and not what shows.
ATTACHMENTS: dict[str, Callable[[Machine], None]] = {
    "set_log": lambda m: m.ram.set_log(True, DirtyClient.VGA),
    "add_eventfd": lambda m: m.device.add_eventfd(0, 4, 8),
    "del_eventfd": lambda m: m.device.del_eventfd(0x10, 4, m.eventfd),
    "add_coalescing": lambda m: m.device.add_coalescing(0x20, 0x10),
    "clear_coalescing": lambda m: m.device.clear_coalescing(),
}
each_mutator = pytest.mark.parametrize("mutate", MUTATORS.values(), ids=MUTATORS.keys())


def test_all_mutators_of_the_machine_are_here() -> None:
    """T11: a mutator that is added to MemoryRegion has to be added above."""
    prefixes = ("set_", "add_", "del_", "clear_")
    public = {name for name in dir(MemoryRegion) if name.startswith(prefixes)}
    assert public == {*MUTATORS, *ATTACHMENTS}


# ---- T1: nesting -----------------------------------------------------------------------


async def test_only_the_outermost_end_tells(machine: Machine) -> None:
    """T1: inner ends render nothing and tell nobody."""
    listener = await machine.listen()
    old = machine.space.view
    async with machine.memory.transaction():
        async with machine.memory.transaction():
            machine.window.set_address(0x9000)
            async with machine.memory.transaction():
                machine.window.set_size(0x800)
            assert machine.space.view is old
        assert machine.space.view is old
        assert listener.heard == []
        machine.window.set_address(0xA000)
    assert listener.trace == [
        "begin",
        "region_del [0x8000, 0x9000) ram+0x1000",
        "region_add [0xa000, 0xa800) ram+0x1000",
        "commit",
    ]


async def test_all_views_are_rendered_before_the_first_callback(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T1: the first space's begin comes after the last space's view is rendered."""
    log: list[str] = []
    rendered = FlatView._updated

    def updated(self: FlatView, root: MemoryRegion, *args: Any, **kwargs: Any) -> Any:
        log.append(f"render {root.name}")
        return rendered(self, root, *args, **kwargs)

    class Listener(MemoryListener):
        def begin(self) -> None:
            log.append("begin")

    await machine.memory.register(Listener(), machine.space)
    await machine.memory.register(Listener(), machine.dma)
    log.clear()
    monkeypatch.setattr(FlatView, "_updated", updated)
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
        assert log == []
    assert log == ["render root", "render dma", "begin", "begin"]


async def test_a_transaction_object_is_used_once(machine: Machine) -> None:
    """T1: entering the same one again raises, open or not."""
    transaction = machine.memory.transaction()
    async with transaction:
        with pytest.raises(TransactionError, match="used once"):
            await transaction.__aenter__()
    with pytest.raises(TransactionError, match="used once"):
        await transaction.__aenter__()
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
    machine.check()


# ---- T2: one space after the other, and when the new view is seen ----------------------


async def test_spaces_are_told_one_after_the_other(machine: Machine) -> None:
    """T2: begin, deletes, adds, commit of one space; then those of the next created."""
    log: list[str] = []

    class Listener(MemoryListener):
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self) -> None:
            log.append(f"{self.name} begin")

        def region_add(self, section: MemoryRegionSection) -> None:
            log.append(f"{self.name} add")

        def region_del(self, section: MemoryRegionSection) -> None:
            log.append(f"{self.name} del")

        def commit(self) -> None:
            log.append(f"{self.name} commit")

    await machine.memory.register(Listener("dma"), machine.dma)
    await machine.memory.register(Listener("memory"), machine.space)
    log.clear()
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
    assert log == [
        *("memory begin", "memory del", "memory add", "memory commit"),
        *("dma begin", "dma del", "dma add", "dma commit"),
    ]


async def test_the_new_view_is_published_before_commit(machine: Machine) -> None:
    """T2: hooks see the old view, whole, up to the last region_add; commit the new one."""
    seen: dict[str, list[FlatView]] = {}

    class Watching(MemoryListener):
        def begin(self) -> None:
            seen.setdefault("begin", []).append(machine.space.view)

        def region_del(self, section: MemoryRegionSection) -> None:
            seen.setdefault("region_del", []).append(machine.space.view)

        def region_add(self, section: MemoryRegionSection) -> None:
            seen.setdefault("region_add", []).append(machine.space.view)

        def commit(self) -> None:
            seen.setdefault("commit", []).append(machine.space.view)

    await machine.memory.register(Watching(), machine.space)
    seen.clear()
    old = machine.space.view
    before = str(old)
    async with machine.memory.transaction():
        machine.window.set_address(0x9000)
        machine.ram.set_readonly(True)
        assert machine.space.view is old
    new = machine.space.view
    assert new is not old
    assert str(old) == before
    assert seen["begin"] == [old]
    assert len(seen["region_del"]) == len(seen["region_add"]) == 2
    assert all(each is old for each in seen["region_del"] + seen["region_add"])
    assert len(seen["commit"]) == 1
    assert seen["commit"][0] is new


async def test_other_tasks_and_threads_read_meanwhile(machine: Machine) -> None:
    """T2: the old view until publication, for whomever looks."""
    adding, go_on = trio.Event(), trio.Event()
    committing, finish = trio.Event(), trio.Event()

    class Slow(MemoryListener):
        async def region_del(self, section: MemoryRegionSection) -> None:
            adding.set()
            await go_on.wait()

        async def commit(self) -> None:
            committing.set()
            await finish.wait()

    async def change() -> None:
        async with machine.memory.transaction():
            machine.window.set_enabled(False)

    def look() -> object:
        return machine.space.view.lookup(0x8000)

    with trio.CancelScope(shield=True):
        go_on.set()
        finish.set()
        await machine.memory.register(Slow(), machine.space)
        go_on, finish, committing = trio.Event(), trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await adding.wait()
        assert look() is not None
        assert await trio.to_thread.run_sync(look) is not None
        go_on.set()
        await committing.wait()
        assert look() is None
        assert await trio.to_thread.run_sync(look) is None
        finish.set()


# ---- T10: who is told ------------------------------------------------------------------


async def test_only_listeners_of_spaces_that_changed(machine: Machine) -> None:
    """T10: a change that one space does not see is no business of its listeners."""
    memory, dma = await machine.listen(), await machine.listen(dma=True)
    async with machine.memory.transaction():
        machine.flash.set_size(0x800)
    assert len(memory.heard) == 4
    assert dma.heard == []
    memory.clear()
    async with machine.memory.transaction():
        machine.dma_root.set_size(0x800)
    assert memory.heard == []
    assert dma.trace == [
        "begin",
        "region_del [0x0, 0x1000) ram+0x1000",
        "region_add [0x0, 0x800) ram+0x1000",
        "commit",
    ]


async def test_a_transaction_that_changes_nothing(machine: Machine) -> None:
    """T10: no callback, and the very same view."""
    listener = await machine.listen()
    old = machine.space.view
    async with machine.memory.transaction():
        pass
    assert listener.heard == []
    assert machine.space.view is old


@each_mutator
async def test_a_transaction_that_ends_where_it_began(
    machine: Machine, mutate: Callable[[Machine], None]
) -> None:
    """T10: there and back within one transaction calls nothing."""
    listener, dma = await machine.listen(), await machine.listen(dma=True)
    view = machine.space.view
    async with machine.memory.transaction():
        await taken_back(machine, mutate)
    assert listener.heard == dma.heard == []
    assert machine.space.view is view


async def test_changes_that_nobody_can_see(machine: Machine) -> None:
    """T10: below what hides it, outside its container, or disabled."""
    async with machine.memory.transaction():
        machine.root.add_subregion_overlap(0, io("over", 0x2000), 1)
    listener, dma = await machine.listen(), await machine.listen(dma=True)
    async with machine.memory.transaction():
        machine.root.add_subregion_overlap(0x1000, io("hidden", 0x800), -1)
        machine.root.add_subregion(0x20000, io("outside"))
        disabled = io("disabled")
        disabled.set_enabled(False)
        machine.root.add_subregion(0x6000, disabled)
    async with machine.memory.transaction():
        disabled.set_size(0x10)
    assert listener.heard == dma.heard == []


# ---- T11: live trees change in transactions only ---------------------------------------


@pytest.mark.parametrize(
    "mutate",
    [*MUTATORS.values(), *ATTACHMENTS.values()],
    ids=[*MUTATORS, *ATTACHMENTS],
)
async def test_a_live_tree_outside_a_transaction(
    machine: Machine, mutate: Callable[[Machine], None]
) -> None:
    """T11: raises, and nothing has changed."""
    before, views = snapshot(machine.regions), (machine.space.view, machine.dma.view)
    with pytest.raises(TransactionError, match=r"which is live: do it inside"):
        mutate(machine)
    assert snapshot(machine.regions) == before
    assert machine.space.view is views[0]
    # Nothing waits to be delivered by a later transaction either.
    listener = await machine.listen()
    async with machine.memory.transaction():
        pass
    assert listener.heard == []
    machine.check()


@each_mutator
async def test_the_same_in_a_transaction(
    machine: Machine, mutate: Callable[[Machine], None]
) -> None:
    """T11: each of them is allowed there, changes the view, and is told."""
    listener, old = await machine.listen(), machine.space.view
    async with machine.memory.transaction():
        mutate(machine)
    assert machine.space.view != old
    assert [listener.heard[0].hook, listener.heard[-1].hook] == ["begin", "commit"]
    machine.check()


@each_mutator
def test_a_tree_that_no_address_space_reaches(mutate: Callable[[Machine], None]) -> None:
    """T11: changes freely, outside of trio too."""
    machine = Machine()
    machine.memory.destroy_address_space(machine.space)
    machine.memory.destroy_address_space(machine.dma)
    before = snapshot(machine.regions)
    mutate(machine)
    assert snapshot(machine.regions) != before


async def test_live_through_an_alias_only(machine: Machine) -> None:
    """T11: what an alias shows is live, wherever it hangs; an alias of nobody's is not."""
    async with machine.memory.transaction():
        machine.root.del_subregion(machine.ram)
    with pytest.raises(TransactionError):
        machine.ram.set_readonly(True)
    async with machine.memory.transaction():
        machine.root.del_subregion(machine.window)
    machine.ram.set_readonly(True)
    machine.window.set_size(0x10)
    machine.check()


async def test_a_disabled_part_is_live_too(machine: Machine) -> None:
    """T11: it takes nothing but enabling to show it."""
    async with machine.memory.transaction():
        machine.window.set_enabled(False)
    with pytest.raises(TransactionError):
        machine.window.set_alias_offset(0x800)
    async with machine.memory.transaction():
        machine.window.set_alias_offset(0x800)
        machine.window.set_enabled(True)
    machine.check()


async def test_another_task_has_the_transaction(machine: Machine) -> None:
    """T11: only the task that opened it may change the tree, children included."""
    before = snapshot(machine.regions)
    raised: list[TransactionError] = []

    async def intrude() -> None:
        with pytest.raises(TransactionError, match="in the task that opened it") as info:
            machine.window.set_size(0x800)
        raised.append(info.value)

    async with machine.memory.transaction(), trio.open_nursery() as nursery:
        nursery.start_soon(intrude)
    assert len(raised) == 1
    assert snapshot(machine.regions) == before


async def test_another_thread_has_no_transaction(machine: Machine) -> None:
    """T11: nor may a thread that the task waits for."""
    before = snapshot(machine.regions)
    async with machine.memory.transaction():
        with pytest.raises(TransactionError, match="in the task that opened it"):
            await trio.to_thread.run_sync(machine.window.set_size, 0x800)
    assert snapshot(machine.regions) == before


def test_another_run_of_trio_has_no_transaction() -> None:
    """T11: a second trio, in a thread of its own, is another task as well."""
    machine = Machine()
    raised: list[bool] = []

    async def intrude() -> None:
        with pytest.raises(TransactionError):
            machine.window.set_size(0x800)
        raised.append(True)

    async def main() -> None:
        async with machine.memory.transaction():
            thread = threading.Thread(target=trio.run, args=(intrude,))
            thread.start()
            await trio.to_thread.run_sync(thread.join)

    trio.run(main)
    assert raised == [True]


async def test_taken_out_and_changed(machine: Machine) -> None:
    """T11, T13: what leaves the tree is still the transaction's, and is put back as it was."""
    inner = io("inner", 0x100)
    holder = MemoryRegion.container("holder", 0x1000)
    holder.add_subregion(0, inner)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x6000, holder)
    regions = [*machine.regions, holder, inner]
    before = snapshot(regions)

    def change(machine: Machine) -> None:
        machine.root.del_subregion(holder)
        inner.set_size(0x80)
        inner.set_enabled(False)
        holder.del_subregion(inner)
        inner.set_address(0x40)
        holder.set_size(0x2000)
        machine.root.del_subregion(machine.window)
        machine.window.set_alias_offset(0)
        machine.ram.set_readonly(True)

    await taken_back(machine, change)
    assert snapshot(regions) == before
    machine.check()


async def test_taken_out_and_committed(machine: Machine) -> None:
    """T11: from the end of the transaction on, what was taken out is free."""
    async with machine.memory.transaction():
        machine.root.del_subregion(machine.flash)
    machine.flash.set_size(0x10)
    other = MemoryRegion.container("other", 0x1000)
    other.add_subregion(0, machine.flash)
    assert machine.flash.container is other


async def test_a_region_of_two_memory_systems(machine: Machine) -> None:
    """T11: one transaction cannot be of two systems, so the change is refused."""
    second = MemorySystem()
    root = MemoryRegion.container("second root", 0x10000)
    second.create_address_space("second", root)
    async with second.transaction():
        root.add_subregion(0, MemoryRegion.alias("theirs", machine.ram, offset=0, size=0x1000))
    before = snapshot(machine.regions)
    async with machine.memory.transaction(), second.transaction():
        with pytest.raises(RegionError, match="two memory systems"):
            machine.ram.set_readonly(True)
    assert snapshot(machine.regions) == before


@pytest.mark.parametrize("what", ["the root", "below it", "beside it"])
def test_a_tree_of_two_memory_systems(machine: Machine, what: str) -> None:
    """T11: refused where it begins, naming both address spaces."""
    root = MemoryRegion.container("second root", 0x10000)
    if what == "the root":
        root = machine.root
    elif what == "below it":
        root.add_subregion(0, MemoryRegion.alias("theirs", machine.ram, offset=0, size=0x1000))
    else:
        root = machine.ram
    second = MemorySystem()
    with pytest.raises(RegionError, match=r"'second' of .*AddressSpace 'memory'"):
        second.create_address_space("second", root)
    assert second.address_spaces == ()


async def test_left_out_of_order(machine: Machine) -> None:
    """T1, T13: an outer transaction left before the inner one takes both back."""
    outer, inner = machine.memory.transaction(), machine.memory.transaction()
    await outer.__aenter__()
    await inner.__aenter__()
    before, view = snapshot(machine.regions), machine.space.view
    machine.device.set_enabled(False)
    with pytest.raises(TransactionError, match="while one within it was open"):
        await outer.__aexit__(None, None, None)
    assert snapshot(machine.regions) == before
    with pytest.raises(TransactionError, match="while one within it was open"):
        await inner.__aexit__(None, None, None)
    assert machine.space.view is view
    assert machine.memory.broken is None
    async with machine.memory.transaction():
        machine.device.set_enabled(False)
    machine.check()


async def test_an_inner_one_left_out_of_order(machine: Machine) -> None:
    """T1: the outermost goes on with what it changed before."""
    memory = machine.memory
    async with memory.transaction():
        machine.device.set_enabled(False)
        middle, inner = memory.transaction(), memory.transaction()
        await middle.__aenter__()
        await inner.__aenter__()
        machine.ram.set_enabled(False)
        with pytest.raises(TransactionError, match="while one within it was open"):
            await middle.__aexit__(None, None, None)
        error = ValueError("the body's own")
        await inner.__aexit__(ValueError, error, None)  # says no more, and lets it out
    assert (machine.device.enabled, machine.ram.enabled) == (False, True)
    machine.check()


# ---- T12: no transactions and no changes from hooks ------------------------------------


async def test_t12_a_child_task_of_a_hook(machine: Machine) -> None:
    """T12: a hook that waits for a task that waits for the hook: refused, not hung."""

    class Delegating(MemoryListener):
        async def commit(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.change)

        async def change(self) -> None:
            async with trio.open_nursery() as nursery:  # a grandchild does as well
                nursery.start_soon(self.really_change)

        async def really_change(self) -> None:
            with pytest.raises(TransactionError, match="a listener's hook started and waits for"):
                async with machine.memory.transaction():
                    pass

    with trio.fail_after(60):
        await machine.memory.register(Delegating(), machine.space)
        async with machine.memory.transaction():
            machine.window.set_enabled(False)
    machine.check()


async def test_t12_a_child_task_of_who_commits(machine: Machine) -> None:
    """T14: a task that the hook does not wait for waits its turn, whoever's child it is."""
    order: list[str] = []

    class Slow(MemoryListener):
        async def commit(self) -> None:
            await trio.testing.wait_all_tasks_blocked()
            order.append("commit")

    async def other(memory: MemorySystem) -> None:
        await delivering.wait()
        async with memory.transaction():
            order.append("other")

    class Waking(MemoryListener):
        def begin(self) -> None:
            delivering.set()

    delivering = trio.Event()
    await machine.memory.register(Slow(), machine.space)
    await machine.memory.register(Waking(), machine.space)
    delivering, order[:] = trio.Event(), []
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other, machine.memory)
            async with machine.memory.transaction():
                machine.window.set_enabled(False)
    assert order == ["commit", "other"]


class Meddling(MemoryListener):
    """Tries something in one hook and keeps what it raised."""

    def __init__(self, hook: str, attempt: Callable[[], Awaitable[None]], *, is_async: bool):
        self.raised: list[str] = []

        async def tries(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            with pytest.raises(TransactionError, match="inside a listener's hook") as info:
                await attempt()
            self.raised.append(str(info.value))

        def tries_plainly(*_: object) -> None:
            # Without trio: what has to raise does so before it waits for anything.
            coroutine = attempt()
            with pytest.raises(TransactionError, match="inside a listener's hook") as info:
                coroutine.send(None)  # type: ignore[attr-defined]
            self.raised.append(str(info.value))

        setattr(self, hook, tries if is_async else tries_plainly)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("hook", ["begin", "region_del", "region_add", "region_nop", "commit"])
@pytest.mark.parametrize("what", ["transaction", "mutator", "register", "unregister"])
async def test_no_meddling_in_hooks(machine: Machine, hook: str, what: str, is_async: bool) -> None:
    """T12: every hook, plain or async; the transaction itself goes on and is whole."""

    async def attempt() -> None:
        if what == "transaction":
            async with machine.memory.transaction():
                raise AssertionError("a transaction was opened in a hook")
        elif what == "mutator":
            machine.flash.set_size(0x800)
        elif what == "register":
            await machine.memory.register(RecordingListener(), machine.space)
        else:
            await machine.memory.unregister(meddling)

    meddling = Meddling(hook, attempt, is_async=is_async)
    await machine.memory.register(meddling, machine.space)
    meddling.raised.clear()
    flash = snapshot([machine.flash])
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
    assert meddling.raised
    assert snapshot([machine.flash]) == flash
    assert machine.space.listeners == (meddling,)
    machine.check()


async def test_meddling_that_is_not_caught(machine: Machine) -> None:
    """T12, T13: the hook's TransactionError fails the transaction like any other error."""
    before, old = snapshot(machine.regions), machine.space.view

    class Listener(MemoryListener):
        def region_del(self, section: MemoryRegionSection) -> None:
            machine.flash.set_size(0x800)

    await machine.memory.register(Listener(), machine.space)
    with pytest.raises(TransactionError, match="inside a listener's hook"):
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
    assert snapshot(machine.regions) == before
    assert machine.space.view == old


# ---- T13, the part without listeners: bodies that fail ---------------------------------


@pytest.mark.parametrize("error", [Unwanted, KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_a_body_that_raises(machine: Machine, error: type[BaseException]) -> None:
    """T13: the tree is as before, nobody is told, and the error is the body's own."""
    listener = await machine.listen()
    before, view = snapshot(machine.regions), machine.space.view
    await taken_back(machine, *MUTATORS.values(), error=error())
    assert snapshot(machine.regions) == before
    assert machine.space.view is view
    assert listener.heard == []
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
    machine.check()


async def test_an_inner_transaction_that_raises_and_is_caught(machine: Machine) -> None:
    """T13, T14: only its own part is taken back; the outer one goes on."""
    listener = await machine.listen()
    async with machine.memory.transaction():
        machine.window.set_address(0x9000)
        halfway = snapshot(machine.regions)
        await taken_back(
            machine,
            lambda m: m.root.del_subregion(m.window),
            lambda m: m.window.set_size(0x800),
            lambda m: m.flash.set_enabled(False),
        )
        assert snapshot(machine.regions) == halfway
        machine.window.set_alias_offset(0)
    assert listener.trace == [
        "begin",
        "region_del [0x8000, 0x9000) ram+0x1000",
        "region_add [0x9000, 0xa000) ram+0x0",
        "commit",
    ]
    machine.check()


async def test_an_inner_error_that_is_not_caught(machine: Machine) -> None:
    """T13: takes everything back, the outer one's part too."""
    before = snapshot(machine.regions)

    async def fail() -> None:
        async with machine.memory.transaction():
            machine.window.set_address(0x9000)
            async with machine.memory.transaction():
                machine.window.set_size(0x800)
                raise Unwanted

    with pytest.raises(Unwanted):
        await fail()
    assert snapshot(machine.regions) == before
    machine.check()


async def test_a_nursery_that_dies_inside(machine: Machine) -> None:
    """T13: the group of errors passes through, and the transaction is taken back."""
    before, listener = snapshot(machine.regions), await machine.listen()

    async def die() -> None:
        raise Unwanted

    with pytest.RaisesGroup(Unwanted):
        async with machine.memory.transaction(), trio.open_nursery() as nursery:
            machine.window.set_size(0x800)
            nursery.start_soon(die)
            await trio.sleep_forever()
    assert snapshot(machine.regions) == before
    assert listener.heard == []


async def test_a_nursery_that_dies_around(machine: Machine) -> None:
    """T14: a sibling's error cancels the body, which is taken back; the next one gets in."""
    before, inside = snapshot(machine.regions), trio.Event()

    async def change() -> None:
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
            inside.set()
            await trio.sleep_forever()

    async def die() -> None:
        await inside.wait()
        raise Unwanted

    with pytest.RaisesGroup(Unwanted):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            nursery.start_soon(die)
    assert snapshot(machine.regions) == before
    async with machine.memory.transaction():
        machine.window.set_size(0x400)
    machine.check()


async def test_a_tree_that_cannot_be_rendered(machine: Machine) -> None:
    """T13: an alias moved until it shows itself is refused at the end, and taken back."""
    mirror = MemoryRegion.alias("mirror", machine.root, offset=0, size=0x1000)
    async with machine.memory.transaction():
        machine.root.add_subregion(0xC000, mirror)
    listener, before = await machine.listen(), snapshot([*machine.regions, mirror])

    async def fail() -> None:
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
            mirror.set_alias_offset(0xC000)

    with pytest.raises(RegionError, match="shows itself"):
        await fail()
    assert snapshot([*machine.regions, mirror]) == before
    assert listener.heard == []
    machine.check()


# ---- T14: tasks, turns and cancellation ------------------------------------------------


async def test_entering_is_a_checkpoint(machine: Machine) -> None:
    """T14: the outermost one and a nested one."""
    outer, inner = machine.memory.transaction(), machine.memory.transaction()
    with trio.testing.assert_checkpoints():
        await outer.__aenter__()
    with trio.testing.assert_checkpoints():
        await inner.__aenter__()
    await inner.__aexit__(None, None, None)
    await outer.__aexit__(None, None, None)


async def test_cancelled_while_entering(machine: Machine) -> None:
    """T14: Cancelled comes out of entering, and the turn is not taken."""
    with trio.CancelScope() as scope:
        scope.cancel()
        async with machine.memory.transaction():
            raise AssertionError("a cancelled task got in")
    assert scope.cancelled_caught
    async with machine.memory.transaction():
        machine.window.set_size(0x800)
    machine.check()


async def test_tasks_take_turns_in_order_of_arrival(machine: Machine) -> None:
    """T14: first come, first served; one that comes again goes to the end."""
    log: list[str] = []

    async def change(name: str) -> None:
        async with machine.memory.transaction():
            log.append(f"{name} in")
            await trio.testing.wait_all_tasks_blocked()
            log.append(f"{name} out")

    async with trio.open_nursery() as nursery:
        async with machine.memory.transaction():
            for name in ("one", "two", "three"):
                nursery.start_soon(change, name)
                await trio.testing.wait_all_tasks_blocked()
            assert log == []
        await change("again")
    names = ("one", "two", "three", "again")
    assert log == [f"{name} {what}" for name in names for what in ("in", "out")]


async def test_giving_up_while_waiting_for_a_turn(machine: Machine) -> None:
    """T14: one that is cancelled in the queue leaves it, and the others move up."""
    log: list[str] = []

    async def change(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with machine.memory.transaction():
                log.append(name)

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery, machine.memory.transaction():
        for number, scope in enumerate(scopes):
            nursery.start_soon(change, str(number), scope)
            await trio.testing.wait_all_tasks_blocked()
        scopes[1].cancel()
    assert log == ["0", "2"]
    assert scopes[1].cancelled_caught


async def test_a_transaction_that_waits_for_its_own_nested_one(machine: Machine) -> None:
    """T14: the same task nests, even while others wait for their turn."""
    log: list[str] = []

    async def change() -> None:
        async with machine.memory.transaction():
            log.append("other")

    async with trio.open_nursery() as nursery, machine.memory.transaction():
        nursery.start_soon(change)
        await trio.testing.wait_all_tasks_blocked()
        async with machine.memory.transaction():
            log.append("nested")
        await trio.testing.wait_all_tasks_blocked()
        log.append("outer")
    assert log == ["nested", "outer", "other"]


async def test_a_cancelled_body_is_taken_back(machine: Machine) -> None:
    """T14: nothing is told, and the scope catches its own cancellation."""
    before, listener = snapshot(machine.regions), await machine.listen()
    with trio.CancelScope() as scope:
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert snapshot(machine.regions) == before
    assert listener.heard == []


@pytest.mark.parametrize("hook", ["begin", "region_del", "region_add", "commit"])
async def test_cancellation_waits_for_the_delivery(machine: Machine, hook: str) -> None:
    """T14: hooks may wait undisturbed, everything is delivered, and then comes Cancelled."""
    scope = trio.CancelScope()
    finished: list[str] = []

    async def slow(*_: object) -> None:
        scope.cancel()
        await trio.lowlevel.checkpoint()
        finished.append(hook)

    slow_listener = MemoryListener()
    setattr(slow_listener, hook, slow)
    await machine.memory.register(slow_listener, machine.space)
    listener, dma = await machine.listen(), await machine.listen(dma=True)
    scope, after = trio.CancelScope(), False
    finished.clear()
    with scope:
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
        await trio.lowlevel.checkpoint()
        after = True
    assert scope.cancelled_caught
    assert not after
    assert finished == [hook]
    for each in (listener, dma):
        assert [one.hook for one in each.heard] == ["begin", "region_del", "region_add", "commit"]
    assert machine.window.size == 0x800
    machine.check()


async def test_registering_is_not_torn_by_cancellation(machine: Machine) -> None:
    """T8, T14: a replay that has begun is finished."""
    with trio.CancelScope() as scope:

        class Cancelling(RecordingListener):
            async def begin(self) -> None:  # type: ignore[override]
                scope.cancel()
                await trio.lowlevel.checkpoint()

        listener = Cancelling()
        await machine.memory.register(listener, machine.space)
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert listener in machine.space.listeners
    assert len(listener.ranges) == len(machine.space.view)


async def test_a_timeout_in_the_body(machine: Machine, autojump_clock: object) -> None:
    """T14: a deadline that passes inside is a cancelled body like any other."""
    before = snapshot(machine.regions)
    with trio.move_on_after(1) as scope:
        async with machine.memory.transaction():
            machine.window.set_size(0x800)
            await trio.sleep(2)
    assert scope.cancelled_caught
    assert snapshot(machine.regions) == before


def interrupted(line: int) -> tuple[int, Machine, RecordingListener]:
    """A transaction with Ctrl-C at the given line of the library that it comes by."""
    package = os.path.dirname(memory_module.__file__)
    machine, listener = Machine(), RecordingListener()
    passed = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            passed += 1
            if passed == line + 1:
                signal.raise_signal(signal.SIGINT)
        return trace

    async def main() -> None:
        await machine.memory.register(listener, machine.space)
        sys.settrace(trace)
        try:
            async with machine.memory.transaction():
                machine.window.set_size(0x800)
                machine.window.set_address(0x9000)
                machine.root.del_subregion(machine.flash)
                machine.root.add_subregion_overlap(0x100, machine.flash, 1)
        finally:
            sys.settrace(None)
        await trio.lowlevel.checkpoint()

    with contextlib.suppress(KeyboardInterrupt):
        trio.run(main)
    return passed, machine, listener


def test_ctrl_c_anywhere() -> None:
    """T13, T14: the map is old or new, everybody believes in it, and the next one gets in."""
    lines, _, _ = interrupted(-1)
    assert lines > 30

    async def change(machine: Machine) -> None:
        async with machine.memory.transaction():
            machine.window.set_alias_offset(0)

    for line in range(lines):
        passed, machine, listener = interrupted(line)
        assert passed > line
        for _ in range(2):
            machine.check()
            assert sorted(listener.ranges.items()) == [
                (each.start, MemoryRegionSection.of(machine.space, each))
                for each in machine.space.view
            ]
            trio.run(change, machine)


# ---- T15: what is deleted lives until commit has returned ------------------------------


async def test_deleted_regions_live_until_commit_has_returned(machine: Machine) -> None:
    """T15: the region and its RAM, though nobody else holds them; afterwards they are gone."""
    refs: list[weakref.ref[object]] = []
    log: list[tuple[str, list[bool]]] = []

    class Watching(MemoryListener):
        def region_del(self, section: MemoryRegionSection) -> None:
            refs.extend([weakref.ref(section.region), weakref.ref(section.region.block)])

        async def commit(self) -> None:
            gc.collect()
            await trio.lowlevel.checkpoint()
            log.append(("commit", [each() is not None for each in refs]))

    await machine.memory.register(Watching(), machine.space)
    async with machine.memory.transaction():
        machine.root.add_subregion(0x6000, MemoryRegion.ram("doomed", 0x1000))
    log.clear()
    found = machine.space.view.lookup(0x6000)
    assert found is not None
    doomed = found.region
    del found
    async with machine.memory.transaction():
        machine.root.del_subregion(doomed)
        del doomed
    gc.collect()
    assert log == [("commit", [True, True])]
    assert [each() for each in refs] == [None, None]


async def test_deleted_by_one_space_and_used_by_the_next(machine: Machine) -> None:
    """T15: while the second space is told, the first one's regions are alive too."""
    alive: list[bool] = []
    ref: weakref.ref[MemoryRegion]

    class Last(MemoryListener):
        def commit(self) -> None:
            gc.collect()
            alive.append(ref() is not None)

    doomed = io("doomed")
    ref = weakref.ref(doomed)
    async with machine.memory.transaction():
        machine.root.add_subregion(0xE000, doomed)
    await machine.memory.register(Last(), machine.dma)
    alive.clear()
    async with machine.memory.transaction():
        machine.root.del_subregion(doomed)
        del doomed
    assert alive == [True]
    gc.collect()
    assert ref() is None
