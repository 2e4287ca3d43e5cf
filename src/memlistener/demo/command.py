"""The command line of ``memlistener demo``."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable

import click
import trio
from rich.console import Console

from memlistener import kvm
from memlistener.demo import scenario
from memlistener.demo.guest import CPUS, MAX_VCPUS
from memlistener.demo.progress import Display
from memlistener.demo.report import Result
from memlistener.demo.windows import KINDS
from memlistener.trace import TraceInstrument

_SECONDS = 5.0
_MISSING = 2  # exit status: something needed is, here room on a disk

_HELP = "\n".join(
    [
        "Run a guest while its memory map changes under it.",
        "",
        "The guest reads, writes and executes memory that transactions, back to back, split, "
        "merge, move and hide. It checks every value that it meets.",
        "",
        "\b",
        "Modes:",
        "  all     all of these in turn",
        *(f"  {name:<7} {kind.summary}" for name, kind in KINDS.items()),
        "",
        "\b",
        "Exit status:",
        "  0       every access found its memory and its value",
        "  1       the guest saw a torn map, or got nowhere",
        "  2       wrong usage, or something needed is missing",
        "  130     interrupted",
    ]
)


@click.command(help=_HELP)
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
    help=f"Stop after this time.  [default: {_SECONDS:g}; none with --transactions]",
)
@click.option(
    "--transactions",
    type=click.IntRange(1),
    help="Stop after this many transactions.",
)
@click.option("--fake", is_flag=True, help="Scripted vCPUs on a fake kernel, even where KVM works.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write there what brackets and vCPUs did, for https://ui.perfetto.dev.",
)
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
    trace: str | None,
) -> None:
    """Run the scenario, show how it goes, print what came of it."""
    watching = None if trace is None else _Trace(trace)
    if not fake:
        available = kvm.available()
        if not available:
            click.echo(
                f"KVM cannot be used, so scripted vCPUs on a fake kernel run: {available.reason}",
                err=True,
            )
            fake = True
    options = scenario.Options(
        seconds=_SECONDS if seconds is None and transactions is None else seconds,
        transactions=transactions,
        vcpus=vcpus,
        changes=tuple(KINDS) if mode == "all" else (mode,),
        policy=kvm.KickPolicy(policy),
        cpu=cpu,
        fake=fake,
        instruments=() if watching is None else (watching.instrument,),
    )
    with contextlib.ExitStack() as stack:
        if watching is not None:
            stack.callback(watching.close)
        display = stack.enter_context(Display(Console(stderr=True), options))
        result = trio.run(_run_until_signalled, options, display.update)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        output = Console(highlight=False)
        output.print(result.heading, style="bold")
        output.print(result.as_table())
        output.print(result.verdict, style="green" if not result.exit_status else "red")
    if watching is not None:
        if watching.error is not None:
            click.echo(f"The trace in {trace} is not complete: {watching.error}", err=True)
            context.exit(result.exit_status or _MISSING)
        click.echo(f"The trace is in {trace}: open it with https://ui.perfetto.dev", err=True)
    context.exit(result.exit_status)


class _Trace:
    """The file that --trace names, and what fills it.

    Raises:
        click.BadParameter: It cannot be written.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
            self.instrument = TraceInstrument(self._file)
        except OSError as error:
            raise click.BadParameter(
                f"{path!r} cannot be written: {error.strerror}", param_hint="'--trace'"
            ) from error
        self.error: OSError | None = None

    def close(self) -> None:
        """The run is over. What cannot be written is no reason to lose its result."""
        try:
            with self._file:
                self.instrument.close()
        except OSError as error:
            self.error = error


async def _run_until_signalled(
    options: scenario.Options, progress: Callable[[Result], object]
) -> Result:
    """Run the scenario; Ctrl-C and SIGTERM end it in good order, with its result."""
    stop = trio.Event()

    async def watch() -> None:
        async for _ in signals:
            stop.set()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            result = await scenario.run(options, progress, stop)
            nursery.cancel_scope.cancel()
    return result
