"""Which address spaces show the same: the region that a root comes down to.

Many address spaces of a machine are one and the same map, seen through an alias
or a container that adds nothing: each PCI device's, each CPU's. Rule F7 has
them share one view, which is then rendered, compared and kept once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlistener.core.kinds import INHERITED

if TYPE_CHECKING:
    from memlistener.core.region import MemoryRegion


def view_root(root: MemoryRegion, through: list[MemoryRegion] | None = None) -> MemoryRegion | None:
    """The region whose rendering equals that of ``root``; None for an empty view.

    Goes through an alias that covers its whole target from offset 0, and through
    a container whose only enabled child sits in it whole, at 0. Neither may
    add a flag, and addresses have to stay what they are.

    Args:
        root: Where to begin.
        through: Gets what it went through, and came to.
    """
    while root._enabled:
        if through is not None:
            through.append(root)
        target = root._alias_target
        if target is not None:
            if (
                root._alias_offset
                or root._size < target._size
                or root._addr != target._addr
                or root._flags & INHERITED
            ):
                return root
            root = target
        elif not root._terminates:
            enabled = root._children.enabled if root._children is not None else ()
            if len(enabled) > 1:
                return root
            if not enabled:
                return None
            only = next(iter(enabled))
            if only._addr or root._addr or root._size < only._size or root._flags & INHERITED:
                return root
            root = only
        else:
            return root
    return None
