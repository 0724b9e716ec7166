"""The command line."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, InvalidStateError, ProcessPoolExecutor
from contextlib import contextmanager
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
    try:
        from .demo import run_demo

        with _workers() as executor:
            run_demo(out, executor)
    except KeyboardInterrupt:
        # It is over in a moment; a second Ctrl-C would only tear this message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        typer.echo("Stopped. The finished rows are kept: the same command goes on from there.")
        raise typer.Exit(130) from None
    except BrokenExecutor:
        typer.echo(
            "perpkit demo: a worker process died; was memory short? The finished rows are kept: the same "
            "command goes on from there.",
            err=True,
        )
        raise typer.Exit(1) from None
    except ValueError as error:
        typer.echo(f"perpkit demo: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _workers() -> Iterator[Executor | None]:
    """Two worker processes where there are two cores, else none: the rows run here."""
    if len(_cores()) < 2:
        yield None
        return
    # spawn: forking a process that runs threads, as torch does, can deadlock.
    executor = ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    with _born_deaf_to_ctrl_c():
        for _ in range(2):
            executor.submit(os.getpid)
    try:
        yield executor
    except BaseException:
        threading.excepthook = _unless_already_cancelled
        # A worker that is loading torch does not listen yet, and shutdown() would wait for it.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown()


def _unless_already_cancelled(failed: threading.ExceptHookArgs) -> None:
    """Report what went wrong in a thread, but not what the executor's own stumbles over.

    When its workers are ended, Python up to 3.12 gives the error to cancelled rows too, which refuse it.
    """
    if not isinstance(failed.exc_value, InvalidStateError):
        threading.__excepthook__(failed)


@contextmanager
def _born_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside are spared Ctrl-C, which goes to all of a terminal: this one decides."""
    if not hasattr(signal, "pthread_sigmask"):
        # On Windows only once they run `_start_worker`.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> range | set[int]:
    # macOS cannot say which cores this process may use.
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # tqdm's own lock is a semaphore of the system's, which a worker that is stopped would leave behind.
    tqdm.set_lock(threading.RLock())


def _end_with_the_parent() -> None:
    # Killed, it cannot stop its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
