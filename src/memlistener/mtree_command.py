"""The command line of ``memlistener mtree``: reading files, printing, exit status.

What it prints is made by `memlistener.core.mtree` and its siblings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import attrs
import click

from memlistener.core.flatview import FlatRange
from memlistener.core.mtree import (
    Space,
    ViewDump,
    format_tree,
    format_views,
    printed_kind,
    range_kind,
    render_views,
)
from memlistener.core.mtree_diff import SpaceChange, diff_dumps
from memlistener.core.mtree_lines import Guess, is_flatviews
from memlistener.core.mtree_parse import parse_mtree
from memlistener.core.mtree_views import parse_flatviews
from memlistener.core.region import MemoryRegion
from memlistener.errors import MemlistenerError

_Parsed = TypeVar("_Parsed")

_DIFFERENT = 1

_HELP = """Read the output of QEMU's `info mtree` and print it again.

FILE is the output of `info mtree -D` (best), of `info mtree`, or, with -f and
--diff, of `info mtree -f`; "-" is standard input. What the text does not say is
guessed, and the guesses are printed on standard error; --views settles most.

\b
  memlistener mtree FILE               the trees
  memlistener mtree -f FILE            what each address space shows
  memlistener mtree FILE --diff FILE2  what a listener hears from FILE to FILE2

For --diff, address spaces are matched by name (those of one name in the order
they come) and regions by name and kind. A range stays when its start, size,
offset, region and flags are the same; else it is deleted and added. All deletes
of an address space come before its adds.

\b
Exit status:
  0       done; with --diff: no differences
  1       with --diff: there are differences
  2       wrong usage, or a file that cannot be read
"""


class _Trouble(click.ClickException):
    """Like every ``ClickException``, but leaves 1 to mean "different"."""

    exit_code = 2


@attrs.frozen
class _Dump:
    """A file: its trees, unless it has views only, its views, what was guessed."""

    spaces: tuple[Space, ...] | None
    views: Sequence[ViewDump]
    guesses: tuple[Guess, ...]


@click.command(help=_HELP)
@click.argument("file", metavar="FILE")
@click.option("-f", "--flat", is_flag=True, help="Print the flat views, as `info mtree -f` does.")
@click.option("-D", "--disabled", is_flag=True, help="Print disabled regions too.")
@click.option("--diff", "other", metavar="FILE2", help="Print the events from FILE to FILE2.")
@click.option(
    "--views",
    metavar="FILE",
    help="`info mtree -f` from the moment of FILE, to settle what its trees leave open.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print what had to be guessed.")
@click.pass_context
def mtree(
    context: click.Context,
    file: str,
    flat: bool,
    disabled: bool,
    other: str | None,
    views: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read the output of QEMU's `info mtree` and print it again."""
    if [file, other, views].count("-") > 1:
        raise click.UsageError("standard input can be read once only")
    if other is not None and (flat or disabled):
        raise click.UsageError("--diff prints events: it goes with neither -f nor -D")
    if flat and disabled:
        raise click.UsageError("what is disabled does not show: -D goes without -f")
    dump = _load(file, views)
    guesses = list(dump.guesses)
    status = 0
    if other is not None:
        after = _load(other, None)
        guesses += [each for each in after.guesses if each not in guesses]
        changes = diff_dumps(dump.views, after.views)
        status = _DIFFERENT if changes else 0
        text, document = _diff_text(changes), _diff_document(changes)
    elif flat:
        text, document = format_views(dump.views), _views_document(dump.views)
    elif dump.spaces is None:
        _fail(f"{file}: has views only, no trees: use -f")
    else:
        text, document = format_tree(dump.spaces, disabled=disabled), _tree_document(dump.spaces)
    if as_json:
        document["guesses"] = [attrs.asdict(each) for each in guesses]
        text = json.dumps(document, indent=2) + "\n"
    click.echo(text, nl=False)
    if not quiet and not as_json:
        for guess in guesses:
            click.echo(f"memlistener: guessed: {guess}", err=True)
    context.exit(status)


# ---- reading --------------------------------------------------------------------


def _load(file: str, views: str | None) -> _Dump:
    text = _read(file)
    hint = _read(views) if views is not None else None
    if is_flatviews(text):
        if views is not None:
            _fail(f"{file}: has views only: --views is for trees")
        parsed = _parsed(file, lambda: parse_flatviews(text))
        return _Dump(None, parsed.views, parsed.guesses)
    if hint is not None and views is not None:
        _parsed(views, lambda: parse_flatviews(hint))  # names the right file if it is at fault
    machine = _parsed(file, lambda: parse_mtree(text, hint))
    rendered = _parsed(file, lambda: render_views(machine.spaces))
    return _Dump(machine.spaces, rendered, machine.guesses)


def _parsed(file: str, parse: Callable[[], _Parsed]) -> _Parsed:
    try:
        return parse()
    except MemlistenerError as error:  # MtreeError, or a tree that cannot be rendered
        _fail(f"{file}: {error}")


def _read(file: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        _fail(f"{file}: {error.strerror}")
    return raw.decode(errors="backslashreplace")


def _fail(message: str) -> NoReturn:
    raise _Trouble(message)


# ---- events ---------------------------------------------------------------------


def _diff_text(changes: Iterable[SpaceChange]) -> str:
    lines: list[str] = []
    for change in changes:
        lines.append(f"address-space: {change.name}")
        for event in change.events:
            each = event.range
            offset = f" @{each.offset:016x}" if each.offset else ""
            nonvolatile = "nv-" if each.nonvolatile else ""
            lines.append(
                f"  {event.hook} {each.start:016x}-{each.end - 1:016x} "
                f"({nonvolatile}{range_kind(each)}): {each.region.name}{offset}"
            )
        lines.append("")
    return "".join(f"{line}\n" for line in lines)


def _diff_document(changes: Sequence[SpaceChange]) -> dict[str, Any]:
    return {
        "different": bool(changes),
        "address_spaces": [
            {
                "name": change.name,
                "events": [{"event": event.hook, **_range(event.range)} for event in change.events],
            }
            for change in changes
        ],
    }


# ---- JSON -------------------------------------------------------------------------


def _range(each: FlatRange) -> dict[str, Any]:
    return {
        "start": each.start,
        "size": each.size,
        "kind": range_kind(each),
        "name": each.region.name,
        "offset": each.offset,
        "readonly": each.readonly,
        "nonvolatile": each.nonvolatile,
    }


def _views_document(views: Iterable[ViewDump]) -> dict[str, Any]:
    return {
        "flatviews": [
            {
                "address_spaces": [attrs.asdict(space) for space in dump.spaces],
                "root": dump.root,
                "ranges": [
                    {**_range(each), "priority": each.region.priority} for each in dump.view
                ],
            }
            for dump in views
        ]
    }


def _tree_document(spaces: Sequence[Space]) -> dict[str, Any]:
    ids: dict[MemoryRegion, int] = {}
    todo = [root for _, root in reversed(spaces)]
    while todo:
        region = todo.pop()
        if region in ids:
            continue
        ids[region] = len(ids)
        todo += [each for each in (region.alias_target,) if each is not None]
        todo += reversed(region.subregions)
    return {
        "address_spaces": [{"name": name, "root": ids[root]} for name, root in spaces],
        "regions": {str(number): _region(region, ids) for region, number in ids.items()},
    }


def _region(region: MemoryRegion, ids: dict[MemoryRegion, int]) -> dict[str, Any]:
    target = region.alias_target
    return {
        "name": region.name,
        "kind": region.kind.value,
        "printed_kind": printed_kind(region),
        "size": region.size,
        "addr": region.addr,
        "priority": region.priority,
        "enabled": region.enabled,
        "readonly": region.readonly,
        "nonvolatile": region.nonvolatile,
        "alias": ids[target] if target is not None else None,
        "alias_offset": region.alias_offset if target is not None else None,
        "order": [ids[each] for each in region.subregions],
    }
