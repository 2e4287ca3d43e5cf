"""The tree of regions: constructors, attributes, and what every mutator refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    FlatView,
    MemlistenerError,
    MemoryRegion,
    RamBlock,
    RegionError,
    RegionKind,
    RegionTypeError,
)
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.trees import Mutation, examples, mutations, snapshot

MAKERS: dict[str, Callable[[Any, Any], MemoryRegion]] = {
    "container": lambda name, size: MemoryRegion.container(name, size),
    "ram": lambda name, size: MemoryRegion.ram(name, size),
    "rom": lambda name, size: MemoryRegion.rom(name, size),
    "rom_device": lambda name, size: MemoryRegion.rom_device(name, size, None),
    "io": lambda name, size: MemoryRegion.io(name, size, None),
    "alias": lambda name, size: MemoryRegion.alias(
        name, MemoryRegion.ram("target", 1), offset=0, size=size
    ),
    "reservation": lambda name, size: MemoryRegion.reservation(name, size),
    "iommu": lambda name, size: MemoryRegion.iommu(name, size, lambda *_: None),
}
make = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tree() -> tuple[MemoryRegion, MemoryRegion, MemoryRegion]:
    system = MemoryRegion.container("system", 0x10000)
    ram = MemoryRegion.ram("ram", 0x1000)
    uart = MemoryRegion.io("uart", 0x100, None)
    system.add_subregion(0x1000, ram)
    system.add_subregion_overlap(0x1800, uart, 1)
    return system, ram, uart


class TestConstructors:
    @make
    def test_sizes_at_the_limits(self, make: Callable[[Any, Any], MemoryRegion]) -> None:
        """1 byte and 2**64 bytes are both fine, for every kind."""
        assert make("small", 1).size == 1
        assert make("all", 1 << 64).size == 1 << 64

    @make
    @pytest.mark.parametrize("size", [0, -1, (1 << 64) + 1])
    def test_sizes_beyond_the_limits(
        self, make: Callable[[Any, Any], MemoryRegion], size: int
    ) -> None:
        """Size 0, a negative size and more than 2**64 are refused by name and in hex."""
        with pytest.raises(RegionError, match=rf"'odd' is {size:#x}: .* 1 to 2\*\*64"):
            make("odd", size)

    @make
    @pytest.mark.parametrize("size", [True, 1.0, "1", None])
    def test_sizes_of_a_wrong_type(
        self, make: Callable[[Any, Any], MemoryRegion], size: object
    ) -> None:
        """A size is an int and no bool; the error is a TypeError too."""
        with pytest.raises(RegionTypeError, match="size of 'odd' is an int") as caught:
            make("odd", size)
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, MemlistenerError)

    @make
    def test_a_name_is_a_string(self, make: Callable[[Any, Any], MemoryRegion]) -> None:
        """A number where the name belongs is noticed at once."""
        with pytest.raises(TypeError, match="name is a str, not int"):
            make(0x1000, 0x1000)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("container", RegionKind.CONTAINER),
            ("ram", RegionKind.RAM),
            ("rom", RegionKind.ROM),
            ("rom_device", RegionKind.ROM_DEVICE),
            ("io", RegionKind.IO),
            ("alias", RegionKind.ALIAS),
            ("reservation", RegionKind.RESERVATION),
            ("iommu", RegionKind.IOMMU),
        ],
    )
    def test_attributes_of_a_new_region(self, name: str, kind: RegionKind) -> None:
        """A new region is enabled, at 0, in no container, and has no flag but a ROM's."""
        region = MAKERS[name]("region", 0x1000)
        assert (region.kind, region.name, region.size) == (kind, "region", 0x1000)
        assert (region.addr, region.priority, region.enabled) == (0, 0, True)
        assert (region.nonvolatile, region.unmergeable, region.romd_mode) == (False, False, True)
        assert region.readonly is (kind is RegionKind.ROM)
        assert region.container is None
        assert region.subregions == ()

    def test_alias_attributes(self) -> None:
        """An alias knows its target and its offset; nothing else has a target."""
        ram = MemoryRegion.ram("ram", 0x1000)
        alias = MemoryRegion.alias("alias", ram, offset=0x800, size=0x4000)
        assert (alias.alias_target, alias.alias_offset, alias.size) == (ram, 0x800, 0x4000)
        assert (ram.alias_target, ram.alias_offset) == (None, 0)

    @pytest.mark.parametrize("offset", [-1, 1 << 64])
    def test_alias_offset_beyond_the_limits(self, offset: int) -> None:
        """An alias's offset is an address: 0 to 2**64 - 1."""
        with pytest.raises(RegionError, match=rf"offset of 'alias' is {offset:#x}"):
            MemoryRegion.alias("alias", MemoryRegion.ram("ram", 1), offset=offset, size=1)

    def test_alias_of_something_else(self) -> None:
        """An alias shows a region, not a name of one."""
        with pytest.raises(RegionTypeError, match="'ram' is not a MemoryRegion"):
            MemoryRegion.alias("alias", "ram", offset=0, size=1)  # type: ignore[arg-type]

    def test_ops_and_translate(self) -> None:
        """What answers accesses is kept as it was given."""
        ops = object()
        assert MemoryRegion.io("io", 1, ops).ops is ops
        assert MemoryRegion.rom_device("flash", 1, ops).ops is ops
        assert MemoryRegion.ram("ram", 1).ops is None

        def translate(*_: object) -> None:
            raise NotImplementedError

        assert MemoryRegion.iommu("iommu", 1, translate).translate is translate

    def test_container_means_two_things(self) -> None:
        """On the class a constructor, on a region the region it is in."""
        system, ram, _ = tree()
        assert ram.container is system
        assert system.container is None
        assert MemoryRegion.container("other", 1).kind is RegionKind.CONTAINER

    def test_blocks(self) -> None:
        """Memory is the block that was given, or made when it is asked for."""
        block = RamBlock.anonymous(0x2000)
        assert MemoryRegion.ram("ram", 0x1000, block=block).block is block
        made = MemoryRegion.ram("ram", 0x1800)
        assert made.block is made.block
        assert made.block.size == 0x1800
        assert MemoryRegion.io("io", 1, None).block is None
        assert MemoryRegion.container("container", 1).block is None

    def test_data(self) -> None:
        """A ROM starts with its data, and zeroes follow."""
        rom = MemoryRegion.rom("rom", 4, data=b"ab")
        assert bytes(rom.block.view) == b"ab\0\0"
        block = RamBlock.from_buffer(bytearray(b"xxxx"))
        flash = MemoryRegion.rom_device("flash", 4, None, data=b"ab", block=block)
        assert bytes(flash.block.view) == b"abxx"

    def test_data_that_does_not_fit(self) -> None:
        """Both sizes are in the error."""
        with pytest.raises(RegionError, match=r"'rom': 0x3 bytes of data .* size 0x2"):
            MemoryRegion.rom("rom", 2, data=b"abc")

    def test_a_block_that_is_too_small(self) -> None:
        """Both sizes and the mend are in the error."""
        block = RamBlock.anonymous(0x1000)
        with pytest.raises(RegionError, match=r"0x1001 is more .* 0x1000: make the region smaller"):
            MemoryRegion.ram("ram", 0x1001, block=block)

    def test_repr(self) -> None:
        """Kind, name, and hex."""
        system, ram, _ = tree()
        assert repr(ram) == "<MemoryRegion ram 'ram' size 0x1000 at 0x1000>"
        assert repr(system) == "<MemoryRegion container 'system' size 0x10000>"

    @pytest.mark.parametrize("name", ["size", "addr", "container", "enabled", "subregions"])
    def test_attributes_are_read_only(self, name: str) -> None:
        """Attributes change through mutators only."""
        _, ram, _ = tree()
        with pytest.raises(AttributeError):
            setattr(ram, name, 1)


class TestAdding:
    def test_add_subregion(self) -> None:
        """The region gets its address and its container, at priority 0."""
        system, ram, uart = tree()
        assert (ram.addr, ram.priority, ram.container) == (0x1000, 0, system)
        assert (uart.addr, uart.priority, uart.container) == (0x1800, 1, system)
        assert system.subregions == (uart, ram)

    def test_overlapping_siblings(self) -> None:
        """The error has both names, both ranges in hex, and the mend."""
        system, _, _ = tree()
        with pytest.raises(RegionError) as caught:
            system.add_subregion(0x1FFF, MemoryRegion.ram("more", 0x800))
        message = str(caught.value)
        assert "'more' at [0x1fff, 0x27ff) overlaps 'ram' at [0x1000, 0x2000)" in message
        assert "add_subregion_overlap()" in message

    @pytest.mark.parametrize("addr", [0xF00, 0x1000, 0x17FF, 0x1FFF])
    def test_every_overlap_is_seen(self, addr: int) -> None:
        """At either end, inside, and around."""
        system, _, _ = tree()
        with pytest.raises(RegionError, match="overlaps 'ram'"):
            system.add_subregion(addr, MemoryRegion.ram("more", 0x101))

    def test_overlaps_are_seen_among_many(self) -> None:
        """A container with many children checks all that matter."""
        system = MemoryRegion.container("system", 0x100000)
        for number in range(100):
            system.add_subregion(number * 0x1000, MemoryRegion.ram(f"ram{number}", 0x800))
        system.add_subregion(0x50800, MemoryRegion.ram("between", 0x800))
        with pytest.raises(RegionError, match="overlaps 'ram77'"):
            system.add_subregion(77 * 0x1000 + 0x7FF, MemoryRegion.ram("more", 1))

    def test_neighbours_do_not_overlap(self) -> None:
        """Ranges are half-open."""
        system, ram, uart = tree()
        before = MemoryRegion.ram("before", 0x1000)
        after = MemoryRegion.ram("after", 0x1000)
        system.add_subregion(0, before)
        system.add_subregion(0x2000, after)
        assert system.subregions == (uart, after, before, ram)

    def test_the_overlapping_form_does_not_complain(self) -> None:
        """Neither at its own overlap, nor when others come to overlap it."""
        system, ram, uart = tree()
        over = MemoryRegion.ram("over", 0x2000)
        system.add_subregion_overlap(0, over, -1)
        beside = MemoryRegion.ram("beside", 0x800)
        system.add_subregion(0, beside)
        assert system.subregions == (uart, beside, ram, over)

    @pytest.mark.parametrize("priority", [None, 1.0, "1", True])
    def test_bad_priorities(self, priority: Any) -> None:
        """A priority is an int; both regions are named."""
        system, _, _ = tree()
        with pytest.raises(RegionTypeError, match=r"priority of .*'more'.* in .*'system'"):
            system.add_subregion_overlap(0, MemoryRegion.ram("more", 1), priority)

    @pytest.mark.parametrize("addr", [-1, 1 << 64])
    def test_bad_addresses(self, addr: int) -> None:
        """An address is from 0 to 2**64 - 1."""
        system, ram, _ = tree()
        with pytest.raises(RegionError, match=rf"addr of 'more' is {addr:#x}"):
            system.add_subregion(addr, MemoryRegion.ram("more", 1))
        with pytest.raises(RegionError, match=rf"addr of 'ram' is {addr:#x}"):
            ram.set_address(addr)

    @pytest.mark.parametrize("addr", [None, 1.0, "1", True])
    def test_addresses_of_a_wrong_type(self, addr: Any) -> None:
        """An address is an int and no bool."""
        system, ram, _ = tree()
        with pytest.raises(RegionTypeError, match="addr of 'more' is an int"):
            system.add_subregion(addr, MemoryRegion.ram("more", 1))
        with pytest.raises(RegionTypeError, match="addr of 'ram' is an int"):
            ram.set_address(addr)

    def test_what_is_added_is_a_region(self) -> None:
        """Anything else is a RegionTypeError, for taking away too."""
        system, _, _ = tree()
        with pytest.raises(RegionTypeError, match="'ram' is not a MemoryRegion"):
            system.add_subregion(0, "ram")  # type: ignore[arg-type]
        with pytest.raises(RegionTypeError, match="None is not a MemoryRegion"):
            system.del_subregion(None)  # type: ignore[arg-type]

    def test_added_twice(self) -> None:
        """A region is in one container, once; the error names all three."""
        system, ram, _ = tree()
        other = MemoryRegion.container("other", 0x10000)
        with pytest.raises(RegionError, match=r"'ram'.* already .*'system'.* to .*'other'"):
            other.add_subregion(0, ram)
        with pytest.raises(RegionError, match=r"'ram'.* already"):
            system.add_subregion(0x8000, ram)

    def test_added_to_an_alias(self) -> None:
        """An alias has no subregions of its own; the mend is the target."""
        _, ram, _ = tree()
        alias = MemoryRegion.alias("alias", ram, offset=0, size=1)
        with pytest.raises(RegionError, match=r"to the target .*'ram'.*, not to .*'alias'"):
            alias.add_subregion(0, MemoryRegion.ram("more", 1))

    def test_a_terminating_region_may_have_subregions(self) -> None:
        """F5: RAM may hold a device."""
        _, ram, _ = tree()
        device = MemoryRegion.io("device", 1, None)
        ram.add_subregion(0, device)
        assert ram.subregions == (device,)


class TestCycles:
    def test_added_to_itself(self) -> None:
        """A region does not contain itself."""
        system, _, _ = tree()
        with pytest.raises(RegionError, match=r"'system'.* to .*'system'.* cycle"):
            system.add_subregion(0, system)

    def test_added_below_itself(self) -> None:
        """At no distance, and wherever it would be."""
        top, middle, bottom = (
            MemoryRegion.container(name, 0x1000) for name in ("top", "middle", "bottom")
        )
        top.add_subregion(0, middle)
        middle.add_subregion(0x800, bottom)
        for addr in (0, 0x800, 0x1000, 0x8000):
            with pytest.raises(RegionError, match=r"'top'.* to .*'bottom'.* cycle"):
                bottom.add_subregion(addr, top)

    def test_alias_of_its_own_container(self) -> None:
        """An alias that would show itself is a cycle."""
        system, _, _ = tree()
        alias = MemoryRegion.alias("alias", system, offset=0, size=0x10000)
        with pytest.raises(RegionError, match=r"'alias'.*'system'"):
            system.add_subregion_overlap(0, alias, 0)

    def test_container_with_an_alias_of_where_it_goes(self) -> None:
        """The same the other way round: the alias was there first."""
        system, _, _ = tree()
        inner = MemoryRegion.container("inner", 0x10000)
        alias = MemoryRegion.alias("alias", system, offset=0, size=0x10000)
        inner.add_subregion(0, alias)
        with pytest.raises(RegionError, match=r"'alias'.*'system'"):
            system.add_subregion_overlap(0, inner, 0)

    def test_through_several_aliases(self) -> None:
        """Aliases of containers of aliases."""
        rings = [MemoryRegion.container(f"ring{number}", 0x1000) for number in range(4)]
        aliases = [
            MemoryRegion.alias(f"alias{number}", ring, offset=0, size=0x1000)
            for number, ring in enumerate(rings)
        ]
        for number in range(3):
            rings[number].add_subregion(0, aliases[number + 1])
        before = snapshot(rings + aliases)
        with pytest.raises(RegionError, match=r"'alias0'.*'ring0'"):
            rings[3].add_subregion(0, aliases[0])
        assert snapshot(rings + aliases) == before

    def test_alias_of_an_alias_of_its_container(self) -> None:
        """A longer way to oneself is no better."""
        system, _, _ = tree()
        inner = MemoryRegion.alias("inner", system, offset=0, size=0x10000)
        outer = MemoryRegion.alias("outer", inner, offset=0, size=0x10000)
        with pytest.raises(RegionError, match=r"'outer'.*'inner'"):
            system.add_subregion_overlap(0, outer, 0)

    def test_mirror(self) -> None:
        """An alias may show another part of its own container, as ARM's SSE boards do."""
        system = MemoryRegion.container("system", 0x8000)
        ram = MemoryRegion.ram("ram", 0x1000)
        system.add_subregion(0, ram)
        for number in (1, 2, 3):
            mirror = MemoryRegion.alias(f"mirror{number}", system, offset=0, size=0x1000)
            system.add_subregion(0x1000 * number, mirror)
        assert [(each.start, each.region, each.offset) for each in FlatView.render(system)] == [
            (0, ram, 0),
            (0x1000, ram, 0),
            (0x2000, ram, 0),
            (0x3000, ram, 0),
        ]

    @pytest.mark.parametrize(
        ("setter", "value"),
        [("set_address", 0xFFF), ("set_size", 0x1001), ("set_alias_offset", 1)],
    )
    def test_mirror_must_not_come_to_show_itself(self, setter: str, value: int) -> None:
        """Neither by a move, nor by growing, nor by another offset: it is refused by name."""
        system = MemoryRegion.container("system", 0x8000)
        mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x1000)
        system.add_subregion(0x1000, mirror)

        def change_and_render() -> None:
            getattr(mirror, setter)(value)
            FlatView.render(system)

        with pytest.raises(RegionError, match="'mirror'"):
            change_and_render()

    def test_refused_loops_change_nothing(self) -> None:
        """Neither the attribute nor the order nor the view."""
        system = MemoryRegion.container("system", 0x8000)
        ram = MemoryRegion.ram("ram", 0x1000)
        mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x1000)
        system.add_subregion(0, ram)
        system.add_subregion(0x1000, mirror)
        before, view = snapshot([system, ram, mirror]), FlatView.render(system)
        with pytest.raises(RegionError, match=r"setting addr of .*'mirror'.* 0xfff .* cycle"):
            mirror.set_address(0xFFF)
        with pytest.raises(RegionError, match=r"setting size of .*'mirror'.* 0x1001 .* cycle"):
            mirror.set_size(0x1001)
        with pytest.raises(RegionError, match=r"setting alias_offset of .*'mirror'.* 0x1 .* cycle"):
            mirror.set_alias_offset(1)
        assert snapshot([system, ram, mirror]) == before
        assert FlatView.render(system) == view

    def test_what_lies_between_a_mirror_and_itself(self) -> None:
        """The container in between must not move it into its own sight either."""
        system = MemoryRegion.container("system", 0x8000)
        between = MemoryRegion.container("between", 0x4000)
        mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x1000)
        system.add_subregion(0x4000, between)
        between.add_subregion(0, mirror)
        with pytest.raises(RegionError, match=r"setting addr of .*'between'.* cycle.*'mirror'"):
            between.set_address(0x800)
        between.set_address(0x1000)
        assert between.addr == 0x1000

    def test_a_disabled_cycle_is_one(self) -> None:
        """It could be enabled later, when it is too late to say no."""
        system = MemoryRegion.container("system", 0x8000)
        mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x8000)
        mirror.set_enabled(False)
        with pytest.raises(RegionError, match="cycle"):
            system.add_subregion(0x4000, mirror)

    def test_one_alias_through_another(self) -> None:
        """The alias that would show itself need not be the region that is added."""
        system = MemoryRegion.container("system", 0x40)
        box = MemoryRegion.container("box", 1)
        two = MemoryRegion.alias("two", box, offset=0, size=2)
        one = MemoryRegion.alias("one", system, offset=1, size=1)
        system.add_subregion_overlap(0, box, 0)
        system.add_subregion_overlap(0, two, 0)
        with pytest.raises(RegionError, match=r"adding .*'one'.* cycle.*'two'.* shows itself"):
            box.add_subregion(0, one)
        assert box.subregions == ()

    def test_mirror_may_change(self) -> None:
        """As long as it does not show itself, it is an alias like any other."""
        system = MemoryRegion.container("system", 0x8000)
        ram = MemoryRegion.ram("ram", 0x1000)
        mirror = MemoryRegion.alias("mirror", system, offset=0, size=0x1000)
        system.add_subregion(0, ram)
        system.add_subregion(0x1000, mirror)
        mirror.set_address(0x4000)
        mirror.set_size(0x2000)
        mirror.set_alias_offset(0x800)
        assert [(each.start, each.size, each.offset) for each in FlatView.render(system)] == [
            (0, 0x1000, 0),
            (0x4000, 0x800, 0x800),
        ]


class TestRemoving:
    def test_del_subregion(self) -> None:
        """What was taken out keeps its address, and may be added elsewhere."""
        system, ram, uart = tree()
        system.del_subregion(ram)
        assert (ram.container, ram.addr) == (None, 0x1000)
        assert system.subregions == (uart,)
        other = MemoryRegion.container("other", 0x1000)
        other.add_subregion(0, ram)
        assert ram.container is other

    def test_not_a_subregion(self) -> None:
        """The error says where it really is."""
        system, ram, _ = tree()
        other = MemoryRegion.container("other", 1)
        with pytest.raises(RegionError, match=r"'ram'.* not a subregion of .*'other'.* in .*'sys"):
            other.del_subregion(ram)
        with pytest.raises(RegionError, match=r"'other'.* not .* of .*'system'.* in no container"):
            system.del_subregion(other)


class TestOrder:
    def test_priorities(self) -> None:
        """F4: highest priority first, signed."""
        system = MemoryRegion.container("system", 0x1000)
        made = {number: MemoryRegion.ram(f"ram{number}", 1) for number in (0, -5, 3, 1 << 70, -1)}
        for priority, region in made.items():
            system.add_subregion_overlap(0, region, priority)
        assert [each.priority for each in system.subregions] == [1 << 70, 3, 0, -1, -5]

    def test_the_later_added_wins(self) -> None:
        """F4: of equal priorities the later-added is tried first."""
        system = MemoryRegion.container("system", 0x1000)
        first, second, third = (MemoryRegion.ram(name, 1) for name in "abc")
        for each in (first, second, third):
            system.add_subregion_overlap(0, each, 7)
        assert system.subregions == (third, second, first)

    def test_a_move_adds_again(self) -> None:
        """F4: a new address keeps the priority but makes it the latest, even an equal one."""
        system = MemoryRegion.container("system", 0x1000)
        first, second, high = (MemoryRegion.ram(name, 1) for name in "abc")
        system.add_subregion_overlap(0, first, 0)
        system.add_subregion_overlap(0, second, 0)
        system.add_subregion_overlap(0, high, 1)
        first.set_address(1)
        assert system.subregions == (high, first, second)
        assert (first.addr, first.priority) == (1, 0)
        second.set_address(0)
        assert system.subregions == (high, second, first)

    def test_nothing_else_changes_the_order(self) -> None:
        """F4: size, enabled and flags keep the place."""
        system = MemoryRegion.container("system", 0x1000)
        first, second = (MemoryRegion.ram(name, 1) for name in "ab")
        system.add_subregion_overlap(0, first, 0)
        system.add_subregion_overlap(0, second, 0)
        first.set_size(2)
        first.set_enabled(False)
        first.set_enabled(True)
        first.set_readonly(True)
        assert system.subregions == (second, first)


class TestSetters:
    @pytest.mark.parametrize(
        "name", ["enabled", "readonly", "nonvolatile", "unmergeable", "romd_mode"]
    )
    def test_booleans(self, name: str) -> None:
        """Each sets its own attribute, and nothing but True or False."""
        flash = MemoryRegion.rom_device("flash", 0x1000, None)
        setter = getattr(flash, f"set_{name}")
        others = [each for each in snapshot([flash])[0] if not isinstance(each, bool)]
        for value in (True, False, True):
            setter(value)
            assert getattr(flash, name) is value
        setter(False)
        for bad in (1, 0, None, "yes"):
            with pytest.raises(RegionTypeError, match=f"{name} of .*'flash'.* is a bool"):
                setter(bad)
        assert getattr(flash, name) is False
        assert [each for each in snapshot([flash])[0] if not isinstance(each, bool)] == others

    def test_only_a_rom_device_has_a_romd_mode(self) -> None:
        """The others are refused."""
        with pytest.raises(RegionError, match=r"'ram'.* is not a ROM device"):
            MemoryRegion.ram("ram", 1).set_romd_mode(False)

    def test_only_an_alias_has_an_offset(self) -> None:
        """The others are refused."""
        with pytest.raises(RegionError, match=r"'ram'.* is not an alias"):
            MemoryRegion.ram("ram", 1).set_alias_offset(0)

    def test_alias_offset(self) -> None:
        """It is set, and checked as in the constructor."""
        alias = MemoryRegion.alias("alias", MemoryRegion.ram("ram", 1), offset=0, size=1)
        alias.set_alias_offset(0x123)
        assert alias.alias_offset == 0x123
        with pytest.raises(RegionError, match="offset of 'alias' is -0x1"):
            alias.set_alias_offset(-1)
        assert alias.alias_offset == 0x123

    def test_size(self) -> None:
        """It is set, and checked as in the constructor."""
        system, ram, _ = tree()
        ram.set_size(0x800)
        assert ram.size == 0x800
        for bad in (0, -1, (1 << 64) + 1):
            with pytest.raises(RegionError, match="size of 'ram'"):
                ram.set_size(bad)
        with pytest.raises(RegionTypeError, match="size of 'ram'"):
            ram.set_size(None)  # type: ignore[arg-type]
        assert ram.size == 0x800
        assert system.subregions[1] is ram

    def test_no_more_than_the_block_has(self) -> None:
        """Memory grows up to what its block has."""
        ram = MemoryRegion.ram("ram", 0x1000, block=RamBlock.anonymous(0x2000))
        ram.set_size(0x2000)
        with pytest.raises(RegionError, match=r"'ram'.* cannot grow to 0x2001: .* has 0x2000"):
            ram.set_size(0x2001)
        assert ram.size == 0x2000

    def test_a_rom_that_shrinks_below_its_data(self) -> None:
        """What no longer fits is left out when the memory is made."""
        rom = MemoryRegion.rom("rom", 4, data=b"abcd")
        rom.set_size(2)
        assert bytes(rom.block.view[:2]) == b"ab"

    def test_a_region_in_no_container_has_an_address_too(self) -> None:
        """F1: the root of an address space renders at its own address."""
        ram = MemoryRegion.ram("ram", 0x1000)
        ram.set_address(0x4000)
        assert ram.addr == 0x4000
        assert ram.container is None


@examples(dev=60, ci=200)
@given(tree_plans(limit=0x4000), st.lists(mutations(0x8000), max_size=20))
def test_a_refused_change_changes_nothing(plan: TreePlan, changes: list[Mutation]) -> None:
    """Whatever is refused, all regions are as they were before."""
    regions = plan.build()
    for change in changes:
        region = regions[change.which % len(regions)]
        if change.what.startswith("add") and region.container is not None:
            continue  # that would be two changes, and the first is fine
        before = snapshot(regions)
        if not change.apply(regions):
            assert snapshot(regions) == before
        for each in regions:
            assert all(child.container is each for child in each.subregions)
