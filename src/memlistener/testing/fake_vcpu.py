"""`FakeVcpu`: ``KVM_RUN`` over a script, in the thread that calls it.

The rules it plays, each checked against Linux 6.18 on x86:

- Whatever needs the registers waits until the thread in ``KVM_RUN`` comes out:
  there is one mutex for each vCPU. A second thread in `FakeVcpu.run` gets EBUSY,
  as from `memlistener.kvm.fds`.
- ``immediate_exit`` is looked at on entry and only there; a signal takes the
  thread out at the next instruction boundary. So a kick needs both.
- On entry the pending MMIO or PIO exit is completed *first*: what a device
  answered has reached the guest even when ``immediate_exit`` is set and EINTR
  is all that the entry returns. If the access goes on in another fragment, that
  is the next exit, and it wins over EINTR.
- EINTR upon ``immediate_exit`` leaves ``exit_reason`` and the rest of
  ``kvm_run`` alone; EINTR upon a signal makes the reason ``KVM_EXIT_INTR``.
- An access is cut at page boundaries. The parts in memslots are done at once;
  the others, and writes to read-only slots, exit one by one, in fragments of at
  most 8 bytes, of which a read completes only when it has them all.
- Data that nobody gave for an MMIO or PIO read is what ``kvm_run`` had before.
"""

from __future__ import annotations

import copy
import errno
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs

from memlistener.kvm.backend import EXIT_DIRTY_RING_FULL
from memlistener.kvm.exits import VcpuExit
from memlistener.testing import fake_registers
from memlistener.testing.fake_bus import FakeBus
from memlistener.testing.fake_dirty_ring import DirtyRing
from memlistener.testing.fake_ioctls import Begun, IoctlRecorder
from memlistener.testing.fake_memslots import PAGE_SIZE, MemslotTable, kernel_error
from memlistener.testing.guest_script import Deaf, Instruction, LoseSignals, Spin
from memlistener.testing.scripted_guest import EXIT_INTR, ScriptedGuest, cut

T = TypeVar("T")


@attrs.frozen
class FakeVcpuStatistics:
    """What a `FakeVcpu` has done so far.

    Attributes:
        runs: Entries into ``KVM_RUN``, those included that returned at once.
        instructions: Instructions completed.
        eintrs: ``KVM_RUN`` calls that returned EINTR.
        spins: Entries turned away between the kick and the resume ioctl.
        mmio_exits: Exits for MMIO, one a fragment; on what should be RAM, each
            is a hole.
        pio_exits: Exits for PIO.
        internal_errors: Instructions that could not be fetched.
        kicks: Calls of `FakeVcpu.kick`.
        signals_lost: Signals swallowed by `LoseSignals`.
        inside: Whether a thread is inside ``KVM_RUN`` now.
        blocked: Whether that thread waits: in `Spin`, in `Deaf`, for a step.
    """

    runs: int
    instructions: int
    eintrs: int
    spins: int
    mmio_exits: int
    pio_exits: int
    internal_errors: int
    kicks: int
    signals_lost: int
    inside: bool
    blocked: bool


@attrs.define(eq=False)
class VmState:
    """What a `FakeVm` shares with its vCPUs; guarded by the recorder's lock."""

    index: int
    recorder: IoctlRecorder
    memslots: MemslotTable
    # Signalled whenever a vCPU of any VM of the FakeKvm comes out of KVM_RUN.
    left: threading.Condition
    inside: set[int] = attrs.Factory(set)
    kicked: bool = False
    bus: FakeBus = attrs.Factory(FakeBus)


class FakeVcpu:
    """A vCPU of `FakeKvm`: the protocol `VcpuHandle`, and a hand on its guest.

    Attributes:
        vcpu_id: Its id within the VM.
        address_space_id: The address space its accesses go to; 1 is what the
            vCPU sees in system management mode.
    """

    def __init__(
        self,
        vm: VmState,
        vcpu_id: int,
        script: Iterable[Instruction],
        *,
        ring: DirtyRing | None = None,
    ) -> None:
        """Use `FakeVm.create_vcpu` instead."""
        self._ring = ring
        self.vcpu_id = vcpu_id
        self.address_space_id = 0
        self._vm = vm
        self._lock = vm.recorder.lock
        # Reentrant, so that a guest's script can look at its own registers.
        self._mutex = threading.RLock()
        self._closed = False
        self._regs = fake_registers.reset_regs()
        self._sregs = fake_registers.reset_sregs(vcpu_id)

        # Guarded by the running flag: one thread at a time.
        self._guest = ScriptedGuest(self._memory, script, self._bus)
        self._spun = 0

        # Guarded by the lock: what other threads have a hand in.
        self._wake = threading.Condition(self._lock)  # for the thread inside
        self._changed = threading.Condition(self._lock)  # for those who watch it
        self._watchers = 0
        self._immediate_exit = False
        self._signal = False
        self._lose_signals = 0
        self._running = False
        self._inside = False
        self._blocked = False
        self._stepping = False
        self._permits = 0
        self._step_open = False
        self._steps = 0
        self._runs = self._eintrs = self._spins = 0
        self._kicks = self._signals_lost = 0

    def __repr__(self) -> str:
        where = "inside KVM_RUN" if self._inside else "outside KVM_RUN"
        return f"<FakeVcpu {self.vcpu_id} of VM {self._vm.index}, {where}>"

    # The test's hand on the guest.

    def load(self, script: Iterable[Instruction]) -> None:
        """Give the vCPU a new program, from its start.

        Forgets the instruction under way, with its pending exit. Waits, like
        all that changes a vCPU's state, until no thread is inside ``KVM_RUN``.
        """
        with self._mutex:
            self._guest.load(script)
            self._spun = 0

    @property
    def stepping(self) -> bool:
        """Whether the guest waits, inside ``KVM_RUN``, for `step` before each instruction."""
        return self._stepping

    @stepping.setter
    def stepping(self, value: bool) -> None:
        with self._lock:
            self._stepping = value
            self._permits = 0
            self._wake.notify_all()

    def step(self, count: int = 1, *, timeout: float = 5.0) -> None:
        """Let the guest take ``count`` steps, and wait until it has.

        A step is over when its instruction is complete, has left ``KVM_RUN``,
        or has come to wait (`Spin`, `Deaf`). Needs `stepping`, and a thread
        inside ``KVM_RUN`` or soon to come.

        Raises:
            TimeoutError: Not within ``timeout`` seconds; the rest is not taken.
        """
        deadline = time.monotonic() + timeout
        for _ in range(count):
            with self._lock:
                if not self._stepping:
                    raise RuntimeError(f"{self!r} is not stepping: set its stepping first")
                goal = self._steps + 1
                self._permits = 1
                self._wake.notify_all()
                if not self._watch(self._steps_reach(goal), deadline - time.monotonic()):
                    self._permits = 0
                    raise TimeoutError(f"{self!r} did not take a step within {timeout} s")

    def wait_for(
        self, condition: Callable[[FakeVcpuStatistics], bool], *, timeout: float = 5.0
    ) -> FakeVcpuStatistics:
        """Wait until ``condition`` holds for the statistics, and return these.

        ``condition`` is called with the fake kernel's lock held: it must look
        at nothing but its argument.

        Raises:
            TimeoutError: It did not come to hold within ``timeout`` seconds.
        """
        with self._lock:
            if not self._watch(lambda: condition(self._statistics()), timeout):
                raise TimeoutError(f"not within {timeout} s; {self!r}: {self._statistics()}")
            return self._statistics()

    def wait_inside(self, *, timeout: float = 5.0) -> None:
        """Wait until a thread is inside ``KVM_RUN``."""
        self.wait_for(lambda statistics: statistics.inside, timeout=timeout)

    def statistics(self) -> FakeVcpuStatistics:
        """What the vCPU has done so far."""
        with self._lock:
            return self._statistics()

    # VcpuHandle.

    def run(self) -> int:
        """``KVM_RUN``; see `VcpuHandle.run`.

        Returns:
            0 when the guest exited, else the errno: EINTR when the vCPU was
            kicked, EBUSY when another thread is inside already, EBADF when the
            handle is closed.

        Raises:
            Exception: Whatever the guest's script raised.
        """
        if self._closed:
            return errno.EBADF
        # What VcpuFd does: the kernel would let a second thread wait on the
        # vCPU's mutex, where no kick could reach it.
        with self._lock:
            if self._running:
                return errno.EBUSY
            self._running = True
        with self._mutex:
            begun, wants_to_run = self._enter()
            error = begun.errno
            outcome: Any = None
            try:
                if not error:
                    error = self._execute(wants_to_run)
                outcome = self._guest.exit_reason
            except BaseException as exc:
                # Not the exception: its traceback would keep the guest alive.
                outcome = repr(exc)
                raise
            finally:
                self._leave(begun, error, outcome)
            return error

    def clear_kick(self) -> None:
        """Set ``immediate_exit`` to 0."""
        self._check_open()
        with self._lock:
            self._immediate_exit = False

    def kick(self) -> None:
        """Set ``immediate_exit``, and signal the thread inside, if there is one."""
        with self._lock:
            self._immediate_exit = True
            self._kicks += 1
            # A thread outside KVM_RUN handles the signal there and then; it is
            # not pending any more when the thread enters.
            if self._inside:
                if self._lose_signals:
                    self._lose_signals -= 1
                    self._signals_lost += 1
                else:
                    self._signal = True
                    self._wake.notify_all()
            self._notify_watchers()

    @property
    def exit_reason(self) -> int:
        """``kvm_run.exit_reason`` of the last exit."""
        self._check_open()
        return self._guest.exit_reason

    @property
    def in_smm(self) -> bool:
        """Whether the vCPU is in system management mode: `address_space_id` is 1."""
        self._check_open()
        return self.address_space_id == 1

    def mmio(self) -> tuple[int, int, bool, bytes]:
        """The last MMIO exit: (physical address, length, is_write, data)."""
        self._check_open()
        return self._guest.mmio()

    def complete_mmio(self, data: bytes) -> None:
        """Give the bytes that the last MMIO read returns to the guest."""
        self._check_open()
        self._guest.complete_mmio(data)

    def io(self) -> tuple[int, int, int, bool, bytes]:
        """The last PIO exit: (port, size, count, is_out, data)."""
        self._check_open()
        return self._guest.io()

    def complete_io(self, data: bytes) -> None:
        """Give the bytes that the last IN returns to the guest."""
        self._check_open()
        self._guest.complete_io(data)

    def terminal_exit(self) -> VcpuExit:
        """The last exit, when it was neither MMIO nor PIO, as a value."""
        self._check_open()
        return self._guest.terminal_exit()

    def collect_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what is new in the dirty ring; see `VcpuHandle.collect_dirty_gfns`."""
        with self._lock:
            return self._ring.collect() if self._ring is not None else []

    def skip_dirty_gfns(self, none: int = 0) -> int:
        """Pass over entries of a ring that has overflowed; see `VcpuHandle.skip_dirty_gfns`."""
        with self._lock:
            return self._ring.skip(none) if self._ring is not None else 0

    def reset_ring(self) -> int:
        """Free what was collected, and protect its pages. The lock is held."""
        return self._ring.reset(self._vm.memslots.protect) if self._ring is not None else 0

    def get_regs(self) -> dict[str, int]:
        """``KVM_GET_REGS``."""
        return self._vcpu_ioctl("KVM_GET_REGS", lambda: dict(self._regs), {})

    def set_regs(self, regs: dict[str, int]) -> None:
        """``KVM_SET_REGS``; bit 1 of ``rflags`` is always set.

        Raises:
            ValueError: A field is missing, unknown, or does not fit.
        """

        def effect() -> None:
            self._regs = given | {"rflags": given["rflags"] | 2}

        given = dict(regs)
        fake_registers.check_fields("struct kvm_regs", given, self._regs)
        self._vcpu_ioctl("KVM_SET_REGS", effect, given)

    def get_sregs(self) -> dict[str, Any]:
        """``KVM_GET_SREGS``."""
        return self._vcpu_ioctl("KVM_GET_SREGS", lambda: copy.deepcopy(self._sregs), {})

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        """``KVM_SET_SREGS``.

        Raises:
            ValueError: A field is missing, unknown, or does not fit.
            KvmError: EINVAL for a mode that the processor does not have.
        """
        given = copy.deepcopy(sregs)

        def effect() -> None:
            fake_registers.check_sregs(given)
            self._sregs = copy.deepcopy(given)

        fake_registers.check_fields("struct kvm_sregs", given, self._sregs)
        self._vcpu_ioctl("KVM_SET_SREGS", effect, given)

    def close(self) -> None:
        """Close the descriptor. Idempotent; a thread inside ``KVM_RUN`` stays there."""
        self._closed = True

    # KVM_RUN.

    def _enter(self) -> tuple[Begun, bool]:
        with self._lock:
            begun = self._vm.recorder.begin("KVM_RUN")
            self._runs += 1
            self._signal = False
            if self._vm.kicked:
                self._spins += 1
            wants_to_run = not (begun.errno or self._immediate_exit or self._vm.kicked)
            if wants_to_run:
                self._inside = True
                self._vm.inside.add(self.vcpu_id)
            self._notify_watchers()
            return begun, wants_to_run

    def _leave(self, begun: Begun, error: int, outcome: Any) -> None:
        with self._lock:
            self._running = False
            if self._inside:
                self._inside = False
                self._vm.inside.discard(self.vcpu_id)
                self._vm.left.notify_all()
            self._eintrs += error == errno.EINTR
            self._vm.recorder.end(
                begun,
                "KVM_RUN",
                vm=self._vm.index,
                vcpu=self.vcpu_id,
                args={},
                result=outcome,
                errno=error,
                inside=frozenset(self._vm.inside),
            )
            self._close_step()

    def _execute(self, wants_to_run: bool) -> int:
        if not self._guest.complete_pending():
            return 0
        if not wants_to_run:
            return errno.EINTR
        ring = self._ring
        late = False
        while True:
            if ring is not None and ring.full and not late:
                self._guest.exit_reason = EXIT_DIRTY_RING_FULL
                return 0
            late = ring is not None and ring.noticed_late
            if not self._at_boundary():
                break
            if self._perform(self._guest.current_instruction()):
                return 0
        self._guest.exit_reason = EXIT_INTR
        return errno.EINTR

    def _at_boundary(self) -> bool:
        """Between two instructions: False when interrupted, True to go on."""
        with self._lock:
            if self._stepping:
                self._block_until(lambda: self._permits > 0 or not self._stepping)
            if self._interrupted():
                return False
            if self._stepping:
                self._permits = 0
                self._step_open = True
            return True

    def _perform(self, instruction: Instruction) -> bool:
        """Execute one instruction; True when the vCPU leaves ``KVM_RUN`` by it."""
        match instruction:
            case Spin(kicks=kicks):
                self._spin(kicks)
                return False
            case LoseSignals(count=count):
                with self._lock:
                    self._lose_signals += count
                self._guest.retire()
            case Deaf(until=until):
                with self._lock:
                    self._blocked = True
                    self._close_step()
                until.wait()
                self._guest.retire()
                with self._lock:
                    self._blocked = False
            case _:
                # The step of an instruction that leaves is over when it has left.
                if self._guest.perform(instruction):
                    return True
        with self._lock:
            self._close_step()
        return False

    def _spin(self, kicks: int | None) -> None:
        with self._lock:
            self._close_step()
            self._block_until(lambda: False)
        self._spun += 1
        if self._spun == kicks:
            self._spun = 0
            self._guest.retire()

    def _noticed(self, slot: int, page: int) -> None:
        if self._ring is not None:
            self._ring.push(slot, page)

    def _memory(self, addr: int, data: bytearray, is_write: bool) -> list[tuple[int, int]]:
        """Do what memslots can of an access; return what is left, cut at pages."""
        left: list[tuple[int, int]] = []
        memslots, space = self._vm.memslots, self.address_space_id
        with self._lock:
            for offset, length in cut(addr, len(data), PAGE_SIZE):
                part = slice(offset, offset + length)
                if is_write:
                    done = memslots.store(space, addr + offset, bytes(data[part]), self._noticed)
                else:
                    loaded = memslots.load(space, addr + offset, length)
                    done = loaded is not None
                    if loaded is not None:
                        data[part] = loaded
                if not done:
                    left.append((offset, length))
        return left

    def _bus(self, addr: int, data: bytes, pio: bool) -> bool:
        """Have an ioeventfd or the coalesced ring take a write, if one does."""
        with self._lock:
            return self._vm.bus.write(addr, data, pio)

    # With the lock held.

    def _interrupted(self) -> bool:
        return self._signal or self._vm.kicked

    def _block_until(self, condition: Callable[[], bool]) -> None:
        """Wait inside ``KVM_RUN`` until ``condition`` or an interruption."""
        self._blocked = True
        self._notify_watchers()
        self._wake.wait_for(lambda: self._interrupted() or condition())
        self._blocked = False

    def interrupt(self) -> None:
        """Have the thread inside look at `VmState.kicked`. The lock is held."""
        self._wake.notify_all()

    @property
    def entry(self) -> int | None:
        """Which entry into ``KVM_RUN`` is under way, if any. The lock is held."""
        return self._runs if self._inside else None

    def _close_step(self) -> None:
        if self._step_open:
            self._step_open = False
            self._steps += 1
        self._notify_watchers()

    def _steps_reach(self, goal: int) -> Callable[[], bool]:
        return lambda: self._steps >= goal

    def _notify_watchers(self) -> None:
        # Instructions are many and watchers few.
        if self._watchers:
            self._changed.notify_all()

    def _watch(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._watchers += 1
        try:
            return self._changed.wait_for(condition, timeout)
        finally:
            self._watchers -= 1

    def _statistics(self) -> FakeVcpuStatistics:
        return FakeVcpuStatistics(
            runs=self._runs,
            instructions=self._guest.instructions,
            eintrs=self._eintrs,
            spins=self._spins,
            mmio_exits=self._guest.mmio_exits,
            pio_exits=self._guest.pio_exits,
            internal_errors=self._guest.internal_errors,
            kicks=self._kicks,
            signals_lost=self._signals_lost,
            inside=self._inside,
            blocked=self._blocked,
        )

    # The rest.

    def _vcpu_ioctl(self, name: str, effect: Callable[[], T], args: dict[str, Any]) -> T:
        self._check_open()
        with self._mutex:
            return self._vm.recorder.call(
                name,
                effect,
                args=args,
                vm=self._vm.index,
                vcpu=self.vcpu_id,
                inside=self._vm.inside,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise kernel_error(errno.EBADF, f"vCPU {self.vcpu_id} is closed")
