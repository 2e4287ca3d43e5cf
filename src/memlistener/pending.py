"""What an open transaction has gathered so far: `Pending`.

Mutators report to it through their address spaces (`core.change.TreeOwner`):
how to take each change back, and which windows may look different. When the
transaction ends, `Pending.changes` turns that into what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from memlistener.core.diff import diff
from memlistener.core.events import Event, RegionAdd
from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.ioeventfd import NOTHING, Attached, AttachedDiff
from memlistener.core.kinds import LIMIT
from memlistener.core.region import MemoryRegion
from memlistener.core.sharing import view_root
from memlistener.core.ways import Sight

if TYPE_CHECKING:
    from memlistener.address_space import AddressSpace
    from memlistener.memory import MemorySystem

Windows = list[tuple[int, int]]
_EMPTY = FlatView()
_MAP_HOOKS = frozenset({"region_add", "region_del", "log_start", "log_stop"})


@attrs.frozen
class SpaceChange:
    """What a commit does to one address space.

    Attributes:
        space: Which.
        old: Its view before.
        old_root: What it was rendered from (rule F7).
        root: What it is rendered from now.
        new: Its view after; the same object where only what hangs on it changed.
        events: The delete pass and the add pass.
        eventfds: What follows after the passes (rule T9).
    """

    space: AddressSpace
    old: FlatView
    old_root: MemoryRegion | None
    root: MemoryRegion | None
    new: FlatView
    events: Sequence[Event]
    eventfds: Sequence[Event]

    @property
    def quiet(self) -> bool:
        """Whether the map stays, so that begin and commit are not called (rules T9, T10)."""
        return not any(each.hook in _MAP_HOOKS for each in self.events)


class Damage:
    """What may look different in one address space.

    Attributes:
        windows: Where.
        sight: The one sight that all of them were seen through; None for several.
    """

    __slots__ = ("sight", "windows")

    def __init__(self) -> None:
        self.windows: Windows = []
        self.sight: Sight | None = None


class Limbo:
    """Owner of what left the tree in this transaction, until the transaction ends.

    Without it a region could be taken out of the tree, changed while nobody
    looks, and be put back changed when the transaction rolls back.
    """

    def __init__(self, memory: MemorySystem) -> None:
        self._memory = memory
        self._regions: list[MemoryRegion] = []

    @property
    def journal(self) -> object:
        """The journal is the memory system's."""
        return self._memory

    def check_change(self, region: MemoryRegion, what: str) -> None:
        """What is in limbo changes in the transaction only."""
        self._memory._check_change(region, what)

    def record(self, undo: Callable[[], None]) -> None:
        """Keep the way back."""
        self._memory._pending.journal.append(undo)

    def damage(self, low: int, high: int, sight: Sight | None = None) -> None:
        """Nothing shows what is in limbo."""

    def reattached(self, region: MemoryRegion, before: Attached, low: int, high: int) -> None:
        """Nothing shows what is in limbo, but the old view does, and the new one may again."""
        self._memory._pending.remember(region, before)

    def detached(self, region: MemoryRegion) -> None:
        """``region`` comes into limbo."""
        if self not in region._owners:
            region._attach_owner(self)
            self._regions.append(region)

    def clear(self) -> None:
        """The transaction is over."""
        for region in self._regions:
            region._detach_owner(self)
        self._regions.clear()


class Pending:
    """Journal, damage and limbo of the open transaction, if any."""

    def __init__(self, memory: MemorySystem) -> None:
        self.journal: list[Callable[[], None]] = []
        self._damage: dict[AddressSpace, Damage] = {}
        self._attached: dict[AddressSpace, Windows] = {}
        self._before: dict[MemoryRegion, Attached] = {}
        self._limbo = Limbo(memory)

    @property
    def damaged(self) -> bool:
        """Whether anything may have changed that somebody sees."""
        return bool(self._damage or self._attached)

    def damage(self, space: AddressSpace, low: int, high: int, sight: Sight | None = None) -> None:
        """[low, high) of ``space`` may look different; empty: but not its map."""
        damage = self._damage.get(space)
        if damage is None:
            damage = self._damage[space] = Damage()
        if low < high:
            if not damage.windows:
                damage.sight = sight
            elif damage.sight is not sight:
                damage.sight = None
            windows = damage.windows
            if windows and low <= windows[-1][1] and high >= windows[-1][0]:
                # What a region showed before and what it shows after are often the same.
                windows[-1] = min(low, windows[-1][0]), max(high, windows[-1][1])
            else:
                windows.append((low, high))

    def reattached(
        self, space: AddressSpace, region: MemoryRegion, before: Attached, low: int, high: int
    ) -> None:
        """What hangs on ``region`` changed, which shows in [low, high) of ``space``."""
        self.remember(region, before)
        if low < high:
            self._attached.setdefault(space, []).append((low, high))

    def remember(self, region: MemoryRegion, before: Attached) -> None:
        """What hung on ``region`` when the transaction began, wherever it shows now."""
        self._before.setdefault(region, before)

    def follow(self, region: MemoryRegion) -> None:
        """``region`` left the tree."""
        self._limbo.detached(region)

    def rollback(self, mark: int = 0) -> None:
        """Take back every change of the tree since the journal had ``mark`` entries."""
        while len(self.journal) > mark:
            self.journal.pop()()

    def forget(self) -> None:
        """The transaction is over."""
        self.journal.clear()
        self._damage.clear()
        self._attached.clear()
        self.settle()
        self._before.clear()
        self._limbo.clear()

    def settle(self) -> None:
        """What hangs on regions counts as it is now, for accesses too."""
        for region in self._before:
            region._settle()

    def changes(self, log_mask: int) -> list[SpaceChange]:
        """What differs, address space by address space (rules T1, T5, T10).

        Raises:
            RegionError: The tree cannot be rendered: an alias shows itself.
        """
        found: list[SpaceChange] = []
        views = _Views(self._damage, log_mask)
        concerned = list(self._damage)
        if self._attached:
            concerned += self._attached.keys() - self._damage.keys()
        if len(concerned) > 1:
            concerned.sort(key=_creation)
        for space in concerned:
            old = new = space._view
            root = space._view_root
            events: list[Event] = []
            if space in self._damage:
                root = view_root(space._root)
                if self._damage[space].windows or root is not space._view_root:
                    new, events = views.next(space, root)
                if events and "region_nop" in space._hooks:
                    events = diff(old, new, nops=True)
            eventfds: list[Event] = []
            stayed = self._stayed(space, new, events) if self._before else []
            if stayed or any(each.range.region._attached is not NOTHING for each in events):
                attached = AttachedDiff(self._before)
                eventfds = attached.eventfds(old, new, events, stayed)
                events = attached.coalesced(events, stayed)
            if new is not old or root is not space._view_root or events or eventfds:
                found.append(SpaceChange(space, old, space._view_root, root, new, events, eventfds))
        return found

    def _stayed(
        self, space: AddressSpace, new: FlatView, events: Sequence[Event]
    ) -> list[FlatRange]:
        """Ranges in both views of regions whose attachments changed."""
        # A region that was hidden when it changed, and shows again, did so in damage.
        windows = self._attached.get(space, [])
        if space in self._damage:
            windows = windows + self._damage[space].windows
        added = {each.range for each in events if isinstance(each, RegionAdd)}
        stayed: dict[FlatRange, None] = {}
        for low, high in windows:
            for each in new.overlapping(max(low, 0), min(high, LIMIT)):
                if each.region in self._before and each not in added:
                    stayed[each] = None
        return list(stayed)


class _Views:
    """The next views of one commit: rendered once for all that share one (rule F7)."""

    def __init__(self, damage: dict[AddressSpace, Damage], log_mask: int) -> None:
        self._damage = damage
        self._log_mask = log_mask
        self._views: dict[MemoryRegion | None, FlatView] = {}
        self._events: dict[tuple[int, int], list[Event]] = {}  # of a pair of views

    def next(self, space: AddressSpace, root: MemoryRegion | None) -> tuple[FlatView, list[Event]]:
        """The view of ``root``, and how it differs from what ``space`` shows now."""
        old = space._view
        known = self._views.get(root)
        if known is None:
            known = self._elsewhere(space, root)
        if known is not None:
            new = known
        elif root is None:
            new = _EMPTY
        else:
            damage = self._damage[space]
            sight = damage.sight
            if sight is not None and not sight.holds:
                sight = None
            new, events = old._updated(root, damage.windows, self._log_mask, sight)
            self._events[id(old), id(new)] = events
        self._views[root] = new
        if new is old:
            return old, []
        pair = id(old), id(new)
        if pair not in self._events:
            self._events[pair] = diff(old, new)
        if not self._events[pair]:
            return new, []
        return new, self._events[pair]

    def _elsewhere(self, space: AddressSpace, root: MemoryRegion | None) -> FlatView | None:
        """The view of an address space that came down to ``root`` already, and stays."""
        for each in space.memory._sharing.of(root):
            damage = self._damage.get(each)
            if damage is None or not damage.windows:
                return each._view
        return None


def _creation(space: AddressSpace) -> int:
    return space._number
