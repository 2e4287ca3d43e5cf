"""What ``info mtree -f`` says about a tree that ``info mtree`` leaves open.

Two things: which ``i/o`` regions are containers (those that would show where the
views show something else), and which aliases are read-only (those behind which
RAM shows as ``rom``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.kinds import RegionKind
from memlistener.core.mtree import Space, range_kind
from memlistener.core.mtree_lines import Guess
from memlistener.core.mtree_views import ParsedViews
from memlistener.core.region import MemoryRegion


def shown_names(views: ParsedViews) -> frozenset[str]:
    """Names of all regions that show in some view."""
    return frozenset(each.region.name for dump in views.views for each in dump.view)


def wrongly_shown(spaces: Sequence[Space], views: ParsedViews) -> set[MemoryRegion]:
    """I/O regions that show in the trees where the views show something else."""
    wrong: set[MemoryRegion] = set()
    for _, root, view in _pairs(spaces, views):
        for each in FlatView.render(root):
            if each.region.kind is not RegionKind.IO or each.region in wrong:
                continue
            seen = view.lookup(each.start)
            if (
                seen is None
                or seen.region.name != each.region.name
                or seen.start - seen.offset != each.start - each.offset
            ):
                wrong.add(each.region)
    return wrong


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
            guesses.append(
                Guess(f"address space {name!r}: its tree does not show what its view does")
            )
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
    """Make aliases read-only until what is read-only in ``view`` is so in the tree."""
    ours = FlatView.render(root)
    for each in view:
        at = each.start
        while each.readonly and at < each.end:
            found = ours.lookup(at)
            if found is None or found.region.name != each.region.name:
                break
            if found.readonly:
                at = found.end
                continue
            alias = _last_alias(root, at)
            if alias is None:
                break
            alias.set_readonly(True)
            made[alias] = None
            ours = FlatView.render(root)


def _last_alias(root: MemoryRegion, addr: int) -> MemoryRegion | None:
    """The alias nearest to the region that shows at ``addr`` (rule F8); None without one.

    Tries regions in order, going back where one of them shows nothing there.
    """
    # (region, address relative to its container, last alias, whether it is resolved)
    stack: list[tuple[MemoryRegion, int, MemoryRegion | None, bool]] = [(root, addr, None, False)]
    while stack:
        region, at, alias, resolved = stack.pop()
        if resolved:
            return alias
        offset = at - region.addr
        if not region.enabled or not 0 <= offset < region.size:
            continue
        target = region.alias_target
        if target is not None:
            stack.append((target, offset + region.alias_offset + target.addr, region, False))
            continue
        if region.kind is not RegionKind.CONTAINER:
            stack.append((region, at, alias, True))  # shows where no child does
        stack += [(child, offset, alias, False) for child in reversed(region.subregions)]
    return None


def same_ranges(one: FlatView, two: FlatView) -> bool:
    """Whether two views print the same."""
    return len(one) == len(two) and all(
        _printed(left) == _printed(right) for left, right in zip(one, two, strict=True)
    )


def _printed(each: FlatRange) -> tuple[object, ...]:
    region = each.region
    kind = range_kind(each)
    return each.start, each.size, each.offset, region.name, region.priority, kind, each.nonvolatile
