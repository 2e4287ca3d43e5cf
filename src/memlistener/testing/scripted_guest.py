"""`ScriptedGuest`: a guest that executes a script, and its ``struct kvm_run``.

Single-threaded: it knows no locks, and nothing of being interrupted. Those are
`FakeVcpu`'s, which drives it one instruction at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator

import attrs

from memlistener.kvm.backend import EXIT_IO, EXIT_MMIO
from memlistener.kvm.exits import (
    Debug,
    FailEntry,
    Hlt,
    InternalError,
    Shutdown,
    SystemEvent,
    Unknown,
    Unsupported,
    VcpuExit,
)
from memlistener.testing.fake_memslots import PAGE_SIZE
from memlistener.testing.guest_script import (
    Exit,
    Fetch,
    Halt,
    In,
    Instruction,
    Out,
    Read,
    Write,
)

EXIT_INTR = 10
_EXIT_REASONS: dict[type[VcpuExit], int] = {
    Unknown: 0,
    Debug: 4,
    Hlt: 5,
    Shutdown: 8,
    FailEntry: 9,
    InternalError: 17,
    SystemEvent: 24,
}
_EMULATION_FAILURE = 1
_MMIO_FRAGMENT = 8

Memory = Callable[[int, bytearray, bool], list[tuple[int, int]]]
"""Does an access (address, data, is_write) as far as memslots can.

A read fills in the data. Returned is what is left, one (offset into data,
length) for each page.
"""

Bus = Callable[[int, bytes, bool], bool]
"""Takes a write (address, data, whether to a port) without an exit; or does not."""


@attrs.define
class _PendingMmio:
    """An access in which exits take part, one for each (offset into data, length)."""

    addr: int
    data: bytearray
    is_write: bool
    fragments: list[tuple[int, int]]


class ScriptedGuest:
    """What is inside a vCPU: the program, the instruction under way, the last exit.

    Attributes:
        exit_reason: ``kvm_run.exit_reason``.
        instructions: How many have been completed.
        mmio_exits: How many exits for MMIO there were, one a fragment.
        pio_exits: How many exits for PIO there were.
        internal_errors: How many fetches found no memslot.
    """

    def __init__(
        self,
        memory: Memory,
        script: Iterable[Instruction],
        bus: Bus = lambda addr, data, pio: False,
    ) -> None:
        """A guest at the start of its script, whose accesses go to ``memory`` and ``bus``."""
        self._memory = memory
        self._bus = bus
        self.exit_reason = 0
        self.instructions = self.mmio_exits = self.pio_exits = self.internal_errors = 0
        self._terminal: VcpuExit = Unknown(0)
        self._mmio = (0, 0, False)
        self._mmio_data = bytearray(_MMIO_FRAGMENT)
        self._io = (0, 0, 0, False)
        self._io_data = bytearray(PAGE_SIZE)
        self.load(script)

    def load(self, script: Iterable[Instruction]) -> None:
        """Start a script, forgetting the instruction under way and its pending exit."""
        self._script: Iterator[Instruction] = iter(script)
        self._started = False
        self._instruction: Instruction | None = None
        self._result = 0
        self._pending: _PendingMmio | In | Out | None = None

    # Executing.

    def current_instruction(self) -> Instruction:
        """The instruction under way; if there is none, the script's next."""
        if self._instruction is None:
            self._instruction = self._next_instruction()
        return self._instruction

    def retire(self, result: int = 0) -> None:
        """Complete the instruction under way; ``result`` is what it read."""
        self._instruction = None
        self._result = result
        self.instructions += 1

    def perform(self, instruction: Read | Write | Fetch | In | Out | Exit) -> bool:
        """Execute an instruction; True when the vCPU leaves ``KVM_RUN`` by it."""
        match instruction:
            case Read(addr=addr, size=size):
                return self._access(addr, bytearray(size), is_write=False)
            case Write(addr=addr, size=size, value=value):
                return self._access(addr, bytearray(value.to_bytes(size, "little")), is_write=True)
            case Fetch(addr=addr, size=size):
                return self._fetch(addr, size)
            case In(port=port, size=size, count=count):
                self._exit_io(instruction, (port, size, count, False))
            case Out(port=port, size=size, count=count, value=value):
                data = value.to_bytes(size * count, "little")
                if self._out(port, data, size):
                    self.retire()
                    return False
                self._io_data[: len(data)] = data
                self._exit_io(instruction, (port, size, count, True))
            case Exit(value=terminal):
                self.retire()
                self._exit(terminal)
        return True

    def complete_pending(self) -> bool:
        """Take in the answer to the last exit; False when it leads to another."""
        pending, self._pending = self._pending, None
        if isinstance(pending, _PendingMmio):
            offset, length = pending.fragments.pop(0)
            if not pending.is_write:
                pending.data[offset : offset + length] = self._mmio_data[:length]
            if pending.fragments:
                self._exit_mmio(pending)
                return False
            self.retire(0 if pending.is_write else int.from_bytes(pending.data, "little"))
        elif isinstance(pending, In):
            length = pending.size * pending.count
            self.retire(int.from_bytes(self._io_data[:length], "little"))
        elif isinstance(pending, Out):
            self.retire()
        return True

    # The exit, as it is seen from outside.

    def mmio(self) -> tuple[int, int, bool, bytes]:
        """The last MMIO exit: (physical address, length, is_write, data)."""
        self._check_exit(EXIT_MMIO)
        addr, length, is_write = self._mmio
        return addr, length, is_write, bytes(self._mmio_data[:length])

    def complete_mmio(self, data: bytes) -> None:
        """Give the bytes that the last MMIO read returns."""
        self._check_exit(EXIT_MMIO)
        _, length, is_write = self._mmio
        _check_answer("MMIO", is_write, length, data)
        self._mmio_data[:length] = data

    def io(self) -> tuple[int, int, int, bool, bytes]:
        """The last PIO exit: (port, size, count, is_out, data)."""
        self._check_exit(EXIT_IO)
        port, size, count, is_out = self._io
        return port, size, count, is_out, bytes(self._io_data[: size * count])

    def complete_io(self, data: bytes) -> None:
        """Give the bytes that the last IN returns."""
        self._check_exit(EXIT_IO)
        _, size, count, is_out = self._io
        _check_answer("PIO", is_out, size * count, data)
        self._io_data[: size * count] = data

    def terminal_exit(self) -> VcpuExit:
        """The last exit, when it was neither MMIO nor PIO, as a value."""
        if self.exit_reason in (EXIT_IO, EXIT_MMIO, EXIT_INTR):
            return Unsupported(self.exit_reason)
        return self._terminal

    # Inside.

    def _next_instruction(self) -> Instruction:
        result, self._result = self._result, 0
        try:
            if isinstance(self._script, Generator) and self._started:
                instruction = self._script.send(result)
            else:
                self._started = True
                instruction = next(self._script)
        except StopIteration:
            return Halt()
        if not isinstance(instruction, Instruction):
            raise TypeError(f"{instruction!r} is no guest instruction")
        return instruction

    def _access(self, addr: int, data: bytearray, *, is_write: bool) -> bool:
        left = self._memory(addr, data, is_write)
        if not left:
            self.retire(0 if is_write else int.from_bytes(data, "little"))
            return False
        fragments = []
        for offset, length in left:
            on_bus = is_write  # what follows the first part that exits does so too
            for inner, size in cut(0, length, _MMIO_FRAGMENT):
                at = offset + inner
                on_bus = on_bus and self._bus(addr + at, bytes(data[at : at + size]), False)
                if not on_bus:
                    fragments.append((at, size))
        if not fragments:
            self.retire()
            return False
        self._exit_mmio(_PendingMmio(addr, data, is_write, fragments))
        return True

    def _out(self, port: int, data: bytes, size: int) -> bool:
        """Whether the bus takes an OUT: the first access decides; what it then refuses is lost."""
        for at in range(0, len(data), size):
            if not self._bus(port, data[at : at + size], True):
                return at > 0
        return True

    def _fetch(self, addr: int, size: int) -> bool:
        code = bytearray(size)
        if self._memory(addr, code, False):
            # Not retired: the next run tries the same fetch again.
            self.internal_errors += 1
            self._exit(InternalError(_EMULATION_FAILURE))
            return True
        self.retire(int.from_bytes(code, "little"))
        return False

    def _exit_mmio(self, pending: _PendingMmio) -> None:
        offset, length = pending.fragments[0]
        self._pending = pending
        self.exit_reason = EXIT_MMIO
        self._mmio = (pending.addr + offset, length, pending.is_write)
        if pending.is_write:
            self._mmio_data[:length] = pending.data[offset : offset + length]
        self.mmio_exits += 1

    def _exit_io(self, instruction: In | Out, io: tuple[int, int, int, bool]) -> None:
        self._pending = instruction
        self.exit_reason = EXIT_IO
        self._io = io
        self.pio_exits += 1

    def _exit(self, value: VcpuExit) -> None:
        self._terminal = value
        if isinstance(value, Unsupported):
            self.exit_reason = value.reason
        else:
            self.exit_reason = _EXIT_REASONS[type(value)]

    def _check_exit(self, reason: int) -> None:
        if self.exit_reason != reason:
            raise ValueError(f"the last exit had reason {self.exit_reason}, not {reason}")


def cut(start: int, size: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut [start, start + size) at multiples of ``unit``: (offset, length) each."""
    offset = 0
    while offset < size:
        length = min(size - offset, unit - (start + offset) % unit)
        yield offset, length
        offset += length


def _check_answer(kind: str, is_write: bool, length: int, data: bytes) -> None:
    if is_write:
        raise ValueError(f"the last {kind} exit was a write: there is nothing to answer")
    if len(data) != length:
        raise ValueError(f"the last {kind} exit wants {length} bytes, not {len(data)}")
