"""What a `FakeKvm` was asked for, in order, and the failures it has been told to play."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from memlistener.errors import KvmError

T = TypeVar("T")

IOCTLS = frozenset(
    {
        "KVM_CHECK_EXTENSION",
        "KVM_CLEAR_DIRTY_LOG",
        "KVM_CREATE_VCPU",
        "KVM_CREATE_VM",
        "KVM_ENABLE_CAP",
        "KVM_GET_DIRTY_LOG",
        "KVM_GET_REGS",
        "KVM_GET_SREGS",
        "KVM_IOEVENTFD",
        "KVM_KICK_ALL_RUNNING_VCPUS",
        "KVM_REGISTER_COALESCED_MMIO",
        "KVM_RESET_DIRTY_RINGS",
        "KVM_RESUME_ALL_KICKED_VCPUS",
        "KVM_RUN",
        "KVM_SET_REGS",
        "KVM_SET_SREGS",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_UNREGISTER_COALESCED_MMIO",
    }
)


@attrs.frozen(hash=False)
class Ioctl:
    """One ioctl that a `FakeKvm` has answered.

    Attributes:
        name: The request, such as ``"KVM_SET_USER_MEMORY_REGION"``.
        vm: The VM's index in `FakeKvm.vms`; None for requests to ``/dev/kvm``.
        vcpu: The vCPU's id; None for requests to a VM.
        args: The arguments, by the names they have in `KvmBackend`.
        result: What was returned; for ``KVM_RUN`` the exit reason, or the
            repr of what the guest's script raised.
        errno: 0, or the error with which it failed.
        inside: The ids of the VM's (other) vCPUs that were inside ``KVM_RUN``
            when the ioctl took effect.
        began: When it began. `began` and `ended` number the beginnings and
            ends of all ioctls of one `FakeKvm` in one sequence.
        ended: When it ended. The log is ordered by this.
    """

    name: str
    vm: int | None
    vcpu: int | None
    args: Mapping[str, Any]
    result: Any
    errno: int
    inside: frozenset[int]
    began: int
    ended: int

    def __str__(self) -> str:
        """The call as strace would print it."""
        who = "/dev/kvm" if self.vm is None else f"vm {self.vm}"
        if self.vcpu is not None:
            who += f" vcpu {self.vcpu}"
        args = ", ".join(
            f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value!r}"
            for name, value in self.args.items()
        )
        outcome = os.strerror(self.errno) if self.errno else repr(self.result)
        inside = f" with vCPUs {sorted(self.inside)} inside KVM_RUN" if self.inside else ""
        return f"{who}: {self.name}({args}) = {outcome}{inside}"


@attrs.define
class _Failure:
    countdown: int
    errno: int


@attrs.frozen
class Begun:
    """An ioctl under way: when it began, and the errno it is to fail with, or 0."""

    began: int
    errno: int


class IoctlRecorder:
    """The log and the injected failures of one `FakeKvm`, and its one lock.

    One lock guards everything that the fake kernel's threads share: there is
    nothing to gain from more under one GIL, and no order to get wrong. What
    waits, waits on conditions of this lock; guest scripts and hooks run
    without it.
    """

    def __init__(self, limit: int | None) -> None:
        """An empty log that keeps the last ``limit`` ioctls; None keeps all."""
        self.lock = threading.Lock()
        self.on_ioctl: Callable[[Ioctl], object] | None = None
        self._log: collections.deque[Ioctl] = collections.deque(maxlen=limit)
        self._failures: dict[str, list[_Failure]] = {}
        self._clock = 0

    def log(self) -> tuple[Ioctl, ...]:
        """Everything logged so far."""
        with self.lock:
            return tuple(self._log)

    def fail(self, ioctl: str, nth: int, errno: int) -> None:
        """Make the ``nth`` such ioctl from now fail with ``errno``."""
        if ioctl not in IOCTLS:
            raise ValueError(f"{ioctl!r} is none of {', '.join(sorted(IOCTLS))}")
        if nth < 1:
            raise ValueError(f"the next one is nth=1; there is no nth={nth}")
        if errno < 1:
            raise ValueError(f"errnos are positive, not {errno}")
        with self.lock:
            self._failures.setdefault(ioctl, []).append(_Failure(nth, errno))

    def pending_failures(self) -> int:
        """How many injected failures have not come up yet."""
        with self.lock:
            return sum(len(failures) for failures in self._failures.values())

    def begin(self, name: str) -> Begun:
        """Number the beginning of an ioctl. The lock is held by the caller."""
        self._clock += 1
        error = 0
        failures = self._failures.get(name)
        if failures:
            for failure in failures:
                failure.countdown -= 1
                if failure.countdown == 0 and not error:
                    error = failure.errno
            self._failures[name] = [failure for failure in failures if failure.countdown > 0]
        return Begun(self._clock, error)

    def end(
        self,
        begun: Begun,
        name: str,
        *,
        vm: int | None,
        vcpu: int | None = None,
        args: Mapping[str, Any],
        result: Any,
        errno: int,
        inside: frozenset[int],
    ) -> Ioctl:
        """Log an ioctl that has ended. The lock is held by the caller."""
        self._clock += 1
        record = Ioctl(name, vm, vcpu, args, result, errno, inside, begun.began, self._clock)
        self._log.append(record)
        return record

    def call(
        self,
        name: str,
        effect: Callable[[], T],
        *,
        args: Mapping[str, Any],
        vm: int | None = None,
        vcpu: int | None = None,
        inside: set[int] | frozenset[int] = frozenset(),
        summary: Callable[[T], Any] = lambda result: result,
    ) -> T:
        """Play one ioctl: fail as told, or have its effect under the lock; log; hook.

        Args:
            name: The request.
            effect: Does it and returns its result, or raises `KvmError`.
            args: What to log as its arguments.
            vm: The VM's index.
            vcpu: The vCPU's id.
            inside: The set of the VM's vCPUs that are inside, as it is kept.
            summary: Turns the result into what is logged of it.
        """
        with self.lock:
            begun = self.begin(name)
            error: KvmError | None = None
            logged = None
            try:
                if begun.errno:
                    raise KvmError(begun.errno, f"{name}: {os.strerror(begun.errno)} (injected)")
                result = effect()
                logged = summary(result)
            except KvmError as exc:
                error = exc
            record = self.end(
                begun,
                name,
                vm=vm,
                vcpu=vcpu,
                args=args,
                result=logged,
                errno=(error.errno or 0) if error is not None else 0,
                inside=frozenset(inside) - {vcpu},
            )
        if self.on_ioctl is not None:
            self.on_ioctl(record)
        if error is not None:
            raise error
        return result
