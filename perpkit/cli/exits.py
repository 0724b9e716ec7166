"""How a command ends: exit codes, and errors in one line."""

import signal
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

import typer

ERROR, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
EPILOG = (
    f"Exit codes: 0 all well, {ERROR} an error, {USAGE} wrong usage, {SOME_FAILED} some rows failed, "
    f"{INTERRUPTED} interrupted."
)
KEPT = "The finished rows are kept: the same command goes on from there."


@contextmanager
def errors_in_words(command: str, *, stopped: str = f"Stopped. {KEPT}", err: bool = True) -> Iterator[None]:
    """Turn what a user can mend, or did herself, into a line and an exit code.

    `stopped` is what Ctrl-C is answered, on stderr unless `err` is False.
    """
    try:
        yield
    except KeyboardInterrupt:
        # It is over in a moment; a second Ctrl-C would only tear this message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        typer.echo(stopped, err=err)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenExecutor:
        typer.echo(f"perpkit {command}: a worker process died; was memory short? {KEPT}", err=True)
        raise typer.Exit(ERROR) from None
    except ValueError as error:
        typer.echo(f"perpkit {command}: {error}", err=True)
        raise typer.Exit(ERROR) from None
