"""Old ranges, new ranges -> the events that turn the one into the other (rule T5).

Events are frozen values. The same ones are delivered to listeners by
`memlistener.memory`, compared in unit tests, and inverted when a transaction
has to be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import attrs

from memlistener.core.kinds import LOG_SHIFT

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatRange

_FLAGS = (1 << LOG_SHIFT) - 1


@attrs.frozen
class RegionDel:
    """A range of the old view is not in the new one."""

    range: FlatRange
    is_delete: ClassVar[bool] = True


@attrs.frozen
class RegionAdd:
    """A range of the new view was not in the old one."""

    range: FlatRange
    is_delete: ClassVar[bool] = False


@attrs.frozen
class RegionNop:
    """A range is in both views; its dirty-log mask may differ."""

    range: FlatRange
    is_delete: ClassVar[bool] = False


Event: TypeAlias = RegionDel | RegionAdd | RegionNop


def diff(
    old: Sequence[FlatRange] | Iterable[FlatRange],
    new: Sequence[FlatRange] | Iterable[FlatRange],
    *,
    nops: bool = False,
) -> list[Event]:
    """Compare two ascending sequences of ranges.

    Args:
        old: Before.
        new: After.
        nops: Whether ranges that stay are of interest too.

    Returns:
        All deletes, ascending, then all adds (and nops), ascending.
    """
    dels: list[Event] = []
    adds: list[Event] = []
    olds, news = iter(old), iter(new)
    one, two = next(olds, None), next(news, None)
    while one is not None or two is not None:
        if two is None or (one is not None and one[0] < two[0]):
            assert one is not None
            dels.append(RegionDel(one))
            one = next(olds, None)
        elif one is None or two[0] < one[0]:
            adds.append(RegionAdd(two))
            two = next(news, None)
        else:
            if _same(one, two):
                if nops or one[4] != two[4]:
                    adds.append(RegionNop(two))
            else:
                dels.append(RegionDel(one))
                adds.append(RegionAdd(two))
            one, two = next(olds, None), next(news, None)
    return dels + adds


def _same(one: FlatRange, two: FlatRange) -> bool:
    """Whether two ranges with one start differ at most in what is logged."""
    return one is two or (
        one[1] == two[1]
        and one[2] is two[2]
        and one[3] == two[3]
        and (one[4] ^ two[4]) & _FLAGS == 0
    )
