"""The command line."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

main = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@main.callback()
def _perpkit() -> None:
    """See what pruning does to a neural network, and get its quality back cheaply."""


@main.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures, the table and the notebook.")] = Path(
        "out/demo"
    ),
) -> None:
    """Prune the embedded model, watch perplexity explode, retrain a few parameters, watch it come back."""
    from .demo import run_demo

    try:
        with _workers() as executor:
            run_demo(out, executor)
    except KeyboardInterrupt:
        typer.echo("Stopped. The finished rows are kept: the next `perpkit demo` goes on from there.")
        raise typer.Exit(130) from None
    except ValueError as error:
        typer.echo(f"perpkit demo: {error}", err=True)
        raise typer.Exit(1) from None


def _workers():
    """Two worker processes where there are two cores, else none: the rows run here."""
    if len(_cores()) < 2:
        return nullcontext()
    # spawn: forking a process that runs threads, as torch does, can deadlock.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, mp_context=context, initializer=_start_worker)


def _cores() -> range | set[int]:
    # macOS cannot say which cores this process may use.
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
