import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memlistener.mtree_command import mtree
from tests.corpus import load

TREE = "pc-basic.fw.D.txt"
VIEWS = "pc-basic.fw.f.txt"
TEXT: dict[str, str] = load("text")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TEXT.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(mtree, args, input=stdin)


def test_prints_trees(folder: Path) -> None:
    """Trees come out as QEMU prints them; -D includes what is disabled."""
    assert run(TREE, "-D", "-q").stdout == TEXT[TREE]
    assert "[disabled]" not in run(TREE).stdout


@pytest.mark.parametrize("file", [TREE, VIEWS])
def test_prints_views(folder: Path, file: str) -> None:
    """Views come out of trees and of views."""
    lines = run("-f", "-q", file).stdout.splitlines()
    wanted = TEXT[VIEWS].splitlines()
    assert sorted(line for line in lines if "prio" in line) == sorted(
        line for line in wanted if "prio" in line
    )


def test_guesses_go_to_standard_error(folder: Path) -> None:
    """Guesses are told, but not where output is expected; -q keeps them back."""
    assert "memlistener: guessed: lines " in run(TREE).stderr
    assert "guessed" not in run(TREE).stdout
    assert run(TREE, "-q").stderr == ""


def test_views_settle_guesses(folder: Path) -> None:
    """With --views nothing is left to guess about aliases."""
    guesses = json.loads(run(TREE, "--json").stdout)["guesses"]
    settled = json.loads(run(TREE, "--json", "--views", VIEWS).stdout)["guesses"]
    assert any("taken as writable" in each["what"] for each in guesses)
    assert not any("taken as writable" in each["what"] for each in settled)


def test_standard_input(folder: Path) -> None:
    """A file named - is standard input, once."""
    assert run("-", "-D", "-q", stdin=TEXT[TREE]).stdout == TEXT[TREE]
    assert run("-", "--diff", "-", stdin="").exit_code == 2


def test_same_machine_does_not_differ(folder: Path) -> None:
    """A tree and the views beside it show the same: status 0, no output."""
    result = run(TREE, "--diff", VIEWS, "-q")
    assert (result.exit_code, result.stdout) == (0, "")


def test_differences(folder: Path) -> None:
    """A range that is gone and another that came: deletes first, status 1."""
    gone = "  00000000fed00000-00000000fed003ff (prio 0, i/o): hpet\n"
    came = "  00000000fed00000-00000000fed001ff (prio 0, i/o): hpet\n"
    (folder / "new.txt").write_text(TEXT[VIEWS].replace(gone, came))
    result = run(VIEWS, "--diff", "new.txt", "-q")
    assert result.exit_code == 1
    assert (
        "address-space: cpu-smm-0\n"
        "  region_del 00000000fed00000-00000000fed003ff (i/o): hpet\n"
        "  region_add 00000000fed00000-00000000fed001ff (i/o): hpet\n"
        "\n"
    ) in result.stdout
    document = json.loads(run(VIEWS, "--diff", "new.txt", "--json").stdout)
    assert document["different"] is True
    events = document["address_spaces"][0]["events"]
    assert [(each["event"], each["start"], each["size"]) for each in events] == [
        ("region_del", 0xFED00000, 0x400),
        ("region_add", 0xFED00000, 0x200),
    ]


def test_json_of_trees(folder: Path) -> None:
    """Regions are numbered, and refer to each other by number."""
    document = json.loads(run(TREE, "--json").stdout)
    regions = document["regions"]
    root = next(each["root"] for each in document["address_spaces"] if each["name"] == "memory")
    assert regions[str(root)]["name"] == "system"
    children = [regions[str(each)] for each in regions[str(root)]["order"]]
    low = next(each for each in children if each["name"] == "ram-below-4g")
    assert regions[str(low["alias"])]["name"] == "pc.ram"
    assert regions[str(root)]["size"] == 1 << 64


def test_json_of_views(folder: Path) -> None:
    """Views come with who shares them."""
    views = json.loads(run("-f", "--json", VIEWS).stdout)["flatviews"]
    assert [space["name"] for space in views[1]["address_spaces"]] == [
        "memory",
        "cpu-memory-0",
        "e1000",
    ]
    assert views[1]["ranges"][0]["priority"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt"], "nowhere.txt: No such file"),
        ([VIEWS], "has views only"),
        ([VIEWS, "-f", "--views", VIEWS], "--views is for trees"),
        ([TREE, "--views", TREE], f"{TREE}: line 1: expected 'FlatView #0'"),
        ([TREE, "--diff", VIEWS, "-f"], "--diff prints events"),
        ([TREE, "-f", "-D"], "what is disabled does not show"),
        ([], "Missing argument"),
    ],
)
def test_trouble_is_status_2(folder: Path, args: list[str], message: str) -> None:
    """Wrong usage and bad files: one message on standard error, nothing on the other."""
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_malformed_file_names_the_line(folder: Path) -> None:
    """A file that is something else: its name, the line, and what was expected."""
    (folder / "bad.txt").write_text("address-space: a\nhello\n")
    result = run("bad.txt")
    assert result.exit_code == 2
    assert "bad.txt: line 2: expected " in result.stderr
    assert "'hello'" in result.stderr
