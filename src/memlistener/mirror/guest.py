"""What the mirror's guest executes, and where things are in its memory.

It writes to all of the memory that it is shown, as fast as it can: each vCPU goes
over the window page by page, increments a word of its own in each, counts the pass
in its mailbox, and begins again. Which RAM is behind a page of the window changes
while it does so; it neither knows nor minds.

The RAM is one block. Its first `FIXED_SIZE` bytes are mapped at 0 and stay there:
the code, the mailboxes, a device's registers, and page tables. All the rest moves
(`memlistener.mirror.layout`).
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memlistener import kvm
from memlistener.rig.listing import listing

WORD = 4
PAGE = 0x1000

# Offsets in the block, and guest addresses as well.
CODE = 0x1000
MAILBOXES = 0x2000
REGISTERS = 0x3000
PAGE_TABLES = 0x10000
FIXED_SIZE = 0x20000

WINDOW = 0x200000  # the guest address from which it writes
DMA = 0x800  # offset in a page of what a device writes, clear of the vCPUs' words
LABEL = 0xC00  # offset in a page of its number

MAX_VCPUS = 64  # so many mailboxes fit into their page
_MAILBOX_SIZE = 0x40

_SLIDE = 64  # by so many pages the RAM can slide under the window
_MAP_STEP = 2 << 20  # long mode's page tables map multiples of this

# On entry: ebx = this vCPU's word in the window's first page, edx = the window's
# end, ebp = its mailbox. The bytes mean the same in 32- and in 64-bit mode.
PROGRAM = listing("""
    89 df               ; 00 start:  mov  edi, ebx
    ff 07               ; 02 page:   inc  dword [edi]         <- must not be missed
    81 c7 00 10 00 00   ; 04         add  edi, PAGE
    39 d7               ; 0a         cmp  edi, edx
    72 f4               ; 0c         jb   page
    ff 45 00            ; 0e         inc  dword [ebp]         passes
    eb ed               ; 11         jmp  start
""")


@attrs.frozen
class Geometry:
    """How much memory there is, and how much of it the guest is shown.

    Attributes:
        size: Of the RAM, in bytes.
    """

    size: int

    @property
    def pages(self) -> int:
        """Of the RAM."""
        return self.size // PAGE

    @property
    def moving(self) -> int:
        """Pages of the part that moves."""
        return (self.size - FIXED_SIZE) // PAGE

    @property
    def slide(self) -> int:
        """By how many pages it can be moved."""
        return min(_SLIDE, self.moving // 4)

    @property
    def window(self) -> int:
        """Pages that the guest writes to: those that show RAM wherever it is moved."""
        return self.moving - self.slide

    @property
    def window_end(self) -> int:
        """Guest address of the window's end."""
        return WINDOW + self.window * PAGE

    @property
    def map_size(self) -> int:
        """How much the page tables of long mode have to map."""
        return -(-self.window_end // _MAP_STEP) * _MAP_STEP


def load(ram: memoryview) -> None:
    """Put the program there, and its number into each page.

    So no page is like another, and all of them exist: to have the host make them while
    they are being copied would cost more than all the rest.
    """
    ram[CODE : CODE + len(PROGRAM)] = PROGRAM
    for page in range(len(ram) // PAGE):
        at = page * PAGE + LABEL
        ram[at : at + WORD] = page.to_bytes(WORD, "little")


def mailbox_address(vcpu_id: int) -> int:
    """Where a vCPU counts its passes."""
    return MAILBOXES + _MAILBOX_SIZE * vcpu_id


def passes(ram: memoryview, vcpu_id: int) -> int:
    """How often a vCPU has been over the window."""
    at = mailbox_address(vcpu_id)
    return int.from_bytes(ram[at : at + WORD], "little")


def _long_mode(vcpu: kvm.Vcpu, geometry: Geometry) -> None:
    kvm.x86.long_mode(vcpu, CODE, page_tables=PAGE_TABLES, map_size=geometry.map_size)


def _protected_mode(vcpu: kvm.Vcpu, geometry: Geometry) -> None:
    kvm.x86.protected_mode(vcpu, CODE)


# Not real mode: a megabyte is not much of a guest.
CPUS: dict[str, Callable[[kvm.Vcpu, Geometry], None]] = {
    "long": _long_mode,
    "protected": _protected_mode,
}


def start(vcpu: kvm.Vcpu, cpu: str, geometry: Geometry) -> None:
    """Put a vCPU at the start of the program; it must not be running."""
    CPUS[cpu](vcpu, geometry)
    vcpu.regs.update(
        rbx=WINDOW + WORD * vcpu.id, rdx=geometry.window_end, rbp=mailbox_address(vcpu.id)
    )
