"""Planning memslots: what is mapped, what should be, and the ioctls in between.

Pure: no ioctl is made here. A `Mapping` is what the kernel has to be told of a
stretch of memory, a `Memslot` is a mapping under a slot's number, and a `Plan`
is a sequence of `SlotOp`, each of them one KVM_SET_USER_MEMORY_REGION.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import attrs

from memlistener.errors import MemslotError
from memlistener.kvm.backend import MEM_LOG_DIRTY_PAGES, MEM_READONLY

PAGE_SIZE = 4096
# KVM counts the pages of a slot in 31 bits (KVM_MEM_MAX_NR_PAGES).
MAX_SLOT_BYTES = ((1 << 31) - 1) * PAGE_SIZE


@attrs.frozen
class Mapping:
    """A stretch of guest memory and the host memory behind it.

    Attributes:
        guest_phys_addr: First guest address; a multiple of the page size.
        memory_size: Bytes; a multiple of the page size.
        userspace_addr: Host address of the first byte.
        flags: ``KVM_MEM_*``.
        name: The region's, for people; does not count in comparisons.
    """

    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    flags: int = 0
    name: str = attrs.field(default="", eq=False)

    @property
    def end(self) -> int:
        """One past the last guest address."""
        return self.guest_phys_addr + self.memory_size

    def overlaps(self, other: Mapping) -> bool:
        """Whether the two have a guest address in common."""
        return self.guest_phys_addr < other.end and other.guest_phys_addr < self.end

    def __str__(self) -> str:
        flags = (" readonly" if self.flags & MEM_READONLY else "") + (
            " logged" if self.flags & MEM_LOG_DIRTY_PAGES else ""
        )
        return f"[{self.guest_phys_addr:#x}, {self.end:#x}) {self.name!r}{flags}"


@attrs.frozen
class Memslot:
    """A mapping under its slot's number, as the kernel has it."""

    slot: int
    mapping: Mapping

    @property
    def guest_phys_addr(self) -> int:
        """First guest address."""
        return self.mapping.guest_phys_addr

    @property
    def memory_size(self) -> int:
        """Bytes."""
        return self.mapping.memory_size

    @property
    def userspace_addr(self) -> int:
        """Host address of the first byte."""
        return self.mapping.userspace_addr

    @property
    def flags(self) -> int:
        """``KVM_MEM_*``."""
        return self.mapping.flags

    def __str__(self) -> str:
        return f"slot {self.slot} {self.mapping}"


@attrs.frozen
class SlotOp:
    """One KVM_SET_USER_MEMORY_REGION: from ``old`` to ``new``, None for no slot.

    Both: the slot moves, or its flags change. `inverse` takes it back.
    """

    old: Memslot | None
    new: Memslot | None

    @property
    def slot(self) -> int:
        """The slot's number."""
        either = self.new or self.old
        assert either is not None
        return either.slot

    @property
    def kind(self) -> str:
        """The kernel's word: CREATE, DELETE, MOVE or FLAGS_ONLY."""
        if self.old is None:
            return "CREATE"
        if self.new is None:
            return "DELETE"
        if self.old.mapping.guest_phys_addr != self.new.mapping.guest_phys_addr:
            return "MOVE"
        return "FLAGS_ONLY"

    @property
    def inverse(self) -> SlotOp:
        """The op that takes this one back."""
        return SlotOp(self.new, self.old)

    def arguments(self) -> tuple[int, int, int, int, int]:
        """``slot, flags, guest_phys_addr, memory_size, userspace_addr``."""
        if self.new is not None:
            mapping = self.new.mapping
            return (
                self.new.slot,
                mapping.flags,
                mapping.guest_phys_addr,
                mapping.memory_size,
                mapping.userspace_addr,
            )
        assert self.old is not None
        mapping = self.old.mapping
        return self.old.slot, 0, mapping.guest_phys_addr, 0, mapping.userspace_addr

    def __str__(self) -> str:
        if self.kind == "MOVE":
            assert self.old is not None
            return f"MOVE {self.old} to {self.new and self.new.mapping}"
        return f"{self.kind} {self.new or self.old}"


def pieces(start: int, size: int, max_slot: int = MAX_SLOT_BYTES) -> list[tuple[int, int]]:
    """The whole pages of a section, in pieces that fit a slot (rules K2, K3).

    Args:
        start: First guest address of the section.
        size: Its bytes.
        max_slot: Most bytes that one slot may have.

    Returns:
        (guest address, bytes) each, ascending; none for less than a page.
    """
    low = -(-start // PAGE_SIZE) * PAGE_SIZE
    high = (start + size) // PAGE_SIZE * PAGE_SIZE
    step = max_slot // PAGE_SIZE * PAGE_SIZE
    return [(at, min(step, high - at)) for at in range(low, high, step)]


class SlotTable:
    """The slots of one VM: which number is which mapping.

    Args:
        limit: How many slots the kernel has (KVM_CAP_NR_MEMSLOTS).
        as_id: The KVM address space, in the upper half of every slot's number.
    """

    def __init__(self, limit: int, as_id: int = 0) -> None:
        self.limit = limit
        self._base = as_id << 16
        self._slots: dict[int, Memslot] = {}
        self._by_address: dict[int, Memslot] = {}
        self._free: list[int] = []  # numbers given back, smallest first (K3)
        self._unused = 0  # the smallest number never given

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """All slots by guest address."""
        return tuple(sorted(self._slots.values(), key=_address))

    def at(self, guest_phys_addr: int) -> Memslot | None:
        """The slot that begins at an address."""
        return self._by_address.get(guest_phys_addr)

    def overlapping(self, mapping: Mapping) -> list[Memslot]:
        """The slots that have a guest address in common with ``mapping``."""
        return [each for each in self.slots if each.mapping.overlaps(mapping)]

    def apply(self, op: SlotOp) -> None:
        """The kernel has done ``op``."""
        if op.old is not None:
            del self._slots[op.old.slot]
            self._by_address.pop(op.old.mapping.guest_phys_addr, None)
        if op.new is not None:
            self._slots[op.new.slot] = op.new
            self._by_address[op.new.mapping.guest_phys_addr] = op.new
        if op.new is None and op.old is not None:
            heapq.heappush(self._free, op.old.slot - self._base)
        elif op.old is None and op.new is not None:
            number = op.new.slot - self._base
            if number < self._unused:
                if number in self._free:
                    self._free.remove(number)
                    heapq.heapify(self._free)
            else:
                self._unused = number + 1

    def plan(self, removed: Iterable[Mapping], added: Iterable[Mapping]) -> list[SlotOp]:
        """The shortest sequence of ioctls that removes and adds these (rule K4).

        What is removed and added back unchanged costs nothing; new flags or a
        new address cost one ioctl; deletes come first, then moves and flags,
        then creates, so that no op meets an address that is still taken.

        Raises:
            MemslotError: More slots are needed than there are (rule K3).
        """
        gone = {each: self._slot_of(each) for each in removed}
        wanted: list[Mapping] = []
        for each in added:
            if gone.pop(each, None) is None:
                wanted.append(each)
        needed = len(self._slots) - len(gone) + len(wanted)
        if needed > self.limit:
            raise MemslotError(
                28,
                f"{needed} memslots are needed and the kernel has {self.limit}: "
                f"merge or remove regions (the first to find none is "
                f"{wanted[self.limit - needed]})",
            )
        changes, wanted = self._changes(gone, wanted)
        moves, split = _in_order(changes)
        for change in split:
            assert change.old is not None
            assert change.new is not None
            gone[change.old.mapping] = change.old
            wanted.append(change.new.mapping)
        deletes = [SlotOp(slot, None) for slot in sorted(gone.values(), key=_address)]
        return [*deletes, *moves, *self._creates(deletes, wanted)]

    def _slot_of(self, mapping: Mapping) -> Memslot:
        found = self._by_address.get(mapping.guest_phys_addr)
        assert found is not None, f"{mapping} is to be removed and has no slot"
        assert found.mapping == mapping, f"{mapping} is to be removed, and there is {found}"
        return found

    def _changes(
        self, gone: dict[Mapping, Memslot], wanted: list[Mapping]
    ) -> tuple[list[SlotOp], list[Mapping]]:
        """Slots that can stay with other flags or at another address; the rest wanted.

        The kernel changes a slot in place where size, host address and
        read-only flag stay as they are. Pairs of one address come first.
        """
        changes: list[SlotOp] = []
        for same_address in (True, False):
            by_key: dict[tuple[int, ...], list[Mapping]] = {}
            # Both by address, so that several windows onto one memory keep their
            # order and do not have to pass each other.
            for each in sorted(gone, key=_guest_address, reverse=True):
                by_key.setdefault(_in_place_key(each, same_address), []).append(each)
            left: list[Mapping] = []
            for each in sorted(wanted, key=_guest_address):
                candidates = by_key.get(_in_place_key(each, same_address))
                if candidates:
                    old = gone.pop(candidates.pop())
                    changes.append(SlotOp(old, Memslot(old.slot, each)))
                else:
                    left.append(each)
            wanted = left
        return changes, wanted

    def _creates(self, deletes: Sequence[SlotOp], wanted: Sequence[Mapping]) -> list[SlotOp]:
        free = [*self._free, *(op.slot - self._base for op in deletes)]
        heapq.heapify(free)
        unused = self._unused
        creates = []
        for each in sorted(wanted, key=_guest_address):
            if free:
                number = heapq.heappop(free)
            else:
                number = unused
                unused += 1
            creates.append(SlotOp(None, Memslot(self._base + number, each)))
        return creates


def tears(ops: Sequence[SlotOp]) -> bool:
    """Whether a vCPU between two of these ops can miss memory it had and will have.

    Rule B16: an added range overlaps a deleted one, or a logging slot is touched.
    A move is a delete and an add to the kernel. A flag is not.
    """
    gone = [op.old.mapping for op in ops if op.old is not None and op.kind != "FLAGS_ONLY"]
    come = [op.new.mapping for op in ops if op.new is not None and op.kind != "FLAGS_ONLY"]
    if any(op.old is not None and op.old.mapping.flags & MEM_LOG_DIRTY_PAGES for op in ops):
        return True
    gone.sort(key=_guest_address)
    come.sort(key=_guest_address)
    at = 0
    for each in come:  # neither list overlaps itself
        while at < len(gone) and gone[at].end <= each.guest_phys_addr:
            at += 1
        if at < len(gone) and gone[at].overlaps(each):
            return True
    return False


def _in_place_key(mapping: Mapping, same_address: bool) -> tuple[int, ...]:
    key = (mapping.memory_size, mapping.userspace_addr, mapping.flags & MEM_READONLY)
    return (mapping.guest_phys_addr, *key) if same_address else key


def _in_order(changes: list[SlotOp]) -> tuple[list[SlotOp], list[SlotOp]]:
    """Order changes so that each finds its new address free.

    Returns:
        The changes in order, and those that have to be a delete and a create
        instead, because they go round in a circle.
    """
    ordered = [op for op in changes if op.kind != "MOVE"]
    moves = [op for op in changes if op.kind == "MOVE"]
    # A move waits for all whose old place its new one overlaps. Neither the old
    # places nor the new ones overlap each other, so sorting finds those that do.
    olds = _Places([_mapping(op.old) for op in moves])
    news = _Places([_mapping(op.new) for op in moves])
    waits = [
        sum(other != number for other in olds.overlapping(_mapping(op.new)))
        for number, op in enumerate(moves)
    ]
    ready = [number for number, count in enumerate(waits) if not count]
    left = dict.fromkeys(range(len(moves)))
    split: list[SlotOp] = []
    while left:
        if ready:
            number = ready.pop()
            ordered.append(moves[number])
        else:  # all that are left wait for each other
            number = next(iter(left))
            split.append(moves[number])
        del left[number]
        for other in news.overlapping(_mapping(moves[number].old)):
            if other in left:
                waits[other] -= 1
                if not waits[other]:
                    ready.append(other)
    return ordered, split


class _Places:
    """Mappings that do not overlap, by address: which of them overlap another one."""

    def __init__(self, mappings: list[Mapping]) -> None:
        self._order = sorted(range(len(mappings)), key=lambda n: mappings[n].guest_phys_addr)
        self._starts = [mappings[n].guest_phys_addr for n in self._order]
        self._ends = [mappings[n].end for n in self._order]

    def overlapping(self, mapping: Mapping) -> list[int]:
        """The numbers of those that have an address in common with ``mapping``."""
        first = bisect_right(self._ends, mapping.guest_phys_addr)
        last = bisect_left(self._starts, mapping.end)
        return self._order[first:last]


def _mapping(slot: Memslot | None) -> Mapping:
    assert slot is not None
    return slot.mapping


def _address(slot: Memslot) -> int:
    return slot.mapping.guest_phys_addr


def _guest_address(mapping: Mapping) -> int:
    return mapping.guest_phys_addr
