from __future__ import annotations

import pytest

from memlistener.demo.guest import WORD, Work, mailbox_address, word
from memlistener.demo.scripted import guest
from memlistener.testing import Fetch, Instruction, Read, Write

WORK = Work(first=0x4000, end=0x4008, stride=4, touch=0x4004, own=0x4100, routine=0x4020)
MAILBOX = mailbox_address(1)


def one_pass(memory: dict[int, int]) -> list[Instruction]:
    """Run vCPU 1 over ``memory`` until it has counted a pass."""
    done: list[Instruction] = []
    script = guest([WORK], 1)
    instruction = next(script)
    while instruction != Write(MAILBOX, WORD, 1):
        done.append(instruction)
        match instruction:
            case Read(addr=addr):
                instruction = script.send(memory.get(addr, 0))
            case Write(addr=addr, value=value):
                memory[addr] = value
                instruction = script.send(0)
            case _:
                instruction = script.send(0)
    return done


def test_pass_does_the_work_in_order() -> None:
    """Reads, then the touch, then its own word, then the routine: as the machine code."""
    memory = {0x4000: word(0x4000), 0x4004: word(0x4004)}
    assert one_pass(memory) == [
        Read(MAILBOX, WORD),
        Read(0x4000, WORD),
        Read(0x4004, WORD),
        Write(0x4004, WORD, word(0x4004)),
        Read(0x4104, WORD),
        Write(0x4104, WORD, 1),
        Fetch(0x4020),
    ]


@pytest.mark.parametrize(("addr", "found"), [(0x4000, 7), (0x4004, 0), (0x4104, 9)])
def test_wrong_value_is_reported(addr: int, found: int) -> None:
    """It is counted in the mailbox, with where it was and what."""
    memory = {0x4000: word(0x4000), 0x4004: word(0x4004), addr: found}
    one_pass(memory)
    assert [memory[MAILBOX + at] for at in (4, 8, 12)] == [1, addr, found]
