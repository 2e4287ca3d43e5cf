"""What an open transaction gathers, and what it comes to."""

from __future__ import annotations

import functools

from memlistener import AddressSpace, FlatView, MemoryRegion, MemorySystem
from memlistener.core.ioeventfd import NOTHING, Attached, IoEventFd
from memlistener.pending import Pending


def machine() -> tuple[MemorySystem, MemoryRegion, MemoryRegion, AddressSpace]:
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x10000)
    device = MemoryRegion.io("device", 0x1000, None)
    root.add_subregion(0, device)
    return memory, root, device, memory.create_address_space("space", root)


def test_nothing_is_pending() -> None:
    """T10: nothing was damaged, so nothing differs."""
    memory, _, _, _ = machine()
    pending = Pending(memory)
    assert not pending.damaged
    assert pending.changes(0) == []


def test_damage_that_shows_nothing_new() -> None:
    """T10: rendered again, found equal, and nothing is said; the view stays."""
    memory, _, _, space = machine()
    pending = Pending(memory)
    pending.damage(space, 0, 0x10000)
    pending.damage(space, 0x800, 0x900)
    assert pending.damaged
    assert pending.changes(0) == []
    pending.forget()
    assert not pending.damaged


def test_the_first_before_counts() -> None:
    """T9: of several changes in one transaction, what was there before the first."""
    memory, _, device, space = machine()
    device_fd = IoEventFd(0x10, 4, None, 7)
    pending = Pending(memory)
    pending.reattached(space, device, NOTHING, 0, 0x1000)
    pending.reattached(space, device, Attached((device_fd,)), 0, 0x1000)
    assert pending.damaged
    assert pending.changes(0) == []
    pending.forget()
    pending.reattached(space, device, Attached((device_fd,)), 0, 0x1000)
    (change,) = pending.changes(0)
    assert [each.hook for each in change.eventfds] == ["eventfd_del"]
    assert change.events == []
    assert change.new is change.old
    assert change.quiet


def test_reattached_where_it_does_not_show() -> None:
    """T9: nobody hears of it, but it is remembered for where it did show."""
    memory, _, device, space = machine()
    pending = Pending(memory)
    fd = IoEventFd(0x10, 4, None, 7)
    pending.reattached(space, device, Attached((fd,)), 0, 0)
    assert not pending.damaged
    pending.damage(space, 0, 0x1000)
    (change,) = pending.changes(0)
    assert [each.hook for each in change.eventfds] == ["eventfd_del"]


def test_rollback_to_a_mark() -> None:
    """T1, T13: an inner transaction takes back its own changes only, last first."""
    memory, _, _, _ = machine()
    pending = Pending(memory)
    undone: list[int] = []
    for number in range(4):
        pending.journal.append(functools.partial(undone.append, number))
    pending.rollback(2)
    assert undone == [3, 2]
    pending.rollback()
    assert undone == [3, 2, 1, 0]
    assert pending.journal == []


async def test_limbo_ends_with_the_transaction() -> None:
    """T11, T13: what left the tree is followed until then, and free afterwards."""
    memory, root, device, _ = machine()
    async with memory.transaction():
        root.del_subregion(device)
        owners = len(device._owners)
        device.add_eventfd(0, 4, 7)
    assert (owners, len(device._owners)) == (1, 0)
    device.set_size(0x800)
    assert device.size == 0x800


def test_views_are_rendered_once_for_all_that_share() -> None:
    """F7, T1: two address spaces of one root: one new view, and the same events."""
    memory, root, device, space = machine()
    again = memory.create_address_space("again", root)
    assert again.view is space.view
    device._addr = 0x2000  # behind the system's back
    pending = Pending(memory)
    for each in (space, again):
        pending.damage(each, 0, 0x10000)
    one, two = pending.changes(0)
    assert one.new is two.new
    assert one.events is two.events
    assert one.new == FlatView.render(root)


def test_a_space_that_joins_one_that_stays() -> None:
    """F7: takes over its view, and no events where the two are equal."""
    memory, root, _, space = machine()
    window = MemoryRegion.alias("window", root, offset=0, size=0x10000)
    window._alias_offset = 0x800
    joining = memory.create_address_space("joining", window)
    assert joining.view is not space.view
    window._alias_offset = 0
    pending = Pending(memory)
    pending.damage(joining, 0, 0x10000)
    (change,) = pending.changes(0)
    assert change.new is space.view
    assert [each.hook for each in change.events] == ["region_del", "region_add"]
    assert change.root is space._view_root
    assert change.old_root is window
