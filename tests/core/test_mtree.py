import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import FlatView, MemoryRegion
from memlistener.core.mtree import (
    Space,
    ViewDump,
    format_flatviews,
    format_tree,
    format_views,
    printed_kind,
    range_kind,
    render_views,
)
from memlistener.core.mtree_parse import parse_mtree
from memlistener.core.mtree_views import parse_flatviews
from memlistener.testing.strategies import TreePlan, tree_plans
from tests.corpus import Regions, cases, load
from tests.trees import examples

_RECORDED = ("start", "size", "name", "kind", "offset", "priority", "nonvolatile")
TEXTS = sorted(name.removesuffix(".D.txt") for name in load("text") if name.endswith(".D.txt"))


def small() -> list[Space]:
    """A machine with one of everything that prints differently."""
    system = MemoryRegion.container("system", 1 << 64)
    ram = MemoryRegion.ram("ram", 0x4000)
    system.add_subregion_overlap(0x1000, MemoryRegion.alias("low", ram, offset=0, size=0x2000), -1)
    window = MemoryRegion.alias("window", ram, offset=0x3000, size=0x1000)
    window.set_readonly(True)
    system.add_subregion_overlap(0x2000, window, 1)
    flash = MemoryRegion.rom_device("flash", 0x1000, None)
    system.add_subregion(0x8000, flash)
    off = MemoryRegion.io("off", 8, None)
    system.add_subregion(0x9000, off)
    off.set_enabled(False)
    kept = MemoryRegion.ram("kept", 0x1000)
    kept.set_nonvolatile(True)
    system.add_subregion(0xA000, kept)
    return [("memory", system), ("cpu-0", system)]


def machine(name: str) -> list[Space]:
    built = Regions(cases()[name])
    spaces = cases()[name]["address_spaces"]
    return [(space["name"], built[space["root"]]) for space in spaces]


def marked(root: MemoryRegion) -> MemoryRegion:
    """Add something disabled, so that the text can be told from plain ``info mtree``."""
    off = MemoryRegion.container("off", 1)
    off.set_enabled(False)
    root.add_subregion_overlap(0, off, -100)
    return root


def shows(root: MemoryRegion) -> str:
    """What a root shows, as text."""
    return format_views([ViewDump((), None, FlatView.render(root))])


def by_name(spaces: list[Space] | tuple[Space, ...]) -> list[tuple[str, str]]:
    return sorted((name, shows(root)) for name, root in spaces)


# ---- printing -------------------------------------------------------------------


def test_tree_prints_what_is_enabled() -> None:
    """A tree is printed sorted by address, alias targets behind it, disabled regions left out."""
    assert format_tree(small()) == (
        "address-space: cpu-0\n"
        "address-space: memory\n"
        "  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n"
        "    0000000000001000-0000000000002fff (prio -1, ram): alias low @ram "
        "0000000000000000-0000000000001fff\n"
        "    0000000000002000-0000000000002fff (prio 1, ram): alias window @ram "
        "0000000000003000-0000000000003fff\n"
        "    0000000000008000-0000000000008fff (prio 0, romd): flash\n"
        "    000000000000a000-000000000000afff (prio 0, nv-ram): kept\n"
        "\n"
        "memory-region: ram\n"
        "  0000000000000000-0000000000003fff (prio 0, ram): ram\n"
        "\n"
    )


def test_tree_prints_what_is_disabled_on_demand() -> None:
    """The -D form marks disabled regions."""
    line = "    0000000000009000-0000000000009007 (prio 0, i/o): off [disabled]\n"
    assert line in format_tree(small(), disabled=True)
    assert line not in format_tree(small())


def test_children_of_a_hidden_region_are_printed() -> None:
    """Plain info mtree hides a disabled region's line and prints its children."""
    root = MemoryRegion.container("root", 0x1000)
    hidden = MemoryRegion.container("hidden", 0x100)
    hidden.add_subregion(8, MemoryRegion.io("seen", 8, None))
    hidden.set_enabled(False)
    root.add_subregion(0x10, hidden)
    assert format_tree([("memory", root)]) == (
        "address-space: memory\n"
        "  0000000000000000-0000000000000fff (prio 0, i/o): root\n"
        "      0000000000000018-000000000000001f (prio 0, i/o): seen\n"
        "\n"
    )


def test_flatviews_print_read_only_ranges_as_rom() -> None:
    """A view prints priority, the flags of the whole path, and offsets other than 0."""
    assert format_flatviews(small()) == (
        "FlatView #0\n"
        ' AS "memory", root: system\n'
        ' AS "cpu-0", root: system\n'
        " Root memory region: system\n"
        "  0000000000001000-0000000000001fff (prio 0, ram): ram\n"
        "  0000000000002000-0000000000002fff (prio 0, rom): ram @0000000000003000\n"
        "  0000000000008000-0000000000008fff (prio 0, romd): flash\n"
        "  000000000000a000-000000000000afff (prio 0, nv-ram): kept\n"
        "\n"
    )


def test_flatview_of_nothing() -> None:
    """A root that shows nothing has no root region and no ranges; its alias is named."""
    target = MemoryRegion.container("bus", 0x1000)
    alias = MemoryRegion.alias("master", target, offset=0, size=0x1000)
    assert format_flatviews([("dma", alias)]) == (
        "FlatView #0\n"
        ' AS "dma", root: master, alias bus\n'
        " Root memory region: (none)\n"
        "  No rendered FlatView\n"
        "\n"
    )


def test_addresses_past_64_bits_are_marked() -> None:
    """A region that reaches past 2**64 is printed modulo 2**64, with QEMU's mark."""
    root = MemoryRegion.container("root", 1 << 64)
    root.add_subregion(0x10, MemoryRegion.container("big", 1 << 64))
    text = format_tree([("memory", root)], disabled=True)
    assert "[DETECTED OVERFLOW!]     0000000000000010-000000000000000f (prio 0, i/o): big\n" in text
    assert format_tree(parse_mtree(text).spaces, disabled=True) == text


def test_printed_kinds() -> None:
    """Kinds print as QEMU's words; an alias as its target, through aliases too."""
    flash = MemoryRegion.rom_device("flash", 8, None)
    ram = MemoryRegion.ram("ram", 8)
    one = MemoryRegion.alias("one", flash, offset=0, size=8)
    two = MemoryRegion.alias("two", one, offset=0, size=8)
    rom = MemoryRegion.rom("rom", 8)
    regions = [flash, two, ram, rom, MemoryRegion.reservation("none", 8)]
    assert list(map(printed_kind, regions)) == ["romd", "romd", "ram", "rom", "i/o"]
    flash.set_romd_mode(False)
    ram.set_readonly(True)
    assert list(map(printed_kind, regions)) == ["i/o", "i/o", "rom", "rom", "i/o"]


@pytest.mark.parametrize("name", sorted(cases()))
def test_views_of_real_machines(name: str) -> None:
    """Views, their roots and who shares them are QEMU's, for every recorded machine."""
    recorded = cases()[name]
    regions = recorded["regions"]
    wanted = sorted(
        (
            sorted(view["address_spaces"]),
            "" if view["root_id"] is None else regions[str(view["root_id"])]["name"],
            [tuple(each[key] for key in _RECORDED) for each in view["ranges"]],
        )
        for view in recorded["flatviews"]
    )
    found = sorted(
        (
            sorted(space.name for space in dump.spaces),
            dump.root or "",
            [
                (
                    *(each.start, each.size, each.region.name, range_kind(each), each.offset),
                    *(each.region.priority, each.nonvolatile),
                )
                for each in dump.view
            ],
        )
        for dump in render_views(machine(name))
    )
    assert found == wanted


# ---- there and back ---------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_qemus_text_comes_back(name: str) -> None:
    """QEMU's own text, read and printed, is the same to the last byte."""
    tree, views = load("text")[f"{name}.D.txt"], load("text")[f"{name}.f.txt"]
    assert format_tree(parse_mtree(tree).spaces, disabled=True) == tree
    assert format_tree(parse_mtree(tree, views).spaces, disabled=True) == tree
    assert format_views(parse_flatviews(views).views) == views


@pytest.mark.parametrize("with_views", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_qemus_trees_show_qemus_views(name: str, with_views: bool) -> None:
    """A tree that was read renders to the views that QEMU printed beside it."""
    tree, views = load("text")[f"{name}.D.txt"], load("text")[f"{name}.f.txt"]
    parsed = parse_mtree(tree, views if with_views else None)
    wanted = sorted(
        (space.name, format_views([ViewDump((), None, dump.view)]))
        for dump in parse_flatviews(views).views
        for space in dump.spaces
    )
    assert by_name(parsed.spaces) == wanted
    assert not any("does not show" in guess.what for guess in parsed.guesses)


@pytest.mark.parametrize("name", sorted(cases()))
def test_real_machines_come_back(name: str) -> None:
    """A recorded machine, printed and read with its views, prints and shows the same."""
    spaces = machine(name)
    views = format_flatviews(spaces)
    tree = format_tree(spaces, disabled=True)
    assert format_tree(parse_mtree(tree).spaces, disabled=True) == tree
    assert by_name(parse_mtree(tree, views).spaces) == by_name(spaces)
    assert by_name(parse_mtree(format_tree(spaces), views).spaces) == by_name(spaces)


def test_most_machines_need_no_views() -> None:
    """What is guessed without views is right for nearly all address spaces."""
    right = total = 0
    for name in cases():
        spaces = machine(name)
        read = parse_mtree(format_tree(spaces, disabled=True)).spaces
        pairs = list(zip(by_name(spaces), by_name(read), strict=True))
        right += sum(one == two for one, two in pairs)
        total += len(pairs)
    assert total > 800
    assert right / total > 0.95


@given(plan=tree_plans())
@examples(dev=100, ci=300)
def test_any_tree_comes_back(plan: TreePlan) -> None:
    """Whatever the tree, its -D text is read, and prints the same again."""
    regions = plan.build()
    spaces = [("memory", marked(regions[0])), ("other", regions[-1])]
    text = format_tree(spaces, disabled=True)
    assert format_tree(parse_mtree(text).spaces, disabled=True) == text


@given(plan=tree_plans(), data=st.data())
@examples(dev=100, ci=300)
def test_any_tree_shows_the_same(plan: TreePlan, data: st.DataObject) -> None:
    """A tree read with its views shows what it showed, where the text says all of it.

    It does not say: which containers are read-only, what is unmergeable, and
    the order of siblings of equal priority.
    """
    regions = plan.build()
    for number, region in enumerate(regions):
        region.set_unmergeable(False)
        region.set_nonvolatile(False)
        if region.kind.value not in ("ram", "rom"):
            region.set_readonly(False)
        holder = region.container
        if holder is not None:
            holder.del_subregion(region)
            holder.add_subregion_overlap(region.addr, region, number)
    spaces = [("memory", regions[0]), ("other", data.draw(st.sampled_from(regions)))]
    marked(regions[0])
    text, views = format_tree(spaces, disabled=True), format_flatviews(spaces)
    assert by_name(parse_mtree(text, views).spaces) == by_name(spaces)


@given(plan=tree_plans())
@examples(dev=100, ci=300)
def test_any_view_comes_back(plan: TreePlan) -> None:
    """Whatever shows, its text is read, and prints the same again."""
    text = format_flatviews([("memory", plan.build()[0])])
    parsed = parse_flatviews(text)
    assert format_views(parsed.views) == text
    for dump in parsed.views:
        dump.view.check()
