"""What hangs on a region, and what of it shows in a range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatRange, FlatView, MemoryRegion, RegionError, RegionTypeError
from memlistener.core.diff import diff, replay, replay_reversed
from memlistener.core.events import (
    CoalescedAdd,
    CoalescedDel,
    Event,
    EventfdAdd,
    EventfdDel,
    RegionAdd,
    RegionDel,
)
from memlistener.core.ioeventfd import (
    NOTHING,
    Attached,
    AttachedDiff,
    IoEventFd,
    coalesced_of,
    eventfds_of,
)
from memlistener.core.kinds import ROMD_MODE
from tests.trees import examples

DEVICE = MemoryRegion.io("device", 0x1000, None)


def showing(start: int, size: int, offset: int, region: MemoryRegion = DEVICE) -> FlatRange:
    return FlatRange(start, size, region, offset, ROMD_MODE)


def spans(events: list[Event]) -> list[tuple[str, int, int]]:
    return [
        (each.hook, each.addr, each.size)
        if isinstance(each, CoalescedAdd | CoalescedDel)
        else (each.hook, each.range.start, each.range.size)
        for each in events
    ]


def test_order() -> None:
    """T9: by address, then size, then whether data is matched, then data."""
    ordered = [
        IoEventFd(0, 4, None, "fd"),
        IoEventFd(0, 4, 0, "fd"),
        IoEventFd(0, 4, 1, "fd"),
        IoEventFd(0, 8, None, "fd"),
        IoEventFd(1, 0, 5, "fd"),
    ]
    assert sorted(reversed(ordered), key=IoEventFd.order) == ordered
    assert [each.match_data for each in ordered] == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("start", "size", "offset", "shows"),
    [
        (0x8000, 0x1000, 0, 0x8100),
        (0x8000, 0x10, 0x100, 0x8000),
        (0x8000, 0x10, 0x103, 0x7FFD),  # its last byte
        (0x8000, 0x1, 0x100, 0x8000),  # its first
        (0x8000, 0x10, 0x104, None),
        (0x8000, 0x100, 0, None),
    ],
)
def test_eventfds_that_show(start: int, size: int, offset: int, shows: int | None) -> None:
    """T9: where any byte of the write shows, at an absolute address."""
    attached = Attached(eventfds=(IoEventFd(0x100, 4, None, "fd"),))
    found = [fd.addr for fd in eventfds_of(showing(start, size, offset), attached)]
    assert found == ([] if shows is None else [shows])


def test_an_eventfd_for_any_width() -> None:
    """T9: of size 0 it shows where its first byte does."""
    attached = Attached(eventfds=(IoEventFd(0x10, 0, None, "fd"),))
    assert list(eventfds_of(showing(0, 0x10, 0), attached)) == []
    assert list(eventfds_of(showing(0, 0x11, 0), attached)) == list(attached.eventfds)
    assert list(eventfds_of(showing(0, 0x10, 0x11), attached)) == []


@pytest.mark.parametrize(
    ("start", "size", "offset", "expected"),
    [
        (0x8000, 0x1000, 0, [(0x8100, 0x10)]),
        (0x8000, 0x108, 0, [(0x8100, 8)]),
        (0x8000, 0x1000, 0x108, [(0x8000, 8)]),
        (0x8000, 4, 0x108, [(0x8000, 4)]),
        (0x8000, 0x100, 0, []),
        (0x8000, 0x100, 0x110, []),
    ],
)
def test_coalesced_ranges_that_show(
    start: int, size: int, offset: int, expected: list[tuple[int, int]]
) -> None:
    """T6: clipped to what shows."""
    attached = Attached(coalesced=((0x100, 0x10),))
    assert list(coalesced_of(showing(start, size, offset), attached)) == expected


def machine() -> tuple[MemoryRegion, MemoryRegion]:
    root = MemoryRegion.container("root", 0x10000)
    device = MemoryRegion.io("device", 0x1000, None)
    root.add_subregion(0, device)
    return root, device


def test_one_that_straddles_two_ranges() -> None:
    """T9: is one eventfd: added once, and there until the last range that shows it goes."""
    root, device = machine()
    device.add_eventfd(0x7FE, 4, 7)
    hole = MemoryRegion.io("hole", 1, None)
    root.add_subregion_overlap(0x7FF, hole, 1)
    view = FlatView.render(root)
    assert len(view) == 3
    assert [each.hook for each in replay(view)] == ["region_add"] * 3 + ["eventfd_add"]
    assert [each.hook for each in replay_reversed(view)] == ["region_del"] * 3 + ["eventfd_del"]
    hole.set_size(0x801)
    half = FlatView.render(root)
    assert AttachedDiff({}).eventfds(view, half, diff(view, half), []) == []
    assert AttachedDiff({}).eventfds(half, view, diff(half, view), []) == []
    hole.set_address(0)
    hole.set_size(0x1000)
    gone = FlatView.render(root)
    last = half.lookup(0)
    assert last is not None
    fd = IoEventFd(0x7FE, 4, None, 7)
    events = diff(half, gone)
    assert AttachedDiff({}).eventfds(half, gone, events, []) == [EventfdDel(last, fd)]


def test_the_symmetric_difference_is_sorted() -> None:
    """T9: deletes and adds in one order, by address; what is in both is left out."""
    _, device = machine()
    before = Attached(eventfds=(IoEventFd(0x20, 4, 1, 3), IoEventFd(0x10, 4, None, 4)))
    for offset, data, eventfd in ((0x18, None, 5), (0x10, None, 4), (0x20, 0, 3)):
        device.add_eventfd(offset, 4, eventfd, data=data)
    each = showing(0x4000, 0x1000, 0, device)
    view = FlatView([each])
    assert AttachedDiff({device: before}).eventfds(view, view, [], [each]) == [
        EventfdAdd(each, IoEventFd(0x4018, 4, None, 5)),
        EventfdAdd(each, IoEventFd(0x4020, 4, 0, 3)),
        EventfdDel(each, IoEventFd(0x4020, 4, 1, 3)),
    ]


def test_another_eventfd_at_the_same_place() -> None:
    """T9: the old one goes before the new one comes."""
    _, device = machine()
    before = Attached(eventfds=(IoEventFd(0, 4, None, "old"),))
    device.add_eventfd(0, 4, 8)
    each = showing(0, 0x1000, 0, device)
    view = FlatView([each])
    events = AttachedDiff({device: before}).eventfds(view, view, [], [each])
    assert [type(event) for event in events] == [EventfdDel, EventfdAdd]


def test_coalesced_beside_their_ranges() -> None:
    """T6: coalesced_io_del before region_del, coalesced_io_add after region_add."""
    _, device = machine()
    device.add_coalescing(0, 8)
    device.add_coalescing(0x100, 8)
    one, two = showing(0, 0x1000, 0, device), showing(0x4000, 0x1000, 0, device)
    assert spans(AttachedDiff({}).coalesced([RegionDel(one), RegionAdd(two)], [])) == [
        ("coalesced_io_del", 0, 8),
        ("coalesced_io_del", 0x100, 8),
        ("region_del", 0, 0x1000),
        ("region_add", 0x4000, 0x1000),
        ("coalesced_io_add", 0x4000, 8),
        ("coalesced_io_add", 0x4100, 8),
    ]


def test_a_range_that_stays_hears_the_difference() -> None:
    """T6, T10: what was coalesced and is, is not told again, nor what does not show."""
    _, device = machine()
    before = Attached(coalesced=((0, 8), (0x10, 8)))
    device.add_coalescing(0x10, 8)
    device.add_coalescing(0x20, 8)
    device.add_coalescing(0x800, 8)
    each = showing(0x4000, 0x100, 0, device)
    assert spans(AttachedDiff({device: before}).coalesced([], [each])) == [
        ("coalesced_io_del", 0x4000, 8),
        ("coalesced_io_add", 0x4020, 8),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.add_eventfd(0, 3, 1), "bytes wide"),
        (lambda r: r.add_eventfd(0xFFD, 4, 1), "not inside"),
        (lambda r: r.add_eventfd(-1, 4, 1), "not inside"),
        (lambda r: r.add_eventfd(0, 1, 1, data=0x100), "not a value"),
        (lambda r: r.add_eventfd(0, 1, 1, data=-1), "not a value"),
        (lambda r: r.add_eventfd(4, 4, 1), "already"),
        (lambda r: r.del_eventfd(4, 4, 1, data=1), "has no"),
        (lambda r: r.del_eventfd(4, 4, 2), "has no"),
        (lambda r: r.add_coalescing(0, 0), "not inside"),
        (lambda r: r.add_coalescing(0x800, 0x801), "not inside"),
    ],
)
def test_what_cannot_hang_there(call: Callable[[MemoryRegion], None], message: str) -> None:
    """T9: refused, and nothing has changed."""
    _, device = machine()
    device.add_eventfd(4, 4, 1)
    before = device.eventfds, device.coalesced
    with pytest.raises(RegionError, match=message):
        call(device)
    assert (device.eventfds, device.coalesced) == before


class File:
    """Has a descriptor, as files have."""

    def fileno(self) -> int:
        return 7


@pytest.mark.parametrize(
    "arguments",
    [
        (None, 4, 3),
        (0.0, 4, 3),
        (True, 4, 3),
        (0, None, 3),
        (0, "4", 3),
        (0, True, 3),
        (0, 4, None),
        (0, 4, "fd"),
        (0, 4, -1),
        (0, 4, True),
        (0, 4, object()),
        (0, 4, 3, "x"),
        (0, 4, 3, True),
        (0, 4, 3, 1.5),
    ],
)
def test_arguments_of_an_eventfd(arguments: tuple[Any, ...]) -> None:
    """Ints that are no bools, and something with a file descriptor."""
    _, device = machine()
    offset, size, eventfd, data = (*arguments, None)[:4]
    with pytest.raises(RegionError):
        device.add_eventfd(offset, size, eventfd, data=data)
    assert device.eventfds == ()


def test_what_an_eventfd_hangs_on() -> None:
    """T9: on what answers accesses; on containers and aliases nobody would ever hear of it."""
    root, device = machine()
    alias = MemoryRegion.alias("alias", device, offset=0, size=0x1000)
    for region in (root, alias):
        with pytest.raises(RegionError, match="answers no accesses"):
            region.add_eventfd(0, 4, 7)
    file = File()
    device.add_eventfd(0, 4, file)
    assert device.eventfds == (IoEventFd(0, 4, None, file),)


def test_one_write_signals_one_eventfd() -> None:
    """T9: the kernel refuses a second one, so it is refused where it is made."""
    _, device = machine()
    device.add_eventfd(0, 4, 7, data=1)
    with pytest.raises(RegionError, match=r"has <IoEventFd \[0x0, 0x4\) data 0x1 -> 7> already"):
        device.add_eventfd(0, 4, 8, data=1)
    device.add_eventfd(0, 4, 8, data=2)
    device.add_eventfd(0, 4, 8)


@pytest.mark.parametrize("span", [(None, 4), (0, None), (0.5, 1), (0, True), ("0", 1)])
def test_arguments_of_coalescing(span: tuple[Any, Any]) -> None:
    """Ints that are no bools."""
    _, device = machine()
    with pytest.raises(RegionTypeError, match=r"of a coalesced range of .* is an int, not"):
        device.add_coalescing(*span)
    assert device.coalesced == ()


def test_reprs() -> None:
    """In hex, half-open."""
    each = showing(0x1000, 0x1000, 0, MemoryRegion.io("device", 0x1000, None))
    assert repr(IoEventFd(0x10, 4, None, 7)) == "<IoEventFd [0x10, 0x14) -> 7>"
    for event in (CoalescedAdd, CoalescedDel):
        assert repr(event(each, 0x1010, 8)) == (
            f"<{event.__name__} [0x1010, 0x1018) of <FlatRange [0x1000, 0x2000) i/o 'device' +0x0>>"
        )


def test_only_io_is_coalesced() -> None:
    """T6: memory has no writes that could be late."""
    with pytest.raises(RegionError, match="not an I/O region"):
        MemoryRegion.ram("ram", 0x1000).add_coalescing(0, 8)


def test_taken_away_again() -> None:
    """T9: del_eventfd takes one of several, clear_coalescing all."""
    _, device = machine()
    assert device._attached is NOTHING
    device.add_eventfd(4, 4, 1)
    device.add_eventfd(4, 4, 1, data=0)
    device.add_coalescing(0, 8)
    device.add_coalescing(8, 8)
    device.del_eventfd(4, 4, 1)
    device.clear_coalescing()
    assert device.eventfds == (IoEventFd(4, 4, 0, 1),)
    assert device.coalesced == ()


fds = st.builds(
    IoEventFd,
    addr=st.sampled_from((0, 0xFF, 0x100, 0x7FE, 0x800)),
    size=st.sampled_from((0, 1, 4, 8)),
    data=st.sampled_from((None, 0, 1)),
    eventfd=st.integers(0, 1),
)
sets = st.lists(fds, unique_by=IoEventFd.order, max_size=5).map(tuple)
windows = st.lists(st.sampled_from((0, 0x100, 0x101, 0x800)), unique=True, max_size=3)


def cut(region: MemoryRegion, at: list[int], shift: int) -> FlatView:
    """The region with a byte of something else at each of these offsets."""
    root = MemoryRegion.container("root", 0x10000)
    window = MemoryRegion.alias("window", region, offset=0, size=0x1000)
    root.add_subregion_overlap(shift, window, 0)
    for offset in at:
        root.add_subregion_overlap(offset + shift, MemoryRegion.io("byte", 1, None), 1)
    return FlatView.render(root)


@examples(dev=100, ci=300)
@given(sets, sets, windows, windows, st.sampled_from((0, 0x100)))
def test_any_two_states(
    before: tuple[IoEventFd, ...],
    after: tuple[IoEventFd, ...],
    old_cuts: list[int],
    new_cuts: list[int],
    shift: int,
) -> None:
    """T9: the events turn what the old view shows into what the new one shows, in order."""
    region = MemoryRegion.io("region", 0x1000, None)
    for fd in after:
        region.add_eventfd(fd.addr, fd.size, fd.eventfd, data=fd.data)
    old, new = cut(region, old_cuts, 0), cut(region, new_cuts, shift)
    events = diff(old, new)
    added = {each.range for each in events if isinstance(each, RegionAdd)}
    stayed = [each for each in new if each not in added and each.region is region]
    attached = Attached(eventfds=before)
    believed = {fd for each in old if each.region is region for fd in eventfds_of(each, attached)}
    told = AttachedDiff({region: attached}).eventfds(old, new, events, stayed)
    keys = []
    for event in told:
        assert isinstance(event, EventfdAdd | EventfdDel)
        keys.append(event.fd.order())
        if isinstance(event, EventfdAdd):
            assert event.fd not in believed
            believed.add(event.fd)
        else:
            believed.remove(event.fd)
    assert keys == sorted(keys)
    assert believed == {fd for each in new for fd in eventfds_of(each, each.region._attached)}
