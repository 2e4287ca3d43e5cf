"""`FlatView`: what a tree of regions shows, as an immutable value.

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
from typing import TypeAlias, TypeVar

from memlistener.core.diff import Event, diff
from memlistener.core.flatrange import FlatRange, mergeable, merged, part
from memlistener.core.kinds import BACKED, LIMIT, UNMERGEABLE
from memlistener.core.region import MemoryRegion
from memlistener.core.render import render
from memlistener.core.ways import Sight
from memlistener.errors import RegionTypeError

Starts: TypeAlias = "array[int]"
__all__ = ["FlatRange", "FlatView"]

S = TypeVar("S", "tuple[FlatRange, ...]", "array[int]")
# Ranges of a view: the chunk and index of the first, and the chunk of the last and
# one past its index.
Span: TypeAlias = "tuple[int, int, int, int]"

# Ranges in a full chunk. Replacing a range copies one chunk of this size and a
# list of len(view) / this: at 256 both stay small up to a million ranges.
_CHUNK = 256


class FlatView:
    """What an address space shows (QEMU's ``FlatView``): immutable, ascending.

    Make one with `FlatView.render`. ``len(view)`` is the number of ranges and
    iterating gives them; two views are equal when their ranges are.
    """

    __slots__ = ("_chunks", "_firsts", "_length", "_starts")

    def __init__(self, ranges: Iterable[FlatRange] = ()) -> None:
        """A view of these ranges, which must be in order, apart and merged."""
        whole = tuple(ranges)
        self._chunks = _cut_up(whole)
        self._starts = [_addresses(chunk) for chunk in self._chunks]
        self._firsts = [starts[0] for starts in self._starts]
        self._length = len(whole)

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
            return cls(_logged(render(root, 0, LIMIT), log_mask))
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
    ) -> tuple[FlatView, list[Event]]:
        """The view after a change that can show only inside ``windows``.

        Renders those windows and shares the rest: O(log n + what is in them).

        Args:
            root: The tree as it is now.
            windows: [low, high) each; in any order, may overlap.
            log_mask: As for `render`.

        Returns:
            The new view and what differs, deletes first, both ascending (rule
            T5), without a word on ranges that stay. Where nothing differs the
            view is ``self``.
        """
        return self._updated(root, windows, log_mask, None)

    def _updated(
        self,
        root: MemoryRegion,
        windows: Sequence[tuple[int, int]],
        log_mask: int,
        sight: Sight | None,
    ) -> tuple[FlatView, list[Event]]:
        """As `updated`.

        Args:
            root: As there.
            windows: As there.
            log_mask: As there.
            sight: One that holds, of a region below ``root``: a window inside it
                need not be rendered from the root.
        """
        source = _Source(root, sight, log_mask)
        edits: list[tuple[Span, list[FlatRange]]] = []
        before: list[FlatRange] = []
        after: list[FlatRange] = []
        for span, group in self._groups(_union(windows)):
            old = self._between(span)
            new = _redone(source, group, old)
            if new != old:
                before += old
                after += new
                edits.append((span, new))
        if not edits:
            return self, []
        return self._spliced(edits), diff(before, after)

    def _groups(self, windows: list[tuple[int, int]]) -> list[tuple[Span, list[tuple[int, int]]]]:
        """The windows, those together that touch one range: they must not be taken one by one."""
        groups: list[tuple[Span, list[tuple[int, int]]]] = []
        for window in windows:
            span = self._span(*window)
            if groups and span[:2] < groups[-1][0][2:]:
                (chunk, first, _, _), group = groups[-1]
                group.append(window)
                groups[-1] = (chunk, first, *span[2:]), group
            else:
                groups.append((span, [window]))
        return groups

    def _span(self, low: int, high: int) -> Span:
        """The ranges that reach into [low, high) or touch it.

        Those can merge with what is rendered there now, all others cannot.
        """
        firsts = self._firsts
        if not firsts:
            return 0, 0, 0, 0
        chunk = max(bisect_left(firsts, low) - 1, 0)
        starts = self._starts[chunk]
        first = max(bisect_left(starts, low) - 1, 0)
        each = self._chunks[chunk][first]
        if each[0] + each[1] < low:
            first += 1
        end = chunk
        if chunk + 1 < len(firsts) and firsts[chunk + 1] <= high:
            end = bisect_right(firsts, high) - 1
            starts = self._starts[end]
        return chunk, first, end, bisect_right(starts, high)

    def _between(self, span: Span) -> list[FlatRange]:
        chunk, first, end, last = span
        if chunk == end:
            return list(self._chunks[chunk][first:last]) if self._chunks else []
        found = list(self._chunks[chunk][first:])
        for each in self._chunks[chunk + 1 : end]:
            found += each
        found += self._chunks[end][:last]
        return found

    def _spliced(self, edits: list[tuple[Span, list[FlatRange]]]) -> FlatView:
        """The view with the ranges of each span replaced; spans ascend and are apart."""
        if not self._chunks:
            return FlatView([each for _, new in edits for each in new])
        view = FlatView.__new__(FlatView)
        chunks = view._chunks = self._chunks.copy()
        starts = view._starts = self._starts.copy()
        firsts = view._firsts = self._firsts.copy()
        length = self._length
        todo = edits.copy()
        while todo:  # the last one first, so that the places of the others stay
            run = [todo.pop()]
            while todo and todo[-1][0][2] == run[-1][0][0]:  # one that ends in the same chunk
                run.append(todo.pop())
            first_chunk, stop = run[-1][0][0], run[0][0][2] + 1
            # The addresses are cut as the ranges are: to gather them anew takes far longer.
            made, addresses = list(chunks[first_chunk]), starts[first_chunk][:]
            begins = [0]  # where each chunk does
            for each in range(first_chunk + 1, stop):
                begins.append(len(made))
                made += chunks[each]
                addresses += starts[each]
            for (chunk, first, end, last), new in run:
                first += begins[chunk - first_chunk]
                last += begins[end - first_chunk]
                made[first:last] = new
                addresses[first:last] = _addresses(new)
                length += len(new) - (last - first)
            # A chunk that became small takes its neighbour in, so that a view which
            # shrinks does not end as many chunks of a range or two.
            if len(made) < _CHUNK // 4 and stop < len(chunks):
                made += chunks[stop]
                addresses += starts[stop]
                stop += 1
            if len(made) <= 2 * _CHUNK and made:
                chunks[first_chunk:stop] = (tuple(made),)
                starts[first_chunk:stop] = (addresses,)
                firsts[first_chunk:stop] = (addresses[0],)
            else:
                cut = _cut_up(addresses)
                chunks[first_chunk:stop] = _cut_up(tuple(made))
                starts[first_chunk:stop] = cut
                firsts[first_chunk:stop] = [each[0] for each in cut]
        view._length = length
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

    __slots__ = ("_log_mask", "_root", "_sight", "_top")

    def __init__(self, root: MemoryRegion, sight: Sight | None, log_mask: int) -> None:
        self._root = root
        self._sight = sight
        self._top = None if sight is None else sight.top()
        self._log_mask = log_mask

    def render(self, low: int, high: int) -> list[FlatRange]:
        sight, top = self._sight, self._top
        if sight is None or top is None or low < sight.low or high > sight.high:
            ranges = render(self._root, low, high)
        else:
            ranges = render(top, low, high, sight.top_base, sight.flags)
        return _logged(ranges, self._log_mask)


def _redone(
    source: _Source, windows: list[tuple[int, int]], old: list[FlatRange]
) -> list[FlatRange]:
    """``old``, which is all that reaches into the windows or touches them, as it is now."""
    for each in old:
        if each[4] & UNMERGEABLE:
            windows = _widened(windows, old)
            break
    if len(windows) == 1:
        ((low, high),) = windows
        if not old or (old[0][0] >= low and old[-1][0] + old[-1][1] <= high):
            return source.render(low, high)  # as mostly: no seam
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
                pieces.append(part(left, max(at, left[0]), min(low, end)))
            if end > low:
                break
            left = next(kept, None)
        pieces.extend(source.render(low, high))
        at = high
        while left is not None and left[0] + left[1] <= high:
            left = next(kept, None)
    while left is not None:
        whole = at <= left[0]
        pieces.append(left if whole else part(left, at, left[0] + left[1]))
        left = next(kept, None)
    return merged(pieces)


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


def _logged(ranges: list[FlatRange], log_mask: int) -> list[FlatRange]:
    """The ranges with ``log_mask`` on all memory."""
    if not log_mask:
        return ranges
    return [
        each._replace(flags=each[4] | log_mask) if each[2]._kind in BACKED else each
        for each in ranges
    ]


def _cut_up(items: S) -> list[S]:
    """Items of chunks, of which none is above twice the usual size."""
    if len(items) <= 2 * _CHUNK:
        return [items] if items else []
    return [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]


def _addresses(ranges: Iterable[FlatRange]) -> Starts:
    """The first addresses: unboxed, since bisection touches those of a large view only once."""
    return array("Q", [each[0] for each in ranges])


def _union(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The windows clipped to 64 bits, in order, those that touch made one."""
    clipped = [(low if low > 0 else 0, high if high < LIMIT else LIMIT) for low, high in windows]
    clipped.sort()
    union: list[tuple[int, int]] = []
    for low, high in clipped:
        if low >= high:
            continue
        if union and low <= union[-1][1]:
            union[-1] = (union[-1][0], max(high, union[-1][1]))
        else:
            union.append((low, high))
    return union
