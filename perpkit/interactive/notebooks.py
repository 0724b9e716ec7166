"""Executing a notebook: a fresh kernel, all cells from the top, and outputs that can be read without one."""

import asyncio
import os
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiments.store import Store

if TYPE_CHECKING:
    from nbclient import NotebookClient
    from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
# A progress bar: "retrain:  40%|████      | 40/100 [00:01<00:01]"
BAR = re.compile(r"\d+%\|.*\|")


def execute_notebook(
    notebook: "NotebookNode", folder: Path, store: Store | str | Path, *, timeout: int = 1800
) -> None:
    """Run all cells in place in a fresh kernel that starts in `folder` and keeps its rows in `store`.

    The outputs are those of a reader without a kernel (`readable`). `timeout` bounds each cell, in seconds.
    Ctrl-C kills the kernel at once.

    Raises ValueError naming the cell's error when a cell or the kernel fails.

    >>> from nbformat.v4 import new_code_cell, new_notebook
    >>> notebook = new_notebook(cells=[new_code_cell("6 * 7")])
    >>> folder = Path(tempfile.mkdtemp())
    >>> execute_notebook(notebook, folder, folder / "results.sqlite")
    >>> notebook.cells[0].outputs[0].data["text/plain"]
    '42'
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    path = store.path if isinstance(store, Store) else Path(store)
    environment = {**os.environ, "PERPKIT_STORE": str(path.expanduser().resolve())}
    options: dict = {"record_timing": False, "store_widget_state": False, "coalesce_streams": True}
    options |= {"kernel_name": "python3", "timeout": timeout}
    with tempfile.TemporaryDirectory(prefix="perpkit-", ignore_cleanup_errors=True) as private:
        options["config"] = _connection(private)
        client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options)
        with open(Path(private, "log"), "w+b") as log:
            try:
                _run(client, env=environment, stderr=log)
            except (CellExecutionError, CellTimeoutError) as error:
                raise ValueError(f"{type(error).__name__}: {error}") from error
            except RuntimeError as error:
                # The kernel did not start or has died, and this is where it says why.
                log.seek(0)
                last = log.read().decode(errors="replace")[-2000:]
                raise ValueError(f"{type(error).__name__}: {error}\n{last}".rstrip()) from error
    readable(notebook)


def readable(notebook: "NotebookNode") -> None:
    """Leave out, in place, what cannot be shown without a kernel: progress bars, widgets and their state."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _keep(output)]


def _keep(output: "NotebookNode") -> bool:
    """Whether anything of an output is worth keeping; the rest of it is taken out."""
    if output.output_type == "stream" and output.name == "stderr":
        lines = re.split(r"[\r\n]", output.text)
        output.text = "\n".join(line for line in lines if not BAR.search(line))
        return bool(output.text.strip())
    if WIDGET in output.get("data", {}):
        # A cell's value says in words what it was; what is displayed on the way is a progress bar.
        del output.data[WIDGET]
        return output.output_type == "execute_result"
    return True


def _connection(folder: str):
    """Talk to the kernel through sockets in a folder: a port would be open to all users of the machine."""
    from traitlets.config import Config

    if os.name != "posix":
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder) / "kernel")}})


def _run(client: "NotebookClient", **kernel) -> None:
    """Execute in a thread: in the main one nbclient would take Ctrl-C for a kernel that died."""
    stop = threading.Event()

    async def execute() -> None:
        running = asyncio.ensure_future(client.async_execute(**kernel))
        while not (await asyncio.wait([running], timeout=0.1))[0]:
            if stop.is_set():
                # The polite way waits for a kernel that may be busy, or not even started.
                client.shutdown_kernel = "immediate"
                running.cancel()
                break
        await running

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(asyncio.run, execute())
        try:
            future.result()
        finally:
            stop.set()
            while not future.done():
                # A second Ctrl-C must not leave while the kernel is being ended: that is quick.
                with suppress(KeyboardInterrupt):
                    wait([future])
