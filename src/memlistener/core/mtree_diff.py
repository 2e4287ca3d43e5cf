"""What a listener would hear between two dumps of one machine.

Text identifies nothing, so this is matched by what it says:

* Address spaces by name; those of one name in the order they come.
* Regions by name and by the kind that the view prints (``rom`` for what is
  read-only there). So a range stays when start, size, offset, name, kind and
  the nv- mark are the same in both dumps. Size and priority of the region, and
  where it is in the tree, do not count: they are no part of a section, and
  changing them alone is no event. Two regions of one name and kind that trade
  places cannot be seen.

Dirty logging, ROMD mode of what is hidden, eventfds and coalesced ranges are
not in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from memlistener.core.diff import Event, diff
from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.kinds import NONVOLATILE, READONLY, ROMD_MODE
from memlistener.core.mtree import ViewDump, range_kind
from memlistener.core.region import MemoryRegion


@attrs.frozen
class SpaceChange:
    """How an address space differs between two dumps.

    Attributes:
        name: The address space.
        events: `RegionDel`, ascending, then `RegionAdd`, ascending; never empty.
    """

    name: str
    events: tuple[Event, ...]


def diff_dumps(old: Sequence[ViewDump], new: Sequence[ViewDump]) -> list[SpaceChange]:
    """The events by address space, where there are any.

    An address space that only one of the dumps has is empty in the other.
    Those of the old dump come first, in its order.
    """
    before, after = _by_space(old), _by_space(new)
    known: dict[tuple[str, str], MemoryRegion] = {}
    empty = FlatView()
    changes: list[SpaceChange] = []
    for key in [*before, *(key for key in after if key not in before)]:
        events = diff(
            _matched(before.get(key, empty), known), _matched(after.get(key, empty), known)
        )
        if events:
            changes.append(SpaceChange(key[0], tuple(events)))
    return changes


def _by_space(dumps: Sequence[ViewDump]) -> dict[tuple[str, int], FlatView]:
    """Each address space's view, by name and how many of that name came before."""
    found: dict[tuple[str, int], FlatView] = {}
    counts: dict[str, int] = {}
    for dump in dumps:
        for space in dump.spaces:
            count = counts.get(space.name, 0)
            counts[space.name] = count + 1
            found[space.name, count] = dump.view
    return found


def _matched(
    view: Iterable[FlatRange], known: dict[tuple[str, str], MemoryRegion]
) -> list[FlatRange]:
    """The ranges with one region for all of a name and kind: the first that was met."""
    ranges: list[FlatRange] = []
    for each in view:
        region = known.setdefault((each.region.name, range_kind(each)), each.region)
        flags = each.flags & (READONLY | NONVOLATILE) | ROMD_MODE
        ranges.append(FlatRange(each.start, each.size, region, each.offset, flags))
    return ranges
