"""The ``memlistener`` command: its subcommands, and nothing that they do.

click and rich come with ``pip install 'memlistener[cli]'`` only, so they are
imported when the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit status.

    Args:
        args: The arguments; None for those of the process.
    """
    try:
        import click

        command = _command()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(
            f"memlistener: the command needs {missing}: pip install 'memlistener[cli]'",
            file=sys.stderr,
        )
        sys.exit(_USAGE_ERROR)
    try:
        status = command.main(args, prog_name="memlistener", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:  # Ctrl-C where the subcommand does not see to it itself
        sys.exit(_INTERRUPTED)
    sys.exit(status)


def _command() -> click.Group:
    """The command with its subcommands, each from the package whose it is."""
    import click

    from memlistener import __version__
    from memlistener.demo.command import demo
    from memlistener.mirror.command import mirror
    from memlistener.mtree_command import mtree

    @click.group()
    @click.version_option(__version__)
    def memlistener() -> None:
        """QEMU's memory API as an async library."""

    memlistener.add_command(demo)
    memlistener.add_command(mirror)
    memlistener.add_command(mtree)
    return memlistener


if __name__ == "__main__":
    main()
