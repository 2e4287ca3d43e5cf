"""Rendering: a window of a tree of regions -> what shows in it, ascending.

In two steps, which together are rules F1 to F5.

1. `place` walks the tree and lists every terminating region that reaches into
   the window, as a placement: the addresses it would cover if nothing hid it.
   They come in the order in which QEMU renders them (children before their
   parent, highest priority first), so of two that overlap the earlier shows.
2. `render` sweeps over the placements by address and emits for each stretch
   the earliest one that covers it.

QEMU fills gaps of the view with one region after another, each insertion moving
what is above it: quadratic in the number of ranges. The sweep is n log n, and
it never cuts a placement where it is not covered by another, so nothing has to
be mended afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, TypeAlias

from memlistener.core.kinds import INHERITED, RegionKind
from memlistener.core.ways import Chain, in_chain
from memlistener.errors import RegionError

if TYPE_CHECKING:
    from memlistener.core.region import MemoryRegion

# (low, high, region, the address of the region's offset 0, flags)
Piece: TypeAlias = "tuple[int, int, MemoryRegion, int, int]"
# (low, order, high, region, base, flags): sorts by address, then by order.
Placement: TypeAlias = "tuple[int, int, int, MemoryRegion, int, int]"


def render(
    root: MemoryRegion, low: int, high: int, base: int = 0, flags: int = 0
) -> Iterator[Piece]:
    """What shows of the tree below ``root`` in [low, high): ascending, apart.

    Args:
        root: The tree, or a part of it that shows alone in the window.
        low: The first address.
        high: One past the last.
        base: The address from which ``root`` counts its own.
        flags: What ``root`` inherits.

    Raises:
        RegionError: An alias shows itself.
    """
    placements = place(root, low, high, base, flags)
    placements.sort()
    count = len(placements)
    # Placements that cover ``at``, or did when they were pushed, earliest first.
    covering: list[tuple[int, Placement]] = []
    at = low
    index = 0
    while index < count or covering:
        if not covering:
            placement = placements[index]
            index += 1
            if index == count or placements[index][0] >= placement[2]:
                # Alone on its stretch, as most are.
                at, _, end, region, offset_0, its_flags = placement
                yield at, end, region, offset_0, its_flags
                at = end
                continue
            at = placement[0]
            heappush(covering, (placement[1], placement))
        while index < count and placements[index][0] <= at:
            heappush(covering, (placements[index][1], placements[index]))
            index += 1
        order, top = covering[0]
        end = top[2]
        if end <= at:
            heappop(covering)
            continue
        # It shows up to its end, or to where an earlier one begins. A later one
        # that ends first never shows.
        while index < count and placements[index][0] < end:
            other = placements[index]
            if other[1] < order:
                end = other[0]
                break
            if other[2] > end:
                heappush(covering, (other[1], other))
            index += 1
        yield at, end, top[3], top[4], top[5]
        at = end


def place(
    root: MemoryRegion, low: int, high: int, base: int = 0, flags: int = 0
) -> list[Placement]:
    """Every terminating region that reaches into [low, high), in rendering order.

    The walk keeps its own stack, since a tree may be deeper than Python's. A
    frame is a container whose children are being walked; one child after the
    other is either a leaf, listed on the spot, or pushes a frame of its own.
    """
    out: list[Placement] = []
    append = out.append
    order = 0
    # The frames that wait for a child to be done.
    stack: list[tuple[Iterator[MemoryRegion], Any, int, int, int, int, Chain]] = []
    # This one: the children left, its own placement if it terminates, ..., the
    # aliases on the way.
    children: Iterator[MemoryRegion] = iter((root,))
    own: Any = None
    via: Chain = None
    while True:
        for child in children:
            if not child._enabled:
                continue
            start = base + child._addr
            end = start + child._size
            first = start if start > low else low
            last = end if end < high else high
            if first >= last:
                continue
            if child._terminates and child._children is None:
                append((first, order, last, child, start, flags | child._flags))
                order += 1
                continue
            # Not a leaf: come back to this frame when the child is done.
            stack.append((children, own, base, low, high, flags, via))
            own = None
            if child._kind is RegionKind.ALIAS:
                target = child._alias_target
                assert target is not None
                if in_chain(child, via):
                    raise RegionError(
                        f"{child!r} shows itself: its target {target!r} shows it again at "
                        f"[{first - start + child._alias_offset:#x}, "
                        f"{last - start + child._alias_offset:#x}); move the alias, or make its "
                        f"window smaller"
                    )
                children = iter((target,))
                base = start - child._alias_offset - target._addr
                via = (via, child)
            else:
                if child._terminates:
                    own = (first, last, child, start, flags | child._flags)
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
                first, last, child, start, its_flags = own
                append((first, order, last, child, start, its_flags))
                order += 1
            if not stack:
                return out
            children, own, base, low, high, flags, via = stack.pop()
