from __future__ import annotations

from memlistener.mirror.guest import DMA, PAGE, WINDOW, WORD, Geometry, mailbox_address
from memlistener.mirror.scripted import guest
from memlistener.testing import Read, Write

GEOMETRY = Geometry(1 << 20)


def test_pass_increments_a_word_in_each_page_and_the_mailbox() -> None:
    """As the machine code does; the next pass counts on from there."""
    memory: dict[int, int] = {}
    script = guest(GEOMETRY, 1)
    instruction = next(script)
    while memory.get(mailbox_address(1), 0) < 2:
        match instruction:
            case Read(addr=addr):
                instruction = script.send(memory.get(addr, 0))
            case Write(addr=addr, value=value):
                memory[addr] = value
                instruction = script.send(0)
    pages = range(WINDOW, GEOMETRY.window_end, PAGE)
    assert memory == {page + WORD: 2 for page in pages} | {mailbox_address(1): 2}
    assert all(addr % PAGE < DMA for addr in memory)


def test_words_wrap() -> None:
    """A run may be long."""
    script = guest(GEOMETRY, 0)
    next(script)
    assert script.send((1 << 32) - 1) == Write(WINDOW, WORD, 0)
