import pytest

from memlistener import FlatView, MemlistenerError, RegionKind
from memlistener.core.mtree import format_tree
from memlistener.core.mtree_lines import Guess, MtreeError
from memlistener.core.mtree_parse import parse_mtree
from memlistener.core.mtree_views import parse_flatviews


def line(level: int, start: int, last: int, rest: str) -> str:
    return f"{'  ' * level}{start:016x}-{last:016x} {rest}\n"


ROOT = "address-space: memory\n" + line(1, 0, (1 << 64) - 1, "(prio 0, i/o): system")
OFF = "address-space: off\n" + line(1, 0, 1, "(prio 0, i/o): off [disabled]")


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("", 1, "address-space: name"),
        ("(qemu) info mtree\n", 1, "address-space: name"),
        ("hello\n", 1, "address-space: name"),
        (ROOT + "hello\n", 3, "indented by two spaces"),
        (ROOT + "   " + line(0, 0, 1, "(prio 0, ram): a"), 3, "indented by two spaces"),
        (ROOT + line(2, 0, 1, "(prio 0, foo): a"), 3, "a kind that is one of ram, rom"),
        (ROOT + line(2, 0, 1, "(prio x, ram): a"), 3, "(prio N, kind)"),
        (ROOT + line(1, 0, 1, "(prio 0, ram): a"), 3, "one root below"),
        (ROOT + line(2, 0, 1, "(prio 0, ram): alias a @b " + "0" * 16 + "-" + "0" * 16), 3, "size"),
        (
            ROOT + line(2, 0, 0, "(prio 0, ram): alias a @b " + "0" * 16 + "-" + "0" * 16),
            3,
            "a section 'memory-region: b'",
        ),
        (ROOT + line(3, 0, 1, "(prio 0, ram): a [disabled]"), 3, "at most 4 spaces"),
        (ROOT + "\naddress-space: b\n\n" + OFF, 4, "a root to follow"),
        (ROOT + "\nmemory-region: b\n" + line(1, 0, 1, "(prio 0, ram): c"), 5, "'b'"),
    ],
)
def test_malformed_trees_are_refused(text: str, number: int, expected: str) -> None:
    """An error shows the line, its number, and what should be there."""
    with pytest.raises(MtreeError) as caught:
        parse_mtree(text)
    assert caught.value.number == number
    assert expected in caught.value.expected
    assert isinstance(caught.value, MemlistenerError)
    assert str(caught.value).startswith(f"line {number}: expected ")
    assert repr(caught.value.line) in str(caught.value)


@pytest.mark.parametrize("first", ["a", "b"])
def test_aliases_in_a_circle_are_refused(first: str) -> None:
    """Aliases that show each other make no tree."""
    zero = "0" * 16 + "-" + "0" * 16
    text = f"address-space: memory\n{line(1, 0, 0, f'(prio 0, i/o): alias {first} @a {zero}')}\n"
    for name, target in (("a", "b"), ("b", "a")):
        alias = line(1, 0, 0, f"(prio 0, i/o): alias {name} @{target} {zero}")
        text += f"memory-region: {name}\n{alias}\n"
    with pytest.raises(MtreeError, match="does not, in the end, show itself"):
        parse_mtree(text)


def test_alias_that_shows_its_own_window_is_refused() -> None:
    """A tree that cannot be made names the line that breaks it."""
    span = "0000000000000000-ffffffffffffffff"
    text = ROOT + line(2, 0, (1 << 64) - 1, f"(prio 0, i/o): alias again @system {span}")
    text += "\n" + text.replace("address-space: memory", "memory-region: system")
    with pytest.raises(MtreeError, match="a region that can be here") as caught:
        parse_mtree(text)
    assert caught.value.number == 3


VIEW = 'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("", 1, "FlatView #0"),
        (ROOT, 1, "FlatView #0"),
        ("FlatView #0\n", 1, "Root memory region"),
        ("FlatView #0\nFlatView #1\n", 1, "Root memory region"),
        ("FlatView #0\n AS memory\n", 2, "AS"),
        (VIEW + "hello\n", 4, "first-last"),
        (VIEW + line(1, 8, 1, "(prio 0, ram): a"), 4, "not below the first"),
        (VIEW + line(1, 0, 1, "(prio 0, container): a"), 4, "a container does not"),
        (VIEW + 2 * line(1, 0, 1, "(prio 0, ram): a"), 5, "after the one before it"),
        (VIEW + line(1, 0, 1, "(prio 0, ram): a @" + "f" * 16), 4, "below 2**64"),
    ],
)
def test_malformed_views_are_refused(text: str, number: int, expected: str) -> None:
    """An error shows the line, its number, and what should be there."""
    with pytest.raises(MtreeError) as caught:
        parse_flatviews(text)
    assert (caught.value.number, expected in caught.value.expected) == (number, True)


def test_every_guess_names_its_lines() -> None:
    """What the text does not say is listed, with the lines it concerns."""
    text = ROOT + line(2, 0, 0xFF, "(prio 0, ramd): mapped")
    text += line(2, 0x80, 0x80, "(prio 0, ramd): port")
    guesses = {guess.what: guess.lines for guess in parse_mtree(text).guesses}
    assert {lines for what, lines in guesses.items() if "'ramd'" in what} == {(3, 4)}
    assert {lines for what, lines in guesses.items() if "sizes 0 and 1" in what} == {(4,)}
    assert {lines for what, lines in guesses.items() if "equal priority" in what} == {(4,)}
    assert {lines for what, lines in guesses.items() if "[disabled]" in what} == {()}


def test_guesses_print_short() -> None:
    """A guess about many lines names the first few."""
    assert str(Guess("so", (7,))) == "line 7: so"
    assert str(Guess("so", tuple(range(1, 11)))) == "lines 1, 2, 3, 4, 5, 6, 7, 8 and 2 more: so"
    assert str(Guess("so")) == "so"


def test_hidden_disabled_region_gets_a_stand_in() -> None:
    """In plain text, what cannot belong to the line before it is below something hidden."""
    text = ROOT + line(2, 0, 0xFF, "(prio 0, ram): ram")
    text += line(3, 0x800, 0x8FF, "(prio 0, ram): below")
    parsed = parse_mtree(text)
    root = parsed.spaces[0][1]
    assert [each.region.name for each in FlatView.render(root)] == ["ram"]
    hidden = next(each for each in root.subregions if not each.enabled)
    assert [each.name for each in hidden.subregions] == ["below"]
    assert any(guess.lines == (4,) and "hidden" in guess.what for guess in parsed.guesses)
    assert format_tree(parsed.spaces) == text + "\n"


def test_hidden_root_shows_nothing() -> None:
    """An address space whose root is disabled prints no root; it reads as a disabled one."""
    parsed = parse_mtree("address-space: dma\n\n" + ROOT)
    assert [(name, root.enabled) for name, root in parsed.spaces] == [
        ("dma", False),
        ("memory", True),
    ]


def test_region_of_an_alias_is_the_one_in_the_tree() -> None:
    """A memory-region section that repeats a part of a tree is that part."""
    span = "0000000000000000-00000000000000ff"
    bus = line(0, 0x100, 0x1FF, "(prio 2, ram): bus")
    text = f"{ROOT}    {bus}" + line(2, 0x800, 0x8FF, f"(prio 0, ram): alias seen @bus {span}")
    text += f"\nmemory-region: bus\n  {bus}\n"
    parsed = parse_mtree(text)
    later, earlier = sorted(parsed.spaces[0][1].subregions, key=lambda each: -each.addr)
    assert later.alias_target is earlier
    assert earlier.priority == 2


def test_accelerator_notes_are_dropped() -> None:
    """What an accelerator has mapped is marked behind the name; the mark is no name."""
    text = VIEW + line(1, 0, 0xFF, "(prio 0, ram): ram @0000000000000100 KVM")
    (dump,) = parse_flatviews(text).views
    assert [(each.region.name, each.offset) for each in dump.view] == [("ram", 0x100)]


def test_containers_of_new_qemus_are_known() -> None:
    """A QEMU that prints the kind "container" needs no guess about it."""
    text = ROOT.replace("i/o", "container") + line(2, 0, 0xFF, "(prio 0, container): bus")
    root = parse_mtree(text).spaces[0][1]
    assert [each.kind for each in (root, *root.subregions)] == [RegionKind.CONTAINER] * 2


def test_views_settle_kinds_and_read_only_aliases() -> None:
    """With views, I/O is told from containers and read-only aliases from writable ones."""
    span = "0000000000000000-00000000000000ff"
    text = ROOT + line(2, 0, 0xFF, f"(prio 0, ram): alias window @ram {span}")
    text += line(2, 0x100, 0x1FF, "(prio 0, i/o): dev") + line(
        3, 0x100, 0x10F, "(prio 0, i/o): reg"
    )
    text += "\nmemory-region: ram\n" + line(1, 0, 0xFF, "(prio 0, ram): ram")
    views = VIEW + line(1, 0, 0xFF, "(prio 0, rom): ram")
    views += line(1, 0x100, 0x10F, "(prio 0, i/o): reg")
    views += line(1, 0x110, 0x1FF, "(prio 0, i/o): dev @0000000000000010")
    with_views, without = parse_mtree(text, views), parse_mtree(text)
    assert [
        (each.region.name, each.readonly) for each in FlatView.render(with_views.spaces[0][1])
    ] == [
        ("ram", True),
        ("reg", False),
        ("dev", False),
    ]
    assert [each.region.name for each in FlatView.render(without.spaces[0][1])] == ["ram", "reg"]


def test_views_that_do_not_fit_are_reported() -> None:
    """Views of another moment are no error, but it is said that they differ."""
    views = VIEW + line(1, 0, 0xFF, "(prio 0, rom): elsewhere")
    parsed = parse_mtree(ROOT + line(2, 0, 0xFF, "(prio 0, ram): ram"), views)
    assert any("does not show" in guess.what for guess in parsed.guesses)
