"""Rules T3 to T8 in the most obvious way: an oracle for what listeners hear.

Pure functions over plain values, written from the numbered rules alone and
sharing no code with the library: ranges and listeners in, the expected trace
out. `AddressSpace`s are changed one after the other; each is a call of `delivery`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from memlistener import FlatRange, MemoryRegion, MemoryRegionSection
from memlistener.testing.recording import Heard


@attrs.frozen
class Range:
    """All that rule T5 compares."""

    address: int
    size: int
    region: MemoryRegion
    offset: int
    romd_mode: bool
    readonly: bool
    nonvolatile: bool
    unmergeable: bool

    @classmethod
    def all_of(cls, view: Iterable[FlatRange]) -> list[Range]:
        return [
            cls(
                each.start,
                each.size,
                each.region,
                each.offset,
                each.romd_mode,
                each.readonly,
                each.nonvolatile,
                each.unmergeable,
            )
            for each in view
        ]


@attrs.frozen
class Who:
    """A listener as the rules see it."""

    name: str
    priority: int
    hears_nops: bool = False


@attrs.frozen
class Call:
    """One hook called: what `Heard` is, without the names of ROMD modes and spaces."""

    listener: str
    hook: str
    section: tuple[object, ...] | None = None

    @classmethod
    def about(cls, who: Who, hook: str, range_: Range) -> Call:
        return cls(
            who.name,
            hook,
            (
                range_.region,
                range_.address,
                range_.size,
                range_.offset,
                range_.readonly,
                range_.nonvolatile,
                range_.unmergeable,
            ),
        )

    @classmethod
    def heard(cls, heard: Heard) -> Call:
        section = heard.section
        return cls(heard.listener, heard.hook, None if section is None else section_values(section))


def section_values(section: MemoryRegionSection) -> tuple[object, ...]:
    """A section as `Call.section` has it."""
    return (
        section.region,
        section.offset_within_address_space,
        section.size,
        section.offset_within_region,
        section.readonly,
        section.nonvolatile,
        section.unmergeable,
    )


def ascending(listeners: Sequence[Who]) -> list[Who]:
    """Rule T4; ``listeners`` come in registration order."""
    numbered = list(enumerate(listeners))
    return [who for _, who in sorted(numbered, key=lambda each: (each[1].priority, each[0]))]


def delivery(old: Sequence[Range], new: Sequence[Range], listeners: Sequence[Who]) -> list[Call]:
    """What the listeners of one address space hear in one transaction."""
    if list(old) == list(new):
        return []  # T10
    upwards = ascending(listeners)
    downwards = upwards[::-1]
    calls = [Call(who.name, "begin") for who in upwards]
    for each in sorted(old, key=lambda each: each.address):  # T3, T5, T6: the delete pass
        if each not in new:
            calls += [Call.about(who, "region_del", each) for who in downwards]
    for each in sorted(new, key=lambda each: each.address):  # the add pass
        if each not in old:
            calls += [Call.about(who, "region_add", each) for who in upwards]
        else:  # T7
            calls += [Call.about(who, "region_nop", each) for who in upwards if who.hears_nops]
    return calls + [Call(who.name, "commit") for who in upwards]


def replay(view: Sequence[Range], who: Who, hook: str) -> list[Call]:
    """Rule T8: ``hook`` is region_add to register, region_del to unregister."""
    ranges = sorted(view, key=lambda each: each.address)
    return [
        Call(who.name, "begin"),
        *(Call.about(who, hook, each) for each in ranges),
        Call(who.name, "commit"),
    ]
