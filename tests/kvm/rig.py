"""One guest for both kernels, and a machine to run it on.

A guest is a list of `memlistener.testing` instructions. The fake kernel executes
them as they are; for the real one they are assembled into 64-bit code. What the
guest reads it stores in its own RAM, so that a test looks in one place.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import trio

from memlistener import AddressSpace, MemoryRegion, MemorySystem
from memlistener.kvm import KickPolicy, Vcpu, Vm, open_vm, x86
from memlistener.kvm.exits import Hlt
from memlistener.testing import (
    Exit,
    FakeKvm,
    FakeVcpu,
    Fetch,
    GuestScript,
    In,
    Instruction,
    Out,
    Read,
    Spin,
    Write,
)

PAGE = 0x1000
RAM_SIZE = 0x100000
LONG_ENOUGH = 60.0
SLOT_IOCTL = "KVM_SET_USER_MEMORY_REGION"

_TABLES = 0x80000  # six pages, for all vCPUs
_CODE, _DATA, _RESULTS, _STRIDE = 0x1000, 0x3000, 0x4000, 0x4000
_COUNTER = PAGE - 8  # in the page of results
_STACK = 0x80  # bytes, below the data

# By size: mov ax, [imm64]; mov [imm64], ax; mov ax, imm; and in, out, rep ins, rep outs.
_LOAD = {1: b"\xa0", 2: b"\x66\xa1", 4: b"\xa1", 8: b"\x48\xa1"}
_STORE = {1: b"\xa2", 2: b"\x66\xa3", 4: b"\xa3", 8: b"\x48\xa3"}
_SET = {1: b"\xb0", 2: b"\x66\xb8", 4: b"\xb8", 8: b"\x48\xb8"}
_IN = {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}
_OUT = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}
_INS = {1: b"\xf3\x6c", 2: b"\x66\xf3\x6d", 4: b"\xf3\x6d"}
_OUTS = {1: b"\xf3\x6e", 2: b"\x66\xf3\x6f", 4: b"\xf3\x6f"}
_HLT, _JMP_SELF = b"\xf4", b"\xeb\xfe"


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


class Guest:
    """A program, and where a vCPU has it.

    Args:
        number: The vCPU's: each has memory of its own.
        instructions: What it does.
        loop: Whether it starts over at the end, counting the rounds, instead
            of executing HLT.
    """

    def __init__(self, number: int, instructions: Sequence[Instruction], *, loop: bool) -> None:
        base = number * _STRIDE
        self.entry = base + _CODE
        self.instructions = instructions
        self.loop = loop
        self._data_at = base + _DATA
        self._results_at = base + _RESULTS
        assert self._results_at + PAGE <= _TABLES, "too many vCPUs for this RAM"

    def _reads(self) -> Iterator[tuple[int, Instruction, int]]:
        """(address of the result, instruction, its bytes) for all that reads."""
        at = self._results_at
        for each in self.instructions:
            if isinstance(each, Read | In):
                length = each.size * (each.count if isinstance(each, In) else 1)
                yield at, each, length
                at += -(-length // 8) * 8

    def script(self) -> GuestScript:
        """For the fake kernel."""
        rounds = 0
        while True:
            at = self._results_at
            for each in self.instructions:
                value = yield each
                if isinstance(each, Read | In):
                    length = each.size * (each.count if isinstance(each, In) else 1)
                    yield Write(at, length, value)
                    at += -(-length // 8) * 8
            if not self.loop:
                return
            rounds += 1
            yield Write(self._results_at + _COUNTER, 4, rounds % 2**32)

    def image(self) -> list[tuple[int, bytes]]:
        """For the real kernel: (address, bytes) of code and data."""
        code = bytearray()
        data = bytearray()
        results = {id(each): at for at, each, _ in self._reads()}
        for each in self.instructions:
            match each:
                case Read(addr=addr, size=size):
                    code += _LOAD[size] + _u64(addr) + _STORE[size] + _u64(results[id(each)])
                case Write(addr=addr, size=size, value=value):
                    code += _SET[size] + value.to_bytes(size, "little")
                    code += _STORE[size] + _u64(addr)
                case In(port=port, size=size, count=count):
                    code += b"\x66\xba" + struct.pack("<H", port)  # mov dx, port
                    if count == 1:
                        code += _IN[size] + _STORE[size] + _u64(results[id(each)])
                    else:
                        code += b"\x48\xbf" + _u64(results[id(each)])  # mov rdi, there
                        code += b"\x48\xb9" + _u64(count) + _INS[size]  # mov rcx, count
                case Out(port=port, size=size, count=count, value=value):
                    code += b"\x66\xba" + struct.pack("<H", port)
                    if count == 1:
                        code += _SET[size] + value.to_bytes(size, "little") + _OUT[size]
                    else:
                        code += b"\x48\xbe" + _u64(self._data_at + len(data))  # mov rsi, there
                        code += b"\x48\xb9" + _u64(count) + _OUTS[size]
                        data += value.to_bytes(size * count, "little")
                case Fetch(addr=addr):  # which has to be a ret
                    code += b"\x48\xb8" + _u64(addr) + b"\xff\xd0"  # call it
                case Exit(value=Hlt()):
                    code += _HLT
                case Spin():
                    code += _JMP_SELF
                case _:
                    raise NotImplementedError(f"{each} for the real kernel")
        if self.loop:
            counter = self._results_at + _COUNTER
            code += b"\xff\x04\x25" + struct.pack("<I", counter)  # inc dword [counter]
            code += b"\xe9" + struct.pack("<i", -len(code) - 5)  # jmp to the start
        else:
            code += _HLT
        assert len(code) <= _DATA - _CODE - _STACK
        return [(self.entry, bytes(code)), (self._data_at, bytes(data))]

    def results(self, ram: memoryview) -> list[int]:
        """What the guest has read, in order."""
        return [int.from_bytes(ram[at : at + length], "little") for at, _, length in self._reads()]

    def rounds(self, ram: memoryview) -> int:
        """How often a looping guest has started over."""
        at = self._results_at + _COUNTER
        return int.from_bytes(ram[at : at + 4], "little")


class Rig:
    """1 MiB of RAM at 0 and an empty space of I/O ports, on the real kernel or the fake one.

    Args:
        fake: The fake kernel; None for the real one.
        unassigned_raises: For both address spaces.
    """

    def __init__(self, fake: FakeKvm | None, *, unassigned_raises: bool = False) -> None:
        self.fake = fake
        self.memory = MemorySystem()
        self.low = MemoryRegion.ram("low", RAM_SIZE)
        self.system = MemoryRegion.container("system", 1 << 36)
        self.system.add_subregion(0, self.low)
        self.ports = MemoryRegion.container("ports", 0x10000)
        self._unassigned_raises = unassigned_raises
        self.guests: dict[int, Guest] = {}
        self._index = 0

    @functools.cached_property
    def space(self) -> AddressSpace:
        """The guest's memory; what was added to `system` before is in it from the start."""
        return self.memory.create_address_space(
            "memory", self.system, unassigned_raises=self._unassigned_raises
        )

    @functools.cached_property
    def io(self) -> AddressSpace:
        """The guest's ports."""
        return self.memory.create_address_space(
            "io", self.ports, unassigned_raises=self._unassigned_raises
        )

    @contextlib.asynccontextmanager
    async def open(
        self, policy: KickPolicy = KickPolicy.EVERY_COMMIT, **options: Any
    ) -> AsyncIterator[Vm]:
        """`open_vm` on the rig's kernel."""
        if self.fake is not None:
            self._index = len(self.fake.vms)
        async with open_vm(self.space, self.io, policy=policy, backend=self.fake, **options) as vm:
            yield vm

    def fake_vcpu(self, vcpu: Vcpu) -> FakeVcpu:
        """The fake kernel's side of a vCPU."""
        assert self.fake is not None
        return next(v for v in self.fake.vms[self._index].vcpus if v.vcpu_id == vcpu.id)

    async def boot(self, vm: Vm, *instructions: Instruction, loop: bool = False) -> Vcpu:
        """A new vCPU with a program."""
        vcpu = await vm.create_vcpu()
        self.load(vcpu, *instructions, loop=loop)
        return vcpu

    def load(self, vcpu: Vcpu, *instructions: Instruction, loop: bool = False) -> None:
        """Start a vCPU over with a program."""
        guest = self.guests[vcpu.id] = Guest(vcpu.id, instructions, loop=loop)
        if self.fake is not None:
            self.fake_vcpu(vcpu).load(guest.script())
            return
        for addr, data in guest.image():
            vcpu.write_guest_memory(addr, data)
        stack = guest.entry - _CODE + _DATA
        x86.long_mode(vcpu, guest.entry, page_tables=_TABLES, stack=stack)

    def results(self, vcpu: Vcpu) -> list[int]:
        """What the vCPU's guest has read, in order."""
        return self.guests[vcpu.id].results(self.low.block.view)

    def rounds(self, vcpu: Vcpu) -> int:
        """How often the vCPU's guest has started over."""
        return self.guests[vcpu.id].rounds(self.low.block.view)

    async def wait_rounds(self, vcpu: Vcpu, more: int = 1) -> None:
        """Wait until the vCPU's guest has started over ``more`` times from now."""
        goal = self.rounds(vcpu) + more
        await until(lambda: self.rounds(vcpu) >= goal)

    async def wait_inside(self, vm: Vm, count: int = 1) -> None:
        """Wait until so many vCPUs are inside."""
        await until(lambda: vm.statistics().gate.vcpus_inside >= count)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that guests do, for a long time at most."""
    with trio.fail_after(LONG_ENOUGH):
        while not condition():
            await trio.sleep(0.0005)


def vcpu_threads() -> list[str]:
    """The vCPUs' threads that there are."""
    return [each.name for each in threading.enumerate() if each.name.startswith("vcpu ")]
