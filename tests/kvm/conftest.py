"""Fixtures over a real /dev/kvm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kvm.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A fresh machine with RAM; for tests marked `kvm`."""
    with Machine() as machine:
        yield machine
