"""Puts an x86 vCPU into a mode in which guest code can start.

Each function sets every register, so that it may be used on a fresh vCPU or to
start one over. They set the processor's hidden segment state directly and write
no descriptor tables: a guest that loads a segment register, takes an interrupt
or faults in protected or long mode has to bring its own GDT and IDT, and until
then an exception is a triple fault (`Shutdown`).

A vCPU here is anything with ``get_regs``, ``set_regs``, ``get_sregs`` and
``set_sregs``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from memlistener.kvm.registers import RegisterAccess, Regs, Sregs

_CR0_PE: Final = 1 << 0  # protected mode
_CR0_ET: Final = 1 << 4  # always 1 since the 486
_CR0_PG: Final = 1 << 31  # paging
_CR4_PAE: Final = 1 << 5
_EFER_LME: Final = 1 << 8  # long mode enabled
_EFER_LMA: Final = 1 << 10  # long mode active

_RFLAGS_RESERVED: Final = 1 << 1  # always 1

_PTE_PRESENT_WRITABLE: Final = 0b11
_PDE_LARGE: Final = 1 << 7  # a page of 2 MiB instead of a table of 4 KiB pages

_PAGE: Final = 0x1000
_LARGE_PAGE: Final = 2 << 20
_DIRECTORY_SPAN: Final = 1 << 30  # what one page directory maps
_MAX_MAP: Final = 512 << 30  # what one page-directory-pointer table maps

_TYPE_DATA: Final = 0b0011  # read, write, accessed
_TYPE_CODE: Final = 0b1011  # execute, read, accessed
_TYPE_LDT: Final = 0b0010
_TYPE_TSS: Final = 0b1011  # 32- or 64-bit, busy: what a processor in either mode must have


def real_mode(vcpu: RegisterAccess, entry: int, *, stack: int = 0) -> None:
    """Start in real mode (16-bit, addresses up to 1 MiB).

    The data and stack segments begin at 0. So does the code segment when the
    entry lies below 0x10000; beyond, it begins at the entry rounded down to
    0x10000. The interrupt vectors are at 0, as ever.

    Args:
        vcpu: The vCPU; it must not be running.
        entry: Linear address of the first instruction, below 0x100000.
        stack: The initial SP, below 0x10000; 0 makes the first push wrap to
            0xfffe.

    Raises:
        ValueError: An address is out of range; nothing is changed.
    """
    _check_below("entry", entry, 0x100000)
    _check_below("stack", stack, 0x10000)
    base = entry & ~0xFFFF
    data = _segment(_TYPE_DATA, limit=0xFFFF)
    _start(
        vcpu,
        rip=entry - base,
        rsp=stack,
        code=_segment(_TYPE_CODE, limit=0xFFFF, base=base, selector=base >> 4),
        data=data,
        cr0=_CR0_ET,
        idt_limit=0x3FF,
    )


def protected_mode(vcpu: RegisterAccess, entry: int, *, stack: int = 0) -> None:
    """Start in 32-bit protected mode, flat and without paging.

    All segments begin at 0 and reach 4 GiB; the selectors are 0x8 (code) and
    0x10 (data), at privilege level 0.

    Args:
        vcpu: The vCPU; it must not be running.
        entry: Address of the first instruction, below 4 GiB.
        stack: The initial ESP, below 4 GiB.

    Raises:
        ValueError: An address is out of range; nothing is changed.
    """
    _check_below("entry", entry, 1 << 32)
    _check_below("stack", stack, 1 << 32)
    _start(
        vcpu,
        rip=entry,
        rsp=stack,
        code=_segment(_TYPE_CODE, limit=0xFFFFFFFF, selector=0x8, db=1, g=1),
        data=_segment(_TYPE_DATA, limit=0xFFFFFFFF, selector=0x10, db=1, g=1),
        cr0=_CR0_ET | _CR0_PE,
    )


def long_mode(
    vcpu: RegisterAccess,
    entry: int,
    *,
    page_tables: int = 0x70000,
    write: Callable[[int, bytes], object] | None = None,
    map_size: int = 4 << 30,
    stack: int = 0,
) -> None:
    """Start in 64-bit long mode, with guest memory mapped one to one.

    Writes page tables that map [0, ``map_size``) to itself in pages of 2 MiB,
    writable and executable: `page_tables_size` bytes of guest memory from
    ``page_tables`` on are overwritten.

    Args:
        vcpu: The vCPU; it must not be running.
        entry: Address of the first instruction, below ``map_size``.
        page_tables: Guest-physical address for the page tables, a multiple of
            0x1000; they must be RAM, and the guest must leave them alone.
        write: Writes bytes to guest memory at a guest-physical address.
            Without it, ``vcpu.write_guest_memory`` is used.
        map_size: How much to map, in bytes: a multiple of 2 MiB, at most
            512 GiB. A vCPU whose CPUID was not set has 36 address bits.
        stack: The initial RSP, at most ``map_size``.

    Raises:
        ValueError: An argument is out of range or misaligned; nothing is changed.
        TypeError: There is nothing to write guest memory with.
    """
    tables = _page_tables(page_tables, map_size)
    _check_below("entry", entry, map_size)
    _check_below("stack", stack, map_size + 1)
    if write is None:
        write = getattr(vcpu, "write_guest_memory", None)
        if write is None:
            raise TypeError(
                f"{vcpu!r} has no write_guest_memory(addr, data) to write page tables with; "
                "pass write="
            )
    write(page_tables, tables)
    _start(
        vcpu,
        rip=entry,
        rsp=stack,
        code=_segment(_TYPE_CODE, limit=0xFFFFFFFF, selector=0x8, l=1, g=1),
        data=_segment(_TYPE_DATA, limit=0xFFFFFFFF, selector=0x10, db=1, g=1),
        cr0=_CR0_ET | _CR0_PE | _CR0_PG,
        cr3=page_tables,
        cr4=_CR4_PAE,
        efer=_EFER_LME | _EFER_LMA,
    )


def page_tables_size(map_size: int = 4 << 30) -> int:
    """How many bytes of guest memory `long_mode` takes for its page tables.

    Raises:
        ValueError: ``map_size`` is no multiple of 2 MiB in (0, 512 GiB].
    """
    if not 0 < map_size <= _MAX_MAP or map_size % _LARGE_PAGE:
        raise ValueError(
            f"map_size {map_size:#x} is not a multiple of {_LARGE_PAGE:#x} in (0, {_MAX_MAP:#x}]"
        )
    directories = -(-map_size // _DIRECTORY_SPAN)
    return (2 + directories) * _PAGE


def _page_tables(addr: int, map_size: int) -> bytes:
    """A PML4, a page-directory-pointer table, and the page directories, in this order."""
    size = page_tables_size(map_size)
    _check_below("page_tables", addr, 1 << 52)
    if addr % _PAGE:
        raise ValueError(f"page_tables {addr:#x} is not a multiple of {_PAGE:#x}")
    tables = bytearray(size)
    struct.pack_into("<Q", tables, 0, (addr + _PAGE) | _PTE_PRESENT_WRITABLE)
    directories = range(addr + 2 * _PAGE, addr + size, _PAGE)
    struct.pack_into(
        f"<{len(directories)}Q", tables, _PAGE, *(d | _PTE_PRESENT_WRITABLE for d in directories)
    )
    pages = range(0, map_size, _LARGE_PAGE)
    struct.pack_into(
        f"<{len(pages)}Q",
        tables,
        2 * _PAGE,
        *(page | _PDE_LARGE | _PTE_PRESENT_WRITABLE for page in pages),
    )
    return bytes(tables)


def _segment(
    type_: int,
    *,
    limit: int,
    base: int = 0,
    selector: int = 0,
    s: int = 1,
    db: int = 0,
    l: int = 0,  # noqa: E741 - the processor's name for it
    g: int = 0,
) -> dict[str, int]:
    return {
        "base": base,
        "limit": limit,
        "selector": selector,
        "type": type_,
        "present": 1,
        "dpl": 0,
        "db": db,
        "s": s,
        "l": l,
        "g": g,
        "avl": 0,
        "unusable": 0,
    }


def _start(
    vcpu: RegisterAccess,
    *,
    rip: int,
    rsp: int,
    code: dict[str, int],
    data: dict[str, int],
    cr0: int,
    cr3: int = 0,
    cr4: int = 0,
    efer: int = 0,
    idt_limit: int = 0,
) -> None:
    system: dict[str, Any] = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
    Sregs(vcpu).update(
        **system,
        cs=code,
        tr=_segment(_TYPE_TSS, limit=0xFFFF, s=0),
        ldt=_segment(_TYPE_LDT, limit=0xFFFF, s=0),
        gdt={"base": 0, "limit": 0},
        idt={"base": 0, "limit": idt_limit},
        cr0=cr0,
        cr2=0,
        cr3=cr3,
        cr4=cr4,
        efer=efer,
    )
    regs = Regs(vcpu)
    regs.update(
        **{**dict.fromkeys(regs.snapshot(), 0), "rip": rip, "rsp": rsp, "rflags": _RFLAGS_RESERVED}
    )


def _check_below(name: str, addr: int, end: int) -> None:
    if not 0 <= addr < end:
        raise ValueError(f"{name} {addr:#x} is not in [0, {end:#x})")
