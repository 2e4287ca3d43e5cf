"""The mirror's guest for machines without KVM: a script on `FakeKvm`'s vCPUs."""

from __future__ import annotations

from memlistener.mirror.guest import PAGE, WINDOW, WORD, Geometry, mailbox_address
from memlistener.testing import GuestScript, Read, Write


def guest(geometry: Geometry, vcpu_id: int) -> GuestScript:
    """The script of a vCPU: the program of `memlistener.mirror.guest`, step by step."""
    while True:
        for page in range(WINDOW, geometry.window_end, PAGE):
            yield from _increment(page + WORD * vcpu_id)
        yield from _increment(mailbox_address(vcpu_id))


def _increment(addr: int) -> GuestScript:
    value = yield Read(addr, WORD)
    yield Write(addr, WORD, (value + 1) % (1 << 32))
