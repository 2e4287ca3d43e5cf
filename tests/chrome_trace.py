"""Chrome's trace event format, read back: tracks, spans, and what they have to obey."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import attrs


@attrs.frozen
class Span:
    """Of one track. Times are in us, exactly as they are in the file."""

    name: str
    began: Decimal
    ended: Decimal
    args: dict[str, Any] = attrs.field(factory=dict)

    def contains(self, other: Span) -> bool:
        """Whether ``other`` lies in it."""
        return self.began <= other.began and other.ended <= self.ended

    def overlaps(self, other: Span) -> bool:
        """Whether they have time in common."""
        return self.began < other.ended and other.began < self.ended


@attrs.frozen
class Bracket:
    """A bracket, with what lies in it."""

    span: Span
    wait: Span | None
    ioctls: list[Span]

    @property
    def quiet(self) -> Span:
        """From when all vCPUs were outside until they could enter again."""
        began = self.wait.ended if self.wait is not None else self.span.began
        return Span("quiet", began, self.span.ended)


class Trace:
    """A parsed trace.

    Args:
        text: The file.
    """

    def __init__(self, text: str) -> None:
        self.events = json.loads(text, parse_float=Decimal)
        names = {
            each["tid"]: each["args"]["name"]
            for each in self.events
            if each["name"] == "thread_name"
        }
        self.spans: dict[str, list[Span]] = {name: [] for name in names.values()}
        self.instants: dict[str, list[tuple[str, Decimal]]] = {name: [] for name in names.values()}
        for each in self.events:
            if each["ph"] == "X":
                began = Decimal(each["ts"])
                span = Span(each["name"], began, began + Decimal(each["dur"]), each.get("args", {}))
                self.spans[names[each["tid"]]].append(span)
            elif each["ph"] == "i":
                self.instants[names[each["tid"]]].append((each["name"], Decimal(each["ts"])))
            else:
                assert each["ph"] == "M", each

    @property
    def vcpus(self) -> list[str]:
        """The tracks of vCPUs."""
        return [name for name in self.spans if name.startswith("vcpu ")]

    def of(self, track: str, *names: str) -> list[Span]:
        """A track's spans of these names, in order of time."""
        return sorted(
            (each for each in self.spans[track] if each.name in names),
            key=lambda each: each.began,
        )

    @property
    def ioctls(self) -> list[Span]:
        """Those of the VM, bracketed or not."""
        return self.of("brackets", "KVM_SET_USER_MEMORY_REGION")

    def brackets(self) -> list[Bracket]:
        """All of them, in order of time."""
        found = []
        for each in sorted(self.spans["brackets"], key=lambda each: each.began):
            if each.name.startswith("bracket: "):
                waits = [w for w in self.of("brackets", "wait for the vCPUs") if each.contains(w)]
                assert len(waits) <= 1
                inside = [one for one in self.ioctls if each.contains(one)]
                found.append(Bracket(each, waits[0] if waits else None, inside))
        return found

    def check(self) -> None:
        """On each track spans nest, and a vCPU is in one place at a time."""
        for name, spans in self.spans.items():
            assert_nested(spans)
            if name in self.vcpus:
                assert all(depth == 0 for depth, _ in nested(spans)), name


def nested(spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with how many others it lies in."""
    open_spans: list[Span] = []
    for each in sorted(spans, key=lambda each: (each.began, -each.ended)):
        while open_spans and open_spans[-1].ended <= each.began:
            open_spans.pop()
        yield len(open_spans), each
        open_spans.append(each)


def assert_nested(spans: list[Span]) -> None:
    """Any two spans lie in one another or have no time in common."""
    open_spans: list[Span] = []
    for each in sorted(spans, key=lambda each: (each.began, -each.ended)):
        while open_spans and open_spans[-1].ended <= each.began:
            open_spans.pop()
        assert not open_spans or open_spans[-1].contains(each), (open_spans[-1], each)
        open_spans.append(each)


def torn(trace: Trace, quiet: Iterable[Span]) -> list[tuple[str, Span, Span]]:
    """Where a vCPU was in the guest during a span of ``quiet``."""
    guests = [(name, each) for name in trace.vcpus for each in trace.of(name, "guest")]
    return [
        (name, guest, each)
        for (name, guest), each in itertools.product(guests, quiet)
        if guest.overlaps(each)
    ]
