"""`perpkit bench`: what a model of real size costs to retrain, prune and reconstruct, without its weights."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .exits import errors_in_words
from .sweep import JsonOption, exportable
from .tables import print_json, records

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
        str | None, typer.Option(help="What is retrained; all ways unless told.", show_default=False)
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
            help="A .csv or .parquet file, written after every row.",
            callback=exportable,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens a second, seconds and peak memory at a model's real size, with random weights."""
    with errors_in_words("bench", stopped="Stopped.", as_json=as_json):
        parts = _chosen("what", what, PARTS)
        from ..experiments.scale.pruning import pruning_seconds, reconstruction_seconds
        from ..experiments.scale.shapes import check_length, shape
        from ..experiments.scale.throughput import METHODS, throughput
        from ..sources.models import check_device, check_dtype

        shape(model, layers)
        check_length(model, length)
        check_dtype(dtype)
        common: dict[str, Any] = {"dtype": dtype, "device": check_device(device), "length": length}
        chosen = METHODS if methods is None else _chosen("methods", methods, METHODS)
        ways = (False, True) if checkpointing is None else (checkpointing,)
        work: dict[str, Iterator[dict]] = {
            "train": throughput(model, chosen, ways, layers=layers, batch=batch, steps=steps, **common),
            "prune": pruning_seconds(model, samples=samples, layers=layers, **common),
            "reconstruct": reconstruction_seconds(model, samples=samples, **common),
        }
        rows = []
        for row in chain.from_iterable(work[part] for part in parts):
            rows.append(row)
            if not as_json:
                _say(row, first=len(rows) == 1)
            if out is not None:
                _write(rows, out)
        if as_json:
            import pandas as pd

            print_json({"rows": records(pd.DataFrame(rows))})


def _chosen(name: str, given: str, valid: tuple[str, ...]) -> tuple[str, ...]:
    several = tuple(word.strip() for word in given.split(","))
    for word in several:
        if word not in valid:
            raise ValueError(f"--{name} is {word!r}; of {', '.join(valid)}")
    return several


def _say(row: dict, first: bool) -> None:
    """One line for a row, under a line that says what is the same for all."""
    if first:
        cut = f", {row['layers']} blocks only" if row["layers"] else ""
        typer.echo(f"{row['model']}{cut}, random weights, {row['dtype']}, {row['device']}")
    if "what" in row:
        if row["error"]:
            typer.echo(f"{row['what']:32} {row['error']}")
            return
        typer.echo(f"{row['what']:32} {row['seconds']:10.2f} s {row['peak_memory'] / GB:8.2f} GB")
        return
    way = "recomputed" if row["checkpointing"] else "kept"
    start = f"{row['method']:14} activations {way:10}"
    if row["error"]:
        typer.echo(f"{start} {row['error']}")
        return
    ratio = f"{row['ratio']:.2f} × full" if row["ratio"] else ""
    published = f" (published {row['published_ratio']:.2f})" if row["published_ratio"] else ""
    numbers = f"{row['trainable_share']:8.3%} {row['tokens_per_second']:10.1f} tokens/s"
    typer.echo(f"{start} {numbers} {row['peak_memory'] / GB:8.2f} GB  {ratio}{published}")


def _write(rows: list[dict], out: Path) -> None:
    import pandas as pd

    table = pd.DataFrame(rows)
    if out.suffix.lower() == ".csv":
        table.to_csv(out, index=False)
    else:
        table.to_parquet(out, index=False)
