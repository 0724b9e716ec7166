"""`perpkit bench`: what a model of real size costs to retrain, prune and reconstruct, without its weights."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .exits import KEPT, SOME_FAILED, errors_in_words
from .sweep import JsonOption, exportable
from .tables import print_json

PARTS = ("train", "prune", "reconstruct")
GB = 1e9


def bench(
    model: Annotated[str, typer.Option(help="A bundled shape, such as opt-2.7b; an unknown one lists them.")],
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Always so: nothing is downloaded, only the cost is real."),
    ] = True,
    what: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = "train",
    methods: Annotated[
        str | None,
        typer.Option(
            help="What is retrained (full comes first: ratios are to it; perp, as published: biases, norms "
            "and LoRA on queries, values and head), criteria of prune and units of reconstruct; of each all "
            "unless told.",
            show_default=False,
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Gradient checkpointing; with and without unless told.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Only the first blocks; all unless told.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows of a training step.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    steps: Annotated[int, typer.Option(help="Training steps that are timed, after two of warm-up.")] = 5,
    samples: Annotated[int, typer.Option(help="Calibration windows of prune and reconstruct.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; the GPU if there is one.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .parquet file, written after every row; the rows that it has are kept.",
            callback=exportable,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens a second, seconds and peak memory at a model's real size, with random weights."""
    stopped = "Stopped." if out is None else f"Stopped. {KEPT}"
    with errors_in_words("bench", stopped=stopped, as_json=as_json):
        parts = _chosen("what", what, PARTS)
        from ..experiments.scale.files import read_rows, write_rows
        from ..experiments.scale.pruning import CRITERIA, UNITS, pruning_seconds, reconstruction_seconds
        from ..experiments.scale.rows import asked_for
        from ..experiments.scale.shapes import check_length, shape
        from ..experiments.scale.throughput import METHODS, throughput
        from ..sources.models import check_device, check_dtype

        shape(model, layers)
        check_length(model, length)
        check_dtype(dtype)
        common: dict[str, Any] = {"dtype": dtype, "device": check_device(device), "length": length}
        chosen = {"train": METHODS, "prune": CRITERIA, "reconstruct": UNITS}
        if methods is not None:
            named = _chosen("methods", methods, tuple(chain.from_iterable(chosen[part] for part in parts)))
            for part in parts:
                chosen[part] = tuple(name for name in named if name in chosen[part]) or chosen[part]
        ways = (False, True) if checkpointing is None else (checkpointing,)
        kept: dict[tuple, dict[str, Any]] = {}
        if out is not None:
            kept = read_rows(out)
            # A file that cannot be written is refused before the first row is measured.
            write_rows(kept, out)
            if finished := sum(row["error"] is None for row in kept.values()):
                said = "row, which is" if finished == 1 else "rows, which are"
                typer.echo(f"{out} has {finished} {said} not measured again.", err=True)
        common["known"] = kept
        work: dict[str, Iterator[dict]] = {
            "train": throughput(
                model, chosen["train"], ways, layers=layers, batch=batch, steps=steps, **common
            ),
            "prune": pruning_seconds(model, chosen["prune"], samples=samples, layers=layers, **common),
            "reconstruct": reconstruction_seconds(model, chosen["reconstruct"], samples=samples, **common),
        }
        rows = []
        for row in chain.from_iterable(work[part] for part in parts):
            rows.append(row)
            if not as_json:
                _say(row, first=len(rows) == 1)
            if out is not None:
                kept[asked_for(row)] = row
                write_rows(kept, out)
        if as_json:
            print_json({"rows": rows})
        if any(row["error"] for row in rows):
            raise typer.Exit(SOME_FAILED)


def _chosen(name: str, given: str, valid: tuple[str, ...]) -> tuple[str, ...]:
    several = tuple(dict.fromkeys(word.strip() for word in given.split(",")))
    for word in several:
        if word not in valid:
            raise ValueError(f"--{name} is {word!r}; of {', '.join(valid)}")
    return several


def _say(row: dict, first: bool) -> None:
    """One line for a row, under a line that says what is the same for all."""
    if first:
        cut = f", {row['layers']} blocks only" if row["layers"] else ""
        memory = f", {row['device_memory'] / GB:.1f} GB of memory" if row["device_memory"] else ""
        typer.echo(f"{row['model']}{cut}, random weights, {row['dtype']}, {row['device']}{memory}")
    way = "recomputed" if row["checkpointing"] else "kept"
    start = {
        "train": f"{row['method']:14} activations {way:10}",
        "prune": f"{'prune: ' + row['method']:32}",
        "reconstruct": f"{'reconstruct a block: ' + row['method']:32}",
    }[row["what"]]
    if row["error"]:
        typer.echo(f"{start} {row['error']}")
        return
    peak = f"{row['peak_memory'] / GB:8.2f} GB"
    if row["what"] != "train":
        typer.echo(f"{start} {row['seconds']:10.2f} s {peak}")
        return
    ratio = f"  {row['ratio']:.2f} × full" if row["ratio"] else ""
    published = f" (published {row['published_ratio']:.2f})" if row["published_ratio"] else ""
    steps = f"({row['slowest_step']:.1f} to {row['fastest_step']:.1f})"
    numbers = f"{row['trainable_share']:8.3%} {row['tokens_per_second']:10.1f} tokens/s {steps:22}"
    typer.echo(f"{start} {numbers} {peak}{ratio}{published}")
