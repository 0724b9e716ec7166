"""Zero-shot accuracy through the LM evaluation harness, on a model in memory."""

import json
import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..sources.storyworld import ABILITIES, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def zero_shot(
    model: "PreTrainedModel",
    tokenizer,
    *,
    tasks: str = "storyworld",
    questions_per_task: int = 200,
    seed: int = 0,
    batch: int = 64,
) -> pd.DataFrame:
    """Accuracy on multiple-choice questions, one row a task: task, accuracy, stderr, chance, n.

    The harness (lm-eval) scores each choice by its log-likelihood after the context, no examples given, and
    plain accuracy is reported. `tasks` is `"storyworld"` or its abilities joined by commas; `chance` is the
    accuracy of guessing.

    Raises ValueError for an unknown task.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> result = zero_shot(model, tokenizer, tasks="agreement", questions_per_task=20)
    >>> bool(result.accuracy[0] > 0.8)
    True
    """
    names = list(ABILITIES) if tasks == "storyworld" else tasks.split(",")
    asked = {name: questions(name, questions_per_task, seed) for name in names}
    # Not its simple_evaluate: that also asks git and pip about the machine, seconds for what nobody reads.
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Quiet(HFLM):
        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return super().loglikelihood(requests, disable_tqdm=True)

    context = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2048))
    with tempfile.TemporaryDirectory() as folder, _as_before(model), _quiet():
        described = [_task(name, asked[name], Path(folder)) for name in names]
        results = evaluate(
            Quiet(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=context),
            TaskManager(include_defaults=False).load(described),
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
    rows = []
    for name in names:
        accuracy = results[f"storyworld_{name}"]["acc,none"]
        count = len(asked[name])
        chance = sum(1 / len(question["choices"]) for question in asked[name]) / count
        stderr = (accuracy * (1 - accuracy) / count) ** 0.5
        rows.append({"task": name, "accuracy": accuracy, "stderr": stderr, "chance": chance, "n": count})
    return pd.DataFrame(rows)


@contextmanager
def _as_before(model: "PreTrainedModel") -> Iterator[None]:
    """The harness seeds and draws from the global generators and puts the model in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    drawn, seeded = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(drawn)
        np.random.set_state(seeded)  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks on every evaluation, and the bars of its parts, out of the notebook."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from lm_eval.api import task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface")]
    levels = [logger.level for logger in loggers]
    shown = is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    disable_progress_bar()
    # A bar for each task that is over in a moment; the harness has no switch for it.
    bar, task.tqdm = task.tqdm, lambda documents, **_: documents
    try:
        yield
    finally:
        task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            enable_progress_bar()


def _task(name: str, asked: list[dict], folder: Path) -> dict:
    """The harness's description of one question set, its data written to a file."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in asked))
    return {
        "task": f"storyworld_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
