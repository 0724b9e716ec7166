"""Work of a figure that is no row of a sweep: image classifiers, soups, reconstruction by adapters."""

import gc
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...evaluation.cost import Cost, device_name
from ...sources.models import best_device
from ..experiment import RESULT_FORMAT
from ..files import digest, language, model_files, task_files, text_files
from ..run import NotLoaded
from ..shared import Cancelled
from ..store import Store

# Results of jobs under another format are never mixed with these: raise it when a result changes its meaning.
JOB_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One piece of work that gives several rows: a function of this package and its settings.

    `function` is called with `settings` as keywords and returns a list of rows. The training `steps` and the
    `evaluations` it takes say how long it will take, beside jobs that were run or tried.
    """

    function: Callable[..., list[dict]]
    settings: Mapping[str, Any] = field(hash=False)
    steps: int = 0
    evaluations: int = 0

    @property
    def name(self) -> str:
        return self.function.__name__

    def key(self) -> str:
        """A digest of the function's name, the settings, what they are read from, and the formats."""
        named = [Path(str(self.settings[name])) for name in ("classifier", "images") if name in self.settings]
        files = [digest(_inside(path)) for path in named]
        if "model" in self.settings:
            read = model_files(self.settings["model"]), text_files(self.settings["text"])
            files += [digest(each) for each in (*read, task_files(self.settings["tasks_dir"]))]
            files.append(language())
        inputs = [self.name, self.settings, files, RESULT_FORMAT, JOB_FORMAT]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def _inside(path: Path) -> list[Path]:
    path = path.expanduser()
    return sorted(path.rglob("*")) if path.is_dir() else [path]


def job_store(path: Path) -> Path:
    """The file of the jobs' rows, beside that of a sweep's: they have other columns.

    >>> job_store(Path("out/results.sqlite")).name
    'results-figures.sqlite'
    """
    return path.with_name(f"{path.stem}-figures{path.suffix}")


def distinct(jobs: Iterable[Job]) -> dict[str, Job]:
    """The jobs by key, each once."""
    return {job.key(): job for job in jobs}


def run_jobs(
    jobs: Iterable[Job],
    store: Store,
    *,
    executor: Executor | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> dict[str, dict]:
    """Run the jobs that are not in the store, on an executor or here; what is in it of each, by key.

    Each is stored as soon as it is finished: `rows`, `seconds`, `peak_memory`, `device` and `error`, None
    when it is well. A job that fails is stored with its error, and the others go on; one whose model,
    pictures or tasks cannot be loaded is not stored, and tried again the next time.
    """
    wanted = distinct(jobs)
    found = store.get(wanted)
    missing = {
        key: job
        for key, job in wanted.items()
        if key not in found or (retry_failed and found[key].get("error"))
    }
    total, done = len(wanted), len(wanted) - len(missing)
    with tqdm(total=total, initial=done, unit="job", disable=not progress or not missing) as bar:

        def keep(key: str, row: dict) -> None:
            if row.pop("loaded"):
                store.put(key, row)
            found[key] = row
            bar.update()

        if executor is None:
            for key, job in missing.items():
                keep(key, attempt(job))
            return found
        # The longest first: the last one to end keeps all waiting.
        order = sorted(missing, key=lambda key: -missing[key].steps)
        futures: dict[Future, str] = {executor.submit(attempt, missing[key]): key for key in order}
        try:
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return found


def attempt(job: Job) -> dict:
    """Run a job: its row in the store, with the error instead of rows when it fails."""
    device = torch.device(best_device())
    row: dict[str, Any] = {"function": job.name, "settings": dict(job.settings), "rows": [], "loaded": True}
    started = time.perf_counter()
    with Cost(device) as cost:
        try:
            row |= {"rows": job.function(**job.settings), "error": None}
        except Cancelled:
            raise
        except NotLoaded as error:
            row |= {"error": str(error), "loaded": False}
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    # The next may need all of the memory.
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    spent = {"seconds": time.perf_counter() - started, "peak_memory": cost.peak_memory}
    return {**row, **spent, "device": device_name(device), "steps": job.steps}
