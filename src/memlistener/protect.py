"""Control-C stays out of the mutators of a region, which it could leave half done.

The core knows nothing of trio, so the protection is put on from outside. Control-C
that comes while a mutator runs is raised at the next checkpoint, as trio does it.
"""

from __future__ import annotations

import trio

from memlistener.core.region import MemoryRegion

MUTATORS = (
    "add_coalescing",
    "add_eventfd",
    "add_subregion",
    "add_subregion_overlap",
    "clear_coalescing",
    "del_eventfd",
    "del_subregion",
    "set_address",
    "set_alias_offset",
    "set_enabled",
    "set_log",
    "set_nonvolatile",
    "set_readonly",
    "set_romd_mode",
    "set_size",
    "set_unmergeable",
)


def apply() -> None:
    """Protect them all; again does no harm."""
    for name in MUTATORS:
        mutator = trio.lowlevel.enable_ki_protection(vars(MemoryRegion)[name])
        setattr(MemoryRegion, name, mutator)
