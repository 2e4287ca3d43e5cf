"""Flattening, rule by rule: hand-made cases, and a property over random trees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatView, MemoryRegion, RegionKind
from memlistener.core.render import render
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.oracles import TOP, Shown, flatten, resolve
from tests.trees import examples


def container(name: str = "system", size: int = TOP) -> MemoryRegion:
    return MemoryRegion.container(name, size)


def ram(name: str = "ram", size: int = 0x1000) -> MemoryRegion:
    return MemoryRegion.ram(name, size)


def io(name: str = "io", size: int = 0x1000) -> MemoryRegion:
    return MemoryRegion.io(name, size, None)


def shown(root: MemoryRegion) -> list[str]:
    """A view in short: ``name+offset[start, end)`` each."""
    view = FlatView.render(root)
    view.check()
    assert [Shown.of(each) for each in view] == flatten(root)
    return [
        f"{each.region.name}{f'+{each.offset:x}' if each.offset else ''}"
        f"[{each.start:x}, {each.end:x})"
        for each in view
    ]


class TestWorkedVectors:
    def vector_a(self, b: MemoryRegion) -> MemoryRegion:
        a, c = container("A", 0x8000), io("C", 0x6000)
        d, e = io("D"), io("E")
        a.add_subregion_overlap(0x2000, b, 2)
        a.add_subregion_overlap(0, c, 1)
        b.add_subregion(0, d)
        b.add_subregion(0x2000, e)
        return a

    def test_a(self) -> None:
        """F4, F5: QEMU's example, where a container lets lower siblings through."""
        assert shown(self.vector_a(container("B", 0x4000))) == [
            "C[0, 2000)",
            "D[2000, 3000)",
            "C+3000[3000, 4000)",
            "E[4000, 5000)",
            "C+5000[5000, 6000)",
        ]

    def test_a_with_io(self) -> None:
        """F5: had B been I/O, it would show between its children."""
        assert shown(self.vector_a(io("B", 0x4000))) == [
            "C[0, 2000)",
            "D[2000, 3000)",
            "B+1000[3000, 4000)",
            "E[4000, 5000)",
            "B+3000[5000, 6000)",
        ]

    def test_b(self) -> None:
        """F1 to F6: the PC of QEMU's memory document."""
        system, _ = pc()
        assert shown(system) == [
            "ram[0, a0000)",
            "vram+10000[a0000, a8000)",
            "vram+20000[a8000, b0000)",
            "ram+b0000[b0000, e0000000)",
            "vram[e1000000, e2000000)",
            "vga-mmio[e2000000, e2010000)",
            "ram+e0000000[100000000, 120000000)",
        ]


def pc() -> tuple[MemoryRegion, MemoryRegion]:
    """The PC of QEMU's memory document, and its VGA window."""
    system, pci = container(), container("pci", 1 << 32)
    memory = ram("ram", 0x1_0000_0000)
    lomem = MemoryRegion.alias("lomem", memory, offset=0, size=0xE000_0000)
    himem = MemoryRegion.alias("himem", memory, offset=0xE000_0000, size=0x2000_0000)
    vga_area = container("vga-area", 0x10000)
    vram = ram("vram", 0x100_0000)
    vga_window = MemoryRegion.alias("vga-window", pci, offset=0xA0000, size=0x20000)
    pci_hole = MemoryRegion.alias("pci-hole", pci, offset=0xE000_0000, size=0x2000_0000)
    system.add_subregion(0, lomem)
    system.add_subregion_overlap(0xA0000, vga_window, 1)
    system.add_subregion(0xE000_0000, pci_hole)
    system.add_subregion(0x1_0000_0000, himem)
    pci.add_subregion(0xA0000, vga_area)
    bank1 = MemoryRegion.alias("bank1", vram, offset=0x10000, size=0x8000)
    bank2 = MemoryRegion.alias("bank2", vram, offset=0x20000, size=0x8000)
    vga_area.add_subregion(0, bank1)
    vga_area.add_subregion(0x8000, bank2)
    pci.add_subregion(0xE100_0000, vram)
    pci.add_subregion(0xE200_0000, io("vga-mmio", 0x10000))
    return system, vga_window


class TestWalking:
    def test_addresses_add_up(self) -> None:
        """F1: a region's base is the sum of the addresses above it."""
        system, outer, inner = container(), container("outer"), container("inner")
        system.add_subregion(0x1000, outer)
        outer.add_subregion(0x200, inner)
        inner.add_subregion(0x30, ram())
        assert shown(system) == ["ram[1230, 2230)"]

    def test_the_root_renders_at_its_own_address(self) -> None:
        """F1: the root of an address space may sit in a container, or have sat in one."""
        system, root = container(), container("root", 0x2000)
        system.add_subregion(0x4000, root)
        root.add_subregion(0x100, ram())
        assert shown(root) == ["ram[4100, 5100)"]
        assert shown(root) == shown(system)
        system.del_subregion(root)
        assert shown(root) == ["ram[4100, 5100)"]

    def test_a_root_that_terminates(self) -> None:
        """F1, F5: nothing says that a root is a container."""
        assert shown(ram()) == ["ram[0, 1000)"]

    def test_a_root_that_is_an_alias(self) -> None:
        """F1, F3: an alias shows its target wherever it is."""
        assert shown(MemoryRegion.alias("alias", ram(), offset=0x800, size=0x1000)) == [
            "ram+800[0, 800)"
        ]

    def test_an_empty_tree(self) -> None:
        """F1: a container without children shows nothing."""
        assert shown(container()) == []

    @pytest.mark.parametrize("which", range(3))
    def test_disabled(self, which: int) -> None:
        """F1: a disabled region ends the walk: root, container or leaf."""
        system, box, memory = container(), container("box"), ram()
        system.add_subregion(0, box)
        box.add_subregion(0, memory)
        (system, box, memory)[which].set_enabled(False)
        assert shown(system) == []

    def test_disabled_parents_hide_their_children(self) -> None:
        """F1: a terminating parent too."""
        system, memory = container(), ram()
        system.add_subregion(0, memory)
        memory.add_subregion(0, io())
        memory.set_enabled(False)
        assert shown(system) == []

    def test_a_disabled_target(self) -> None:
        """F1, F3: an alias of a disabled region shows nothing."""
        system, memory = container(), ram()
        system.add_subregion(0, MemoryRegion.alias("alias", memory, offset=0, size=0x1000))
        memory.set_enabled(False)
        assert shown(system) == []

    def test_children_past_their_container(self) -> None:
        """F1, F3: what reaches past the container's end shows nothing."""
        system, box = container(), container("box", 0x1000)
        system.add_subregion(0x4000, box)
        box.add_subregion(0x800, ram())
        box.add_subregion(0x1800, ram("beyond"))
        assert shown(system) == ["ram[4800, 5000)"]

    def test_the_clip_of_every_container_counts(self) -> None:
        """F1: not only that of the nearest."""
        system, outer, inner = container(), container("outer", 0x900), container("inner")
        system.add_subregion(0, outer)
        outer.add_subregion(0x100, inner)
        inner.add_subregion(0, ram())
        assert shown(system) == ["ram[100, 900)"]


class TestFlags:
    def test_read_only_alias(self) -> None:
        """F2: RAM is read-only where it is seen through a read-only alias, and nowhere else."""
        system, memory = container(), ram()
        window = MemoryRegion.alias("window", memory, offset=0, size=0x1000)
        window.set_readonly(True)
        system.add_subregion(0, memory)
        system.add_subregion(0x4000, window)
        assert [each.readonly for each in FlatView.render(system)] == [False, True]
        assert memory.readonly is False

    @pytest.mark.parametrize("name", ["readonly", "nonvolatile", "unmergeable"])
    @pytest.mark.parametrize("which", range(4))
    def test_inherited(self, name: str, which: int) -> None:
        """F2: whoever has the flag on the way, the range has it, and its neighbour does not."""
        system, box, memory = container(), container("box"), ram()
        window = MemoryRegion.alias("window", box, offset=0, size=0x1000)
        system.add_subregion_overlap(0, window, 1)
        box.add_subregion(0, memory)
        beside = io("beside")
        system.add_subregion(0x1000, beside)
        getattr((system, window, box, memory)[which], f"set_{name}")(True)
        first, second = FlatView.render(system)
        assert getattr(first, name) is True
        assert getattr(second, name) is (which == 0)
        for other in {"readonly", "nonvolatile", "unmergeable"} - {name}:
            assert getattr(first, other) is False
        assert shown(system)  # and the oracle thinks so too

    def test_inherited_from_a_terminating_parent(self) -> None:
        """F2: downwards means to children, whatever the parent is."""
        memory, device = ram(), io(size=0x100)
        memory.add_subregion(0, device)
        memory.set_nonvolatile(True)
        assert [each.nonvolatile for each in FlatView.render(memory)] == [True, True]

    def test_not_upwards(self) -> None:
        """F2: a child's flag is its own."""
        memory, device = ram(), io(size=0x100)
        memory.add_subregion(0, device)
        device.set_readonly(True)
        assert [each.readonly for each in FlatView.render(memory)] == [True, False]

    def test_rom(self) -> None:
        """F2: a ROM is read-only by itself."""
        (each,) = FlatView.render(MemoryRegion.rom("rom", 0x1000))
        assert (each.readonly, each.region.kind) == (True, RegionKind.ROM)

    def test_romd_off(self) -> None:
        """F6: the mode is in the range; it is the ROM device's own."""
        system, flash = container(), MemoryRegion.rom_device("flash", 0x1000, None)
        system.add_subregion(0, flash)
        assert [each.romd_mode for each in FlatView.render(system)] == [True]
        flash.set_romd_mode(False)
        assert [each.romd_mode for each in FlatView.render(system)] == [False]
        flash.add_subregion(0, io(size=0x100))
        assert [each.romd_mode for each in FlatView.render(system)] == [True, False]


class TestAliases:
    def test_offset(self) -> None:
        """F3: the alias starts at its offset in the target."""
        system = container()
        system.add_subregion(0x4000, MemoryRegion.alias("alias", ram(), offset=0x300, size=0x200))
        assert shown(system) == ["ram+300[4000, 4200)"]

    def test_past_the_target(self) -> None:
        """F3: what reaches past the target's end shows nothing."""
        system = container()
        system.add_subregion(0, MemoryRegion.alias("alias", ram(), offset=0x800, size=0x10000))
        system.add_subregion(0x10000, MemoryRegion.alias("none", ram(), offset=0x1000, size=1))
        assert shown(system) == ["ram+800[0, 800)"]

    def test_the_target_s_own_address_does_not_matter(self) -> None:
        """F3: base -= target.addr."""
        system, elsewhere, memory = container(), container("elsewhere"), ram()
        elsewhere.add_subregion(0x123000, memory)
        system.add_subregion(0, MemoryRegion.alias("alias", memory, offset=0, size=0x1000))
        assert shown(system) == ["ram[0, 1000)"]

    def test_negative_bases(self) -> None:
        """F3: an alias at 0 that starts deep in its target has its target's base below 0."""
        system, target = container(), container("target")
        target.add_subregion((1 << 63) - 0x800, ram())
        alias = MemoryRegion.alias("alias", target, offset=1 << 63, size=0x10000)
        system.add_subregion(0, alias)
        assert shown(system) == ["ram+800[0, 800)"]

    def test_aliases_of_aliases(self) -> None:
        """F3: offsets add up and every window clips."""
        memory = ram(size=0x10000)
        inner = MemoryRegion.alias("inner", memory, offset=0x1000, size=0x800)
        outer = MemoryRegion.alias("outer", inner, offset=0x200, size=0x10000)
        system = container()
        system.add_subregion(0x100, outer)
        assert shown(system) == ["ram+1200[100, 700)"]

    def test_alias_of_a_container(self) -> None:
        """F3: children, holes and priorities are seen through it."""
        target = container("target", 0x4000)
        target.add_subregion(0x1000, ram())
        target.add_subregion_overlap(0x1800, io(size=0x100), 1)
        system = container()
        system.add_subregion(0x10000, MemoryRegion.alias("a", target, offset=0x1400, size=0x600))
        assert shown(system) == [
            "ram+400[10000, 10400)",
            "io[10400, 10500)",
            "ram+900[10500, 10600)",
        ]

    def test_neighbours_through_two_aliases(self) -> None:
        """F6: two windows that continue each other are one range."""
        memory, system = ram(), container()
        system.add_subregion(0, MemoryRegion.alias("low", memory, offset=0, size=0x800))
        system.add_subregion(0x800, MemoryRegion.alias("high", memory, offset=0x800, size=0x800))
        assert shown(system) == ["ram[0, 1000)"]


class TestTop:
    def test_the_last_address(self) -> None:
        """F3: a region may end at 2**64."""
        system = container()
        system.add_subregion(TOP - 0x1000, ram())
        assert shown(system) == ["ram[fffffffffffff000, 10000000000000000)"]

    def test_no_wrap_around(self) -> None:
        """F3: what reaches beyond 2**64 is cut, not continued at 0."""
        system, box = container(), container("box")
        system.add_subregion(TOP - 0x800, box)
        box.add_subregion(0, ram())
        box.add_subregion(TOP - 1, ram("far"))
        assert shown(system) == ["ram[fffffffffffff800, 10000000000000000)"]

    def test_everything(self) -> None:
        """F3: one region of 2**64 bytes, whole and through an alias of it."""
        everything = io(size=TOP)
        assert shown(everything) == ["io[0, 10000000000000000)"]
        alias = MemoryRegion.alias("alias", everything, offset=TOP - 1, size=TOP)
        assert shown(alias) == ["io+ffffffffffffffff[0, 1)"]

    def test_an_alias_from_the_top(self) -> None:
        """F3: an alias at the top of one that starts at the top."""
        target = container("target")
        target.add_subregion(TOP - 0x10, ram())
        outer = MemoryRegion.alias("outer", target, offset=TOP - 0x20, size=0x20)
        system = container()
        system.add_subregion(TOP - 0x18, outer)
        assert shown(system) == ["ram[fffffffffffffff8, 10000000000000000)"]


class TestOrder:
    def test_priority(self) -> None:
        """F4: the higher priority hides the lower, negative ones too."""
        system = container()
        system.add_subregion_overlap(0, ram("low"), -2)
        system.add_subregion_overlap(0x800, ram("high"), -1)
        system.add_subregion_overlap(0x400, io("top", 0x100), 5)
        assert shown(system) == [
            "low[0, 400)",
            "top[400, 500)",
            "low+500[500, 800)",
            "high[800, 1800)",
        ]

    def test_the_later_added_wins(self) -> None:
        """F4: among equals; and a new address adds again."""
        system, one, two = container(), ram("one"), ram("two")
        system.add_subregion_overlap(0, one, 0)
        system.add_subregion_overlap(0, two, 0)
        assert shown(system) == ["two[0, 1000)"]
        one.set_address(0)
        assert shown(system) == ["one[0, 1000)"]

    def test_priorities_compare_siblings_only(self) -> None:
        """F4: a high priority deep in a low container is low."""
        system, box = container(), container("box")
        box.add_subregion_overlap(0, io("deep"), 1000)
        system.add_subregion_overlap(0, box, -1)
        system.add_subregion_overlap(0, ram(size=0x800), 0)
        assert shown(system) == ["ram[0, 800)", "deep+800[800, 1000)"]


class TestFilling:
    @pytest.mark.parametrize(
        "leaf",
        [
            MemoryRegion.ram("x", 0x1000),
            MemoryRegion.rom("x", 0x1000),
            MemoryRegion.rom_device("x", 0x1000, None),
            MemoryRegion.io("x", 0x1000, None),
            MemoryRegion.reservation("x", 0x1000),
            MemoryRegion.iommu("x", 0x1000, lambda *_: None),
        ],
        ids=lambda leaf: leaf.kind.name,
    )
    def test_what_terminates(self, leaf: MemoryRegion) -> None:
        """F5: each of these fills its gaps, around its children and under its betters."""
        child = MemoryRegion.io("child", 0x100, None)
        system = container()
        system.add_subregion(0, leaf)
        leaf.add_subregion(0x400, child)
        system.add_subregion_overlap(0x800, MemoryRegion.io("over", 0x100, None), 1)
        assert shown(system) == [
            "x[0, 400)",
            "child[400, 500)",
            "x+500[500, 800)",
            "over[800, 900)",
            "x+900[900, 1000)",
        ]
        system.del_subregion(leaf)
        leaf.del_subregion(child)

    def test_a_child_of_a_leaf_is_clipped(self) -> None:
        """F1, F5: it does not reach out of its parent."""
        memory = ram()
        memory.add_subregion(0xF00, io())
        assert shown(memory) == ["ram[0, f00)", "io[f00, 1000)"]


class TestMerging:
    def pair(self) -> tuple[MemoryRegion, MemoryRegion, MemoryRegion]:
        """Two windows on one RAM, side by side: one range, as they are."""
        system, memory = container(), ram()
        low = MemoryRegion.alias("low", memory, offset=0, size=0x800)
        high = MemoryRegion.alias("high", memory, offset=0x800, size=0x800)
        system.add_subregion_overlap(0, low, 0)
        system.add_subregion_overlap(0x800, high, 0)
        return system, low, high

    def test_merged(self) -> None:
        """F6: same region, touching, contiguous offsets, same flags."""
        system, _, _ = self.pair()
        assert shown(system) == ["ram[0, 1000)"]

    def test_apart(self) -> None:
        """F6: one byte between them keeps them two."""
        system, low, _ = self.pair()
        low.set_size(0x7FF)
        assert shown(system) == ["ram[0, 7ff)", "ram+800[800, 1000)"]

    def test_other_offsets(self) -> None:
        """F6: touching is not enough."""
        system, _, high = self.pair()
        high.set_alias_offset(0x7FF)
        assert shown(system) == ["ram[0, 800)", "ram+7ff[800, 1000)"]

    @pytest.mark.parametrize("name", ["readonly", "nonvolatile", "unmergeable"])
    def test_other_flags(self, name: str) -> None:
        """F6: a flag that one has and the other has not keeps them two."""
        system, low, _ = self.pair()
        getattr(low, f"set_{name}")(True)
        assert shown(system) == ["ram[0, 800)", "ram+800[800, 1000)"]

    @pytest.mark.parametrize("name", ["readonly", "nonvolatile"])
    def test_equal_flags(self, name: str) -> None:
        """F6: a flag that both have does not."""
        system, low, high = self.pair()
        getattr(low, f"set_{name}")(True)
        getattr(high, f"set_{name}")(True)
        assert shown(system) == ["ram[0, 1000)"]

    def test_both_unmergeable(self) -> None:
        """F6: unmergeable is for both to be free of."""
        system, _, _ = self.pair()
        system.set_unmergeable(True)
        assert shown(system) == ["ram[0, 800)", "ram+800[800, 1000)"]

    def test_another_region(self) -> None:
        """F6: two RAMs side by side stay two."""
        system = container()
        system.add_subregion(0, ram("one"))
        system.add_subregion(0x1000, ram("two"))
        assert shown(system) == ["one[0, 1000)", "two[1000, 2000)"]

    def test_what_was_hidden_in_between(self) -> None:
        """F6: a hidden middle keeps its two sides apart though their offsets go on."""
        system, memory = container(), ram()
        system.add_subregion(0, memory)
        system.add_subregion_overlap(0x400, io(size=0x100), 1)
        assert shown(system) == ["ram[0, 400)", "io[400, 500)", "ram+500[500, 1000)"]


class TestDepth:
    DEPTH = 5000

    def test_nested_containers(self) -> None:
        """A tree may be deeper than Python's stack."""
        root: MemoryRegion = ram()
        for number in range(self.DEPTH):
            outer = container(f"box{number}")
            outer.add_subregion(1, root)
            root = outer
        view = FlatView.render(root)
        view.check()
        assert [(each.start, each.size, each.offset) for each in view] == [(self.DEPTH, 0x1000, 0)]

    @pytest.mark.parametrize("unmergeable", [False, True])
    def test_aliases_of_aliases(self, unmergeable: bool) -> None:
        """And a chain of aliases longer, also where the way is compared (F6)."""
        target: MemoryRegion = ram()
        target.set_unmergeable(unmergeable)
        for number in range(self.DEPTH):
            target = MemoryRegion.alias(f"alias{number}", target, offset=0, size=0x1000)
        system = container()
        system.add_subregion(0, target)
        view = FlatView.render(system)
        over = io(size=0x100)
        system.add_subregion_overlap(0x400, over, 1)
        covered, _ = view.updated(system, [(0x400, 0x500)])
        system.del_subregion(over)
        again, _ = covered.updated(system, [(0x400, 0x500)])
        again.check()
        assert len(covered) == 3
        assert again == view

    def test_terminating_regions_in_each_other(self) -> None:
        """Each shows one byte of itself around the next."""
        root = io("io0", 1)
        for number in range(1, self.DEPTH):
            outer = io(f"io{number}", number + 1)
            outer.add_subregion(1, root)
            root = outer
        view = FlatView.render(root)
        assert len(view) == self.DEPTH
        assert all(each.size == 1 for each in view)


@examples(dev=200, ci=5000)
@given(tree_plans())
def test_against_the_oracles(plan: TreePlan) -> None:
    """F1 to F6, F8: any tree gives the naive flattener's list, and at any address its answer."""
    regions = plan.build()
    root = regions[0]
    view = FlatView.render(root)
    view.check()
    ranges = [Shown.of(each) for each in view]
    assert ranges == flatten(root)
    edges = {0, TOP - 1, *(each.start for each in ranges), *(each.end for each in ranges)}
    for plain in plan.regions:
        edges |= {plain.addr, plain.addr + plain.size}
    for edge in edges:
        for addr in (edge - 1, edge):
            if 0 <= addr < TOP:
                found = view.lookup(addr)
                assert (found and Shown.of(found).at(addr)) == resolve(root, addr), hex(addr)


def test_ways_that_part_and_meet_again() -> None:
    """F5: two aliases of one region at one place, 40 times over: 40 steps, not 2**40."""
    ram = MemoryRegion.ram("ram", 0x1000)
    top = ram
    for _ in range(40):
        holder = MemoryRegion.container("holder", 0x1000)
        for priority in range(2):
            alias = MemoryRegion.alias("alias", top, offset=0, size=0x1000)
            alias.set_readonly(priority == 0)
            holder.add_subregion_overlap(0, alias, priority)
        top = holder
    (each,) = FlatView.render(top)
    assert (each.start, each.size, each.region, each.readonly) == (0, 0x1000, ram, False)
    # Only what was placed in full hides the rest: here the first shows half of it.
    part = MemoryRegion.alias("part", top, offset=0, size=0x800)
    whole = MemoryRegion.alias("whole", top, offset=0, size=0x1000)
    whole.set_readonly(True)
    root = MemoryRegion.container("root", 0x1000)
    root.add_subregion_overlap(0, part, 1)
    root.add_subregion_overlap(0, whole, 0)
    assert [(each.size, each.readonly) for each in FlatView.render(root)] == [
        (0x800, False),
        (0x800, True),
    ]


@examples(dev=60, ci=500)
@given(tree_plans(limit=0x40, max_regions=10), st.integers(0, 0x40), st.integers(1, 0x40))
def test_windows(plan: TreePlan, low: int, size: int) -> None:
    """F8: a window renders as what the whole shows there, address by address."""
    root = plan.build()[0]
    got: dict[int, tuple[MemoryRegion, int]] = {}
    last = low
    for each in render(root, low, low + size):
        assert last <= each.start < each.end <= low + size
        last = each.end
        for addr in range(each.start, each.end):
            got[addr] = each.region, each.offset + addr - each.start
    for addr in range(low, low + size):
        expected = resolve(root, addr)
        assert got.get(addr) == (expected and (expected.region, expected.offset))


@examples(dev=40, ci=200)
@given(tree_plans(), st.data())
def test_any_region_can_be_a_root(plan: TreePlan, data: st.DataObject) -> None:
    """F1: whatever it is, and wherever it sits."""
    root = data.draw(st.sampled_from(plan.build()))
    view = FlatView.render(root)
    view.check()
    assert [Shown.of(each) for each in view] == flatten(root)
