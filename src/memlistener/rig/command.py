"""What a command that runs a guest does around it."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import click
import trio
from rich.console import Console
from rich.table import Table

from memlistener import kvm
from memlistener.errors import KvmUnavailableError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

policy = click.option(
    "--policy",
    type=click.Choice([policy.value for policy in kvm.KickPolicy]),
    default=kvm.KickPolicy.EVERY_COMMIT.value,
    show_default=True,
    help="When to hold the vCPUs; 'never' shows what goes wrong without.",
)
transactions = click.option(
    "--transactions",
    type=click.IntRange(1),
    help="Stop after this many transactions.",
)
fake = click.option(
    "--fake", is_flag=True, help="Scripted vCPUs on a fake kernel, even where KVM works."
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."
)


class NotAvailable(click.ClickException):
    """Something that the command needs is missing."""

    exit_code = 2


def seconds(default: float) -> Callable[[F], F]:
    """``--seconds``; None where it is not given, see `seconds_or_default`."""
    return click.option(
        "--seconds",
        type=click.FloatRange(0, min_open=True),
        help=f"Stop after this time.  [default: {default:g}; none with --transactions]",
    )


def vcpus(most: int) -> Callable[[F], F]:
    """``--vcpus``."""
    return click.option(
        "--vcpus",
        type=click.IntRange(1, most),
        default=2,
        show_default=True,
        help="How many vCPUs run.",
    )


def seconds_or_default(
    given: float | None, transactions: int | None, default: float
) -> float | None:
    """How long to run: who limits the transactions does not limit the time too."""
    return default if given is None and transactions is None else given


def fake_or_no_kvm(fake: bool) -> bool:
    """Whether to run on the fake kernel; says so where nobody asked for it."""
    if fake:
        return True
    available = kvm.available()
    if not available:
        click.echo(
            f"KVM cannot be used, so scripted vCPUs on a fake kernel run: {available.reason}",
            err=True,
        )
    return not available


def run(scenario: Callable[[trio.Event], Awaitable[T]]) -> T:
    """Run a scenario; Ctrl-C and SIGTERM set the event that it is given, and it ends.

    Raises:
        NotAvailable: KVM cannot do what is asked for, or a file cannot be used.
    """
    try:
        return trio.run(_run_until_signalled, scenario)
    except (ExceptionGroup, OSError) as error:
        cause = _first(error)
        if isinstance(cause, KvmUnavailableError):
            text = str(cause)
        elif isinstance(cause, OSError) and cause.filename is not None:
            text = f"{cause.filename}: {cause.strerror}"
        else:
            raise
        raise NotAvailable(text) from error


async def _run_until_signalled(scenario: Callable[[trio.Event], Awaitable[T]]) -> T:
    stop = trio.Event()

    async def watch() -> None:
        async for _ in signals:
            stop.set()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            result = await scenario(stop)
            nursery.cancel_scope.cancel()
    return result


def _first(error: Exception) -> Exception:
    """What happened first, inside the groups that nurseries make."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


class Outcome(Protocol):
    """What came of a run."""

    @property
    def heading(self) -> str:
        """What was run."""
        ...

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        ...

    @property
    def exit_status(self) -> int:
        """0 where all is well."""
        ...

    def as_table(self) -> Table:
        """All of it for people."""
        ...

    def as_json(self) -> dict[str, Any]:
        """All of it for programs."""
        ...


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        click.echo(json.dumps(outcome.as_json(), indent=2))
        return
    output = Console(highlight=False)
    output.print(outcome.heading, style="bold")
    output.print(outcome.as_table())
    output.print(outcome.verdict, style="green" if not outcome.exit_status else "red")
