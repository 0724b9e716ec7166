"""`perpkit demo`: one sweep on the embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from .exits import errors_in_words
from .workers import cores, worker_processes


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures, the table and the notebook.")] = Path(
        "out/demo"
    ),
) -> None:
    """Prune the embedded model, watch perplexity explode, retrain a few parameters, watch it come back."""
    with errors_in_words("demo", err=False):
        from ..demo import run_demo

        with worker_processes(min(2, len(cores()))) as executor:
            run_demo(out, executor)
