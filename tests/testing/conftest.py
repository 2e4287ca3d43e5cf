"""Fixtures of the tests of FakeKvm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memlistener.kvm.backend import KvmBackend
from memlistener.testing.fake_kvm import FakeKvm, FakeVm

from .fakes import HostMemory


@pytest.fixture
def ram() -> Iterator[HostMemory]:
    memory = HostMemory(0x20000)
    yield memory
    memory.close()


@pytest.fixture
def fake() -> FakeKvm:
    return FakeKvm()


@pytest.fixture
def vm(fake: FakeKvm) -> FakeVm:
    return fake.create_vm()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kvm)])
def kernel(request: pytest.FixtureRequest) -> Iterator[KvmBackend]:
    """A body that takes this runs on the fake kernel and on the real one."""
    if request.param == "fake":
        yield FakeKvm()
        return
    # Not at the top: the fake has to work where this cannot be imported.
    from memlistener.kvm.fds import Kvm

    with Kvm.open() as kvm:
        yield kvm
