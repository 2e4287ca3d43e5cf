"""The machinery of a change to the tree: who has to allow it, and who has to know.

`reach` walks upwards from a region to every address space that can show it, and
`change` wraps one mutation into the steps that all of them share: ask, apply,
journal the way back, report the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeAlias

from memlistener.errors import RegionError

if TYPE_CHECKING:
    from memlistener.core.ioeventfd import Attached
    from memlistener.core.region import MemoryRegion

# The aliases on a way through the tree, the last one first: (the rest, alias).
Chain: TypeAlias = "tuple[Chain, MemoryRegion] | None"


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

    def damage(self, low: int, high: int) -> None:
        """Addresses [low, high) may look different now; where it is empty, none do."""
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
    """
    reached = reach(region)
    if above is not None:
        reached += [(owner, 0, 0) for owner, _, _ in reach(above)]
    if not reached:
        apply()
        return []
    owners = list(dict.fromkeys(owner for owner, _, _ in reached))
    if len({id(owner.journal) for owner in owners}) > 1:
        raise RegionError(
            f"{region!r} is reachable from two memory systems: they cannot change it "
            f"in one transaction"
        )
    for owner in owners:
        owner.check_change(region, what)
    apply()
    owners[0].record(undo)
    if before is not None:
        for owner, low, high in reached:
            # Hidden or not: it may show again before the transaction ends.
            owner.reattached(region, before, low, high)
        return owners
    for owner, low, high in reached:
        # What shows nowhere may decide all the same which view a root shares (F7).
        owner.damage(low, high)
    for owner, low, high in reach(region):
        if low < high:
            owner.damage(low, high)
    return owners


def reach(region: MemoryRegion) -> list[tuple[TreeOwner, int, int]]:
    """Where a region can show: (owner, low, high) in the owner's addresses.

    Walks up through containers and through aliases of them, clipping on the
    way. An owner from which nothing of it can be seen comes with an empty
    window: the region is live there all the same.
    """
    found: list[tuple[TreeOwner, int, int]] = []
    unseen: set[MemoryRegion] = set()  # walked already with an empty window
    # And with one that is not: ways that part and meet again double at each
    # meeting. Where an alias may lead back, the ways above depend on the chain.
    seen: set[tuple[MemoryRegion, int, int]] = set()
    # (region, low, high, the aliases passed on the way)
    todo: list[tuple[MemoryRegion, int, int, Chain]] = [(region, 0, region._size, None)]
    while todo:
        each, low, high, chain = todo.pop()
        if low < 0:
            low = 0
        if high > each._size:
            high = each._size
        if low >= high or not each._enabled:
            if each in unseen:
                continue
            unseen.add(each)
            low = high = 0
        elif chain is not None and not each._looped:
            if (each, low, high) in seen:
                continue
            seen.add((each, low, high))
        if each._aliases:
            for alias in each._aliases:
                # Through an alias a second time: it would show itself, which
                # rendering refuses. An alias of a container that it is in is
                # ordinary, so the tree of a real machine does have such loops.
                if not in_chain(alias, chain):
                    offset = alias._alias_offset
                    todo.append((alias, low - offset, high - offset, (chain, alias)))
        addr = each._addr
        for owner in each._owners:
            found.append((owner, low + addr, high + addr))
        if each._container is not None:
            todo.append((each._container, low + addr, high + addr, chain))
    return found


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


def in_chain(region: MemoryRegion, chain: Chain) -> bool:
    """Whether ``region`` is one of a chain's aliases."""
    while chain is not None:
        chain, alias = chain
        if alias is region:
            return True
    return False


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
