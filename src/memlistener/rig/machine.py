"""What differs between real vCPUs and scripted ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import attrs

from memlistener import kvm
from memlistener.kvm.backend import KvmBackend
from memlistener.testing import FakeKvm, Ioctl
from memlistener.testing.guest_script import GuestProgram

# About what these ioctls take. What counts is that a vCPU gets to run between two
# of them, which Python's threads would seldom let it.
_IOCTL = 20e-6
_SLOW = {"KVM_SET_USER_MEMORY_REGION", "KVM_GET_DIRTY_LOG", "KVM_RESET_DIRTY_RINGS"}


class Machine(Protocol):
    """What a scenario has to know of its vCPUs."""

    @property
    def backend(self) -> KvmBackend | None:
        """For `kvm.open_vm`."""
        ...

    def start(self, vcpu: kvm.Vcpu) -> None:
        """Put a vCPU at the start of its program; it must not be running."""
        ...


@attrs.frozen
class RealMachine:
    """vCPUs on /dev/kvm.

    Attributes:
        enter: Puts one at the start of its program.
    """

    enter: Callable[[kvm.Vcpu], object]
    backend: KvmBackend | None = attrs.field(default=None, init=False)

    def start(self, vcpu: kvm.Vcpu) -> None:
        """See `Machine`."""
        self.enter(vcpu)


class ScriptedMachine:
    """A `FakeKvm` whose vCPUs execute scripts.

    Args:
        script: Makes the script of a vCPU, given its id.

    Attributes:
        backend: For `kvm.open_vm`.
    """

    def __init__(self, script: GuestProgram) -> None:
        self._script = script
        self.backend = FakeKvm(log_limit=0)
        self.backend.on_ioctl = _take_time

    def start(self, vcpu: kvm.Vcpu) -> None:
        """See `Machine`."""
        self.backend.vms[-1].vcpus[vcpu.id].load(self._script(vcpu.id))


def _take_time(ioctl: Ioctl) -> None:
    if ioctl.name in _SLOW:
        time.sleep(_IOCTL)
