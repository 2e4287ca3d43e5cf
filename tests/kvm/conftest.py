"""Fixtures over a real /dev/kvm, and over both kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memlistener.testing import FakeKvm
from tests.kvm.machine import Machine
from tests.kvm.rig import Rig, vcpu_threads


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A fresh machine with RAM; for tests marked `kvm`."""
    with Machine() as machine:
        yield machine


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kvm)])
def rig(request: pytest.FixtureRequest) -> Rig:
    """A machine on the fake kernel, and then on the real one."""
    return Rig(FakeKvm() if request.param == "fake" else None)


@pytest.fixture(autouse=True)
def _no_vcpu_thread_is_left() -> Iterator[None]:
    """No vCPU's thread outlives its test."""
    yield
    assert vcpu_threads() == []
