"""The machinery of a change to the tree: who has to allow it, and who has to know.

`reach` says which address spaces can show a region, and where; `change` wraps one
mutation into the steps that all of them share: ask, apply, journal the way back,
report the damage. The ways from a region up to the address spaces are `core.ways`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

from memlistener.core.ways import Chain, Sight, covering, in_chain, outdate, outdate_below, way_of
from memlistener.errors import RegionError

if TYPE_CHECKING:
    from memlistener.core.ioeventfd import Attached
    from memlistener.core.region import MemoryRegion


class TreeOwner(Protocol):
    """Who owns the tree below a root region: in practice an `AddressSpace`."""

    def check_change(self, region: MemoryRegion, what: str) -> None:
        """Raise `TransactionError` when ``region`` may not be changed now."""
        ...

    def record(self, undo: Callable[[], None]) -> None:
        """Keep the way back from a change that was just made."""
        ...

    @property
    def journal(self) -> object:
        """Owners with the same journal need to be told of an undo only once."""
        ...

    def damage(self, low: int, high: int, sight: Sight | None = None) -> None:
        """Addresses [low, high) may look different now; where it is empty, none do.

        Args:
            low: The first.
            high: One past the last.
            sight: Where a region shows that has all that changed below it.
        """
        ...

    def reattached(self, region: MemoryRegion, before: Attached, low: int, high: int) -> None:
        """What hangs on ``region`` changed; it shows in [low, high), if anywhere."""
        ...

    def detached(self, region: MemoryRegion) -> None:
        """``region`` left the tree, but a rollback would bring it back."""
        ...


def change(
    region: MemoryRegion,
    what: str,
    apply: Callable[[], None],
    undo: Callable[[], None],
    *,
    above: MemoryRegion | None = None,
    before: Attached | None = None,
    flags: bool = False,
) -> list[TreeOwner]:
    """Steps 2 to 5 of a mutator.

    Args:
        region: What changes.
        what: The mutator's name.
        apply: Makes the change.
        undo: Takes it back.
        above: The container that the region is about to join.
        before: For a change of what hangs on the region, which is no damage:
            what that was.
        flags: Whether it is the region's flags, and so neither where it shows nor
            what it hides.
    """
    owners = _owners(region, above)
    make = _flag if flags else _make
    if not owners:
        make(apply, region)
        return []
    # Those with one journal answer alike.
    owners[0].check_change(region, what)
    if before is not None:
        apply()
        owners[0].record(undo)
        for owner, low, high in reach(region):
            # Hidden or not: it may show again before the transaction ends.
            owner.reattached(region, before, low, high)
        return owners
    _report(region)
    make(apply, region)
    owners[0].record(partial(make, undo, region))
    if not flags:
        _report(region)
    return owners


def _make(change: Callable[[], None], region: MemoryRegion) -> None:
    """Change ``region``, or back, and forget the ways that this may have changed."""
    before = region._container
    change()
    outdate(region, before)


def _flag(change: Callable[[], None], region: MemoryRegion) -> None:
    """As `_make`, where ``region`` stays where it is."""
    change()
    outdate_below(region)


def _owners(region: MemoryRegion, above: MemoryRegion | None) -> list[TreeOwner]:
    """Who has to allow a change, and has to know: all of them keep one journal."""
    found = covering(region)
    if above is None:
        if found is None:
            return []
        owners = found[0].live_owners()
        if not found[0].mixed:
            return owners
    else:
        owners = way_of(above).live_owners()
        if found is not None:
            owners = list(dict.fromkeys([*found[0].live_owners(), *owners]))
    if len({id(owner.journal) for owner in owners}) > 1:
        raise RegionError(
            f"{region!r} is reachable from two memory systems: they cannot change it "
            f"in one transaction"
        )
    return owners


def _report(region: MemoryRegion) -> None:
    """Tell each owner where ``region`` shows now."""
    found = covering(region)
    if found is None:
        return
    way, low, high = found
    for first, last, sights, deciding in way.places:
        begin = first if first > low else low
        end = last if last < high else high
        if begin < end:
            for sight in sights:
                owner = sight.owner()
                if owner is not None:
                    owner.damage(begin + sight.base, end + sight.base, sight)
        else:
            # What shows nowhere may decide all the same which view a root shares (F7).
            for sight in deciding if way is not region._way else sights:
                owner = sight.owner()
                if owner is not None:
                    owner.damage(0, 0)


def reach(region: MemoryRegion) -> list[tuple[TreeOwner, int, int]]:
    """Where a region can show: (owner, low, high) in the owner's addresses.

    An owner from which nothing of it can be seen comes with an empty window: the
    region is live there all the same.
    """
    found = covering(region)
    if found is None:
        return []
    way, low, high = found
    windows: list[tuple[TreeOwner, int, int]] = []
    for first, last, sights, _ in way.places:
        begin, end = max(first, low), min(last, high)
        for sight in sights if begin < end else ():
            owner = sight.owner()
            if owner is not None:
                windows.append((owner, begin + sight.base, end + sight.base))
    seeing = {owner for owner, _, _ in windows}
    windows += [(owner, 0, 0) for owner in way.live_owners() if owner not in seeing]
    return windows


def showing_itself(region: MemoryRegion) -> MemoryRegion | None:
    """An alias above ``region``, or itself, some byte of which shows within that alias.

    Whether anything on the way is disabled does not count: it may be enabled later.
    """
    for each in (region, *above_of(region)):
        if each._alias_target is None:
            continue
        todo: list[tuple[MemoryRegion, int, int, Chain]] = [(each, 0, each._size, (None, each))]
        while todo:
            at, low, high, chain = todo.pop()
            low, high = max(low, 0), min(high, at._size)
            if low >= high:
                continue
            for alias in at._aliases or ():
                first, last = low - alias._alias_offset, high - alias._alias_offset
                if first < alias._size and last > 0:
                    if in_chain(alias, chain):
                        return alias
                    todo.append((alias, first, last, (chain, alias)))
            if at._container is not None:
                todo.append((at._container, low + at._addr, high + at._addr, chain))
    return None


def above_of(region: MemoryRegion) -> set[MemoryRegion]:
    """All regions that contain or show ``region``, at any distance."""
    seen: set[MemoryRegion] = set()
    todo = [region]
    while todo:
        each = todo.pop()
        if each._container is not None and each._container not in seen:
            seen.add(each._container)
            todo.append(each._container)
        for alias in each._aliases or ():
            if alias not in seen:
                seen.add(alias)
                todo.append(alias)
    return seen


def owners_around(root: MemoryRegion) -> Iterator[TreeOwner]:
    """Who owns anything below ``root``, or anything that shows a part of that. O(n)."""
    below = {root}
    todo = [root]
    while todo:
        each = todo.pop()
        shown = list(each._children or ())
        if each._alias_target is not None:
            shown.append(each._alias_target)
        new = [one for one in shown if one not in below]
        below.update(new)
        todo += new
    around = set(below)
    todo = list(below)
    while todo:
        each = todo.pop()
        yield from each._owners
        holders = list(each._aliases or ())
        if each._container is not None:
            holders.append(each._container)
        new = [one for one in holders if one not in around]
        around.update(new)
        todo += new
