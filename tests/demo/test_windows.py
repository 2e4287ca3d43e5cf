from __future__ import annotations

import pytest

from memlistener import FlatView, MemoryRegion, MemorySystem
from memlistener.demo.guest import CPUS, FIXED_SIZE, PAGE_TABLES, WORD, Work, word
from memlistener.demo.windows import KINDS, Window

ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)


def make(kind: type[Window]) -> tuple[Window, MemoryRegion]:
    system = MemoryRegion.container("system", 1 << 32)
    return kind(system, CPUS["protected"]), system


def addresses(work: Work) -> list[int]:
    return [*range(work.first, work.end, work.stride), *([work.touch] if work.touch else [])]


@ALL
async def test_words_are_right_in_both_states(kind: type[Window]) -> None:
    """Before and after a change the guest finds the same words at the same addresses."""
    window, system = make(kind)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    for _ in range(3):
        for work in window.work:
            for addr in addresses(work):
                assert await space.read(addr, WORD) == word(addr).to_bytes(WORD, "little")
        async with memory.transaction():
            window.change()


@ALL
async def test_own_words_survive_a_change(kind: type[Window]) -> None:
    """What a vCPU stores in its own words is there after the change, and after the next."""
    window, system = make(kind)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    owns = [work.own for work in window.work if work.own]
    for number in range(1, 4):
        for addr in owns:
            await space.write(addr, number.to_bytes(WORD, "little"))
        async with memory.transaction():
            window.change()
        for addr in owns:
            assert await space.read(addr, WORD) == number.to_bytes(WORD, "little")


@ALL
async def test_routine_is_there_in_both_states(kind: type[Window]) -> None:
    """What the guest calls is the same code before and after a change."""
    window, system = make(kind)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    for _ in range(3):
        for work in window.work:
            if work.routine:
                code = CPUS["protected"].routine(work.routine)
                assert await space.read(work.routine, len(code)) == code
        async with memory.transaction():
            window.change()


@ALL
def test_a_change_changes_the_view_and_the_next_takes_it_back(kind: type[Window]) -> None:
    """Otherwise there would be nothing to tell the kernel."""
    window, system = make(kind)
    before = FlatView.render(system)
    window.change()
    changed = FlatView.render(system)
    window.change()
    assert changed != before
    assert FlatView.render(system) == before


def test_windows_do_not_overlap() -> None:
    """All of them fit into one guest, in either state, beside what never moves."""
    system = MemoryRegion.container("system", 1 << 32)
    windows = [kind(system, CPUS["protected"]) for kind in KINDS.values()]
    alone = []
    for changed in (False, True):
        for kind in KINDS.values():
            window, own = make(kind)
            if changed:
                window.change()
            alone += [(each.start, each.end, kind) for each in FlatView.render(own)]
    for window in windows:
        window.change()
    for start, end, kind in alone:
        assert FIXED_SIZE <= start < end <= PAGE_TABLES
        for other_start, other_end, other in alone:
            assert other is kind or end <= other_start or other_end <= start
