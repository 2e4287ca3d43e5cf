"""`Vcpu`: a KVM vCPU that a trio task runs, its registers and its end.

What it executes, and what its exits turn into, is `memlistener.kvm.run`; its thread
is `memlistener.vcpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

import attrs
import trio

from memlistener.kvm import backend as kernel
from memlistener.kvm.exits import VcpuExit
from memlistener.kvm.registers import Regs, Sregs
from memlistener.kvm.run import KvmRun
from memlistener.vcpu import VcpuRunner

if TYPE_CHECKING:
    from memlistener.address_space import AddressSpace
    from memlistener.bracket import Gate
    from memlistener.kvm.coalesced import Coalesced
    from memlistener.kvm.dirty_log import DirtyLog


@attrs.frozen
class VcpuStatistics:
    """What a vCPU's exits were.

    Attributes:
        id: Its number.
        exits: How many by reason: ``Mmio``, ``Io``, ``Hlt``, ...
        served_on_thread: Accesses that needed no other thread.
        kicked: How often KVM_RUN returned only because of a kick.
        holes: MMIO exits on memory that the view had and no slot covered. 0
            under a bracket.
    """

    id: int
    exits: dict[str, int]
    served_on_thread: int
    kicked: int
    holes: int


class Vcpu:
    """A vCPU of a `Vm`. Make one with ``await vm.create_vcpu()``."""

    def __init__(
        self,
        vcpu_id: int,
        handle: kernel.VcpuHandle,
        gate: Gate,
        space: AddressSpace,
        io: AddressSpace | None,
        *,
        coalesced: Coalesced,
        smm: AddressSpace | None = None,
        readonly_memory: bool = True,
        log: DirtyLog | None = None,
        ring_full: Callable[[], Coroutine[Any, Any, None]] | None = None,
        closed: Callable[[Vcpu], object] = lambda vcpu: None,
    ) -> None:
        """Use `Vm.create_vcpu`."""
        self._on_close = closed
        self._id = vcpu_id
        self._handle = handle
        self._space = space
        self._log = log
        self._kvm_run = KvmRun(
            handle,
            space,
            io,
            f"vcpu {vcpu_id}",
            coalesced=coalesced,
            smm=smm,
            readonly_memory=readonly_memory,
            ring_full=ring_full,
        )
        self._runner = VcpuRunner(f"vcpu {vcpu_id}", self._kvm_run, gate)
        if log is not None:  # after what can fail: nobody would take it back
            log.add_vcpu(handle)
        self._regs = Regs(self)
        self._sregs = Sregs(self)

    @property
    def id(self) -> int:
        """The number that KVM_CREATE_VCPU was given: on x86 its APIC id."""
        return self._id

    @property
    def running(self) -> bool:
        """Whether a task is in `run`."""
        return self._runner.running

    def statistics(self) -> VcpuStatistics:
        """What its exits were so far, as a frozen value."""
        exits = self._kvm_run.exits
        return VcpuStatistics(
            self._id, dict(exits.by_reason), exits.on_thread, exits.kicked, exits.holes
        )

    async def run(self) -> VcpuExit:
        """Run the guest until it halts, shuts down or fails; says why it stopped.

        Accesses to devices are dispatched to their ops meanwhile. Cancelling
        kicks the vCPU out of the guest and waits until its thread is out; it
        can be run again afterwards and goes on where it was.

        Raises:
            VcpuBusyError: It is run by another task already.
            KvmError: KVM_RUN itself failed.
            trio.ClosedResourceError: The VM is closed, or was meanwhile.
            Exception: Whatever a device's ops raised. The access is served
                again by the next `run`. A coalesced write of any vCPU may be
                what failed: it comes before every exit.
        """
        return cast(VcpuExit, await self._runner.run())

    # ---- registers ------------------------------------------------------------------

    @property
    def regs(self) -> Regs:
        """The general registers, live: ``vcpu.regs.rip = 0x1000`` (KVM_GET/SET_REGS).

        They can be used between runs, and inside `Vm.paused` while a task is in
        `run`. A device handler may read those of the vCPU that called it.

        Setting any gives up an access that a cancelled or failed handler left
        unfinished, and an exit that no `run` has returned yet: the vCPU starts
        from what it is set to.

        Raises:
            VcpuBusyError: On use while the vCPU runs; on setting while an access
                of its own is being served, or `run` is about to return.
            RuntimeError: On use outside trio's thread.
        """
        return self._regs

    @property
    def sregs(self) -> Sregs:
        """Segments, control registers and tables, live (KVM_GET/SET_SREGS)."""
        return self._sregs

    def get_regs(self) -> dict[str, int]:
        """All general registers by name."""
        self._runner.check_idle("KVM_GET_REGS")
        return self._handle.get_regs()

    def set_regs(self, regs: dict[str, int]) -> None:
        """Set all general registers."""
        self._runner.check_idle("KVM_SET_REGS", changes=True)
        self._handle.set_regs(regs)

    def get_sregs(self) -> dict[str, Any]:
        """All special registers by name, nested."""
        self._runner.check_idle("KVM_GET_SREGS")
        return self._handle.get_sregs()

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        """Set all special registers."""
        self._runner.check_idle("KVM_SET_SREGS", changes=True)
        self._handle.set_sregs(sregs)

    def write_guest_memory(self, addr: int, data: bytes) -> None:
        """Write RAM or ROM at a guest physical address: `AddressSpace.load`.

        Raises:
            RegionError: Something else than memory is there.
        """
        self._space.load(addr, data)

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Stop the vCPU, end its thread and close its descriptor. Idempotent."""
        await self._runner.aclose()
        if not self._kvm_run.closed:
            self._kvm_run.closed = True
            try:
                if self._log is not None:
                    self._log.remove_vcpu(self._handle)
            finally:
                self._handle.close()
                self._on_close(self)

    def __repr__(self) -> str:
        return f"<Vcpu {self._id}{' running' if self.running else ''}>"
