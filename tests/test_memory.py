"""`MemorySystem` and `AddressSpace`: creating, destroying, reading, writing, mapping."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from memlistener import (
    FlatView,
    ListenerError,
    MemoryListener,
    MemoryRegion,
    MemorySystem,
    RegionTypeError,
    TransactionError,
)
from memlistener.testing import RecordingListener
from tests.small_machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ---- creating and destroying ----------------------------------------------------------


def test_create(machine: Machine) -> None:
    """A new address space shows its tree at once; F1: also where the root is in a container."""
    memory = machine.memory
    inner = memory.create_address_space("ram only", machine.ram)
    assert memory.address_spaces == (machine.space, inner)
    assert (inner.name, inner.root, inner.memory) == ("ram only", machine.ram, memory)
    assert inner.listeners == ()
    assert inner.unassigned_accesses == 0
    assert inner.view == FlatView.render(machine.ram)
    assert [(each.start, each.size, each.region) for each in inner.view] == [
        (0, 0x2000, machine.ram)
    ]
    assert repr(inner) == "<AddressSpace 'ram only' root 'ram'>"


async def test_two_spaces_with_one_root(machine: Machine) -> None:
    """T10: both see a change; F7: and share the view."""
    second = machine.memory.create_address_space("second", machine.root)
    assert second.view is machine.space.view
    async with machine.memory.transaction():
        machine.window.set_enabled(False)
    assert second.view is machine.space.view
    assert second.view == FlatView.render(machine.root)
    machine.memory.destroy_address_space(machine.space)
    async with machine.memory.transaction():
        machine.window.set_enabled(True)
    assert second.view == FlatView.render(machine.root)
    assert machine.space.view != second.view


async def test_two_spaces_with_one_root_that_becomes_empty(machine: Machine) -> None:
    """T10, F7: the second one's listeners hear of it too."""
    root = MemoryRegion.container("root", 0x1000)
    device = MemoryRegion.io("device", 0x100, None)
    root.add_subregion(0, device)
    spaces = [machine.memory.create_address_space(name, root) for name in ("one", "two")]
    listener = RecordingListener()
    await machine.memory.register(listener, spaces[1])
    listener.clear()
    async with machine.memory.transaction():
        root.del_subregion(device)
    assert [len(space.view) for space in spaces] == [0, 0]
    assert listener.trace == ["begin", "region_del [0x0, 0x100) device+0x0", "commit"]


async def test_create_inside_a_transaction(machine: Machine) -> None:
    """T1, T13: refused, since the tree is neither what it was nor final."""
    async with machine.memory.transaction():
        with pytest.raises(TransactionError, match="cannot be created inside a transaction"):
            machine.memory.create_address_space("new", machine.root)
    assert machine.memory.address_spaces == (machine.space,)


async def test_create_inside_a_hook(machine: Machine) -> None:
    """T8, T12: refused while a listener is being registered too."""
    outcome: list[str] = []

    class Creating(MemoryListener):
        def begin(self) -> None:
            with pytest.raises(TransactionError, match="cannot be created") as info:
                machine.memory.create_address_space("new", machine.root)
            outcome.append(str(info.value))

    await machine.memory.register(Creating(), machine.space)
    async with machine.memory.transaction():
        machine.window.set_enabled(False)
    assert len(outcome) == 2
    assert machine.memory.address_spaces == (machine.space,)


@pytest.mark.parametrize("root", [None, "root", 0])
def test_a_root_that_is_no_region(machine: Machine, root: Any) -> None:
    """A clear TypeError, here and in a render without an address space."""
    with pytest.raises(RegionTypeError, match="is a MemoryRegion, not"):
        machine.memory.create_address_space("new", root)
    with pytest.raises(RegionTypeError, match="is a MemoryRegion, not"):
        FlatView.render(root)


def test_a_name_that_is_none(machine: Machine) -> None:
    """It is for messages, which would read oddly."""
    name: Any = None
    with pytest.raises(RegionTypeError, match="name is a str"):
        machine.memory.create_address_space(name, machine.root)


def test_destroy(machine: Machine) -> None:
    """T11: the tree is free again; destroying twice is refused, and so is a stranger's."""
    with pytest.raises(TransactionError):
        machine.ram.set_size(0x1000)
    with pytest.raises(ListenerError, match="not an address space of this memory system"):
        MemorySystem().destroy_address_space(machine.space)
    machine.memory.destroy_address_space(machine.space)
    with pytest.raises(ListenerError, match="not an address space of this memory system"):
        machine.memory.destroy_address_space(machine.space)
    assert machine.memory.address_spaces == ()
    machine.ram.set_size(0x1000)
    again = machine.memory.create_address_space("again", machine.root)
    assert again.view == FlatView.render(machine.root)


async def test_destroy_with_listeners(machine: Machine) -> None:
    """T8: they have to be told first, so it is refused."""
    listener = RecordingListener()
    await machine.memory.register(listener, machine.space)
    with pytest.raises(ListenerError, match="still has listeners"):
        machine.memory.destroy_address_space(machine.space)
    await machine.memory.unregister(listener)
    machine.memory.destroy_address_space(machine.space)
    assert machine.memory.address_spaces == ()


async def test_destroy_inside_a_transaction(machine: Machine) -> None:
    """T1: refused, also from a task that does not have the transaction."""

    async def destroy() -> None:
        with pytest.raises(TransactionError, match="inside a transaction"):
            machine.memory.destroy_address_space(machine.space)

    async with machine.memory.transaction():
        await destroy()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(destroy)
    assert machine.memory.address_spaces == (machine.space,)


async def test_destroy_while_a_listener_registers(machine: Machine) -> None:
    """T8: no listener ends up with an address space that is gone."""
    outcome: list[object] = []

    class Slow(MemoryListener):
        async def begin(self) -> None:
            try:
                machine.memory.destroy_address_space(machine.space)
            except (ListenerError, TransactionError) as error:
                outcome.append(type(error))

    await machine.memory.register(Slow(), machine.space)
    assert len(outcome) == 1
    assert machine.memory.address_spaces == (machine.space,)


async def test_destroy_before_a_waiting_listener_gets_its_turn(machine: Machine) -> None:
    """T8: registering then finds that the address space is gone."""
    waiting = RecordingListener()

    async def register() -> None:
        with pytest.raises(ListenerError, match="not an address space"):
            await machine.memory.register(waiting, machine.space)

    async with trio.open_nursery() as nursery:
        async with machine.memory.transaction():
            nursery.start_soon(register)
            await trio.testing.wait_all_tasks_blocked()
        machine.memory.destroy_address_space(machine.space)
    assert waiting.heard == []
    assert machine.space.listeners == ()


async def test_spaces_that_reduce_to_another_root_unseen(machine: Machine) -> None:
    """F7: a child that shows nothing may decide what a root comes down to."""
    outer = MemoryRegion.container("outer", 0x2000)
    unseen = MemoryRegion.io("unseen", 1, None)
    outer.add_subregion(0, MemoryRegion.alias("all", machine.ram, offset=0, size=0x2000))
    outer.add_subregion(0x5000, unseen)
    one = machine.memory.create_address_space("one", outer)
    two = machine.memory.create_address_space("two", machine.ram)
    assert one.view is not two.view
    listener = RecordingListener()
    await machine.memory.register(listener, one)
    listener.clear()
    async with machine.memory.transaction():
        unseen.set_enabled(False)
    assert one.view is two.view
    assert listener.trace == []
    async with machine.memory.transaction():
        machine.ram.set_enabled(False)
        unseen.set_enabled(True)
    assert (len(one.view), len(two.view)) == (0, 0)
    async with machine.memory.transaction():
        machine.ram.set_enabled(True)
    assert one.view == two.view == FlatView.render(machine.ram)
    assert one.view is not two.view


async def test_before_a_transaction(machine: Machine) -> None:
    """K6: before each outermost one has its turn, and may itself run one; then no more."""
    calls: list[str] = []

    async def callback() -> None:
        if calls.count("called") == len(calls):  # not in its own
            calls.append("called")
            calls.append("inner")
            async with machine.memory.transaction():
                calls.append("body")

    forget = machine.memory.before_transaction(callback)
    async with machine.memory.transaction():
        assert calls == ["called", "inner", "body"]
        async with machine.memory.transaction():
            pass
        assert len(calls) == 3
    forget()
    calls.clear()
    async with machine.memory.transaction():
        assert calls == []


async def test_what_fails_before_a_transaction(machine: Machine) -> None:
    """K6: nothing has begun, and the next one can."""

    async def fail() -> None:
        raise ZeroDivisionError

    forget = machine.memory.before_transaction(fail)
    transaction = machine.memory.transaction()
    with pytest.raises(ZeroDivisionError):
        await transaction.__aenter__()
    with pytest.raises(ZeroDivisionError):
        await machine.memory.register(RecordingListener(), machine.space)
    forget()
    async with machine.memory.transaction():
        pass
    assert machine.space.listeners == ()


async def test_a_hook_is_not_what_comes_before(machine: Machine) -> None:
    """K6, T12: the refusal of a transaction in a hook comes first, and calls nothing."""
    calls: list[str] = []

    class Nesting(MemoryListener):
        async def begin(self) -> None:
            calls.clear()
            async with machine.memory.transaction():
                pass

    async def callback() -> None:
        calls.append("called")

    machine.memory.before_transaction(callback)
    with pytest.raises(TransactionError):
        await machine.memory.register(Nesting(), machine.space)
    assert calls == []
