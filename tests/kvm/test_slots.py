"""The planner alone: rules K2 to K4, checked on `MemslotTable`, which plays the kernel."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.errors import MemslotError
from memlistener.kvm.backend import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from memlistener.kvm.slots import (
    MAX_SLOT_BYTES,
    PAGE_SIZE,
    Mapping,
    Memslot,
    SlotOp,
    SlotTable,
    pieces,
    tears,
)
from memlistener.testing.fake_memslots import FakeMemslot, MemslotTable

LIMIT = 64
HOST = 0x7F0000000000


def page(number: int, pages: int = 1, *, host: int = 0, flags: int = 0, name: str = "") -> Mapping:
    """A mapping at a page number."""
    return Mapping(number * PAGE_SIZE, pages * PAGE_SIZE, HOST + host * PAGE_SIZE, flags, name)


class Kernel:
    """A table of slots and the kernel it describes, kept in step."""

    def __init__(self, *mappings: Mapping, limit: int = LIMIT, as_id: int = 0) -> None:
        self.table = SlotTable(limit, as_id)
        self.kernel = MemslotTable(
            limit=limit, address_spaces=as_id + 1, readonly_offered=True, physical_bits=52
        )
        self.carry_out(self.table.plan([], mappings))

    def carry_out(self, ops: Iterable[SlotOp]) -> None:
        """Make each op's ioctl; the kernel's errors come out of here."""
        for op in ops:
            self.kernel.update(FakeMemslot(*op.arguments()))
            self.table.apply(op)
            self.kernel.check()
            assert self.slots() == {each.slot: each.mapping for each in self.table.slots}

    def slots(self) -> dict[int, Mapping]:
        """What the kernel has, by slot number."""
        return {
            each.slot: Mapping(
                each.guest_phys_addr, each.memory_size, each.userspace_addr, each.flags
            )
            for each in self.kernel.slots()
        }

    def change(self, removed: Iterable[Mapping], added: Iterable[Mapping]) -> list[str]:
        """Plan and carry out; the kinds of the ops."""
        ops = self.table.plan(removed, added)
        self.carry_out(ops)
        return [op.kind for op in ops]


@st.composite
def layouts(draw: st.DrawFn, *, most: int = 6, shared: bool = True) -> tuple[Mapping, ...]:
    """Disjoint mappings, so alike that one can often be made of another.

    Shared: the same host memory may be mapped several times.
    """
    found = []
    hosts = draw(st.permutations(range(6)))
    at = draw(st.integers(0, 3))
    for number in range(draw(st.integers(0, most))):
        size = draw(st.integers(1, 2))
        host = HOST + 2 * PAGE_SIZE * (draw(st.integers(0, 1)) if shared else hosts[number])
        flags = draw(st.sampled_from((0, 0, 0, MEM_LOG_DIRTY_PAGES, MEM_READONLY)))
        found.append(Mapping(at * PAGE_SIZE, size * PAGE_SIZE, host, flags))
        at += size + draw(st.sampled_from((0, 0, 1, 2)))
    return tuple(found)


# ---- pieces ----------------------------------------------------------------------------------


@given(
    start=st.integers(0, 20 * PAGE_SIZE),
    size=st.integers(1, 20 * PAGE_SIZE),
    max_slot=st.integers(PAGE_SIZE, 8 * PAGE_SIZE),
)
def test_k2_whole_pages(start: int, size: int, max_slot: int) -> None:
    """K2, K3: pieces are the pages that lie wholly in the section, none longer than a slot."""
    inside = [
        number * PAGE_SIZE
        for number in range(41)
        if start <= number * PAGE_SIZE and (number + 1) * PAGE_SIZE <= start + size
    ]
    found = pieces(start, size, max_slot)
    covered = [at for low, length in found for at in range(low, low + length, PAGE_SIZE)]
    assert covered == inside
    assert all(0 < length <= max_slot for _, length in found)
    most = max_slot // PAGE_SIZE
    assert len(found) == -(-len(inside) // most)


@pytest.mark.parametrize(
    ("start", "size"), [(0x1800, 0x400), (0x1800, 0x1000), (0x1001, 0x1FFE), (0, 0xFFF)]
)
def test_k2_less_than_a_page(start: int, size: int) -> None:
    """K2: a section with no whole page has no slot."""
    assert pieces(start, size) == []


def test_k3_the_kernels_largest_slot() -> None:
    """K3: 2**31 - 1 pages are one slot; one page more are two; 2**56 bytes can be cut."""
    assert pieces(0, MAX_SLOT_BYTES) == [(0, MAX_SLOT_BYTES)]
    assert pieces(0, 1 << 43) == [(0, MAX_SLOT_BYTES), (MAX_SLOT_BYTES, PAGE_SIZE)]
    assert sum(size for _, size in pieces(0, 1 << 56)) == 1 << 56
    with pytest.raises(OSError, match="has more than"):
        Kernel(Mapping(0, MAX_SLOT_BYTES + PAGE_SIZE, 0))
    Kernel(Mapping(0, MAX_SLOT_BYTES, 0))


# ---- K3: numbers -----------------------------------------------------------------------------


def test_k3_slot_numbers_are_reused() -> None:
    """K3: the smallest free number is taken, so 1,000 changes stay within a few numbers."""
    kernel = Kernel(page(0), page(1, host=1), page(2, host=2))
    assert sorted(kernel.slots()) == [0, 1, 2]
    kernel.change([page(1, host=1)], [])
    assert sorted(kernel.slots()) == [0, 2]
    kernel.change([], [page(5, host=9)])
    assert kernel.slots()[1] == page(5, host=9)
    for number in range(1000):
        old = page(5, host=9 + number)
        kernel.change([old], [page(5, host=10 + number)])
    assert sorted(kernel.slots()) == [0, 1, 2]


@given(st.lists(layouts(most=4), max_size=8))
def test_k3_no_number_beyond_the_most_ever_needed(sequence: list[tuple[Mapping, ...]]) -> None:
    """K3: with a limit of exactly the slots needed, any sequence of changes fits."""
    limit = max((len(each) for each in sequence), default=1) or 1
    kernel = Kernel(limit=limit)
    now: tuple[Mapping, ...] = ()
    for wanted in sequence:
        kernel.change(now, wanted)  # the kernel refuses a number that is not below the limit
        now = wanted
        assert len(kernel.table) == len(now)


def test_k3_running_out() -> None:
    """K3: it is said before any ioctl how many slots are needed and how many there are."""
    kernel = Kernel(page(0), page(1, host=1), limit=3)
    before = kernel.slots()
    with pytest.raises(MemslotError) as caught:
        kernel.table.plan(
            [page(0)], [page(4, host=4), page(5, host=5), page(6, host=6, name="last straw")]
        )
    assert caught.value.errno == errno.ENOSPC
    assert "4 memslots are needed" in str(caught.value)
    assert "the kernel has 3" in str(caught.value)
    assert "'last straw'" in str(caught.value)
    assert kernel.slots() == before
    kernel.change([page(0)], [page(4, host=4), page(5, host=5)])  # just fits
    assert len(kernel.table) == 3


def test_k3_address_space_id() -> None:
    """A second KVM address space has its id in the upper half of each number."""
    kernel = Kernel(page(0), page(1, host=1), as_id=1)
    assert sorted(kernel.slots()) == [1 << 16, 1 << 16 | 1]
    kernel.change([page(0)], [page(7)])
    assert kernel.slots() == {1 << 16: page(7), 1 << 16 | 1: page(1, host=1)}


# ---- K4: plans -----------------------------------------------------------------------------


def test_k4_unchanged_costs_nothing() -> None:
    """K4: what is deleted and added back as it was needs no ioctl."""
    kernel = Kernel(page(0), page(1, host=1))
    assert kernel.change([page(0), page(1, host=1)], [page(1, host=1), page(0, name="b")]) == []


def test_k4_flags_only() -> None:
    """K4: switching the dirty log on or off is one ioctl."""
    kernel = Kernel(page(0))
    logged = page(0, flags=MEM_LOG_DIRTY_PAGES)
    assert kernel.change([page(0)], [logged]) == ["FLAGS_ONLY"]
    assert kernel.change([logged], [page(0)]) == ["FLAGS_ONLY"]


def test_k4_readonly_is_no_flag_to_change() -> None:
    """K4: the kernel does not change KVM_MEM_READONLY in place: a delete and a create."""
    kernel = Kernel(page(0))
    assert kernel.change([page(0)], [page(0, flags=MEM_READONLY)]) == ["DELETE", "CREATE"]


def test_k4_move() -> None:
    """K4: the same memory at another address is one ioctl, onto its own old place too."""
    kernel = Kernel(page(0, 2))
    assert kernel.change([page(0, 2)], [page(8, 2)]) == ["MOVE"]
    assert kernel.change([page(8, 2)], [page(9, 2)]) == ["MOVE"]


def test_k4_move_with_other_flags() -> None:
    """K4: another address and other flags are one ioctl too."""
    kernel = Kernel(page(0))
    assert kernel.change([page(0)], [page(8, flags=MEM_LOG_DIRTY_PAGES)]) == ["MOVE"]


def test_k4_resize() -> None:
    """K4: the kernel does not resize: a delete and a create."""
    kernel = Kernel(page(0, 2))
    assert kernel.change([page(0, 2)], [page(0, 1)]) == ["DELETE", "CREATE"]


def test_k4_deletes_before_adds() -> None:
    """K4: whatever goes is gone before anything comes, ascending."""
    kernel = Kernel(page(0, 4), page(8, 1, host=9))
    ops = kernel.table.plan(
        [page(8, host=9), page(0, 4)], [page(2, 2, host=2), page(0, 2), page(8, host=5)]
    )
    assert [op.kind for op in ops] == ["DELETE"] * 2 + ["CREATE"] * 3
    assert [op.arguments()[2] for op in ops] == [each * PAGE_SIZE for each in (0, 8, 0, 2, 8)]
    kernel.carry_out(ops)


def test_k4_chain_of_moves() -> None:
    """K4: moves that wait for each other's place are put into an order that works."""
    old = [page(number, host=number) for number in range(4)]
    new = [page(number + 1, host=number) for number in range(4)]
    for removed, added in ((old, new), (new, old)):
        for order in itertools.permutations(range(4)):
            kernel = Kernel(*removed)
            kinds = kernel.change([removed[n] for n in order], [added[n] for n in order])
            assert kinds == ["MOVE"] * 4


@pytest.mark.parametrize("count", [2, 3, 5])
def test_k4_circle_of_moves(count: int) -> None:
    """K4: moves in a circle cost one ioctl more: one slot is deleted and created."""
    old = [page(number, host=number) for number in range(count)]
    new = [page((number + 1) % count, host=number) for number in range(count)]
    kernel = Kernel(*old)
    kinds = kernel.change(old, new)
    assert kinds == ["DELETE", *["MOVE"] * (count - 1), "CREATE"]
    assert {each.mapping for each in kernel.table.slots} == set(new)


def test_k4_two_windows_onto_one_memory() -> None:
    """K4: windows onto the same memory that move by one page are two ioctls."""
    old, new = [page(0, 2), page(3, 2)], [page(1, 2), page(4, 2)]
    for removed, added in itertools.product(
        itertools.permutations(old), itertools.permutations(new)
    ):
        assert Kernel(*old).change(removed, added) == ["MOVE", "MOVE"]


def shortest(current: Sequence[Mapping], wanted: Sequence[Mapping]) -> int:
    """Fewest ioctls from one set to the other: breadth first, by the kernel's rules alone."""

    def fits(new: Mapping, others: Iterable[Mapping]) -> bool:
        return not any(
            new.guest_phys_addr < each.end and each.guest_phys_addr < new.end for each in others
        )

    def in_place(old: Mapping, new: Mapping) -> bool:
        return (
            old.memory_size == new.memory_size
            and old.userspace_addr == new.userspace_addr
            and old.flags & MEM_READONLY == new.flags & MEM_READONLY
        )

    goal = frozenset(wanted)
    frontier = {frozenset(current)}
    seen = set(frontier)
    for length in itertools.count():
        if goal in frontier:
            return length
        following = set()
        for state in frontier:
            for old in state:
                rest = state - {old}
                following.add(rest)
                following |= {rest | {n} for n in goal if in_place(old, n) and fits(n, rest)}
            following |= {state | {n} for n in goal if fits(n, state)}
        frontier = following - seen
        seen |= frontier
    raise AssertionError


@given(layouts(), layouts())
def test_k4_any_change(current: tuple[Mapping, ...], wanted: tuple[Mapping, ...]) -> None:
    """K4: from any set to any other without an error, in no more than the naive plan's ioctls."""
    kernel = Kernel(*current)
    ops = kernel.table.plan(current, wanted)
    kernel.carry_out(ops)
    assert set(kernel.slots().values()) == set(wanted)
    assert len(ops) <= len(set(current) ^ set(wanted))
    order = {"DELETE": 0, "FLAGS_ONLY": 1, "MOVE": 1, "CREATE": 2}
    ranks = [order[op.kind] for op in ops]
    assert ranks == sorted(ranks)


@given(layouts(most=4, shared=False), layouts(most=4, shared=False))
def test_k4_shortest(current: tuple[Mapping, ...], wanted: tuple[Mapping, ...]) -> None:
    """K4: no sequence of ioctls that the kernel takes is shorter than the plan."""
    plan = Kernel(*current).table.plan(current, wanted)
    assert len(plan) == shortest(current, wanted)


@given(layouts(), layouts())
def test_k4_any_part_of_the_sets(current: tuple[Mapping, ...], wanted: tuple[Mapping, ...]) -> None:
    """K4: naming only what differs gives as short a plan as naming everything."""
    whole = Kernel(*current).table.plan(current, wanted)
    gone = [each for each in current if each not in wanted]
    come = [each for each in wanted if each not in current]
    kernel = Kernel(*current)
    ops = kernel.table.plan(gone, come)
    kernel.carry_out(ops)
    assert len(ops) == len(whole)
    assert set(kernel.slots().values()) == set(wanted)


@given(layouts(), layouts(), st.data())
def test_inverse_restores(
    current: tuple[Mapping, ...], wanted: tuple[Mapping, ...], data: st.DataObject
) -> None:
    """Stopped after any op, the inverses in reverse order restore every slot and number."""
    kernel = Kernel(*current)
    before = kernel.slots()
    ops = kernel.table.plan(current, wanted)
    done = ops[: data.draw(st.integers(0, len(ops)))]
    kernel.carry_out(done)
    kernel.carry_out(op.inverse for op in reversed(done))
    assert kernel.slots() == before
    kernel.carry_out(kernel.table.plan(current, wanted))  # and the table is as good as new
    assert set(kernel.slots().values()) == set(wanted)


# ---- B16: what tears -----------------------------------------------------------------------


def pages_of(mappings: Iterable[Mapping]) -> set[int]:
    return {at for each in mappings for at in range(each.guest_phys_addr, each.end, PAGE_SIZE)}


@given(layouts(), layouts())
def test_b16_tears(current: tuple[Mapping, ...], wanted: tuple[Mapping, ...]) -> None:
    """B16: a plan tears exactly where a page goes away and comes back, or a log is touched."""
    ops = Kernel(*current).table.plan(current, wanted)
    there = {each.slot: each for each in Kernel(*current).table.slots}
    lost: set[int] = set()
    logging = False
    come: set[int] = set()
    for op in ops:
        if op.old is not None:
            logging |= bool(op.old.flags & MEM_LOG_DIRTY_PAGES)
            del there[op.slot]
            if op.kind != "FLAGS_ONLY":  # for the kernel a move is a delete and a create
                lost |= pages_of([op.old.mapping])
        if op.new is not None:
            there[op.slot] = op.new
            if op.kind != "FLAGS_ONLY":
                come |= pages_of([op.new.mapping])
    assert tears(ops) == (bool(lost & come) or logging)


def test_b16_nothing_tears() -> None:
    """B16: adding, removing, and moving elsewhere tear nothing."""
    kernel = Kernel(page(0), page(4, host=4))
    assert not tears([])
    assert not tears(kernel.table.plan([], [page(2, host=2)]))
    assert not tears(kernel.table.plan([page(0)], []))
    assert not tears(kernel.table.plan([page(0)], [page(8)]))
    assert tears(kernel.table.plan([page(4, host=4)], [page(4, host=5)]))


# ---- values ---------------------------------------------------------------------------------


def test_table_lookups() -> None:
    """Slots come by address; overlapping() finds those with a common address."""
    kernel = Kernel(page(4, 2, host=4), page(0, 2), page(8, host=8))
    assert [each.guest_phys_addr for each in kernel.table.slots] == [0, 0x4000, 0x8000]
    overlapping = kernel.table.overlapping
    assert [each.guest_phys_addr for each in overlapping(page(1, 4))] == [0, 0x4000]
    assert overlapping(page(2, 2)) == []
    assert overlapping(page(6, 2)) == []


def test_texts() -> None:
    """Texts have the kernel's word for the op, the slot, hex addresses, name and flags."""
    old = Memslot(3, page(1, 2, flags=MEM_READONLY | MEM_LOG_DIRTY_PAGES, name="bios"))
    new = Memslot(3, page(4, 2, name="bios"))
    assert str(old) == "slot 3 [0x1000, 0x3000) 'bios' readonly logged"
    assert str(SlotOp(None, old)) == f"CREATE {old}"
    assert str(SlotOp(old, None)) == f"DELETE {old}"
    assert str(SlotOp(old, new)) == f"MOVE {old} to [0x4000, 0x6000) 'bios'"
    assert SlotOp(old, new).inverse == SlotOp(new, old)
    assert SlotOp(old, None).arguments() == (3, 0, 0x1000, 0, HOST)
