"""Registers of a `FakeVcpu`: what a vCPU comes out of reset with, and two checks.

Read from Linux 6.18 on x86. The special registers are checked like the kernel's
``kvm_is_valid_sregs`` does where a mode set-up goes wrong; what it refuses
beyond that (reserved bits of CR4, EFER and ``apic_base``) is let through.
"""

from __future__ import annotations

import errno
from typing import Any

from memlistener.testing.fake_memslots import kernel_error

_CR0_PE, _CR0_NW, _CR0_CD, _CR0_PG = 1 << 0, 1 << 29, 1 << 30, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10

_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)


def reset_regs() -> dict[str, int]:
    """``struct kvm_regs`` at reset: RDX is the processor's signature."""
    return dict.fromkeys(_REGS, 0) | {"rdx": 0x600, "rip": 0xFFF0, "rflags": 2}


def reset_sregs(vcpu_id: int) -> dict[str, Any]:
    """``struct kvm_sregs`` at reset; vCPU 0 is the bootstrap processor."""
    sregs: dict[str, Any] = {
        "cs": _segment(type=11, base=0xFFFF0000, selector=0xF000),
        **{name: _segment(type=3) for name in ("ds", "es", "fs", "gs", "ss")},
        "tr": _segment(type=11, s=0),
        "ldt": _segment(type=2, s=0),
        **{name: {"base": 0, "limit": 0xFFFF} for name in ("gdt", "idt")},
        **dict.fromkeys(("cr2", "cr3", "cr4", "cr8", "efer"), 0),
        "cr0": 0x60000010,
        "apic_base": 0xFEE00900 if vcpu_id == 0 else 0xFEE00800,
        "interrupt_bitmap": (0, 0, 0, 0),
    }
    return sregs


def check_fields(name: str, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that a structure has all its fields, and no others, as `VcpuFd` does.

    Raises:
        ValueError: A field is missing, unknown, or does not fit into 64 bits.
    """
    if wrong := given.keys() ^ wanted.keys():
        told = (f"{'unknown' if key in given else 'missing'} {key}" for key in sorted(wrong))
        raise ValueError(f"{name}: {', '.join(told)}")
    for key, value in wanted.items():
        if isinstance(value, dict):
            check_fields(f"{name}.{key}", given[key], value)
        elif isinstance(value, int) and not 0 <= given[key] < 1 << 64:
            raise ValueError(f"{name}.{key} = {given[key]:#x} does not fit")


def check_sregs(sregs: dict[str, Any]) -> None:
    """Refuse the modes that the kernel refuses.

    Raises:
        OSError: EINVAL.
    """
    cr0, efer = sregs["cr0"], sregs["efer"]
    if cr0 & _CR0_PG and not cr0 & _CR0_PE:
        raise kernel_error(errno.EINVAL, "CR0.PG without CR0.PE")
    if cr0 & _CR0_NW and not cr0 & _CR0_CD:
        raise kernel_error(errno.EINVAL, "CR0.NW without CR0.CD")
    if cr0 & _CR0_PG and efer & _EFER_LME:
        if not sregs["cr4"] & _CR4_PAE:
            raise kernel_error(errno.EINVAL, "long mode without CR4.PAE")
        if not efer & _EFER_LMA:
            raise kernel_error(errno.EINVAL, "EFER.LME and CR0.PG without EFER.LMA")
    elif efer & _EFER_LMA:
        raise kernel_error(errno.EINVAL, "EFER.LMA outside long mode")
    elif sregs["cs"]["l"]:
        raise kernel_error(errno.EINVAL, "CS.L outside long mode")


def _segment(*, type: int, base: int = 0, selector: int = 0, s: int = 1) -> dict[str, int]:
    # A present data, code or system segment of 64 KiB.
    return {
        **{"base": base, "limit": 0xFFFF, "selector": selector, "type": type, "present": 1},
        **{"dpl": 0, "db": 0, "s": s, "l": 0, "g": 0, "avl": 0, "unusable": 0},
    }
