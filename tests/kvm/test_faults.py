"""T13: of a thousand random plans, every ioctl fails once, and nothing has happened."""

from __future__ import annotations

import errno
import itertools
import os
import random

import pytest
import trio

from memlistener import DirtyClient, MemoryRegion, MemoryRegionOps
from memlistener.errors import MemslotError
from memlistener.kvm import KickPolicy
from memlistener.kvm.backend import MEM_LOG_DIRTY_PAGES
from tests.kvm.rig import PAGE, SLOT_IOCTL
from tests.kvm.test_listener import Board

PLANS = 1000 if os.environ.get("MEMLISTENER_HYPOTHESIS") == "ci" else 100
_CHUNKS = 10
_ERRORS = (errno.ENOSPC, errno.ENOMEM, errno.EINVAL, errno.EEXIST)


class Machine:
    """RAM with windows onto it, devices over it and logs on it, and random changes of it all."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.board = Board(
            policy=chance.choice(list(KickPolicy)), max_slot=chance.randint(1, 6) * PAGE
        )
        self.ram = [MemoryRegion.ram(f"ram{number}", 0x8000) for number in range(2)]
        self.windows = [
            MemoryRegion.alias(f"window{number}", self.ram[number % 2], offset=0, size=0x3000)
            for number in range(4)
        ]
        self.covers = [
            MemoryRegion.io(f"io{number}", PAGE, MemoryRegionOps()) for number in range(3)
        ]
        root = self.board.root
        for number, each in enumerate([*self.ram, *self.windows, *self.covers]):
            root.add_subregion_overlap(0x4000 * number, each, number)

    async def change(self) -> None:
        """One transaction of random mutators. The same again for the same state of `chance`."""
        chance = self.chance
        async with self.board.memory.transaction():
            for _ in range(chance.randint(1, 6)):
                window, ram = chance.choice(self.windows), chance.choice(self.ram)
                match chance.randrange(7):
                    case 0:
                        cover = chance.choice(self.covers)
                        cover.set_enabled(not cover.enabled)
                    case 1:
                        window.set_address(chance.randrange(0x40) * PAGE // 2)
                    case 2:
                        window.set_alias_offset(chance.randrange(8) * PAGE)
                    case 3:
                        window.set_readonly(not window.readonly)
                    case 4:
                        window.set_size(chance.randint(1, 8) * PAGE)
                    case 5:
                        ram.set_log(chance.random() < 0.5, DirtyClient.VGA)
                    case 6:
                        ram.set_address(chance.randrange(0x40) * PAGE)

    def believed(self) -> list[tuple[int, int, int, bool]]:
        """What the kernel has, but for the numbers of the slots."""
        return [
            (
                each.guest_phys_addr,
                each.memory_size,
                each.userspace_addr,
                bool(each.flags & MEM_LOG_DIRTY_PAGES),
            )
            for each in self.board.vm.memslots
        ]

    def check(self) -> None:
        """Kernel, listener and view agree; what logs is what the view says does."""
        self.board.check()
        for slot in self.board.vm.memslots:
            shown = self.board.space.view.lookup(slot.guest_phys_addr)
            assert shown is not None
            logs = bool(shown.dirty_log_mask) and not slot.readonly
            assert bool(slot.flags & MEM_LOG_DIRTY_PAGES) == logs


@pytest.mark.parametrize("chunk", range(_CHUNKS))
def test_t13_an_ioctl_fails_at_every_position_of_random_plans(chunk: int) -> None:
    """T13: slots, view and listener are as before, whichever ioctl of a plan fails, and how."""
    trio.run(_run, random.Random(chunk), PLANS // _CHUNKS)


async def _run(chance: random.Random, plans: int) -> None:
    done = failed = 0
    machine = Machine(chance)
    await machine.board.attach()
    fake = machine.board.fake
    while done < plans:
        if chance.random() < 0.1:
            machine = Machine(chance)
            await machine.board.attach()
            fake = machine.board.fake
        state = chance.getstate()
        view, before = machine.board.space.view, machine.believed()
        for position in itertools.count(1):
            chance.setstate(state)
            fake.fail(SLOT_IOCTL, nth=position, errno=_ERRORS[done % 4])
            try:
                await machine.change()
            except MemslotError:
                failed += 1
                assert fake.pending_failures() == 0
                assert machine.board.space.view == view
                assert machine.believed() == before
                machine.check()
                assert machine.board.memory.broken is None
            else:
                machine.check()
                if fake.pending_failures():  # the plan has no such position: this was all
                    fake._recorder._failures.clear()
                    break
                # EINVAL for a move is an answer: a delete and a create do instead.
                assert _ERRORS[done % 4] == errno.EINVAL
                break
        done += 1
    assert failed > plans // 2
