from __future__ import annotations

import random

import pytest

from memlistener import DirtyClient, FlatView, MemoryRegion, MemTxAttrs
from memlistener.mirror.guest import FIXED_SIZE, PAGE, REGISTERS, WINDOW, Geometry
from memlistener.mirror.layout import CHANGES, Layout, RamMap, Registers

GEOMETRY = Geometry(1 << 20)
SEEDS = pytest.mark.parametrize("seed", range(5))


def shown(layout: Layout) -> FlatView:
    system = MemoryRegion.container("system", 1 << 32)
    ram_map = RamMap(system, MemoryRegion.ram("ram", GEOMETRY.size), GEOMETRY)
    ram_map.show(layout)
    return FlatView.render(system)


@SEEDS
def test_every_change_leaves_a_layout_that_is_another(seed: int) -> None:
    """Cuts are in the RAM and ascending, the device is in the window, and something changed."""
    rng = random.Random(seed)
    layout = Layout()
    for _ in range(500):
        before, layout = layout, layout.changed(rng, GEOMETRY)
        assert layout != before
        assert 0 <= layout.slide <= GEOMETRY.slide
        assert list(layout.cuts) == sorted(set(layout.cuts))
        assert len(layout.cuts) <= 2
        assert all(0 < cut < GEOMETRY.moving for cut in layout.cuts)
        assert layout.device is None or 0 <= layout.device < GEOMETRY.window


def test_seed_decides_what_changes() -> None:
    """The same makes the same ones, another makes others."""

    def first(seed: int) -> list[Layout]:
        rng = random.Random(seed)
        layouts = [Layout()]
        for _ in range(10):
            layouts.append(layouts[-1].changed(rng, GEOMETRY))
        return layouts

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_each_kind_of_change() -> None:
    """What it does to the number of pieces, to where they are, and to the device."""
    rng = random.Random(0)
    whole = Layout(slide=3)
    halves = whole.split(rng, GEOMETRY)
    assert len(halves.cuts) == 1
    assert halves.merge(rng, GEOMETRY) == whole
    resized = halves.resize(rng, GEOMETRY)
    assert len(resized.cuts) == 1
    assert resized.cuts != halves.cuts
    assert whole.resize(rng, GEOMETRY) == whole.merge(rng, GEOMETRY) == whole
    thirds = Layout(cuts=(5, 7))
    assert thirds.split(rng, GEOMETRY) == thirds
    assert whole.move(rng, GEOMETRY).slide != 3
    covered = whole.toggle(rng, GEOMETRY)
    assert covered.device is not None
    assert covered.toggle(rng, GEOMETRY) == whole
    assert len(CHANGES) == 5


def test_all_kinds_are_made() -> None:
    """In a few hundred transactions: 1, 2 and 3 pieces, moved, with and without device."""
    rng = random.Random(0)
    layouts = [Layout()]
    for _ in range(300):
        layouts.append(layouts[-1].changed(rng, GEOMETRY))
    assert {len(layout.cuts) for layout in layouts} == {0, 1, 2}
    assert {layout.device is None for layout in layouts} == {True, False}
    assert len({layout.slide for layout in layouts}) > 10


@pytest.mark.parametrize("slide", [0, 5])
@pytest.mark.parametrize("cuts", [(), (100,), (1, 223)])
@pytest.mark.parametrize("device", [None, 1, 99])
def test_map_shows_the_layout(slide: int, cuts: tuple[int, ...], device: int | None) -> None:
    """Each piece of RAM is a range of its own where it has to be; the device lies over it."""
    view = shown(Layout(slide=slide, cuts=cuts, device=device))
    base = WINDOW - slide * PAGE
    pieces = []
    for each in view:
        if each.start == 0:
            assert (each.size, each.offset) == (FIXED_SIZE, 0)
        elif each.region.name == "device":
            assert device is not None
            assert (each.start, each.size) == (WINDOW + device * PAGE, PAGE)
        else:
            assert each.region.name == "ram"
            assert each.offset == FIXED_SIZE + each.start - base
            pieces.append((each.start, each.end))
    assert view.lookup(0) is not None
    assert (pieces[0][0], pieces[-1][1]) == (base, base + GEOMETRY.moving * PAGE)
    inner = {base + cut * PAGE for cut in cuts}
    if device is not None:
        inner |= {WINDOW + device * PAGE, WINDOW + (device + 1) * PAGE}
    bounds = {bound for piece in pieces for bound in piece}
    assert bounds == inner | {pieces[0][0], pieces[-1][1]}


def test_map_keeps_its_regions() -> None:
    """However many changes there are: nothing is made anew, nothing piles up."""
    system = MemoryRegion.container("system", 1 << 32)
    ram_map = RamMap(system, MemoryRegion.ram("ram", GEOMETRY.size), GEOMETRY)
    before = {id(each) for each in system.subregions}
    rng = random.Random(0)
    layout = Layout()
    for _ in range(100):
        layout = layout.changed(rng, GEOMETRY)
        ram_map.show(layout)
    assert {id(each) for each in system.subregions} == before


def test_device_marks_what_it_writes_into_ram() -> None:
    """Nobody else would: its register is in guest memory, at an offset of its own."""
    block = MemoryRegion.ram("ram", GEOMETRY.size).block
    registers = Registers(block)
    registers.write(8, 0x12345678, 4, MemTxAttrs())
    assert registers.read(8, 4, MemTxAttrs()) == 0x12345678
    assert block.view[REGISTERS + 8 : REGISTERS + 12].tobytes() == bytes.fromhex("78563412")
    assert block.take_dirty(DirtyClient.MIGRATION) == [(REGISTERS, PAGE)]
