"""How a command ends: exit codes, and errors in one line."""

import signal
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

import typer

from .tables import print_json

ERROR, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
EPILOG = (
    f"Exit codes: 0 all well, {ERROR} an error, {USAGE} wrong usage, {SOME_FAILED} some rows failed, "
    f"{INTERRUPTED} interrupted."
)
KEPT = "The finished rows are kept: the same command goes on from there."


@contextmanager
def errors_in_words(
    command: str, *, stopped: str = f"Stopped. {KEPT}", err: bool = True, as_json: bool = False
) -> Iterator[None]:
    """Turn what a user can mend, or did herself, into a line and an exit code.

    `stopped` is what Ctrl-C is answered, on stderr unless `err` is False. With `as_json` what is said
    stands also in a JSON document on stdout.
    """

    def say(words: str, *, err: bool = True, start: str = "") -> None:
        if as_json:
            print_json({"error": words})
        typer.echo(f"{start}{words}", err=err)

    start = f"perpkit {command}: "
    try:
        yield
    except KeyboardInterrupt:
        # It is over in a moment; a second Ctrl-C would only tear this message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say(stopped, err=err)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenExecutor:
        say(f"a worker process died; was memory short? {KEPT}", start=start)
        raise typer.Exit(ERROR) from None
    except ValueError as error:
        say(str(error), start=start)
        raise typer.Exit(ERROR) from None
