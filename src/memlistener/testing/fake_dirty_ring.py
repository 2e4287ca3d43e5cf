"""The dirty ring of a `FakeVcpu`: an array that two sides index on their own.

As in the kernel's ``dirty_ring.c``: the vCPU writes entries at one index, those that
were collected are taken back at another, and nothing but the entries' flags says
how far the other side is. Nobody checks that the first index does not lap the
second: that is what the reserve is for, and where it is not enough, entries are
overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

# A ring counts as full when so many entries are left (KVM_DIRTY_RING_RSVD_ENTRIES).
_RESERVE = 64

_FREE, _DIRTY, _RESET = range(3)


class DirtyRing:
    """One vCPU's ring; guarded by the recorder's lock.

    Args:
        entries: How many it has.
        noticed_late: Play a kernel whose vCPUs notice that their ring is full only
            when they enter the guest.
    """

    def __init__(self, entries: int, *, noticed_late: bool) -> None:
        self.noticed_late = noticed_late
        self._entries = [(_FREE, 0, 0)] * entries
        self._dirty_index = self._reset_index = 0  # the kernel's
        self._next = 0  # user space's

    @property
    def full(self) -> bool:
        """Whether the vCPU has to leave the guest before it writes more."""
        return self._dirty_index - self._reset_index >= len(self._entries) - _RESERVE

    def push(self, slot: int, page: int) -> None:
        """The vCPU has written a page that was protected."""
        self._entries[self._dirty_index % len(self._entries)] = (_DIRTY, slot, page)
        self._dirty_index += 1

    def collect(self) -> list[tuple[int, int]]:
        """What user space finds at its index, and marks to be taken back."""
        found: list[tuple[int, int]] = []
        while len(found) < len(self._entries):
            flag, slot, page = self._entries[self._next % len(self._entries)]
            if flag != _DIRTY:
                break
            found.append((slot, page))
            self._mark_next()
        return found

    def skip(self, none: int) -> int:
        """Mark what is before the next entry that the vCPU wrote; ``none`` if there is none."""
        size = len(self._entries)
        for gap in range(size):
            if self._entries[(self._next + gap) % size][0] == _DIRTY:
                break
        else:
            gap = none
        for _ in range(gap):
            self._mark_next()
        return gap

    def reset(self, protect: Callable[[int, int], object]) -> int:
        """``KVM_RESET_DIRTY_RINGS``: take back what is marked, up to the first that is not."""
        count = 0
        while True:
            at = self._reset_index % len(self._entries)
            flag, slot, page = self._entries[at]
            if flag != _RESET:
                return count
            protect(slot, page)
            self._entries[at] = (_FREE, slot, page)
            self._reset_index += 1
            count += 1

    def _mark_next(self) -> None:
        at = self._next % len(self._entries)
        self._entries[at] = (_RESET, *self._entries[at][1:])
        self._next += 1
