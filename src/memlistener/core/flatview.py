"""`FlatRange` and `FlatView`: what a tree of regions shows, as an immutable value.

A view is a sequence of ranges in ascending order, none touching a neighbour
that it could be merged with. It is stored in chunks of a few hundred ranges, so
that a new view shares with the old one all the chunks that did not change: the
price of a small change is one chunk and the list of chunks, whatever the size
of the map. Nothing is ever modified, so a view can be read from any thread
without a lock, and stays whole for as long as anybody holds it.

Rendering itself is in `memlistener.core.render`.
"""

from __future__ import annotations

import gc
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from memlistener.core.diff import Event, diff
from memlistener.core.kinds import (
    BACKED,
    LIMIT,
    LOG_SHIFT,
    NONVOLATILE,
    READONLY,
    ROMD_MODE,
    UNMERGEABLE,
)
from memlistener.core.region import MemoryRegion
from memlistener.core.render import Piece, render
from memlistener.core.ways import Sight
from memlistener.errors import RegionTypeError

T = TypeVar("T")
Starts: TypeAlias = "array[int]"

# Ranges in a full chunk. Replacing a range copies one chunk of this size and a
# list of len(view) / this: at 256 both stay small up to a million ranges.
_CHUNK = 256
# Windows with so few ranges between them are updated in one go.
_CLOSE = 8


class FlatRange(NamedTuple):
    """A run of addresses that shows one stretch of one region.

    A tuple, because views of a million are made and a frozen attrs class takes
    five times as long to construct.

    Attributes:
        start: First address.
        size: Bytes.
        region: What shows; never a container or an alias.
        offset: Where in ``region`` it starts, in bytes.
        flags: The flags below, packed.
    """

    start: int
    size: int
    region: MemoryRegion
    offset: int
    flags: int

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.start + self.size

    @property
    def readonly(self) -> bool:
        """Whether the region, or anything above it on the way, is read-only."""
        return bool(self.flags & READONLY)

    @property
    def romd_mode(self) -> bool:
        """Whether a ROM device is read as memory; True for other regions."""
        return bool(self.flags & ROMD_MODE)

    @property
    def nonvolatile(self) -> bool:
        """Whether the memory outlives the machine."""
        return bool(self.flags & NONVOLATILE)

    @property
    def unmergeable(self) -> bool:
        """Whether the range stays apart from its neighbours."""
        return bool(self.flags & UNMERGEABLE)

    @property
    def dirty_log_mask(self) -> int:
        """One bit for each client that logs writes to the range."""
        return self.flags >> LOG_SHIFT

    def __repr__(self) -> str:
        flags = "".join(
            f" {name}" for name in ("readonly", "nonvolatile", "unmergeable") if getattr(self, name)
        )
        if not self.flags & ROMD_MODE:
            flags += " not-romd"
        return (
            f"<FlatRange [{self.start:#x}, {self.end:#x}) {self.region.kind.value} "
            f"{self.region.name!r} +{self.offset:#x}{flags}>"
        )


def mergeable(left: FlatRange, right: FlatRange) -> bool:
    """Rule F6, for two ranges in ascending order."""
    return (
        left[2] is right[2]
        and left[0] + left[1] == right[0]
        and left[3] + left[1] == right[3]
        and left[4] == right[4]
        and not left[4] & UNMERGEABLE
    )


class FlatView:
    """What an address space shows (QEMU's ``FlatView``): immutable, ascending.

    Make one with `FlatView.render`. ``len(view)`` is the number of ranges and
    iterating gives them; two views are equal when their ranges are.
    """

    __slots__ = ("_chunks", "_firsts", "_length", "_starts")

    def __init__(self, ranges: Iterable[FlatRange] = ()) -> None:
        """A view of these ranges, which must be in order, apart and merged."""
        whole = tuple(ranges)
        self._set(_chunked(whole), len(whole))

    def _set(self, chunks: list[tuple[FlatRange, ...]], length: int) -> None:
        self._chunks = chunks
        self._starts = [_addresses(chunk) for chunk in chunks]
        self._firsts = [starts[0] for starts in self._starts]
        self._length = length

    @classmethod
    def render(cls, root: MemoryRegion, *, log_mask: int = 0) -> FlatView:
        """Flatten the tree below ``root`` (rules F1 to F6). O(n log n), pure.

        Args:
            root: Rendered at its own `MemoryRegion.addr`, clipped to 64 bits.
            log_mask: Flags that all memory gets: that everything is logged.

        Raises:
            RegionError: An alias shows itself, or ``root`` is no region.
        """
        if not isinstance(root, MemoryRegion):
            raise RegionTypeError(f"what is rendered is a MemoryRegion, not {root!r}")
        # A million tuples that all stay: the cyclic collector would look through
        # them again and again, and triples the time from 100,000 ranges on.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return cls(_joined(render(root, 0, LIMIT), log_mask))
        finally:
            if collecting:
                gc.enable()

    # ---- reading --------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[FlatRange]:
        for chunk in self._chunks:
            yield from chunk

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlatView):
            return NotImplemented
        if self is other:
            return True
        return self._length == other._length and all(
            one == two for one, two in zip(self, other, strict=True)
        )

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __copy__(self) -> FlatView:
        return self

    def __deepcopy__(self, memo: object) -> FlatView:
        return self

    def __repr__(self) -> str:
        return f"<FlatView of {self._length} ranges>"

    def __str__(self) -> str:
        """One line a range, ascending, for people and for comparing in tests."""
        return "\n".join(repr(each)[11:-1] for each in self)

    def lookup(self, addr: int) -> FlatRange | None:
        """The range that covers ``addr``, or None (rule F8).

        O(log n), without a lock, from any thread.
        """
        chunk = bisect_right(self._firsts, addr) - 1
        if chunk < 0:
            return None
        starts = self._starts[chunk]
        index = bisect_right(starts, addr) - 1
        found = self._chunks[chunk][index]
        return found if addr - starts[index] < found[1] else None

    def overlapping(self, low: int, high: int) -> Iterator[FlatRange]:
        """The ranges that reach into [low, high), ascending. O(log n + found)."""
        chunk = max(bisect_right(self._firsts, low) - 1, 0)
        for each in range(chunk, len(self._chunks)):
            start = bisect_right(self._starts[each], low) - 1 if each == chunk else 0
            for found in self._chunks[each][max(start, 0) :]:
                if found[0] >= high:
                    return
                if found[0] + found[1] > low:
                    yield found

    # ---- making the next view ---------------------------------------------------

    def updated(
        self,
        root: MemoryRegion,
        windows: Sequence[tuple[int, int]],
        *,
        log_mask: int = 0,
        sight: Sight | None = None,
    ) -> tuple[FlatView, list[Event]]:
        """The view after a change that can show only inside ``windows``.

        Renders those windows and shares the rest: O(log n + what is in them).

        Args:
            root: The tree as it is now.
            windows: [low, high) each; in any order, may overlap.
            log_mask: As for `render`.
            sight: One that holds, of a region below ``root``: a window inside it
                need not be rendered from the root.

        Returns:
            The new view and what differs, deletes first, both ascending (rule
            T5), without a word on ranges that stay. Where nothing differs the
            view is ``self``.
        """
        source = _Source(root, sight)
        union = _union(windows)
        if len(union) == 1:  # as most are
            return self._updated(source, union, log_mask)
        groups = self._groups(union)
        if len(groups) == 1:
            return self._updated(source, union, log_mask)
        view = self
        dels: list[Event] = []
        adds: list[Event] = []
        for group in groups:
            view, events = view._updated(source, group, log_mask)
            for event in events:
                (dels if event.is_delete else adds).append(event)
        return view, dels + adds

    def _groups(self, windows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The windows, those together that touch one range, or lie close by each other.

        The former must not be taken one by one; the latter are cheaper together:
        a region that moves damages two windows, most often of one chunk.
        """
        groups: list[list[tuple[int, int]]] = []
        after = (-1, 0)
        for low, high in windows:
            chunk, index = self._position(low)
            if (chunk, index) < after or (chunk == after[0] and index - after[1] <= _CLOSE):
                groups[-1].append((low, high))
            else:
                groups.append([(low, high)])
            after = self._position_after(high)
        return groups

    def _updated(
        self, source: _Source, windows: list[tuple[int, int]], log_mask: int
    ) -> tuple[FlatView, list[Event]]:
        # The old ranges that reach into a window or touch it: those can merge
        # with what is rendered now, all others cannot.
        first_chunk, first = self._position(windows[0][0])
        last_chunk, last = self._position_after(windows[-1][1])
        old = list(self._between(first_chunk, first, last_chunk, last))
        for each in old:
            if each[4] & UNMERGEABLE:
                windows = _widened(windows, old)
                break
        pieces: list[FlatRange] = []
        at = 0  # up to here everything is in pieces
        kept = iter(old)
        left = next(kept, None)
        for low, high in windows:
            # What lies before the window, and of a range that reaches into it
            # the part before it.
            while left is not None and left[0] < low:
                end = left[0] + left[1]
                if at <= left[0] and end <= low:
                    pieces.append(left)
                elif max(at, left[0]) < min(low, end):
                    pieces.append(_cut(left, max(at, left[0]), min(low, end)))
                if end > low:
                    break
                left = next(kept, None)
            pieces.extend(_joined(source.render(low, high), log_mask))
            at = high
            while left is not None and left[0] + left[1] <= high:
                left = next(kept, None)
        while left is not None:
            whole = at <= left[0]
            pieces.append(left if whole else _cut(left, at, left[0] + left[1]))
            left = next(kept, None)
        new = _merged(pieces)
        events = diff(old, new)
        if not events:
            return self, []
        return self._spliced(first_chunk, first, last_chunk, last, new), events

    def _position(self, low: int) -> tuple[int, int]:
        """Chunk and index of the first range that reaches to ``low`` or beyond."""
        if not self._chunks:
            return 0, 0
        chunk = max(bisect_left(self._firsts, low) - 1, 0)
        index = max(bisect_left(self._starts[chunk], low) - 1, 0)
        each = self._chunks[chunk][index]
        if each[0] + each[1] < low:
            index += 1
            if index == len(self._chunks[chunk]):
                return chunk + 1, 0
        return chunk, index

    def _position_after(self, high: int) -> tuple[int, int]:
        """Chunk and index of the first range that starts above ``high``."""
        if not self._chunks:
            return 0, 0
        chunk = max(bisect_right(self._firsts, high) - 1, 0)
        index = bisect_right(self._starts[chunk], high)
        if index == len(self._chunks[chunk]):
            return chunk + 1, 0
        return chunk, index

    def _between(
        self, first_chunk: int, first: int, last_chunk: int, last: int
    ) -> Iterator[FlatRange]:
        for chunk in range(first_chunk, min(last_chunk + 1, len(self._chunks))):
            low = first if chunk == first_chunk else 0
            high = last if chunk == last_chunk else None
            yield from self._chunks[chunk][low:high]

    def _spliced(
        self, first_chunk: int, first: int, last_chunk: int, last: int, new: list[FlatRange]
    ) -> FlatView:
        chunks = self._chunks
        if first_chunk == len(chunks) and chunks:
            # Behind the last range: go on with the last chunk, not with a new one.
            first_chunk = last_chunk = first_chunk - 1
            first = last = len(chunks[first_chunk])
        head = chunks[first_chunk][:first] if first else ()
        tail = chunks[last_chunk][last:] if last else ()
        stop = last_chunk + 1 if last else last_chunk
        middle = (*head, *new, *tail)
        starts = _addresses(new)
        if first:
            starts = self._starts[first_chunk][:first] + starts
        if last:
            starts += self._starts[last_chunk][last:]
        # A chunk that became small takes its neighbour in, so that a view which
        # shrinks does not end as many chunks of a range or two.
        if len(middle) < _CHUNK // 4 and stop < len(chunks):
            middle = (*middle, *chunks[stop])
            starts = starts + self._starts[stop]
            stop += 1
        view = FlatView.__new__(FlatView)
        view._chunks = _replaced(chunks, first_chunk, stop, _chunked(middle))
        all_starts = [starts] if len(starts) <= 2 * _CHUNK else _cut_up(starts)
        if not starts:
            all_starts = []
        view._starts = _replaced(self._starts, first_chunk, stop, all_starts)
        view._firsts = _replaced(self._firsts, first_chunk, stop, [each[0] for each in all_starts])
        view._length = self._length - sum(map(len, chunks[first_chunk:stop])) + len(middle)
        return view

    # ---- checking -----------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant of the view and of its storage. O(n), for tests."""
        assert self._length == sum(map(len, self._chunks))
        assert len(self._chunks) == len(self._starts) == len(self._firsts)
        for chunk, starts, first in zip(self._chunks, self._starts, self._firsts, strict=True):
            assert 0 < len(chunk) <= 2 * _CHUNK
            assert list(starts) == [each.start for each in chunk]
            assert first == starts[0]
        previous: FlatRange | None = None
        for each in self:
            assert each.size > 0, each
            assert 0 <= each.start < each.end <= LIMIT, each
            assert each.region._terminates, each
            assert each.offset >= 0, each
            if previous is not None:
                assert previous.end <= each.start, (previous, each)
                assert not mergeable(previous, each), (previous, each)
            previous = each


class _Source:
    """Where windows are rendered from: a tree, or the part of it that is alone in a sight."""

    __slots__ = ("_root", "_sight", "_top")

    def __init__(self, root: MemoryRegion, sight: Sight | None) -> None:
        self._root = root
        self._sight = sight
        self._top = None if sight is None else sight.top()

    def render(self, low: int, high: int) -> Iterator[Piece]:
        sight, top = self._sight, self._top
        if sight is None or top is None or low < sight.low or high > sight.high:
            return render(self._root, low, high)
        return render(top, low, high, sight.top_base, sight.flags)


def _cut(each: FlatRange, low: int, high: int) -> FlatRange:
    start, _, region, offset, flags = each
    return FlatRange(low, high - low, region, offset + low - start, flags)


def _widened(windows: list[tuple[int, int]], old: list[FlatRange]) -> list[tuple[int, int]]:
    """The windows with the unmergeable ones of ``old`` whole that they cut or touch.

    A piece of one that is kept and a piece that is rendered could not be told
    from two that have to stay apart, so both are rendered, as one.
    """
    whole = [(start, start + size) for start, size, _, _, flags in old if flags & UNMERGEABLE]
    touched = []
    for start, end in whole:
        below = bisect_right(windows, (end, LIMIT)) - 1  # the last window that begins by ``end``
        if below >= 0 and windows[below][1] >= start:
            touched.append((start, end))
    return _union([*windows, *touched])


def _joined(pieces: Iterable[Piece], log_mask: int) -> list[FlatRange]:
    """Ranges from rendered pieces in ascending order, merged by rule F6."""
    new = tuple.__new__  # FlatRange's own constructor, without the keyword handling
    ranges: list[FlatRange] = []
    last: FlatRange | None = None
    for low, high, region, base, flags in pieces:
        if log_mask and region._kind in BACKED:
            flags |= log_mask
        made = new(FlatRange, (low, high - low, region, low - base, flags))
        if last is not None and last[2] is region and mergeable(last, made):
            made = ranges[-1] = _extended(last, made)
        else:
            ranges.append(made)
        last = made
    return ranges


def _merged(ranges: list[FlatRange]) -> list[FlatRange]:
    merged: list[FlatRange] = []
    for each in ranges:
        if merged and mergeable(merged[-1], each):
            merged[-1] = _extended(merged[-1], each)
        else:
            merged.append(each)
    return merged


def _extended(left: FlatRange, right: FlatRange) -> FlatRange:
    start, size, region, offset, flags = left
    return FlatRange(start, size + right[1], region, offset, flags)


def _chunked(items: tuple[T, ...]) -> list[tuple[T, ...]]:
    """``items`` cut into chunks, of which none is above twice the usual size."""
    if not items:
        return []
    if len(items) <= 2 * _CHUNK:
        return [items]
    return [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]


def _cut_up(starts: Starts) -> list[Starts]:
    """As `_chunked`, for as many starts as ranges."""
    return [starts[at : at + _CHUNK] for at in range(0, len(starts), _CHUNK)]


def _addresses(ranges: Iterable[FlatRange]) -> Starts:
    """The first addresses: unboxed, since bisection touches those of a large view only once."""
    return array("Q", [each[0] for each in ranges])


def _replaced(items: list[T], first: int, stop: int, new: list[T]) -> list[T]:
    """A copy of ``items`` with [first, stop) replaced."""
    copy = items.copy()
    copy[first:stop] = new
    return copy


def _union(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The windows clipped to 64 bits, in order, those that touch made one."""
    if len(windows) == 1:
        low, high = max(windows[0][0], 0), min(windows[0][1], LIMIT)
        return [(low, high)] if low < high else []
    clipped = sorted(
        (max(low, 0), min(high, LIMIT)) for low, high in windows if low < LIMIT and high > 0
    )
    union: list[tuple[int, int]] = []
    for low, high in clipped:
        if low >= high:
            continue
        if union and low <= union[-1][1]:
            union[-1] = (union[-1][0], max(high, union[-1][1]))
        else:
            union.append((low, high))
    return union
