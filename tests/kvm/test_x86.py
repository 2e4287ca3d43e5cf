from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.errors import KvmError
from memlistener.kvm import x86
from memlistener.kvm.exits import Hlt
from memlistener.kvm.registers import Regs, Sregs
from tests.kvm.machine import Machine

ENTRY = 0x1000
STACK = 0x8000
TABLES = 0x9000  # 6 pages, up to 0xf000: within the test machine's RAM
HLT = b"\xf4"


def long_mode(machine: Machine, entry: int = ENTRY) -> None:
    """Long mode with everything in the test machine's little RAM."""
    x86.long_mode(machine.vcpu, entry, page_tables=TABLES, write=machine.write, stack=STACK)


def run_to_hlt(machine: Machine) -> Regs:
    """Run, and have the registers at the HLT."""
    assert machine.run() == 0
    assert machine.vcpu.terminal_exit() == Hlt()
    return Regs(machine.vcpu)


@pytest.mark.kvm
def test_real_mode(machine: Machine) -> None:
    """A 16-bit guest computes, stores and pushes."""
    code = (
        b"\xb8\x34\x12"  # mov ax, 0x1234
        b"\x40"  # inc ax
        b"\xa3\x00\x20"  # mov [0x2000], ax
        b"\x50"  # push ax
    )
    machine.write(ENTRY, code + HLT)
    x86.real_mode(machine.vcpu, entry=ENTRY, stack=STACK)
    regs = run_to_hlt(machine)
    assert regs.rax == 0x1235
    assert regs.rsp == STACK - 2
    assert machine.ram[0x2000:0x2002] == b"\x35\x12"
    assert machine.ram[STACK - 2 : STACK] == b"\x35\x12"


@pytest.mark.kvm
def test_real_mode_beyond_64_kib() -> None:
    """An entry beyond 0x10000 gets a code segment of its own; data begins at 0."""
    with Machine(slot=False) as machine:
        machine.vm.set_user_memory_region(0, 0, 0x20000, 0x10000, machine.host)
        machine.write(0x1234, b"\x8c\xc8" + HLT)  # mov ax, cs
        x86.real_mode(machine.vcpu, 0x21234)
        regs = run_to_hlt(machine)
        assert regs.rax == 0x2000
        assert regs.rip == 0x1237
        assert Sregs(machine.vcpu).ds.base == 0


@pytest.mark.kvm
def test_real_mode_vectors(machine: Machine) -> None:
    """The interrupt vectors are at 0, 256 of them, whatever was there before."""
    Sregs(machine.vcpu).idt.update(base=0x5000, limit=0)
    x86.real_mode(machine.vcpu, ENTRY)
    assert Sregs(machine.vcpu).idt.snapshot() == {"base": 0, "limit": 256 * 4 - 1}


@pytest.mark.kvm
def test_protected_mode(machine: Machine) -> None:
    """A 32-bit guest computes, stores and pushes."""
    code = (
        b"\xb8\x77\x56\x34\x12"  # mov eax, 0x12345677
        b"\x40"  # inc eax (in 64-bit mode a prefix)
        b"\xa3\x00\x20\x00\x00"  # mov [0x2000], eax
        b"\x50"  # push eax
    )
    machine.write(ENTRY, code + HLT)
    x86.protected_mode(machine.vcpu, ENTRY, stack=STACK)
    regs = run_to_hlt(machine)
    assert regs.rax == 0x12345678
    assert regs.rsp == STACK - 4
    assert machine.ram[0x2000:0x2004] == struct.pack("<I", 0x12345678)


@pytest.mark.kvm
def test_long_mode(machine: Machine) -> None:
    """A 64-bit guest uses 64-bit registers, r8 to r15, and 64-bit pushes."""
    value = 0x1122334455667788
    code = (
        b"\x48\xb8" + struct.pack("<Q", value)  # mov rax, value
        + b"\x49\x89\xc1"  # mov r9, rax
        + b"\x48\xa3" + struct.pack("<Q", 0x2000)  # mov [0x2000], rax
        + b"\x50"  # push rax
    )  # fmt: skip
    machine.write(ENTRY, code + HLT)
    long_mode(machine)
    regs = run_to_hlt(machine)
    assert (regs.rax, regs.r9) == (value, value)
    assert regs.rsp == STACK - 8
    assert machine.ram[0x2000:0x2008] == struct.pack("<Q", value)


@pytest.mark.kvm
def test_long_mode_maps_all_of_it(machine: Machine) -> None:
    """The last byte of the 4 GiB that are mapped is reached, one to one: as MMIO of 8 bytes."""
    last = (4 << 30) - 8
    machine.write(ENTRY, b"\x48\xa1" + struct.pack("<Q", last) + HLT)  # mov rax, [last]
    long_mode(machine)
    assert machine.run() == 0
    assert machine.vcpu.mmio()[:3] == (last, 8, False)
    machine.vcpu.complete_mmio(b"\x88\x77\x66\x55\x44\x33\x22\x11")
    assert run_to_hlt(machine).rax == 0x1122334455667788


@pytest.mark.kvm
def test_start_over_in_another_mode(machine: Machine) -> None:
    """A vCPU that ran in one mode can start in any other."""
    machine.write(ENTRY, HLT)
    starts: list[Callable[[], None]] = [
        lambda: x86.real_mode(machine.vcpu, ENTRY),
        lambda: x86.protected_mode(machine.vcpu, ENTRY),
        lambda: long_mode(machine),
    ]
    for first in starts:
        for second in starts:
            for start in (first, second):
                start()
                assert run_to_hlt(machine).rip == ENTRY + 1


class HighLevelVcpu:
    """A real vCPU with the write_guest_memory that the high-level one has."""

    def __init__(self, machine: Machine) -> None:
        self.get_regs = machine.vcpu.get_regs
        self.set_regs = machine.vcpu.set_regs
        self.get_sregs = machine.vcpu.get_sregs
        self.set_sregs = machine.vcpu.set_sregs
        self.write_guest_memory = machine.write


@pytest.mark.kvm
def test_long_mode_writes_through_the_vcpu(machine: Machine) -> None:
    """Without write=, the page tables go through vcpu.write_guest_memory."""
    machine.write(ENTRY, HLT)
    x86.long_mode(HighLevelVcpu(machine), ENTRY, page_tables=TABLES)
    assert run_to_hlt(machine).rip == ENTRY + 1


class NoRegisters:
    """A vCPU that fails when it is touched."""

    def get_regs(self) -> dict[str, int]:
        raise AssertionError("touched")

    def set_regs(self, regs: dict[str, int]) -> None:
        raise AssertionError("touched")

    def get_sregs(self) -> dict[str, Any]:
        raise AssertionError("touched")

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        raise AssertionError("touched")


def unwritable(addr: int, data: bytes) -> None:
    raise AssertionError("written")


def test_bad_arguments_touch_nothing() -> None:
    """Addresses out of range are refused in hex, before anything is changed."""
    vcpu = NoRegisters()
    with pytest.raises(ValueError, match=r"entry 0x100000 is not in \[0, 0x100000\)"):
        x86.real_mode(vcpu, 0x100000)
    with pytest.raises(ValueError, match="stack 0x10000"):
        x86.real_mode(vcpu, 0, stack=0x10000)
    with pytest.raises(ValueError, match="entry -0x1"):
        x86.protected_mode(vcpu, -1)
    with pytest.raises(ValueError, match="stack 0x100000000"):
        x86.protected_mode(vcpu, 0, stack=1 << 32)
    with pytest.raises(ValueError, match=r"entry 0x200000 is not in \[0, 0x200000\)"):
        x86.long_mode(vcpu, 2 << 20, map_size=2 << 20, write=unwritable)
    with pytest.raises(ValueError, match="page_tables 0x70001 is not a multiple of 0x1000"):
        x86.long_mode(vcpu, 0, page_tables=0x70001, write=unwritable)
    for size in (0, 0x1000, (512 << 30) + (2 << 20)):
        with pytest.raises(ValueError, match=f"map_size {size:#x}"):
            x86.long_mode(vcpu, 0, map_size=size, write=unwritable)
    with pytest.raises(TypeError, match="write_guest_memory"):
        x86.long_mode(vcpu, 0)


@pytest.mark.kvm
def test_failed_write_leaves_the_registers(machine: Machine) -> None:
    """When the page tables cannot be written, the vCPU is as it was."""
    before = machine.vcpu.get_regs(), machine.vcpu.get_sregs()

    def fail(addr: int, data: bytes) -> None:
        raise KvmError(14, "no memory there")

    with pytest.raises(KvmError, match="no memory there"):
        x86.long_mode(machine.vcpu, ENTRY, write=fail)
    assert (machine.vcpu.get_regs(), machine.vcpu.get_sregs()) == before


def walk(tables: bytes, at: int, addr: int) -> int | None:
    """What an address maps to: the processor's walk, written independently of the builder."""

    def entry(table: int, index: int) -> int:
        offset = table - at + 8 * index
        if not 0 <= offset < len(tables):
            raise AssertionError(f"table {table:#x} is outside")
        return int.from_bytes(tables[offset : offset + 8], "little")

    table = at
    for shift in (39, 30):
        found = entry(table, addr >> shift & 0x1FF)
        if not found & 1:
            return None
        assert found & 0xFFF == 0x3
        table = found & ~0xFFF
    found = entry(table, addr >> 21 & 0x1FF)
    if not found & 1:
        return None
    assert found & 0xFFF == 0x83
    return (found & ~0x1FFFFF) | addr & 0x1FFFFF


@given(
    pages=st.integers(1, 3000),
    at=st.integers(0, 1 << 20).map(lambda n: n * 0x1000),
    data=st.data(),
)
def test_page_tables_are_the_identity(pages: int, at: int, data: st.DataObject) -> None:
    """Exactly [0, map_size) is mapped, to itself, by page_tables_size() bytes of tables."""
    map_size = pages * (2 << 20)
    tables = x86._page_tables(at, map_size)
    assert len(tables) == x86.page_tables_size(map_size)
    for addr in (0, map_size - 1, data.draw(st.integers(0, map_size - 1))):
        assert walk(tables, at, addr) == addr
    for addr in (map_size, data.draw(st.integers(map_size, (1 << 48) - 1))):
        assert walk(tables, at, addr) is None
