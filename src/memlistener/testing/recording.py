"""`RecordingListener`: what was heard, in order, to be compared with a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs

from memlistener.core.dirty import DirtyClient
from memlistener.core.ioeventfd import IoEventFd
from memlistener.core.kinds import BACKED
from memlistener.core.region import MemoryRegion
from memlistener.listener import HOOKS, ListenerPriority, MemoryListener, MemoryRegionSection

_EVENTFDS = ("eventfd_add", "eventfd_del")
_COALESCED = ("coalesced_io_add", "coalesced_io_del")
_LOGS = (
    "log_start",
    "log_stop",
    "log_sync",
    "log_clear",
    "log_global_start",
    "log_global_stop",
    "log_global_after_sync",
)
_MIGRATION = 1 << DirtyClient.MIGRATION
_ALWAYS = frozenset({"begin", "commit", "region_add", "region_del"})


@attrs.frozen
class Heard:
    """One call of a hook.

    Attributes:
        hook: Its name.
        section: What it was about; None for begin, commit and the global ones.
        listener: The recorder's name, to tell several in one log.
        arguments: What came behind the section: ``(old, new)`` masks,
            ``(addr, size)`` of a coalesced range, ``(match_data, data,
            eventfd)``.
    """

    hook: str
    section: MemoryRegionSection | None = None
    listener: str = ""
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        who = f"{self.listener}: " if self.listener else ""
        if self.section is None:
            return f"{who}{self.hook}"
        each = self.section
        return (
            f"{who}{self.hook} [{each.offset_within_address_space:#x}, {each.end:#x}) "
            f"{each.region.name}+{each.offset_within_region:#x}{self._behind()}"
        )

    def _behind(self) -> str:
        if self.hook in _EVENTFDS:
            match_data, data, eventfd = self.arguments
            return f"{f' data {data:#x}' if match_data else ''} -> {eventfd}"
        if self.hook in _COALESCED:
            addr, size = self.arguments
            return f" coalesced [{addr:#x}, {addr + size:#x})"
        if self.hook in ("log_start", "log_stop"):
            old, new = self.arguments
            return f" {old:#x} -> {new:#x}"
        return ""


class RecordingListener(MemoryListener):
    """Records every hook it hears, and insists that what it hears makes sense.

    Hears begin, commit, region_add and region_del, and of the others those that
    are asked for: a listener that has a hook costs, and changes what is called.

    Args:
        name: Recorded with each entry; useful where listeners share a ``log``.
        priority: See `ListenerPriority`.
        log: A list to append to; its own by default.
        nops: Whether to hear region_nop too.
        eventfds: Whether to hear eventfd_add and eventfd_del.
        coalesced: Whether to hear coalesced_io_add and coalesced_io_del.
        logs: Whether to hear the log hooks; log_sync, not log_sync_global, as
            a listener has the one or the other.
        hooks: Names of further hooks to hear.

    Attributes:
        heard: What was heard, in order: `Heard` values; ``str()`` of one reads
            ``region_add [0x0, 0x1000) ram+0x0``.
        ranges: The map as this listener believes it to be, by first address.
        eventfds: The ioeventfds it believes in, at absolute addresses.
        coalesced: The coalesced ranges it believes in: how often it was told
            of each (address, size). Two of a region may look the same where
            only a part of it shows.
        logged: With ``logs``, the dirty-log masks it believes in, by first
            address, where they are not 0. A range that is added with logging
            on says so at registration only (rule T6), so the region is asked.
        logging: With ``logs``, whether it believes that all memory is logged.

    Raises:
        ValueError: ``hooks`` names something that is none.
    """

    def __init__(
        self,
        name: str = "",
        *,
        priority: int = ListenerPriority.MIN,
        log: list[Heard] | None = None,
        nops: bool = False,
        eventfds: bool = False,
        coalesced: bool = False,
        logs: bool = False,
        hooks: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.priority = priority
        self.heard: list[Heard] = [] if log is None else log
        self.ranges: dict[int, MemoryRegionSection] = {}
        self.eventfds: dict[IoEventFd, MemoryRegionSection] = {}
        self.coalesced: Counter[tuple[int, int]] = Counter()
        self.logged: dict[int, int] = {}
        self.logging = False
        self._begun = False
        asked = set(hooks)
        if not asked <= set(HOOKS):
            raise ValueError(f"no hooks of a MemoryListener: {sorted(asked - set(HOOKS))}")
        for wanted, names in (
            (nops, ("region_nop",)),
            (eventfds, _EVENTFDS),
            (coalesced, _COALESCED),
            (logs, _LOGS),
        ):
            asked.update(names if wanted else ())
        for hook in asked - _ALWAYS:
            # An instance attribute overrides a hook as well as a method does.
            setattr(self, hook, getattr(self, f"_{hook}"))

    @property
    def trace(self) -> list[str]:
        """What was heard, as text: for comparing with a literal."""
        return [str(each) for each in self.heard]

    def clear(self) -> None:
        """Forget what was heard, but not the map."""
        self.heard.clear()

    def _hear(
        self, hook: str, section: MemoryRegionSection | None = None, *arguments: object
    ) -> None:
        self.heard.append(Heard(hook, section, self.name, arguments))

    def begin(self) -> None:
        """Recorded."""
        self._hear("begin")
        self._begun = True

    def commit(self) -> None:
        """Recorded."""
        self._hear("commit")
        self._begun = False

    def region_add(self, section: MemoryRegionSection) -> None:
        """Recorded, and put into ``ranges``, where nothing may be in its place."""
        self._hear("region_add", section)
        start = section.offset_within_address_space
        assert start not in self.ranges, f"{section} is added over {self.ranges[start]}"
        self.ranges[start] = section
        region = section.region
        self._log(section, region.dirty_log_mask | _MIGRATION * self._logs_all_of(region))

    def region_del(self, section: MemoryRegionSection) -> None:
        """Recorded, and taken out of ``ranges``, where it has to be."""
        self._hear("region_del", section)
        start = section.offset_within_address_space
        found = self.ranges.pop(start, None)
        assert found == section, f"{section} is deleted, and {found} was there"
        self.logged.pop(start, None)

    def _region_nop(self, section: MemoryRegionSection) -> None:
        self._hear("region_nop", section)
        self._insist_on(section)

    def _eventfd_add(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> None:
        self._hear("eventfd_add", section, match_data, data, eventfd)
        fd = _io_event_fd(section, match_data, data, eventfd)
        assert fd not in self.eventfds, f"{fd} is added twice"
        self.eventfds[fd] = section

    def _eventfd_del(
        self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
    ) -> None:
        self._hear("eventfd_del", section, match_data, data, eventfd)
        fd = _io_event_fd(section, match_data, data, eventfd)
        assert fd in self.eventfds, f"{fd} is deleted, and was not there"
        del self.eventfds[fd]

    def _coalesced_io_add(self, section: MemoryRegionSection, addr: int, size: int) -> None:
        self._hear("coalesced_io_add", section, addr, size)
        self._insist_on(section, addr, addr + size)
        self.coalesced[addr, size] += 1

    def _coalesced_io_del(self, section: MemoryRegionSection, addr: int, size: int) -> None:
        self._hear("coalesced_io_del", section, addr, size)
        self._insist_on(section, addr, addr + size)
        assert self.coalesced[addr, size], (
            f"[{addr:#x}, {addr + size:#x}) is not to be coalesced any more, and was not"
        )
        self.coalesced[addr, size] -= 1
        if not self.coalesced[addr, size]:
            del self.coalesced[addr, size]

    def _log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        self._hear("log_start", section, old, new)
        self._insist_on(section)
        assert new & ~old, f"{section} gained no client: {old:#x} -> {new:#x}"
        self._log(section, old | new)

    def _log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        self._hear("log_stop", section, old, new)
        self._insist_on(section)
        assert old & ~new, f"{section} lost no client: {old:#x} -> {new:#x}"
        self._log(section, new)

    def _log(self, section: MemoryRegionSection, mask: int) -> None:
        start = section.offset_within_address_space
        self.logged.pop(start, None)
        if mask:
            self.logged[start] = mask

    def _logs_all_of(self, region: MemoryRegion) -> bool:
        return self.logging and region.kind in BACKED

    def _log_sync(self, section: MemoryRegionSection) -> None:
        self._hear("log_sync", section)
        self._insist_on(section)
        start = section.offset_within_address_space
        assert start in self.logged, f"{section} does not log, and is synced"

    def _log_sync_global(self) -> None:
        self._hear("log_sync_global")

    def _log_clear(self, section: MemoryRegionSection) -> None:
        self._hear("log_clear", section)
        start = section.offset_within_address_space
        assert any(
            each.region is section.region
            and each.offset_within_address_space <= start < section.end <= each.end
            for each in self.ranges.values()
        ), f"{section} is cleared, and is not shown"

    def _log_global_start(self) -> None:
        self._hear("log_global_start")
        # When it registers it may hear so again: unregistering says nothing (rule T8).
        assert self._begun or not self.logging, "logging of all memory starts twice"
        self.logging = True

    def _log_global_stop(self) -> None:
        self._hear("log_global_stop")
        assert self._begun or self.logging, "logging of all memory stops, and was not on"
        self.logging = False

    def _log_global_after_sync(self) -> None:
        self._hear("log_global_after_sync")

    def _insist_on(
        self, section: MemoryRegionSection, low: int | None = None, high: int | None = None
    ) -> None:
        """The section is in the map as it is now, and [low, high) in the section."""
        start = section.offset_within_address_space
        found = self.ranges.get(start)
        assert found == section, f"{section} is not in the map, where {found} is"
        if low is not None and high is not None:
            assert start <= low < high <= section.end, (
                f"[{low:#x}, {high:#x}) is not inside {section}"
            )


def _io_event_fd(
    section: MemoryRegionSection, match_data: bool, data: int, eventfd: Any
) -> IoEventFd:
    return IoEventFd(
        section.offset_within_address_space,
        section.size,
        data if match_data else None,
        eventfd,
    )
