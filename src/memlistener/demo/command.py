"""The command line of ``memlistener demo``."""

from __future__ import annotations

import click
from rich.console import Console

from memlistener import kvm
from memlistener.demo import scenario
from memlistener.demo.guest import CPUS, MAX_VCPUS
from memlistener.demo.progress import display
from memlistener.demo.windows import KINDS
from memlistener.rig import command

_SECONDS = 5.0

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
    fake = command.fake_or_no_kvm(fake)
    options = scenario.Options(
        seconds=command.seconds_or_default(seconds, transactions, _SECONDS),
        transactions=transactions,
        vcpus=vcpus,
        changes=tuple(KINDS) if mode == "all" else (mode,),
        policy=kvm.KickPolicy(policy),
        cpu=cpu,
        fake=fake,
    )
    with display(Console(stderr=True), options) as shown:
        result = command.run(lambda stop: scenario.run(options, shown.update, stop))
    command.show(result, as_json=as_json)
    context.exit(result.exit_status)
