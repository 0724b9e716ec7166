"""`perpkit figures`: the tables and figures of the papers, with the published numbers beside."""

import math
import sys
import time
from collections.abc import Container
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .axes import split
from .exits import ERROR, SOME_FAILED, errors_in_words
from .sweep import StoreOption, looked_at, on_threads, store_path
from .workers import cores, cuda_devices, worker_processes

if TYPE_CHECKING:
    from ..experiments.paper.recipe import Recipe
    from ..experiments.paper.reproduce import Reproduced
    from ..experiments.paper.scales import Scale
    from ..interactive.paper import PaperFigure

REPORT = "report.html"
GB = 1e9


def figures(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with commas, such as table-1,sms; an unknown one lists them.", show_default="all"
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            metavar="embedded|quick|opt-125m|paper|FOLDER",
            help="The embedded models, a few points of them, OPT-125M, the papers' models, or your own.",
        ),
    ] = "embedded",
    text: Annotated[
        str | None, typer.Option(help="Text in place of the scale's own.", show_default=False)
    ] = None,
    tasks_dir: Annotated[
        str | None, typer.Option(help="Folder of the tasks' files; else the Hub.", show_default=False)
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="Image classifier in place of the scale's own, with --images.", show_default=False),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Its pictures: shapes, cifar10 or a folder.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of language models in place of the scale's own, such as bfloat16.", show_default=False
        ),
    ] = None,
    store: StoreOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures and the report.")] = Path("out/figures"),
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes; 1: this one. Default: one for each CUDA device, else up to 2.",
            show_default=False,
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed rows again.")] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Compute nothing: draw what the store has, also half of it.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what is left, about how long it takes and its memory; a few steps of what was "
            "never run here are tried, for minutes.",
        ),
    ] = False,
) -> None:
    """Compute what is missing of the papers' tables and figures and draw them beside the published numbers.

    Each is written as PDF, SVG, PNG and CSV, and all into one HTML report. Finished rows are kept: after
    Ctrl-C or a crash the same command goes on.
    """
    with errors_in_words("figures"):
        from ..experiments.paper.recipes import recipes
        from ..experiments.paper.scales import scale_of

        chosen = recipes(split("only", only) if only else None)
        sized = scale_of(
            scale, text=text, tasks_dir=tasks_dir, classifier=classifier, images=images, dtype=dtype
        )
        count = workers or len(cuda_devices()) or min(2, len(cores()))
        if dry_run:
            _estimate(chosen, sized, store, count)
            return
        _writable(out)
        if stored:
            from ..experiments.paper.jobs import job_store
            from ..experiments.paper.reproduce import stored as reproduced

            with looked_at(store) as rows, looked_at(job_store(store_path(store))) as jobs:
                _draw(reproduced(chosen, sized, rows, jobs), chosen, sized, out)
            return
        _compute(chosen, sized, store, count, retry_failed, out)


def _writable(out: Path) -> None:
    """Refuse a folder that cannot be written before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {str(out)!r}: {error}") from error


def _compute(
    chosen: list["Recipe"], scale: "Scale", path: Path | None, count: int, retry_failed: bool, out: Path
) -> None:
    from ..experiments.paper.reproduce import reproduce

    started = time.perf_counter()
    threads = max(1, len(cores()) // count)
    # What a library prints is no result.
    with (
        redirect_stdout(sys.stderr),
        on_threads(threads),
        worker_processes(count, threads=threads, devices=cuda_devices()) as executor,
    ):
        computed = reproduce(chosen, scale, store=path, executor=executor, retry_failed=retry_failed)
    _draw(computed, chosen, scale, out)
    typer.echo(f"({time.perf_counter() - started:.0f} s)")
    if any(each.errors for each in computed):
        raise typer.Exit(SOME_FAILED)


def _draw(computed: list["Reproduced"], chosen: list["Recipe"], scale: "Scale", out: Path) -> None:
    from ..interactive.paper import figures_of
    from ..interactive.plots.figure import save_figure
    from .report import report

    drawn = figures_of(computed)
    files = {}
    for each in drawn:
        if each.figure is not None:
            files[each.reproduced.name] = save_figure(each.figure, out / each.reproduced.name)
    page = out / REPORT
    left_out = [recipe for recipe in chosen if not recipe.pairs(scale)]
    try:
        page.write_text(report(drawn, left_out, scale, files), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {str(page)!r}: {error}") from error
    _show(drawn, left_out, scale)
    typer.echo(f"\n{len(files)} figures as PDF, SVG, PNG and CSV, and the report: {page}")
    if not files:
        raise typer.Exit(ERROR)


def _show(drawn: list["PaperFigure"], left_out: list["Recipe"], scale: "Scale") -> None:
    """A line for each figure, and what is wrong with it."""
    for each in drawn:
        found = each.reproduced
        points = int(found.table["ours"].notna().sum()) if len(found.table) else 0
        both = int(found.table["difference"].notna().sum()) if len(found.table) else 0
        typer.echo(f"{found.name:28} {points:4} points, {both:4} beside published ones")
        for error in found.errors:
            typer.echo(f"  {error.strip().splitlines()[0]}", err=True)
    for recipe in left_out:
        typer.echo(
            f"{recipe.name:28} not computed: name an image classifier and its pictures with --classifier and "
            "--images"
        )


def _estimate(chosen: list["Recipe"], scale: "Scale", path: Path | None, count: int) -> None:
    from ..experiments.estimate import Estimate
    from ..experiments.paper.cost import job_seconds
    from ..experiments.paper.jobs import job_store
    from ..experiments.paper.recipes import work

    grid, jobs = work(chosen, scale)
    with looked_at(path) as store, looked_at(job_store(store_path(path))) as beside:
        known = store.get(each.key() for each in grid) | beside.get(job.key() for job in jobs)
        # What is known at once comes first: the trials may take long, or fail.
        _counts(chosen, scale, known)
        _memory(chosen, scale, [row for row in known.values() if not row.get("error")])
        left = [job for job in jobs if job.key() not in known]
        if left or any(each.key() not in known for each in grid):
            typer.echo("trying a few steps of each kind that was never run here, for minutes …", err=True)
        unknown = ""
        with redirect_stdout(sys.stderr), on_threads(max(1, len(cores()) // count)):
            try:
                seconds = grid.estimate(store, progress=True).seconds
                seconds += job_seconds(left, beside, progress=True)
            except ValueError as error:
                seconds, unknown = math.nan, f"; how long is not known: {error}"
    failed = sum(1 for row in known.values() if row.get("error"))
    every = len(grid) + len({job.key() for job in jobs})
    told = Estimate(every, len(known) - failed, failed, every - len(known), seconds)
    typer.echo(f"together {told}{unknown}")
    if count > 1 and not unknown:
        typer.echo(f"(one after the other; {count} workers share it)")


def _counts(chosen: list["Recipe"], scale: "Scale", known: Container[str]) -> None:
    for recipe in chosen:
        keys = {each.key() for each in recipe.all_experiments(scale)}
        keys |= {job.key() for job in recipe.all_jobs(scale)}
        there = f"{len(keys)} rows and jobs, {sum(key in known for key in keys)} of them in the store"
        typer.echo(f"{recipe.name:20} {there if recipe.pairs(scale) else 'not at this scale'}")


def _memory(chosen: list["Recipe"], scale: "Scale", finished: list[dict]) -> None:
    """What finished rows took, or what models take at least."""
    from ..experiments.paper.cost import least_memory

    peaks = [row["peak_memory"] for row in finished if row.get("peak_memory")]
    if peaks:
        typer.echo(f"memory: finished rows took up to {max(peaks) / GB:.1f} GB a worker")
    models = dict.fromkeys(each.model for recipe in chosen for each in recipe.all_experiments(scale))
    for model, (few, full) in least_memory(scale, models).items():
        typer.echo(
            f"memory: {model} takes {few / GB:.3g} GB, to retrain it whole {full / GB:.3g} GB; activations "
            "come on top"
        )
