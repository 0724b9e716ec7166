"""The demonstration: one sweep on the embedded model, as a table, a figure and an executed notebook."""

import shutil
import textwrap
import time
from concurrent.futures import Executor
from pathlib import Path

import pandas as pd

from .experiments.grid import Grid
from .experiments.store import Store
from .experiments.sweep import sweep
from .interactive.notebooks import execute_notebook
from .interactive.plots.curves import plot_curves
from .interactive.plots.figure import save_figure
from .sources.embedded import data_folder

SPARSITIES = [0.3, 0.4, 0.5, 0.6, 0.7]
RETRAININGS = ["none", "biases", "norms", "biases+norms", "full"]


def demo_grid() -> Grid:
    """Magnitude pruning at five sparsities, five retrainings, three seeds.

    >>> len(demo_grid())
    65
    """
    return Grid(sparsity=SPARSITIES, retrain=RETRAININGS, seed=range(3))


def run_demo(out: Path, executor: Executor | None) -> None:
    """Compute what is missing of the demonstration's sweep and write everything to a folder."""
    started = time.perf_counter()
    grid = demo_grid()
    store = Store(out / "results.sqlite")
    print(f"Pruning tiny-opt by magnitude and retraining it: {len(grid)} runs, two or three minutes.")
    results = sweep(grid, store=store, executor=executor)
    print(f"\nPerplexity on {results.protocol[0]}")
    print(f"dense model {results.dense_perplexity[0]:.2f}, best possible {results.floor[0]:.2f}\n")
    print(_table(results).to_string())
    files = save_figure(plot_curves(results), out / "perplexity_by_sparsity")
    # A terminal would break the lines within words.
    print(f"\n{textwrap.fill(_seen(results), min(100, shutil.get_terminal_size().columns))}\n")
    print("\n  ".join(["Figure and table:", *map(str, files)]))
    if notebook := _execute_notebook(out, store):
        print(
            "\n  ".join(
                ["The same as a notebook:", f"{notebook}", f"{notebook.with_suffix('.html')} (to read)"]
            )
        )
        print("\nNext: `make lab`, then open 00_start_here.ipynb and drag the slider.")
    else:
        print("The notebooks come with the source: clone the repository and start with `make lab`.")
    print(f"({time.perf_counter() - started:.0f} s)")


def _table(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds, a row for each retraining."""
    cells = results.groupby(["retrain", "sparsity"], sort=False)["perplexity"].agg(["mean", "std"])
    words = cells.apply(
        lambda cell: f"{cell['mean']:.2f}" + (f" ± {cell['std']:.2f}" if cell["std"] == cell["std"] else ""),
        axis=1,
    )
    table = words.unstack("sparsity")
    table.insert(0, "trained", results.groupby("retrain")["trainable_share"].first().map("{:.2%}".format))
    return table.rename(columns=lambda name: name if isinstance(name, str) else f"{name:.0%}").rename_axis(
        index="retrain", columns=None
    )


def _seen(results: pd.DataFrame) -> str:
    """What was seen, in one sentence made from the numbers."""
    mean = results.groupby(["retrain", "sparsity"])["perplexity"].mean()
    dense = results.dense_perplexity[0]
    share = results.loc[results.retrain == "biases+norms", "trainable_share"].iloc[0]
    return (
        f"At 50 % sparsity perplexity goes from {dense:.2f} to {mean['none', 0.5]:.2f}, and retraining "
        f"{share:.1%} of the parameters (biases and normalisations) brings it back to "
        f"{mean['biases+norms', 0.5]:.2f}; at 70 % it goes to {mean['none', 0.7]:.1f}, those few reach "
        f"{mean['biases+norms', 0.7]:.2f} and all the weights {mean['full', 0.7]:.2f}."
    )


def _execute_notebook(out: Path, store: Store) -> Path | None:
    """Execute the first notebook on the demonstration's rows; None where the notebooks are not installed."""
    source = data_folder().parent / "notebooks" / "00_start_here.ipynb"
    if not source.is_file():
        return None
    import nbformat
    from nbconvert import HTMLExporter

    print("\nExecuting the first notebook, half a minute or more …")
    notebook = nbformat.read(source, as_version=4)
    target = out / source.name
    try:
        execute_notebook(notebook, out, store)
        nbformat.write(notebook, target)
        page, _ = HTMLExporter().from_notebook_node(notebook)
        target.with_suffix(".html").write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        words = f"the notebook {source.name} could not be executed: {error}"
        raise ValueError(f"{words}\nThe table and the figure are in {out}") from error
    return target
