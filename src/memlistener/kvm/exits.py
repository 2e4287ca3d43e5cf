"""What ``vcpu.run()`` returns: why a vCPU stopped, as frozen values.

These are the members of ``struct kvm_run`` that end a run, one class for each
``KVM_EXIT_*`` that a program has to act on. MMIO and PIO exits are not among
them: they are dispatched to the regions' ops and the vCPU goes on.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs


@attrs.frozen
class Hlt:
    """``KVM_EXIT_HLT``: the guest executed HLT."""


@attrs.frozen
class Shutdown:
    """``KVM_EXIT_SHUTDOWN``: a triple fault, or another way of switching off."""


@attrs.frozen
class InternalError:
    """``KVM_EXIT_INTERNAL_ERROR``: KVM could not go on.

    Attributes:
        suberror: ``KVM_INTERNAL_ERROR_*``; 1 is a failed instruction emulation.
        data: The words of detail that KVM gave, as it gave them.
        instruction: The bytes of the instruction that could not be emulated,
            where KVM gave them, else empty.
    """

    suberror: int
    data: tuple[int, ...] = ()
    instruction: bytes = b""

    @property
    def name(self) -> str:
        """The suberror's name without its ``KVM_INTERNAL_ERROR_`` prefix."""
        return _SUBERRORS.get(self.suberror, f"suberror {self.suberror}")


_SUBERRORS = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}


@attrs.frozen
class FailEntry:
    """``KVM_EXIT_FAIL_ENTRY``: the processor refused the vCPU's state.

    Attributes:
        hardware_entry_failure_reason: The processor's own code.
        cpu: The host CPU on which it happened.
    """

    hardware_entry_failure_reason: int
    cpu: int = 0


@attrs.frozen
class SystemEvent:
    """``KVM_EXIT_SYSTEM_EVENT``: the guest asked for a shutdown, reset or crash."""

    type: int
    data: tuple[int, ...] = ()


@attrs.frozen
class Debug:
    """``KVM_EXIT_DEBUG``: a breakpoint or a single step."""


@attrs.frozen
class Unknown:
    """``KVM_EXIT_UNKNOWN``: the processor exited for a reason KVM does not know."""

    hardware_exit_reason: int


@attrs.frozen
class Unsupported:
    """An exit that memlistener does not handle.

    Attributes:
        reason: The number in ``kvm_run.exit_reason``.
    """

    reason: int


VcpuExit: TypeAlias = (
    Hlt | Shutdown | InternalError | FailEntry | SystemEvent | Debug | Unknown | Unsupported
)
