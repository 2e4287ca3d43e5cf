"""Rendering: a window of a tree of regions -> what shows in it, ascending.

In two steps, which together are rules F1 to F5.

1. `place` walks the tree and lists every terminating region that reaches into
   the window, as a placement: the addresses it would cover if nothing hid it.
   They come in the order in which QEMU renders them (children before their
   parent, highest priority first), so of two that overlap the earlier shows.
2. `render` sorts the placements by address. Mostly no two of them overlap, and then
   that is the view. Else `_sweep` goes over them by address and emits for each
   stretch the earliest one that covers it.

QEMU fills gaps of the view with one region after another, each insertion moving
what is above it: quadratic in the number of ranges. The sweep is n log n, and
it never cuts a placement where it is not covered by another, so nothing has to
be mended afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from memlistener.core.flatrange import FlatRange, merged, part
from memlistener.core.kinds import INHERITED
from memlistener.core.ways import Chain, in_chain
from memlistener.errors import RegionError

if TYPE_CHECKING:
    from memlistener.core.region import MemoryRegion


def render(
    root: MemoryRegion, low: int, high: int, base: int = 0, flags: int = 0
) -> list[FlatRange]:
    """What shows of the tree below ``root`` in [low, high): ascending, apart, merged.

    Args:
        root: The tree, or a part of it that shows alone in the window.
        low: The first address.
        high: One past the last.
        base: The address from which ``root`` counts its own.
        flags: What ``root`` inherits.

    Raises:
        RegionError: An alias shows itself.
    """
    placed = place(root, low, high, base, flags)
    if len(placed) < 2:
        return placed
    ordered = sorted(placed, key=_start)
    end = -1
    touching = False
    for each in ordered:
        start = each[0]
        if start <= end:
            if start < end:
                return merged(_sweep(placed, ordered))
            touching = True
        end = start + each[1]
    return merged(ordered) if touching else ordered


def _start(each: FlatRange) -> int:
    return each[0]


def _sweep(placed: list[FlatRange], ordered: list[FlatRange]) -> Iterator[FlatRange]:
    """What shows of placements in order of precedence, which are given by address too."""
    rank = {id(each): number for number, each in enumerate(placed)}
    count = len(ordered)
    # Placements that cover ``at``, or did when they were pushed, earliest first.
    covering: list[tuple[int, FlatRange]] = []
    at = 0
    index = 0
    while index < count or covering:
        if not covering:
            each = ordered[index]
            index += 1
            at = each[0]
            if index == count or ordered[index][0] >= at + each[1]:
                yield each  # alone on its stretch, as most are
                continue
            heappush(covering, (rank[id(each)], each))
        while index < count and ordered[index][0] <= at:
            heappush(covering, (rank[id(ordered[index])], ordered[index]))
            index += 1
        order, top = covering[0]
        end = top[0] + top[1]
        if end <= at:
            heappop(covering)
            continue
        # It shows up to its end, or to where an earlier one begins. A later one
        # that ends first never shows.
        while index < count and ordered[index][0] < end:
            other = ordered[index]
            its_order = rank[id(other)]
            if its_order < order:
                end = other[0]
                break
            if other[0] + other[1] > end:
                heappush(covering, (its_order, other))
            index += 1
        yield top if at == top[0] and end == at + top[1] else part(top, at, end)
        at = end


def place(
    root: MemoryRegion, low: int, high: int, base: int = 0, flags: int = 0
) -> list[FlatRange]:
    """Every terminating region that reaches into [low, high), in rendering order.

    The walk keeps its own stack, since a tree may be deeper than Python's. A
    frame is a container whose children are being walked; one child after the
    other is either a leaf, listed on the spot, or pushes a frame of its own.
    """
    out: list[FlatRange] = []
    append = out.append
    new = tuple.__new__  # FlatRange's own constructor, without the keyword handling
    # What aliases have shown, and where: ways that part and meet again, as in a mirror
    # of mirrors, double at each meeting.
    placed: set[tuple[MemoryRegion, int, int, int]] = set()
    # The frames that wait for a child to be done.
    stack: list[tuple[Iterator[MemoryRegion], FlatRange | None, int, int, int, int, Chain]] = []
    # This one: the children left, its own placement if it terminates, ..., the
    # aliases on the way.
    children: Iterator[MemoryRegion] = iter((root,))
    own: FlatRange | None = None
    via: Chain = None
    while True:
        for child in children:
            if not child._enabled:
                continue
            start = base + child._addr
            size = child._size
            end = start + size
            first = start if start > low else low
            last = end if end < high else high
            if first >= last:
                continue
            if child._terminates and child._children is None:
                if first is not start or last is not end:
                    size = last - first
                # The size that is there already: of a million ints that are all
                # alike, one has to be fetched from memory later on.
                append(new(FlatRange, (first, size, child, first - start, flags | child._flags)))
                continue
            target = child._alias_target
            if target is not None:
                if in_chain(child, via):
                    raise RegionError(
                        f"{child!r} shows itself: its target {target!r} shows it again at "
                        f"[{first - start + child._alias_offset:#x}, "
                        f"{last - start + child._alias_offset:#x}); move the alias, or make its "
                        f"window smaller"
                    )
                if not target._looped:
                    # What was placed there already hides all that would come.
                    again = (target, start - child._alias_offset, first, last)
                    if again in placed:
                        continue
                    placed.add(again)
            # Not a leaf: come back to this frame when the child is done.
            stack.append((children, own, base, low, high, flags, via))
            own = None
            if target is not None:
                children = iter((target,))
                base = start - child._alias_offset - target._addr
                via = (via, child)
            else:
                if child._terminates:
                    own = FlatRange(first, last - first, child, first - start, flags | child._flags)
                grandchildren = child._children
                children = iter(
                    grandchildren.in_window(first - start, last - start)
                    if grandchildren is not None
                    else ()
                )
                base = start
            low, high = first, last
            flags |= child._flags & INHERITED
            break
        else:
            if own is not None:
                append(own)
            if not stack:
                return out
            children, own, base, low, high, flags, via = stack.pop()
