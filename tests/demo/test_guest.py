from __future__ import annotations

import struct

import pytest

from memlistener.demo import guest
from memlistener.demo.guest import CPUS, Mailbox, Work


def test_words_differ_from_address_to_address() -> None:
    """No two addresses that the guest can have share a word, so a wrong page shows."""
    words = [guest.word(addr) for addr in range(0, guest.PAGE_TABLES, guest.WORD)]
    assert len(set(words)) == len(words)


def test_words_in_memory_are_those_of_their_addresses() -> None:
    """`words` lays out what `word` says, little-endian."""
    data = guest.words(0x4000, 8)
    assert struct.unpack("<2I", data) == (guest.word(0x4000), guest.word(0x4004))


def test_table_ends_with_zero() -> None:
    """The guest stops at an entry whose first address is 0."""
    data = guest.table([Work(first=1, end=2, stride=3, touch=4, own=5, routine=6)])
    assert struct.unpack("<7I", data) == (1, 2, 3, 4, 5, 6, 0)


@pytest.mark.parametrize("cpu", CPUS.values(), ids=lambda cpu: cpu.name)
def test_program_contains_the_constants(cpu: guest.Cpu) -> None:
    """The listings are written by hand: they use the table and the key of this module."""
    assert cpu.program.startswith(b"\xbf" + struct.pack("<H", guest.TABLE))
    assert cpu.program.count(struct.pack("<I", guest.KEY)) == 3
    assert len(cpu.program) <= guest.TABLE - guest.CODE


@pytest.mark.parametrize("cpu", CPUS.values(), ids=lambda cpu: cpu.name)
def test_routine_is_clear_of_the_words(cpu: guest.Cpu) -> None:
    """A routine at offset 0x20 ends before anything else that the guest uses."""
    code = cpu.routine(0xE020)
    assert struct.pack("<I", guest.word(0xE020)) in code
    assert 0x20 + len(code) <= 0x100


def test_mailboxes_and_stacks_fit() -> None:
    """The last vCPU's mailbox and stack are inside their pages."""
    last = guest.MAX_VCPUS - 1
    assert guest.mailbox_address(last) + 16 <= guest.STACKS
    assert guest.STACKS + 0x40 * guest.MAX_VCPUS <= guest.FIXED_SIZE


def test_mailbox_is_read_by_number() -> None:
    """Each vCPU's mailbox is where its program writes it."""
    memory = bytearray(guest.PAGE)
    at = guest.mailbox_address(3) - guest.MAILBOXES
    memory[at : at + 16] = struct.pack("<4I", 1, 2, 3, 4)
    assert Mailbox.read(memoryview(memory), 3) == Mailbox(1, 2, 3, 4)
    assert Mailbox.read(memoryview(memory), 2) == Mailbox(0, 0, 0, 0)
