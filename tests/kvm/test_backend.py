"""The seam: what the library asks of a kernel, the fake and the real one both have."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from memlistener.kvm import backend, bindings
from memlistener.kvm.backend import KvmBackend, VcpuHandle, VmHandle
from memlistener.kvm.fds import Kvm, VcpuFd, VmFd
from memlistener.testing import FakeKvm, FakeVcpu, FakeVm

PAIRS: list[tuple[type, type]] = [
    (KvmBackend, Kvm),
    (KvmBackend, FakeKvm),
    (VmHandle, VmFd),
    (VmHandle, FakeVm),
    (VcpuHandle, VcpuFd),
    (VcpuHandle, FakeVcpu),
]


def statically(kvm: Kvm, vm: VmFd, vcpu: VcpuFd) -> tuple[KvmBackend, VmHandle, VcpuHandle]:
    """Mypy checks here that the real handles fulfil the protocols."""
    return kvm, vm, vcpu


def members(protocol: type) -> dict[str, Any]:
    """A protocol's own methods and properties."""
    return {name: each for name, each in vars(protocol).items() if not name.startswith("_")}


@pytest.mark.parametrize(("protocol", "implementation"), PAIRS)
def test_implementations(protocol: type, implementation: type) -> None:
    """Each implementation has every member, with the protocol's parameters."""
    assert len(members(protocol)) >= 3
    for name, member in members(protocol).items():
        theirs = inspect.getattr_static(implementation, name)
        assert isinstance(theirs, property) == isinstance(member, property), name
        if not isinstance(member, property):
            wanted = list(inspect.signature(member).parameters)
            assert list(inspect.signature(theirs).parameters) == wanted, name


def test_the_fake_is_a_backend() -> None:
    """What FakeKvm hands out is of the classes compared above."""
    kvm: KvmBackend = FakeKvm()
    vm: VmHandle = kvm.create_vm()
    vcpu: VcpuHandle = vm.create_vcpu(0)
    assert [type(each) for each in (kvm, vm, vcpu)] == [FakeKvm, FakeVm, FakeVcpu]


@pytest.mark.skipif(bindings.missing() is not None, reason=f"no extension: {bindings.missing()}")
def test_constants() -> None:
    """The numbers of the seam are those of linux/kvm.h, and each is one that it has."""
    _, lib = bindings.load()
    names = [name for name in vars(backend) if name.startswith(("CAP_", "MEM_", "EXIT_"))]
    assert {name: getattr(backend, name) for name in names} == {
        name: getattr(lib, f"KVM_{name}") for name in names
    }
    assert {"CAP_NR_MEMSLOTS", "MEM_READONLY", "EXIT_MMIO"} <= set(names)


@pytest.mark.kvm
def test_the_fake_offers_what_the_real_one_has_to() -> None:
    """Capabilities that memlistener cannot do without are offered by both."""
    with Kvm.open() as kvm:
        for kernel in (kvm, FakeKvm()):
            for cap in (backend.CAP_USER_MEMORY, backend.CAP_IMMEDIATE_EXIT):
                assert kernel.check_extension(cap) == 1
            assert kernel.check_extension(backend.CAP_NR_MEMSLOTS) >= 32
