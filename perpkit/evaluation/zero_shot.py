"""Zero-shot accuracy through the LM evaluation harness, on a model in memory."""

import copy
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..sources.hub import hub_reachable
from ..sources.storyworld import ABILITIES
from .tasks import check_tasks, describe, from_hub, task_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ["task", "accuracy", "stderr", "chance", "n"]


def zero_shot(
    model: "PreTrainedModel",
    tokenizer,
    *,
    tasks: str = "storyworld",
    tasks_dir: str | Path | None = None,
    questions_per_task: int | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Accuracy on multiple-choice questions, one row a task: task, accuracy, stderr, chance, n.

    The harness (lm-eval) scores each choice by its log-likelihood after the context, no examples given, and
    plain accuracy is reported: its `acc`, with its standard error `sqrt(a (1 - a) / (n - 1))`. `chance` is
    the accuracy of guessing. A context too long for the model loses its beginning.

    `tasks` is `"storyworld"` or its abilities, `"papers"` (BoolQ, RTE, HellaSwag, WinoGrande, ARC-easy,
    ARC-challenge, OpenBookQA, as the harness defines them) or their names, or several of these joined by
    commas. The papers' questions come from the Hub or, with `tasks_dir`, from its files `<task>.jsonl`,
    `<task>_val.jsonl` or `<task>_validation.jsonl`, the first of these that is there, with one question a
    line in the data set's own fields. `questions_per_task` is 200 of the story world, drawn by `seed`, and
    all of the papers' unless told; then the first ones. `batch` is the number of choices scored at a time.
    When `cancelled()` says so, asked before every batch, the table has the tasks finished so far.

    Raises ValueError for an unknown task, a folder without its file, a damaged file, a choice longer than
    the model's context, and a hub that cannot be reached (within five seconds).

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> result = zero_shot(model, tokenizer, tasks="agreement", questions_per_task=20, progress=False)
    >>> bool(result.accuracy[0] > 0.8)
    True
    """
    check_tasks(tasks, tasks_dir)
    for what, number in (("questions_per_task", questions_per_task), ("batch", batch)):
        if number is not None and number < 1:
            raise ValueError(f"{what} is {number}; it must be at least 1")
    # All of them first: a damaged file shows before hours of asking.
    described = {name: describe(name, tasks_dir, questions_per_task, seed) for name in task_names(tasks)}
    local = set(described) if tasks_dir is not None else set(ABILITIES)
    reachable = set(described) <= local or hub_reachable()
    # Not its simple_evaluate: that also asks git and pip about the machine, seconds for what nobody reads.
    from lm_eval import evaluate

    rows = []
    with _as_before(model), _quiet():
        harness = _harness(model, tokenizer, batch, progress, cancelled)
        for name, (description, folder) in described.items():
            if cancelled is not None and cancelled():
                break
            with nullcontext() if name in local else from_hub(name, reachable):
                task = _load(description, folder)
            harness.asking = name
            try:
                found = evaluate(
                    harness, {"tasks": {name: task}}, questions_per_task, bootstrap_iters=0, log_samples=False
                )
            except _Cancelled:
                break
            rows.append(_row(name, task, found["results"][name]["acc,none"]))
    return pd.DataFrame(rows, columns=COLUMNS)


def mean_accuracy(table: pd.DataFrame) -> tuple[float, float]:
    """The mean accuracy over the tasks of `zero_shot`, all of equal weight, and its standard error.

    The tasks' errors are independent: `sqrt(sum stderr²) / tasks`. Both are NaN for no tasks.

    >>> mean_accuracy(pd.DataFrame({"accuracy": [0.5, 0.75], "stderr": [0.03, 0.04]}))
    (0.625, 0.025)
    """
    if table.empty:
        return math.nan, math.nan
    return float(table.accuracy.mean()), math.hypot(*table.stderr) / len(table)


class _Cancelled(Exception):
    """The caller wants no more."""


def _load(description: dict, folder: str | None):
    """The harness's task. It looks for definitions in one folder, as looking through all takes seconds."""
    import lm_eval.tasks

    path = None if folder is None else Path(lm_eval.tasks.__file__).parent / folder
    manager = lm_eval.tasks.TaskManager(include_path=path, include_defaults=False)
    (task,) = manager.load(description)["tasks"].values()
    return task


def _row(name: str, task, accuracy: float) -> dict:
    choices = Counter(request.doc_id for request in task.instances)
    count = len(choices)
    chance = sum(1 / number for number in choices.values()) / count
    stderr = (accuracy * (1 - accuracy) / (count - 1)) ** 0.5 if count > 1 else math.nan
    return {"task": name, "accuracy": accuracy, "stderr": stderr, "chance": chance, "n": count}


def _harness(model: "PreTrainedModel", tokenizer, batch: int, progress: bool, cancelled):
    """The harness's view of the model, which shows progress and can be stopped."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        asking = ""
        ready = False

        @property
        def model(self):
            # Its constructor would tie the head again, and one that was untied by hand would be lost.
            return self._model if self.ready else None

        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, override_bs: int | None = None):
            for (context, choice), _, tokens in requests:
                if not 0 < len(tokens) <= self.max_length:
                    raise ValueError(
                        f"task {self.asking!r}: the choice {choice!r} after {context[-40:]!r} has "
                        f"{len(tokens)} tokens; the model can score 1 to {self.max_length}"
                    )
            # Choices that differ in their last token only are read at once.
            rows = len({(*context, *tokens[:-1]) for _, context, tokens in requests})
            title = f"zero-shot {self.asking}"
            with tqdm(total=rows, desc=title, disable=not progress, leave=False) as self.bar:
                return super()._loglikelihood_tokens(requests, True, override_bs)

        def _model_call(self, inps, attn_mask=None, labels=None):
            if cancelled is not None and cancelled():
                raise _Cancelled
            logits = super()._model_call(inps, attn_mask, labels)
            self.bar.update(len(inps))
            return logits

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if tokenizer.pad_token is None:
        # The harness gives it one.
        tokenizer = copy.deepcopy(tokenizer)
    harness = Harness(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=min(tokenizer.model_max_length, limit),
    )
    harness.ready = True
    # Weights that wait in the host's memory for their turn are on no device until then.
    devices = (parameter.device for parameter in model.parameters())
    harness._device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    return harness


# --- leaving things as they were ------------------------------------------------------------------


@contextmanager
def _as_before(model: "PreTrainedModel") -> Iterator[None]:
    """Put the model in evaluation mode; the harness may draw from the global generators."""
    modes = [(module, module.training) for module in model.modules()]
    drawn, seeded = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        model.eval()
        with torch.random.fork_rng(devices=sorted(gpus, key=str)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(drawn)
        np.random.set_state(seeded)  # noqa: NPY002


_quieting = threading.Lock()
_loud_again: list[Callable[[], None]] = []
_quiet_now = 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks on every evaluation, and the bars of its parts, out of the notebook.

    Several threads may evaluate: the first makes it quiet and the last loud again.
    """
    global _quiet_now
    with _quieting:
        if not _quiet_now:
            _loud_again.extend(_silence())
        _quiet_now += 1
    try:
        yield
    finally:
        with _quieting:
            _quiet_now -= 1
            while not _quiet_now and _loud_again:
                _loud_again.pop()()


def _silence() -> Iterator[Callable[[], None]]:
    """Silence one part after the other; each comes with the way back."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from lm_eval.api import task

    # The last one says that a context is too long, which loses its beginning.
    for name in ("lm_eval", "lm_eval.models.huggingface", "transformers.tokenization_utils_base"):
        logger = logging.getLogger(name)
        level = logger.level
        logger.setLevel(logging.ERROR)
        yield partial(logger.setLevel, level)
    if is_progress_bar_enabled():
        disable_progress_bar()
        yield enable_progress_bar
    # A bar for each task that is over in a moment; the harness has no switch for it.
    bar = task.tqdm
    task.tqdm = lambda documents, **_: documents
    yield partial(setattr, task, "tqdm", bar)
