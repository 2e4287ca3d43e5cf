"""When memslots are changed with the vCPUs stopped."""

from __future__ import annotations

import enum


class KickPolicy(enum.Enum):
    """When a commit holds the vCPUs outside the guest (rule B16)."""

    EVERY_COMMIT = "every-commit"
    """From begin to commit of every transaction that changes the view."""

    ON_OVERLAP = "on-overlap"
    """Only around ioctls between which a vCPU could miss memory: where an added
    range overlaps a deleted one, or a slot with a dirty log is touched."""

    NEVER = "never"
    """Not at all: vCPUs see holes. Exists to show the failure."""
