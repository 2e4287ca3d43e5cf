"""The command line of ``memlistener mirror``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from memlistener import kvm
from memlistener.mirror import scenario
from memlistener.mirror.guest import CPUS, MAX_VCPUS
from memlistener.mirror.progress import display
from memlistener.rig import command

_SECONDS = 10.0
_RAM = 64  # MiB
_RAM_OF_SCRIPTS = 16  # each of their writes is Python

_HELP = """Copy a running guest's RAM to a file while its memory map changes.

The guest writes to all of its memory; transactions, back to back, split, merge,
resize and move its memslots. Round for round what it has written is copied. In the
end it is stopped, the rest is copied, and file and RAM are compared byte by byte.

\b
Exit status:
  0       0 pages differ
  1       pages differ, or the guest got nowhere
  2       wrong usage, or something needed is missing
  130     interrupted; the comparison is made all the same
"""


@click.command(help=_HELP)
@click.option(
    "--dirty-log",
    type=click.Choice([method.value for method in kvm.DirtyLogMethod]),
    default=kvm.DirtyLogMethod.MANUAL_PROTECT.value,
    show_default=True,
    help="How the kernel says which pages were written.",
)
@command.policy
@click.option(
    "--cpu",
    type=click.Choice(list(CPUS)),
    default="long",
    show_default=True,
    help="The guest's processor mode.",
)
@command.vcpus(MAX_VCPUS)
@click.option(
    "--ram",
    type=click.IntRange(1, scenario.MAX_RAM),
    help=f"MiB of memory.  [default: {_RAM}; {_RAM_OF_SCRIPTS} for scripted vCPUs]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to copy to; it is overwritten.  [default: a temporary file]",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the changes.")
@command.seconds(_SECONDS)
@command.transactions
@command.fake
@command.as_json
@click.pass_context
def mirror(
    context: click.Context,
    dirty_log: str,
    policy: str,
    cpu: str,
    vcpus: int,
    ram: int | None,
    output: Path | None,
    seed: int,
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
        ram=ram or (_RAM_OF_SCRIPTS if fake else _RAM),
        dirty_log=kvm.DirtyLogMethod(dirty_log),
        policy=kvm.KickPolicy(policy),
        cpu=cpu,
        output=output,
        seed=seed,
        fake=fake,
    )
    with display(Console(stderr=True), options) as shown:
        result = command.run(lambda stop: scenario.run(options, shown.update, stop))
    command.show(result, as_json=as_json)
    context.exit(result.exit_status)
