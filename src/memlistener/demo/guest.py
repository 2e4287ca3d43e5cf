"""What the demo's guest executes, and where it finds what it needs.

Every guest address has one right value: the word at address ``a`` is ``a * KEY``
modulo 2**32 (`word`). So the guest can check whatever it reads, wherever the
host has moved it, without being told of any change.

The host leaves a table of `Work` in memory. A guest makes passes over it, and
for each entry

1. reads the words from ``first`` up to ``end`` and compares each with its right value;
2. stores the right value at ``touch``, which must do no harm to anybody;
3. reads its own word at ``own``, which must hold the number of passes it has
   made, and stores the next number there;
4. calls the routine at ``routine``, which must return ``routine * KEY``.

At the end of a pass it counts it in its mailbox. Wrong values are counted there
too, with the address and value of the first. The table, the mailboxes, the
stacks and this code are in memory that never moves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import attrs

from memlistener import kvm
from memlistener.rig.listing import listing

KEY = 0x1E3779B1  # odd: no two addresses have the same word
WORD = 4
PAGE = 0x1000

# Memory that never moves: [0, FIXED_SIZE), and page tables for long mode.
CODE = 0x1000
TABLE = 0x1800
MAILBOXES = 0x2000
STACKS = 0x3000
FIXED_SIZE = 0x4000
PAGE_TABLES = 0x10000
PAGE_TABLES_MAP = 2 << 20  # bytes of guest memory that long mode maps
PAGE_TABLES_SIZE = kvm.x86.page_tables_size(PAGE_TABLES_MAP)

MAX_VCPUS = 64  # so many mailboxes fit into their page, and own words between two strides
_PER_VCPU = 0x40  # bytes of mailbox, and of stack


# On entry: ebp = this vCPU's mailbox, ebx = 4 * its number, esp = its stack.
# While it runs: edi = the entry of the table, esi = the address being checked,
# eax = what is right, ecx = what was found.
#
# The bytes mean the same in 32-bit protected mode and in 64-bit long mode: the
# operands are 32 bits in both, and what is an address in both has no upper half.
_FLAT_PROGRAM = listing("""
    bf 00 18 00 00      ; 00 start:   mov  edi, TABLE
    8b 37               ; 05 entry:   mov  esi, [edi]         first
    85 f6               ; 07          test esi, esi
    74 62               ; 09          jz   pass_done          a table ends with 0
    69 c6 b1 79 37 1e   ; 0b verify:  imul eax, esi, KEY
    8b 0e               ; 11          mov  ecx, [esi]         <- must not find a hole
    39 c1               ; 13          cmp  ecx, eax
    74 05               ; 15          je   right
    e8 56 00 00 00      ; 17          call wrong
    03 77 08            ; 1c right:   add  esi, [edi+8]       stride
    3b 77 04            ; 1f          cmp  esi, [edi+4]       end
    72 e7               ; 22          jb   verify
    8b 77 0c            ; 24          mov  esi, [edi+12]      touch
    85 f6               ; 27          test esi, esi
    74 08               ; 29          jz   own
    69 c6 b1 79 37 1e   ; 2b          imul eax, esi, KEY
    89 06               ; 31          mov  [esi], eax         <- must not find a hole
    8b 77 10            ; 33 own:     mov  esi, [edi+16]      own
    85 f6               ; 36          test esi, esi
    74 14               ; 38          jz   call
    01 de               ; 3a          add  esi, ebx
    8b 45 00            ; 3c          mov  eax, [ebp]         passes so far
    8b 0e               ; 3f          mov  ecx, [esi]         <- must not find a hole
    39 c1               ; 41          cmp  ecx, eax
    74 05               ; 43          je   store
    e8 28 00 00 00      ; 45          call wrong
    ff c0               ; 4a store:   inc  eax
    89 06               ; 4c          mov  [esi], eax         <- must not find a hole
    8b 77 14            ; 4e call:    mov  esi, [edi+20]      routine
    85 f6               ; 51          test esi, esi
    74 13               ; 53          jz   next
    ff d6               ; 55          call esi                <- must not find a hole
    89 c1               ; 57          mov  ecx, eax
    69 c6 b1 79 37 1e   ; 59          imul eax, esi, KEY
    39 c1               ; 5f          cmp  ecx, eax
    74 05               ; 61          je   next
    e8 0a 00 00 00      ; 63          call wrong
    83 c7 18            ; 68 next:    add  edi, 24            the next entry
    eb 98               ; 6b          jmp  entry
    ff 45 00            ; 6d pass_done: inc dword [ebp]       passes
    eb 8e               ; 70          jmp  start
    ff 45 04            ; 72 wrong:   inc  dword [ebp+4]      wrong values
    83 7d 04 01         ; 75          cmp  dword [ebp+4], 1
    75 06               ; 79          jne  out
    89 75 08            ; 7b          mov  [ebp+8], esi       where the first was,
    89 4d 0c            ; 7e          mov  [ebp+12], ecx      and what
    c3                  ; 81 out:     ret
""")

# The same for real mode: addresses are 16 bits, and 66 makes operands 32 bits.
_REAL_PROGRAM = listing("""
    bf 00 18            ; 00 start:   mov  di, TABLE
    66 8b 35            ; 03 entry:   mov  esi, [di]          first
    66 85 f6            ; 06          test esi, esi
    74 71               ; 09          jz   pass_done          a table ends with 0
    66 69 c6 b1 79 37 1e ; 0b verify: imul eax, esi, KEY
    66 8b 0c            ; 12          mov  ecx, [si]          <- must not find a hole
    66 39 c1            ; 15          cmp  ecx, eax
    74 03               ; 18          je   right
    e8 66 00            ; 1a          call wrong
    66 03 75 08         ; 1d right:   add  esi, [di+8]        stride
    66 3b 75 04         ; 21          cmp  esi, [di+4]        end
    72 e4               ; 25          jb   verify
    66 8b 75 0c         ; 27          mov  esi, [di+12]       touch
    66 85 f6            ; 2b          test esi, esi
    74 0a               ; 2e          jz   own
    66 69 c6 b1 79 37 1e ; 30         imul eax, esi, KEY
    66 89 04            ; 37          mov  [si], eax          <- must not find a hole
    66 8b 75 10         ; 3a own:     mov  esi, [di+16]       own
    66 85 f6            ; 3e          test esi, esi
    74 17               ; 41          jz   call
    66 01 de            ; 43          add  esi, ebx
    66 8b 46 00         ; 46          mov  eax, [bp]          passes so far
    66 8b 0c            ; 4a          mov  ecx, [si]          <- must not find a hole
    66 39 c1            ; 4d          cmp  ecx, eax
    74 03               ; 50          je   store
    e8 2e 00            ; 52          call wrong
    66 40               ; 55 store:   inc  eax
    66 89 04            ; 57          mov  [si], eax          <- must not find a hole
    66 8b 75 14         ; 5a call:    mov  esi, [di+20]       routine
    66 85 f6            ; 5e          test esi, esi
    74 14               ; 61          jz   next
    ff d6               ; 63          call si                 <- must not find a hole
    66 89 c1            ; 65          mov  ecx, eax
    66 69 c6 b1 79 37 1e ; 68         imul eax, esi, KEY
    66 39 c1            ; 6f          cmp  ecx, eax
    74 03               ; 72          je   next
    e8 0c 00            ; 74          call wrong
    83 c7 18            ; 77 next:    add  di, 24             the next entry
    eb 87               ; 7a          jmp  entry
    66 ff 46 00         ; 7c pass_done: inc dword [bp]        passes
    e9 7d ff            ; 80          jmp  start
    66 ff 46 04         ; 83 wrong:   inc  dword [bp+4]       wrong values
    66 83 7e 04 01      ; 87          cmp  dword [bp+4], 1
    75 08               ; 8c          jne  out
    66 89 76 08         ; 8e          mov  [bp+8], esi        where the first was,
    66 89 4e 0c         ; 92          mov  [bp+12], ecx       and what
    c3                  ; 96 out:     ret
""")

# What is called in the memory that moves. It stays there for a while, fetching.
_FLAT_ROUTINE = listing("""
    b9 20 00 00 00      ; 00          mov  ecx, 32
    ff c9               ; 05 again:   dec  ecx
    75 fc               ; 07          jnz  again
    b8                  ; 09          mov  eax, imm32         the immediate follows
""")
_REAL_ROUTINE = listing("""
    b9 20 00            ; 00          mov  cx, 32
    49                  ; 03 again:   dec  cx
    75 fd               ; 04          jnz  again
    66 b8               ; 06          mov  eax, imm32         the immediate follows
""")
_RET = b"\xc3"


@attrs.frozen
class Cpu:
    """A processor mode, and the guest's code for it.

    Attributes:
        name: As on the command line.
        program: What goes to `CODE`.
        enter: Puts a vCPU into the mode: (vcpu, entry, stack).
    """

    name: str
    program: bytes
    enter: Callable[[kvm.Vcpu, int, int], None]
    _routine: bytes

    def routine(self, addr: int) -> bytes:
        """Code that returns the word of the address that it is called at."""
        return self._routine + struct.pack("<I", word(addr)) + _RET

    def start(self, vcpu: kvm.Vcpu) -> None:
        """Put a vCPU at the start of the program; it must not be running."""
        self.enter(vcpu, CODE, STACKS + _PER_VCPU * (vcpu.id + 1))
        vcpu.regs.update(rbp=mailbox_address(vcpu.id), rbx=WORD * vcpu.id)


CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu(
            "real",
            _REAL_PROGRAM,
            lambda vcpu, entry, stack: kvm.x86.real_mode(vcpu, entry, stack=stack),
            _REAL_ROUTINE,
        ),
        Cpu(
            "protected",
            _FLAT_PROGRAM,
            lambda vcpu, entry, stack: kvm.x86.protected_mode(vcpu, entry, stack=stack),
            _FLAT_ROUTINE,
        ),
        Cpu(
            "long",
            _FLAT_PROGRAM,
            lambda vcpu, entry, stack: kvm.x86.long_mode(
                vcpu, entry, stack=stack, page_tables=PAGE_TABLES, map_size=PAGE_TABLES_MAP
            ),
            _FLAT_ROUTINE,
        ),
    )
}


@attrs.frozen(kw_only=True)
class Work:
    """An entry of the guest's table; 0 leaves a step out.

    Attributes:
        first: Address of the first word to check.
        end: Where to stop.
        stride: Bytes from one word checked to the next.
        touch: Where to store the word that is right there.
        own: Where the vCPUs' own words are, one after the other.
        routine: What to call.
    """

    first: int
    end: int
    stride: int
    touch: int = 0
    own: int = 0
    routine: int = 0


def word(addr: int) -> int:
    """The word that belongs at a guest address."""
    return addr * KEY % (1 << 32)


def words(addr: int, size: int = PAGE) -> bytes:
    """``size`` bytes of the words that belong at ``addr``."""
    return b"".join(struct.pack("<I", word(at)) for at in range(addr, addr + size, WORD))


def table(work: Iterable[Work]) -> bytes:
    """The table that the guest works through, as it lies in memory."""
    return b"".join(struct.pack("<6I", *attrs.astuple(each)) for each in work) + bytes(WORD)


@attrs.frozen
class Mailbox:
    """What a vCPU tells the host.

    Attributes:
        passes: How often it has worked through its table.
        wrong: How many values were not what they had to be.
        first_addr: Where the first of these was.
        first_value: What was found there.
    """

    passes: int
    wrong: int
    first_addr: int
    first_value: int

    @classmethod
    def read(cls, memory: memoryview, vcpu_id: int) -> Mailbox:
        """A vCPU's mailbox, in the memory from `MAILBOXES` on."""
        return cls(*struct.unpack_from("<4I", memory, _PER_VCPU * vcpu_id))


def mailbox_address(vcpu_id: int) -> int:
    """Where a vCPU's mailbox is."""
    return MAILBOXES + _PER_VCPU * vcpu_id
