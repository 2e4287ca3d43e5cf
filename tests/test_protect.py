"""Control-C and the mutators; test_transactions.py has it at every line of a transaction."""

from __future__ import annotations

import inspect
import signal

import pytest
import trio

from memlistener import MemoryRegion, MemorySystem, protect


def test_every_mutator_is_protected() -> None:
    """T13: none was forgotten: what changes a region is in the list."""
    prefixes = ("add_", "del_", "set_", "clear_")
    mutators = {
        name
        for name, member in vars(MemoryRegion).items()
        if inspect.isfunction(member) and name.startswith(prefixes)
    }
    assert mutators == set(protect.MUTATORS)


def test_control_c_waits_for_the_mutator(monkeypatch: pytest.MonkeyPatch) -> None:
    """T13: it is raised at the next checkpoint, when the tree is whole."""
    memory = MemorySystem()
    root = MemoryRegion.container("root", 0x1000)
    ram = MemoryRegion.ram("ram", 0x1000)
    space = memory.create_address_space("space", root)
    place = MemoryRegion._place

    def interrupted(self: MemoryRegion, child: MemoryRegion, rank: int | None = None) -> None:
        signal.raise_signal(signal.SIGINT)
        place(self, child, rank)

    added: list[bool] = []

    async def main() -> None:
        async with memory.transaction():
            with monkeypatch.context() as patch:
                patch.setattr(MemoryRegion, "_place", interrupted)
                root.add_subregion(0, ram)
            added.append(ram.container is root)
            await trio.lowlevel.checkpoint()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert added == [True]
    assert ram.container is None
    assert len(space.view) == 0
