"""Where a region shows: the ways up from it to the address spaces, kept between changes.

A change has to find every address space that can show the region, and where. The
walk there goes up through containers and through aliases of them, and costs by the
level; but the next change is most often one of the same region or of a sibling, and
then its container shows where it did. So each container keeps what was found.

What is kept holds for one *epoch*. A new one begins when a change may have been one
to a way that somebody keeps: when the region that changed, or the container that it
is in, was passed on such a way. What changes most, the leaves of a tree, lie on no
way but their own, so that epochs are long. One epoch for everything, rather than
lists of who depends on whom, because it cannot be got wrong.

Address spaces and regions are kept weakly here. An alias that was dropped together
with what held it is no concern of its target, nor is what it led to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from memlistener.core.kinds import INHERITED
from memlistener.core.sharing import view_root

if TYPE_CHECKING:
    from memlistener.core.change import TreeOwner
    from memlistener.core.region import MemoryRegion

# The aliases on a way through the tree, the last one first: (the rest, alias).
Chain: TypeAlias = "tuple[Chain, MemoryRegion] | None"

# Trees of several threads share it. So no number comes twice, whoever sets it last;
# and a walk uses the one that it began with.
_epochs = itertools.count(1)
_epoch = next(_epochs)


class Sight(NamedTuple):
    """One place at which a region shows.

    Attributes:
        owner: In whose addresses, weakly.
        base: The address of the region's offset 0; may be negative.
        low: The first address that may show it, with all clipping on the way.
        high: One past the last; where it is ``low``, none does.
        top: What shows in [low, high) is what this region shows there, weakly:
            either ``region`` itself or the highest region above it where
            something else reaches in. Rendering can start here.
        top_base: The address from which ``top`` counts its own.
        flags: What ``top`` inherits.
        epoch: When it was found.
    """

    owner: weakref.ref[TreeOwner]
    base: int
    low: int
    high: int
    top: weakref.ref[MemoryRegion]
    top_base: int
    flags: int
    epoch: int

    @property
    def holds(self) -> bool:
        """Whether nothing changed on the way since it was found."""
        return self.epoch == _epoch


class Place(NamedTuple):
    """The sights that show the same part of a region.

    Attributes:
        first: Offset in the region.
        last: One past the last offset; where it is ``first``, nothing is shown.
        sights: Where.
        deciding: Those of address spaces whose view is shared or not by what is
            in the region (rule F7), whether it shows or not.
    """

    first: int
    last: int
    sights: list[Sight]
    deciding: list[Sight]


class Way:
    """All that is to know about where one region shows."""

    __slots__ = ("epoch", "mixed", "owners", "places")

    def __init__(self, epoch: int, places: list[Place]) -> None:
        self.epoch = epoch
        self.places = places
        sights = [sight for place in places for sight in place.sights]
        self.owners = tuple(dict.fromkeys(sight.owner for sight in sights))
        self.mixed = len({id(owner.journal) for owner in self.live_owners()}) > 1

    def live_owners(self) -> list[TreeOwner]:
        """Each owner that can show the region, or could if it were not hidden."""
        return [owner for each in self.owners if (owner := each()) is not None]


def way_of(region: MemoryRegion) -> Way:
    """The way up from ``region``, as it is now."""
    known = region._way
    if known is None or known.epoch != _epoch:
        known = region._way = _walk(region)
    return known


def covering(region: MemoryRegion) -> tuple[Way, int, int] | None:
    """A way that leads to ``region`` too, and which part of it is the region's.

    That is its container's, unless it can be seen in other ways than through that.
    """
    if region._owners or region._aliases:
        return way_of(region), 0, region._size
    holder = region._container
    if holder is None:
        return None
    if not region._enabled:
        return way_of(holder), 0, 0
    return way_of(holder), region._addr, region._addr + region._size


def outdate_below(region: MemoryRegion) -> None:
    """What ``region`` has those below it inherit changed: it shows where it did."""
    global _epoch
    if region._passed == _epoch:
        _epoch = next(_epochs)


def outdate(region: MemoryRegion, before: MemoryRegion | None = None) -> None:
    """``region`` changed, which was in ``before``: ways that led by are to be found anew."""
    global _epoch
    now = _epoch
    after = region._container
    if (
        region._passed == now
        or (region._way is not None and region._way.epoch == now)
        or (before is not None and before._passed == now)
        or (after is not None and after._passed == now)
    ):
        _epoch = next(_epochs)


def in_chain(region: MemoryRegion, chain: Chain) -> bool:
    """Whether ``region`` is one of a chain's aliases."""
    while chain is not None:
        chain, alias = chain
        if alias is region:
            return True
    return False


def _walk(region: MemoryRegion) -> Way:
    epoch = _epoch
    places: dict[tuple[int, int], Place] = {}
    decides: dict[MemoryRegion, bool] = {}  # by root; RAM may show in it twenty times
    for root, sight in _sights(region, epoch):
        part = (sight.low - sight.base, sight.high - sight.base)
        place = places.get(part)
        if place is None:
            place = places[part] = Place(*part, [], [])
        place.sights.append(sight)
        if root not in decides:
            through: list[MemoryRegion] = []
            view_root(root, through)
            decides[root] = region in through
        if decides[root]:
            place.deciding.append(sight)
    return Way(epoch, list(places.values()))


def _sights(region: MemoryRegion, epoch: int) -> Iterator[tuple[MemoryRegion, Sight]]:
    """Walk up from ``region``, and mark what is passed: roots, and how they show it.

    One from which nothing of it can be seen counts too.
    """
    unseen: set[MemoryRegion] = set()  # walked already with an empty window
    # And with one that is not: ways that part and meet again double at each
    # meeting. Where an alias may lead back, the ways above depend on the chain.
    seen: set[tuple[MemoryRegion, int, int, int]] = set()
    # (where we are, the window, where in its terms the region begins; the top, where
    # that begins, what it inherits; the aliases passed)
    todo: list[tuple[MemoryRegion, int, int, int, MemoryRegion, int, int, Chain]] = [
        (region, 0, region._size, 0, region, 0, 0, None)
    ]
    while todo:
        each, low, high, base, top, top_base, flags, chain = todo.pop()
        if low < 0:
            low = 0
        if high > each._size:
            high = each._size
        if low >= high or not each._enabled:
            if each in unseen:
                continue
            unseen.add(each)
            low = high = base = 0
        elif chain is not None and not each._looped:
            if (each, low, high, base) in seen:
                continue
            seen.add((each, low, high, base))
        for alias in each._aliases or ():
            # Through an alias a second time: it would show itself, which
            # rendering refuses. An alias of a container that it is in is
            # ordinary, so the tree of a real machine does have such loops.
            if in_chain(alias, chain):
                continue
            alias._passed = epoch
            at = alias._alias_offset
            todo.append(
                (
                    alias,
                    low - at,
                    high - at,
                    base - at,
                    top,
                    top_base - at,
                    flags | (alias._flags & INHERITED),
                    (chain, alias),
                )
            )
        at = each._addr
        low, high, base, top_base = low + at, high + at, base + at, top_base + at
        for owner in each._owners:
            sight = Sight(
                weakref.ref(owner),
                base,
                low,
                high,
                weakref.ref(top),
                top_base - top._addr,
                flags,
                epoch,
            )
            yield each, sight
        holder = each._container
        if holder is not None:
            holder._passed = epoch
            assert holder._children is not None
            if holder._terminates or not holder._children.alone(each, low, high):
                top, top_base, flags = holder, 0, 0
            else:
                flags |= holder._flags & INHERITED
            todo.append((holder, low, high, base, top, top_base, flags, chain))
