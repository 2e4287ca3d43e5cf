"""The demo's guest for machines without KVM: a script on `FakeKvm`'s vCPUs.

It works through the same table in the same memory as the machine code in
`guest`, and tells the host the same in the same mailboxes; where there is no
memslot it meets the same holes.
"""

from __future__ import annotations

from collections.abc import Sequence

from memlistener.demo.guest import WORD, Work, mailbox_address, word
from memlistener.testing import Fetch, GuestScript, Read, Write


def guest(work: Sequence[Work], vcpu_id: int) -> GuestScript:
    """The script of a vCPU: the program of the module `memlistener.demo.guest`, step by step."""
    mailbox = mailbox_address(vcpu_id)
    passes = yield Read(mailbox, WORD)
    while True:
        for each in work:
            for addr in range(each.first, each.end, each.stride):
                found = yield Read(addr, WORD)
                if found != word(addr):
                    yield from _wrong(mailbox, addr, found)
            if each.touch:
                yield Write(each.touch, WORD, word(each.touch))
            if each.own:
                addr = each.own + WORD * vcpu_id
                found = yield Read(addr, WORD)
                if found != passes:
                    yield from _wrong(mailbox, addr, found)
                yield Write(addr, WORD, (passes + 1) % (1 << 32))
            if each.routine:
                yield Fetch(each.routine)
        passes = (passes + 1) % (1 << 32)
        yield Write(mailbox, WORD, passes)


def _wrong(mailbox: int, addr: int, found: int) -> GuestScript:
    count = yield Read(mailbox + WORD, WORD)
    yield Write(mailbox + WORD, WORD, (count + 1) % (1 << 32))
    if not count:
        yield Write(mailbox + 2 * WORD, WORD, addr)
        yield Write(mailbox + 3 * WORD, WORD, found)
