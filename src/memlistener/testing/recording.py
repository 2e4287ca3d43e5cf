"""`RecordingListener`: what was heard, in order, to be compared with a list."""

from __future__ import annotations

import attrs

from memlistener.listener import ListenerPriority, MemoryListener, MemoryRegionSection


@attrs.frozen
class Heard:
    """One call of a hook.

    Attributes:
        hook: Its name.
        section: What it was about; None for begin and commit.
        listener: The recorder's name, to tell several in one log.
    """

    hook: str
    section: MemoryRegionSection | None = None
    listener: str = ""

    def __str__(self) -> str:
        who = f"{self.listener}: " if self.listener else ""
        if self.section is None:
            return f"{who}{self.hook}"
        each = self.section
        return (
            f"{who}{self.hook} [{each.offset_within_address_space:#x}, {each.end:#x}) "
            f"{each.region.name}+{each.offset_within_region:#x}"
        )


class RecordingListener(MemoryListener):
    """Records every hook it hears.

    Args:
        name: Recorded with each entry; useful where listeners share a ``log``.
        priority: See `ListenerPriority`.
        log: A list to append to; its own by default.
        nops: Whether to hear region_nop too.

    Attributes:
        heard: What was heard, in order: `Heard` values; ``str()`` of one reads
            ``region_add [0x0, 0x1000) ram+0x0``.
        ranges: The map as this listener believes it to be, by first address.
    """

    def __init__(
        self,
        name: str = "",
        *,
        priority: int = ListenerPriority.MIN,
        log: list[Heard] | None = None,
        nops: bool = False,
    ) -> None:
        self.name = name
        self.priority = priority
        self.heard: list[Heard] = [] if log is None else log
        self.ranges: dict[int, MemoryRegionSection] = {}
        if nops:
            # An instance attribute overrides a hook as well as a method does.
            self.region_nop = self._region_nop  # type: ignore[method-assign]

    @property
    def trace(self) -> list[str]:
        """What was heard, as text: for comparing with a literal."""
        return [str(each) for each in self.heard]

    def clear(self) -> None:
        """Forget what was heard, but not the map."""
        self.heard.clear()

    def begin(self) -> None:
        """Recorded."""
        self.heard.append(Heard("begin", None, self.name))

    def commit(self) -> None:
        """Recorded."""
        self.heard.append(Heard("commit", None, self.name))

    def region_add(self, section: MemoryRegionSection) -> None:
        """Recorded, and put into ``ranges``, where nothing may be in its place."""
        self.heard.append(Heard("region_add", section, self.name))
        start = section.offset_within_address_space
        assert start not in self.ranges, f"{section} is added over {self.ranges[start]}"
        self.ranges[start] = section

    def region_del(self, section: MemoryRegionSection) -> None:
        """Recorded, and taken out of ``ranges``, where it has to be."""
        self.heard.append(Heard("region_del", section, self.name))
        found = self.ranges.pop(section.offset_within_address_space, None)
        assert found == section, f"{section} is deleted, and {found} was there"

    def _region_nop(self, section: MemoryRegionSection) -> None:
        self.heard.append(Heard("region_nop", section, self.name))
