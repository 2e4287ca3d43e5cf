"""What ``info mtree -f`` says about a tree that ``info mtree`` leaves open.

Two things: which ``i/o`` regions are no containers (those that show), and which
aliases are read-only (those behind which RAM shows as ``rom``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.mtree import Space, range_kind
from memlistener.core.mtree_lines import Guess
from memlistener.core.mtree_views import ParsedViews
from memlistener.core.region import MemoryRegion


def shown_names(views: ParsedViews) -> frozenset[str]:
    """Names of all regions that show in some view."""
    return frozenset(each.region.name for dump in views.views for each in dump.view)


def settle(spaces: Sequence[Space], views: ParsedViews) -> list[Guess]:
    """Make aliases read-only where ``views`` show what is behind them so.

    Returns:
        What was done, and which address spaces still show something else.
    """
    pairs = list(_pairs(spaces, views))
    made: dict[MemoryRegion, None] = {}
    for _, root, view in pairs:
        _settle_view(root, view, made)
    guesses = []
    if made:
        names = ", ".join(dict.fromkeys(f"{each.name!r}" for each in made))
        guesses.append(
            Guess(f"of the aliases before RAM that shows as rom, the last is read-only: {names}")
        )
    for name, root, view in pairs:
        if not same_ranges(FlatView.render(root), view):
            guesses.append(Guess(f"address space {name!r}: its tree does not show what its view does"))
    return guesses


def _pairs(
    spaces: Sequence[Space], views: ParsedViews
) -> Iterator[tuple[str, MemoryRegion, FlatView]]:
    """Each address space with its view; those of one name in the order they come."""
    found: dict[str, list[FlatView]] = {}
    for dump in views.views:
        for space in dump.spaces:
            found.setdefault(space.name, []).append(dump.view)
    for name, root in spaces:
        left = found.get(name)
        if left:
            yield name, root, left.pop(0)


def _settle_view(root: MemoryRegion, view: FlatView, made: dict[MemoryRegion, None]) -> None:
    for each in view:
        if not each.readonly:
            continue
        at = each.start
        while at < each.end:
            ours = FlatView.render(root).lookup(at)
            if ours is None or ours.region.name != each.region.name:
                return
            if not ours.readonly:
                alias = last_alias(root, at)
                if alias is None:
                    return
                alias.set_readonly(True)
                made[alias] = None
                continue
            at = ours.end


def last_alias(root: MemoryRegion, addr: int) -> MemoryRegion | None:
    """The alias nearest to the region that shows at ``addr``; None without one."""
    path = _resolve(root, addr)
    aliases = [each for each in path or () if each.alias_target is not None]
    return aliases[-1] if aliases else None


def _resolve(region: MemoryRegion, addr: int) -> list[MemoryRegion] | None:
    """Rule F8: the way to what shows at ``addr``; None where nothing does."""
    offset = addr - region.addr
    if not region.enabled or not 0 <= offset < region.size:
        return None
    target = region.alias_target
    if target is not None:
        behind = _resolve(target, offset + region.alias_offset + target.addr)
        return None if behind is None else [region, *behind]
    for child in region.subregions:
        found = _resolve(child, offset)
        if found is not None:
            return [region, *found]
    return [region] if region._terminates else None


def same_ranges(one: FlatView, two: FlatView) -> bool:
    """Whether two views print the same."""
    return len(one) == len(two) and all(
        _printed(left) == _printed(right) for left, right in zip(one, two, strict=True)
    )


def _printed(each: FlatRange) -> tuple[object, ...]:
    region = each.region
    kind = range_kind(each)
    return each.start, each.size, each.offset, region.name, region.priority, kind, each.nonvolatile
