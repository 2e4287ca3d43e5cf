"""The command line of ``memlistener demo``."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable

import click
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from memlistener import kvm
from memlistener.demo import scenario
from memlistener.demo.guest import CPUS, MAX_VCPUS
from memlistener.demo.report import Result
from memlistener.demo.windows import KINDS

_SECONDS = 5.0
_PLAIN_EVERY = 2.0  # seconds between two lines of progress where there is no terminal

_MODES = "\n".join(f"  {name:<7} {kind.summary}" for name, kind in KINDS.items())


@click.command(
    help=f"""Run a guest while its memory map changes under it.

    The guest reads, writes and executes memory that the host splits, merges,
    moves and hides in transactions, back to back. It checks every value.

    \b
    Modes:
      all     every one of these in turn
    {_MODES.replace(chr(10), chr(10) + "    ").removeprefix("  ").replace("    ", "    ")}

    \b
    Exit status:
      0       every access found its memory and its value
      1       some found a hole or a wrong value, or KVM gave up
      2       wrong usage, or something needed is missing
      130     interrupted
    """
)
@click.option(
    "--mode",
    type=click.Choice(["all", *KINDS]),
    default="all",
    show_default=True,
    help="What to change.",
)
@click.option(
    "--policy",
    type=click.Choice([policy.value for policy in kvm.KickPolicy]),
    default=kvm.KickPolicy.EVERY_COMMIT.value,
    show_default=True,
    help="When to hold the vCPUs; 'never' shows what goes wrong without.",
)
@click.option(
    "--cpu",
    type=click.Choice(list(CPUS)),
    default="protected",
    show_default=True,
    help="The guest's processor mode.",
)
@click.option(
    "--vcpus",
    type=click.IntRange(1, MAX_VCPUS),
    default=2,
    show_default=True,
    help="How many vCPUs run.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help=f"Stop after this time.  [default: {_SECONDS:g}, or none with --transactions]",
)
@click.option(
    "--transactions",
    type=click.IntRange(1),
    help="Stop after this many transactions.",
)
@click.option("--fake", is_flag=True, help="Scripted vCPUs on a fake kernel, even where KVM works.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def demo(
    context: click.Context,
    mode: str,
    policy: str,
    cpu: str,
    vcpus: int,
    seconds: float | None,
    transactions: int | None,
    fake: bool,
    as_json: bool,
) -> None:
    """Run the scenario, show how it goes, print what came of it."""
    errors = Console(stderr=True)
    if not fake:
        available = kvm.available()
        if not available:
            _say(errors, f"No KVM here, so scripted vCPUs on a fake kernel: {available.reason}")
            fake = True
    options = scenario.Options(
        seconds=_SECONDS if seconds is None and transactions is None else seconds,
        transactions=transactions,
        vcpus=vcpus,
        changes=tuple(KINDS) if mode == "all" else (mode,),
        policy=kvm.KickPolicy(policy),
        cpu=cpu,
        fake=fake,
    )
    with _Display(errors, options) as display:
        result = trio.run(_run_until_signalled, options, display.update)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        output = Console()
        output.print(result.as_table())
        output.print(result.verdict, style="red" if result.exit_status else "green")
    context.exit(result.exit_status)


async def _run_until_signalled(
    options: scenario.Options, progress: Callable[[Result], object]
) -> Result:
    """Run the scenario; SIGINT and SIGTERM end it in good order."""
    stop = trio.Event()

    async def watch() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            nursery_ready.set()
            async for _ in signals:
                stop.set()

    nursery_ready = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await nursery_ready.wait()
        result = await scenario.run(options, progress, stop)
        nursery.cancel_scope.cancel()
    return result
