"""`open_vm`: an address space as a virtual machine."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence

import attrs
import trio

from memlistener.address_space import AddressSpace
from memlistener.bracket import MIN_RUN, Gate, GateStatistics, Pausing
from memlistener.errors import KvmUnavailableError, RegionError, TransactionError
from memlistener.instrument import Instrument
from memlistener.kvm import backend as kernel
from memlistener.kvm.coalesced import Coalesced
from memlistener.kvm.dirty_bitmap import DirtyBitmapLog
from memlistener.kvm.dirty_log import DirtyLog, DirtyLogMethod
from memlistener.kvm.dirty_ring import RING_ENTRIES, DirtyRingLog
from memlistener.kvm.io_listener import KvmIoListener
from memlistener.kvm.kick import KickIoctls
from memlistener.kvm.listener import (
    KvmBitmapMemoryListener,
    KvmMemoryListener,
    KvmRingMemoryListener,
)
from memlistener.kvm.policy import KickPolicy
from memlistener.kvm.slots import Memslot
from memlistener.kvm.vcpu import Vcpu, VcpuStatistics


@attrs.frozen
class VmStatistics:
    """What a VM has done so far.

    Attributes:
        brackets: Transactions for which the vCPUs were held.
        memslot_ioctls: KVM_SET_USER_MEMORY_REGION calls.
        memslots: Slots in use.
        gate: Kicks, and how long they took.
        stopped_median: Seconds that vCPUs were kept out per bracket, half of all.
        stopped_max: The longest.
        dirty_ring_overflows: How often a dirty ring was noticed to be full too late,
            so that all memory counted as written.
        holes: Accesses to memory that no slot covered, over all vCPUs.
        unassigned: Accesses of anybody that met nothing (rule K5).
        vcpus: Each vCPU that there is or was, by number.
    """

    brackets: int
    memslot_ioctls: int
    memslots: int
    gate: GateStatistics
    stopped_median: float
    stopped_max: float
    dirty_ring_overflows: int
    holes: int
    unassigned: int
    vcpus: tuple[VcpuStatistics, ...]

    @property
    def exits(self) -> dict[str, int]:
        """How many exits by reason, over all vCPUs."""
        return dict(sum((Counter(each.exits) for each in self.vcpus), Counter[str]()))


class Vm:
    """A virtual machine whose memory is an address space. Make one with `open_vm`."""

    def __init__(
        self,
        handle: kernel.VmHandle,
        space: AddressSpace,
        io: AddressSpace | None,
        smm: AddressSpace | None,
        gate: Gate,
        listeners: Sequence[KvmMemoryListener],
        coalesced: Coalesced,
    ) -> None:
        """Use `open_vm`."""
        self._coalesced = coalesced
        self._smm = smm
        self._handle = handle
        self._space = space
        self._io = io
        self._gate = gate
        self._listeners = listeners  # by as_id
        self._vcpus: list[Vcpu] = []
        self._closed_vcpus: list[VcpuStatistics] = []
        self._next_id = 0
        self._closed = False

    @property
    def space(self) -> AddressSpace:
        """The address space that is the guest's memory."""
        return self._space

    @property
    def smm(self) -> AddressSpace | None:
        """What vCPUs see in system management mode, if that is something else."""
        return self._smm

    @property
    def io(self) -> AddressSpace | None:
        """The address space of the guest's I/O ports."""
        return self._io

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs that are not closed, in the order they were created."""
        return tuple(self._vcpus)

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """The memslots that the kernel has, by guest address; those for SMM come last."""
        return tuple(slot for each in self._listeners for slot in each.memslots)

    async def create_vcpu(self, vcpu_id: int | None = None) -> Vcpu:
        """A new vCPU, and its thread (KVM_CREATE_VCPU).

        May be called at any time; while the VM is paused the vCPU waits with
        the others.

        Args:
            vcpu_id: Its number; None for the next one.

        Raises:
            KvmError: The number is taken, or there are too many.
            trio.ClosedResourceError: The VM is closed.
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("the VM is closed")
        number = self._next_id if vcpu_id is None else vcpu_id
        handle = self._handle.create_vcpu(number)
        # The kernel does not give a number twice, whatever happens from here on.
        self._next_id = max(self._next_id, number + 1)
        try:
            vcpu = Vcpu(
                number,
                handle,
                self._gate,
                self._space,
                self._io,
                coalesced=self._coalesced,
                smm=self._smm,
                readonly_memory=self._listeners[0].readonly_memory,
                log=self._listeners[0].dirty_log,
                ring_full=functools.partial(self._listeners[0].empty_rings, handle),
                closed=self._forget,
            )
        except BaseException:
            handle.close()
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def paused(self) -> Pausing:
        """``async with vm.paused():`` no vCPU executes guest code inside.

        Registers of all vCPUs can be read, and those of vCPUs that were in guest
        code set. Memory and registers are as after whole instructions: KVM ends
        one that accessed a device only when the vCPU is run again, and has been
        made to. The exception is a vCPU whose access a handler is still at: a
        handler may itself pause the VM, so it is not waited for, and the registers
        are those before the instruction.

        A hold on the gate that brackets use: nests with them and with itself. It
        waits for other tasks' commits to end.
        """
        return self._gate.pausing(wait=not self._space.memory.delivers_to_us)

    def add_instrument(self, instrument: Instrument) -> None:
        """From now on ``instrument`` watches this VM. Nothing happens where it does.

        Raises:
            TypeError: It is no `memlistener.Instrument`, or has a hook that is ``async``.
        """
        self._gate.instruments.add(instrument)

    def remove_instrument(self, instrument: Instrument) -> None:
        """``instrument`` watches no longer. A hook under way on a vCPU's thread still ends.

        Raises:
            KeyError: It was not added, or was removed because it raised.
        """
        self._gate.instruments.remove(instrument)

    async def flush_coalesced(self) -> None:
        """Serve what the guest has written to coalesced ranges so far.

        For a device whose state is about to be looked at: the guest's writes may
        be late (QEMU's ``qemu_flush_coalesced_mmio_buffer``). A checkpoint. In a
        handler of such a write it does nothing: later ones come after it.

        Raises:
            Exception: Whatever a device's ops raised. The write stays, and those
                behind it, for the next exit, transaction or flush.
            TransactionError: Inside a transaction of the same task, or of one that waits
                for it: a handler may be waiting for its end. Its beginning served what
                there was.
            trio.ClosedResourceError: The VM is closed.
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("the VM is closed")
        if self._space.memory.waits_for_us:
            raise TransactionError(
                "flush_coalesced() inside a transaction of the same task, or of one that waits for "
                "this one: a handler may be waiting for it to end; flush before it, or after"
            )
        await self._coalesced.drain()

    def statistics(self) -> VmStatistics:
        """What the VM has done so far."""
        vcpus = (*self._closed_vcpus, *(each.statistics() for each in self._vcpus))
        spaces = [each for each in (self._space, self._io, self._smm) if each is not None]
        stopped = self._listeners[0].stopped  # one for all of them
        return VmStatistics(
            brackets=sum(each.brackets for each in self._listeners),
            memslot_ioctls=sum(each.ioctls for each in self._listeners),
            memslots=len(self.memslots),
            gate=self._gate.statistics(),
            stopped_median=stopped.quantile(0.5) / 1e9,
            stopped_max=stopped.maximum / 1e9,
            dirty_ring_overflows=self._listeners[0].dirty_log.overflows,
            holes=sum(each.holes for each in vcpus),
            unassigned=sum(each.unassigned_accesses for each in dict.fromkeys(spaces)),
            vcpus=tuple(sorted(vcpus, key=lambda each: each.id)),
        )

    def _forget(self, vcpu: Vcpu) -> None:
        """A vCPU was closed; what it did still counts."""
        self._vcpus.remove(vcpu)
        self._closed_vcpus.append(vcpu.statistics())

    async def _close(self) -> None:
        self._closed = True
        with trio.CancelScope(shield=True):
            # All are told to stop before any is waited for.
            async with trio.open_nursery() as nursery:
                for vcpu in tuple(self._vcpus):
                    nursery.start_soon(vcpu.aclose)


@contextlib.asynccontextmanager
async def open_vm(
    space: AddressSpace,
    io: AddressSpace | None = None,
    *,
    smm: AddressSpace | None = None,
    policy: KickPolicy = KickPolicy.EVERY_COMMIT,
    dirty_log: DirtyLogMethod = DirtyLogMethod.MANUAL_PROTECT,
    dirty_ring_entries: int = RING_ENTRIES,
    backend: kernel.KvmBackend | None = None,
    instruments: Iterable[Instrument] = (),
) -> AsyncIterator[Vm]:
    """A virtual machine that has ``space`` for its memory, until the block ends.

    Every commit to ``space`` changes the machine's memslots, with its vCPUs
    held outside the guest as ``policy`` says. ioeventfds and coalesced ranges of
    both address spaces are the kernel's to see to, as far as it can.

    Coalesced writes that are left when the block ends without an error are
    served then, behind the vCPUs' last exits. What their handlers raise leaves the
    block when all have been served.

    Args:
        space: The guest's physical memory.
        io: The guest's I/O ports; without it, nothing answers there.
        smm: What a vCPU sees in system management mode instead of ``space``, where
            the kernel has a second address space for it.
        policy: When vCPUs are held.
        dirty_log: How the kernel says which pages guests have written, once
            somebody logs them.
        dirty_ring_entries: For `DirtyLogMethod.RING`, how many each vCPU's ring
            has: a power of two.
        backend: What plays the kernel: a `memlistener.testing.FakeKvm`. None
            for /dev/kvm.
        instruments: Who watches, from the first ioctl on.

    Raises:
        KvmUnavailableError: /dev/kvm cannot be used, or not with such a dirty log or
            a second address space; says why and the mend.
        KvmError: The kernel refuses the VM or its memory.
        RegionError: ``io`` or ``smm`` belongs to another memory system.
        TransactionError: Inside a transaction of the same task.
    """
    for other in (io, smm):
        if other is not None and other.memory is not space.memory:
            raise RegionError(
                f"{space!r} and {other!r} belong to different memory systems: create both in one, "
                f"so that one transaction can change both"
            )
    async with contextlib.AsyncExitStack() as stack:
        if backend is None:
            kvm: kernel.KvmBackend = stack.enter_context(contextlib.closing(_open()))
        else:
            kvm = backend
        handle = kvm.create_vm()
        try:
            kick = KickIoctls.probe(handle)
        except BaseException:
            handle.close()
            raise
        if kick is None:
            stack.callback(handle.close)
        else:  # closes the handle as soon as no kick is under way
            stack.push_async_callback(kick.aclose)
        gate = Gate(min_run=getattr(kvm, "min_run", MIN_RUN), assist=kick)
        for each in instruments:
            gate.instruments.add(each)
        if smm is not None and handle.check_extension(kernel.CAP_MULTI_ADDRESS_SPACE) < 2:
            raise KvmUnavailableError(
                "this kernel has no second address space (KVM_CAP_MULTI_ADDRESS_SPACE): on x86 it "
                "has one with CONFIG_KVM_SMM; leave smm out, and vCPUs see memory in system "
                "management mode, too"
            )
        log = _dirty_log(handle, dirty_log, dirty_ring_entries)
        stack.callback(log.close)
        kind: type[KvmMemoryListener] = (
            KvmRingMemoryListener if dirty_log is DirtyLogMethod.RING else KvmBitmapMemoryListener
        )
        listeners: list[KvmMemoryListener] = []
        for as_id, where in enumerate((space,) if smm is None else (space, smm)):
            listener = kind(handle, gate, policy, name=where.name, dirty_log=log, as_id=as_id)
            listeners.append(listener)
            listener.stopped = listeners[0].stopped
            # Whatever happens from here on, memory is not to talk to a closed VM.
            stack.callback(listener.detach, where)
            await space.memory.register(listener, where)
        # A torn map is not run on (T13).
        stack.callback(space.memory.when_broken(lambda _: gate.hold_nowait("broken")))
        coalesced = Coalesced(handle, space, io)
        for where in (space,) if io is None else (space, io):
            bus = KvmIoListener(handle, coalesced, pio=where is io)
            stack.callback(bus.detach, where)
            await space.memory.register(bus, where)
        # Coalesced writes are for the map that there was when the guest made them.
        stack.callback(space.memory.before_transaction(coalesced.drain_before_change))
        vm = Vm(handle, space, io, smm, gate, listeners, coalesced)
        stack.push_async_callback(vm._close)
        yield vm
        # Nothing that the guest wrote is lost. Not where the block raised: that may
        # have been a handler of the very write.
        await vm._close()
        await coalesced.drain_at_end()


def _dirty_log(vm: kernel.VmHandle, method: DirtyLogMethod, ring_entries: int) -> DirtyLog:
    """The one that ``method`` asks for, switched on in the kernel.

    Raises:
        KvmUnavailableError: The kernel does not have it.
    """
    if method is DirtyLogMethod.RING:
        return DirtyRingLog(vm, entries=ring_entries)
    offered = vm.check_extension(kernel.CAP_MANUAL_DIRTY_LOG_PROTECT2)
    manual = method is DirtyLogMethod.MANUAL_PROTECT and bool(
        offered & kernel.DIRTY_LOG_MANUAL_PROTECT_ENABLE
    )
    return DirtyBitmapLog(vm, manual=manual)


def _open() -> kernel.KvmBackend:
    from memlistener.kvm.fds import Kvm

    return Kvm.open()


@attrs.frozen
class Availability:
    """Whether KVM can be used here: true or false, with the reason."""

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable

    def __str__(self) -> str:
        return self.reason


def available() -> Availability:
    """Whether `open_vm` can work on this machine, and if not why not."""
    try:
        _open().close()
    except KvmUnavailableError as error:
        return Availability(False, str(error))
    return Availability(True, "KVM is usable")
