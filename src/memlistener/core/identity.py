"""Things that are what they are, and not what they contain: they have no copies."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class Identity:
    """Base class: `copy.copy`, `copy.deepcopy` and `pickle` are refused.

    A copy of a region would be a subregion of a container that does not have
    it, and one of a block would close a file descriptor that is another's.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse: all three ask here.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self!r} is an identity, not a value: it cannot be copied or pickled")
