"""The command line of ``memlistener demo``."""

from __future__ import annotations

import contextlib

import click
from rich.console import Console

from memlistener import kvm
from memlistener.demo import scenario
from memlistener.demo.guest import CPUS, MAX_VCPUS
from memlistener.demo.progress import display
from memlistener.demo.windows import KINDS
from memlistener.rig import command
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
@command.policy
@click.option(
    "--cpu",
    type=click.Choice(list(CPUS)),
    default="protected",
    show_default=True,
    help="The guest's processor mode.",
)
@command.vcpus(MAX_VCPUS)
@command.seconds(_SECONDS)
@command.transactions
@command.fake
@command.as_json
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
    fake = command.fake_or_no_kvm(fake)
    options = scenario.Options(
        seconds=command.seconds_or_default(seconds, transactions, _SECONDS),
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
        shown = stack.enter_context(display(Console(stderr=True), options))
        result = command.run(lambda stop: scenario.run(options, shown.update, stop))
    command.show(result, as_json=as_json)
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
