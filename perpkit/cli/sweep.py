"""`perpkit sweep`: run the rows of a grid that are not in the store."""

import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .axes import axis_values
from .exits import ERROR, SOME_FAILED, errors_in_words
from .tables import compact, context, print_json, print_table, records
from .workers import cores, cuda_devices, worker_processes

if TYPE_CHECKING:
    import pandas as pd

    from ..experiments.grid import Grid
    from ..experiments.store import Store
    from ..experiments.sweep import NothingComputed

FORMATS = (".csv", ".parquet")
LISTED = 5


def exportable(path: Path | None) -> Path | None:
    """The file of an export; refused before hours of work."""
    if path is not None and path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{path} must end in {' or '.join(FORMATS)}")
    return path


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="The file of the rows; else PERPKIT_STORE, else one in the cache folder.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")]


def sweep(
    ctx: typer.Context,
    grid_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[GRID.yaml]",
            help="Axes and their values, or a list of such mappings (YAML or JSON).",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes; 1: this one. Default: one for each CUDA device, else 1.",
            show_default=False,
        ),
    ] = None,
    threads_per_worker: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each. Default: the cores, shared out.", show_default=False),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed rows again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many rows are left and about how long they take.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write all columns to a .csv or .parquet file.", show_default=False, callback=exportable
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run every experiment of a grid that is not in the store, and show the results.

    Finished rows are kept at once: after Ctrl-C or a crash the same command goes on. Progress goes to
    stderr, the table to stdout.
    """
    if grid_file is None and not ctx.obj:
        words = "name a grid file or at least one axis, such as --sparsity 0.5,0.7"
        if as_json:
            print_json({"error": words})
        raise typer.BadParameter(words)
    with errors_in_words("sweep", as_json=as_json):
        from ..experiments.grid import Grid
        from ..experiments.sweep import NothingComputed

        axes = axis_values(ctx.obj)
        grid = Grid(**axes) if grid_file is None else Grid.from_file(grid_file, **axes)
        _check_sparsity(axes.get("sparsity", []), grid)
        if dry_run:
            _estimate(grid, store, workers, threads_per_worker, retry_failed, as_json)
            return
        try:
            results, kept = _run(grid, store, workers, threads_per_worker, retry_failed)
        except NothingComputed as error:
            _nothing(error, store, as_json)
        if out is not None:
            kept.export(out, results)
        _show(results, kept, store, as_json)


def _estimate(
    grid: "Grid",
    path: Path | None,
    workers: int | None,
    threads: int | None,
    retry_failed: bool,
    as_json: bool,
) -> None:
    with looked_at(path) as store, redirect_stdout(sys.stderr):
        left = _left(grid, store, retry_failed)
        # What is tried takes as long as in a worker only on as many threads.
        count, threads = _shares(left, workers, threads)
        if left:
            typer.echo("trying one row of each kind that was never run here …", err=True)
        with on_threads(threads):
            estimate = grid.estimate(store)
    again = estimate.failed if retry_failed else 0
    if as_json:
        counts = {"finished": estimate.finished, "failed": estimate.failed, "left": estimate.left + again}
        print_json(
            {"rows": estimate.rows, **counts, "seconds": estimate.seconds, "store": str(store_path(path))}
        )
        return
    typer.echo(str(estimate))
    if again:
        typer.echo(f"The {again} failed would be tried again.")
    if count > 1:
        typer.echo(f"(one after the other; {count} workers share it)")


def _left(grid: "Grid", store: "Store", retry_failed: bool) -> int:
    """How many rows are to be computed."""
    keys = {experiment.key() for experiment in grid}
    known = store.get(keys).values()
    return len(keys) - sum(1 for row in known if not (retry_failed and row.get("error")))


def _shares(left: int, workers: int | None, threads: int | None) -> tuple[int, int | None]:
    """How many workers there are for the rows that are left, and the threads of each (None: torch's own)."""
    count = min(workers or len(cuda_devices()) or 1, left)
    return count, threads or (max(1, len(cores()) // count) if count > 1 else None)


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """Inside, torch computes on as many threads; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def looked_at(path: Path | None) -> Iterator["Store"]:
    """The store to read from, which is not created when it is not there."""
    from ..experiments.store import Store

    if store_path(path).exists():
        yield Store(path, readonly=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Store(Path(folder) / "results.sqlite")


def store_path(path: Path | None) -> Path:
    """The file of the rows: the one that is named, or else the default one."""
    from ..experiments.store import default_store

    return default_store() if path is None else path.expanduser()


def _run(
    grid: "Grid", path: Path | None, workers: int | None, threads: int | None, retry_failed: bool
) -> tuple["pd.DataFrame", "Store"]:
    import torch

    from ..experiments.store import Store
    from ..experiments.sweep import sweep as run_sweep

    store = Store(path)
    count, threads = _shares(_left(grid, store, retry_failed), workers, threads)
    devices = cuda_devices()
    if count < 2 and threads:
        torch.set_num_threads(threads)
    # What a library prints is no result.
    with (
        redirect_stdout(sys.stderr),
        worker_processes(count, threads=threads or 1, devices=devices) as executor,
        warnings.catch_warnings(),
    ):
        # They are listed below the table.
        warnings.filterwarnings("ignore", r"\d+ of \d+ rows failed")
        return run_sweep(grid, store=store, executor=executor, retry_failed=retry_failed), store


def _nothing(error: "NothingComputed", store: Path | None, as_json: bool) -> NoReturn:
    """Say that every row has failed; scripts get their document all the same."""
    count = len(error.rows)
    if as_json:
        told = {"finished": 0, "failed": count, "error": error.first, "store": str(store_path(store))}
        print_json({"rows": records(error.rows), **told})
    every = "the row" if count == 1 else f"all {count} rows"
    ways = f" ({_where(store)} shows where; --retry-failed tries again)" if error.kept else ""
    typer.echo(f"perpkit sweep: {every} failed, {error.first}{ways}", err=True)
    raise typer.Exit(ERROR) from error


def _where(store: Path | None) -> str:
    """The command that lists the failed rows of this store."""
    named = "" if store is None else f" --store {shlex.quote(str(store))}"
    return f"perpkit results{named} --failed --traceback"


def _show(results: "pd.DataFrame", store: "Store", named: Path | None, as_json: bool) -> None:
    """Print the results; exit with a code of its own when some rows have failed."""
    has_failed = results["error"].notna()
    failed, finished = results[has_failed], results[~has_failed]
    if as_json:
        counts = {"finished": len(finished), "failed": len(failed)}
        print_json({"rows": records(results), **counts, "store": str(store.path)})
    else:
        if words := context(finished):
            typer.echo(words, err=True)
        print_table(compact(finished))
    if len(failed):
        _list_errors(failed, len(results))
        # Rows that could not even be loaded are not kept.
        kept = store.table(failed=True)
        if "error" in kept and kept["error"].isin(failed["error"]).any():
            typer.echo(f"{_where(named)} shows where; --retry-failed tries them again.", err=True)
        raise typer.Exit(SOME_FAILED)


def _list_errors(failed: "pd.DataFrame", rows: int) -> None:
    typer.echo(f"{len(failed)} of {rows} rows failed:", err=True)
    counts: dict[Any, int] = failed["error"].value_counts(sort=False).to_dict()
    for error, count in [*counts.items()][:LISTED]:
        first = str(error).strip().splitlines()[0]
        typer.echo(f"  {first}" + (f" ({count} rows)" if count > 1 else ""), err=True)
    if len(counts) > LISTED:
        typer.echo(f"  and {len(counts) - LISTED} other errors", err=True)


def _check_sparsity(asked: list, grid: "Grid") -> None:
    """Raise ValueError for a flag that says nothing, because every pattern says another sparsity itself."""
    theirs = {each.sparsity: each.pattern for each in grid}
    for sparsity in map(float, asked):
        if sparsity not in theirs:
            pattern = ", ".join(dict.fromkeys(map(str, theirs.values())))
            raise ValueError(
                f"no row would have --sparsity {sparsity:g}: the pattern {pattern} says it itself; leave one "
                "out, or add none to the patterns"
            )
