"""What tests of trees share: snapshots, an owner that records, random changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st

from memlistener import FlatRange, MemoryRegion, RegionError, TransactionError
from memlistener.core.diff import Event, RegionDel
from memlistener.core.ioeventfd import Attached
from memlistener.core.ways import Sight
from memlistener.testing.strategies import addresses, sizes

from .oracles import TOP

IS_CI = os.environ.get("MEMLISTENER_HYPOTHESIS") == "ci"


def examples(*, dev: int, ci: int) -> settings:
    """How often a property is tried in each of Hypothesis's profiles."""
    return settings(max_examples=ci if IS_CI else dev)


def snapshot(regions: Iterable[MemoryRegion]) -> list[tuple[object, ...]]:
    """Everything public about these regions, to be compared before and after."""
    return [
        (
            each,
            each.kind,
            each.name,
            each.size,
            each.addr,
            each.container,
            each.priority,
            each.enabled,
            each.readonly,
            each.nonvolatile,
            each.unmergeable,
            each.romd_mode,
            each.alias_target,
            each.alias_offset,
            each.subregions,
        )
        for each in regions
    ]


class Journal:
    """Ways back, in the order of the changes."""

    def __init__(self) -> None:
        self.entries: list[Callable[[], None]] = []

    def undo_all(self) -> None:
        while self.entries:
            self.entries.pop()()


class Owner:
    """A `TreeOwner` that writes down what it is told, and refuses when told to."""

    def __init__(self, root: MemoryRegion, journal: Journal | None = None) -> None:
        self.root = root
        self._journal = Journal() if journal is None else journal
        self.damaged: list[tuple[int, int]] = []
        self.asked: list[tuple[MemoryRegion, str]] = []
        self.left: list[MemoryRegion] = []
        self.hung: list[tuple[MemoryRegion, int]] = []
        self.refuses = False
        root._attach_owner(self)

    def check_change(self, region: MemoryRegion, what: str) -> None:
        self.asked.append((region, what))
        if self.refuses:
            raise TransactionError(what)

    def record(self, undo: Callable[[], None]) -> None:
        self._journal.entries.append(undo)

    @property
    def journal(self) -> Journal:
        return self._journal

    def damage(self, low: int, high: int, sight: Sight | None = None) -> None:
        self.damaged.append((low, high))

    def reattached(self, region: MemoryRegion, before: Attached, low: int, high: int) -> None:
        self.hung.append((region, high - low))

    def detached(self, region: MemoryRegion) -> None:
        self.left.append(region)

    def take_damage(self) -> list[tuple[int, int]]:
        """What was damaged since the last time."""
        taken, self.damaged = self.damaged, []
        return taken

    def sees(self, addr: int) -> bool:
        """Whether ``addr`` is in what was damaged."""
        return any(low <= addr < high for low, high in self.damaged)


def replay(events: Iterable[Event], into: dict[int, FlatRange]) -> None:
    """Do to a map what the events say; they have to fit it."""
    for event in events:
        if isinstance(event, RegionDel):
            assert into.pop(event.range.start) == event.range
        else:
            assert event.range.start not in into
            into[event.range.start] = event.range


@attrs.frozen
class Mutation:
    """One random change; ``which`` and ``into`` count regions modulo how many there are."""

    what: str
    which: int
    into: int
    addr: int
    size: int
    priority: int
    flag: bool

    def apply(self, regions: list[MemoryRegion]) -> bool:
        """Make the change; False where it is one that makes no sense there."""
        region = regions[self.which % len(regions)]
        holder = regions[self.into % len(regions)]
        makers: dict[str, Callable[[], Any]] = {
            "add": lambda: self._move(region, holder, None),
            "add_overlap": lambda: self._move(region, holder, self.priority),
            "del": lambda: self._remove(region),
            "enabled": lambda: region.set_enabled(self.flag),
            "address": lambda: region.set_address(self.addr),
            "size": lambda: region.set_size(self.size),
            "alias_offset": lambda: region.set_alias_offset(self.addr),
            "readonly": lambda: region.set_readonly(self.flag),
            "nonvolatile": lambda: region.set_nonvolatile(self.flag),
            "unmergeable": lambda: region.set_unmergeable(self.flag),
            "romd_mode": lambda: region.set_romd_mode(self.flag),
        }
        try:
            makers[self.what]()
        except RegionError:
            return False
        return True

    def _remove(self, region: MemoryRegion) -> None:
        if region.container is not None:
            region.container.del_subregion(region)

    def _move(self, region: MemoryRegion, holder: MemoryRegion, priority: int | None) -> None:
        self._remove(region)
        if priority is None:
            holder.add_subregion(self.addr, region)
        else:
            holder.add_subregion_overlap(self.addr, region, priority)


CHANGES = (
    "add",
    "add_overlap",
    "add_overlap",
    "del",
    "enabled",
    "enabled",
    "address",
    "address",
    "size",
    "alias_offset",
    "readonly",
    "nonvolatile",
    "unmergeable",
    "romd_mode",
)


def mutations(limit: int = TOP) -> st.SearchStrategy[Mutation]:
    return st.builds(
        Mutation,
        what=st.sampled_from(CHANGES),
        which=st.integers(0, 15),
        into=st.integers(0, 15),
        addr=addresses(limit),
        size=sizes(limit),
        priority=st.integers(-2, 2),
        flag=st.booleans(),
    )
