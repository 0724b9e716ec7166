"""One run: load, prune, reconstruct, retrain, measure; its row."""

import copy
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.cost import Cost, device_name, out_of_memory
from ..evaluation.perplexity import perplexity
from ..evaluation.zero_shot import mean_accuracy, zero_shot
from ..pruning.masks import Masks
from ..pruning.prune import CALIBRATED, prune
from ..retraining.layerwise.reconstruct import reconstruct
from ..retraining.loop.modes import has_gradient_checkpointing
from ..sources.models import best_device, load_model
from ..sources.text import Text, load_text
from .experiment import RESULT_FORMAT, Experiment
from .retraining import retrained
from .shared import Cancel, Shared, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of models that are kept for other rows beside the one in work.
KEPT_BYTES = 2**31


class NotLoaded(ValueError):
    """A model, text or task cannot be loaded, which says nothing of the experiment: the row is not kept."""


@dataclass(frozen=True)
class Dense:
    """A dense model in the host's memory, its text, and the device where it runs."""

    key: tuple
    model: "PreTrainedModel"
    tokenizer: Any
    text: Text
    home: torch.device


@dataclass(frozen=True)
class Pruned:
    """A pruned, and perhaps reconstructed, model that waits for its retrainings in the host's memory."""

    model: "PreTrainedModel"
    masks: Masks
    seconds: dict[str, float]
    peak: int


def _copied(model: "PreTrainedModel", device: torch.device) -> "PreTrainedModel":
    return _moved(copy.deepcopy(model), device)


def _moved(model: Any, device: torch.device | str) -> "PreTrainedModel":
    return model if model.device == torch.device(device) else model.to(device)


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


_dense = Shared[Dense](count=4, limit=KEPT_BYTES, size=lambda dense: _bytes(dense.model))
_pruned = Shared[Pruned](count=4, limit=KEPT_BYTES, size=lambda pruned: _bytes(pruned.model))
_reached = Shared[dict](count=16, limit=0, size=lambda measured: 0)


def forget() -> None:
    """Free the models that this process keeps for further rows."""
    _dense.clear()
    _pruned.clear()
    _reached.clear()


def run(experiment: Experiment, cancelled: Cancel = None) -> dict:
    """Prune, reconstruct, retrain and measure one experiment: its row.

    Where memory is short for a retraining, activations are computed again, and `checkpointing` says so.

    Raises Cancelled when `cancelled()` said so before the row was finished, and NotLoaded.
    """
    check(cancelled)
    dense = _loaded(experiment, cancelled)
    measured = _dense_measures(dense, experiment, cancelled)
    pruned = _prepared(experiment, dense, cancelled)
    try:
        found = _finished(pruned, dense, experiment, cancelled, checkpointing=False)
    except Exception as error:
        trained = experiment.retrain != "none" and has_gradient_checkpointing(pruned.model)
        if not (trained and out_of_memory(error)):
            raise
        found = None
    if found is None:
        # Without the error, which holds all that has filled the memory.
        gc.collect()
        if dense.home.type == "cuda":
            torch.cuda.empty_cache()
        found = _finished(pruned, dense, experiment, cancelled, checkpointing=True)
    reached, spent = found
    return {
        **experiment.asdict(),
        **reached,
        **measured,
        "floor": dense.text.floor,
        "reached_sparsity": pruned.masks.sparsity(),
        **spent,
        "device": device_name(dense.home),
        "protocol": dense.text.protocol,
        "error": None,
        "format": RESULT_FORMAT,
    }


def _finished(
    pruned: Pruned, dense: Dense, experiment: Experiment, cancelled: Cancel, checkpointing: bool
) -> tuple[dict, dict]:
    """Retrain a pruned model and measure it: what it reaches and what all of it cost, as columns.

    With `checkpointing` activations are computed again in the backward pass, which takes less memory and more
    time, and gives the same.
    """
    share, tokens = 0.0, 0
    # Measuring leaves a model as it is; only a retraining, or another device, needs one of its own.
    alone = experiment.retrain != "none" or dense.home.type != "cpu"
    model = _copied(pruned.model, dense.home) if alone else pruned.model
    with Cost(dense.home) as cost:
        if experiment.retrain != "none":
            with cost.phase("retrain"):
                share, tokens = retrained(
                    model, pruned.masks, dense.text, experiment, checkpointing, cancelled
                )
        with cost.phase("measure"):
            reached = measures(model, dense, experiment, cancelled)
    seconds = {**pruned.seconds, "retrain": 0.0, **cost.seconds}
    return reached, {
        "trainable_share": share,
        "checkpointing": checkpointing,
        "seconds": sum(seconds.values()) - seconds["measure"],
        **{f"seconds_{phase}": spent for phase, spent in seconds.items()},
        "tokens_per_second": cost.tokens_per_second(tokens),
        "peak_memory": max(pruned.peak, cost.peak_memory),
    }


def measures(model: "PreTrainedModel", dense: Dense, experiment: Experiment, cancelled: Cancel) -> dict:
    """Perplexity on the test windows and the accuracy on every task and on their mean, as columns."""
    found: dict = {"perplexity": perplexity(model, dense.text.test, cancelled=cancelled)}
    check(cancelled)
    if experiment.tasks is not None:
        table = zero_shot(
            model,
            dense.tokenizer,
            tasks=experiment.tasks,
            tasks_dir=experiment.tasks_dir,
            progress=False,
            cancelled=cancelled,
        )
        check(cancelled)
        found["accuracy"], found["accuracy_stderr"] = mean_accuracy(table)
        found |= {f"accuracy_{row.task}": row.accuracy for row in table.itertuples()}
    return found


def _loaded(experiment: Experiment, cancelled: Cancel) -> Dense:
    """The dense model of an experiment and its text, in the host's memory."""
    e = experiment
    # Without the tasks' files: rows that ask and rows that do not share it.
    key = (e.model, e.text, e.dtype, e.length, e.files()[:2])

    def load() -> Dense:
        try:
            model, tokenizer = load_model(e.model, dtype=e.dtype, device="cpu")
            text = load_text(e.text, tokenizer, length=e.length)
        except ValueError as error:
            raise NotLoaded(str(error)) from error
        return Dense(key, model, tokenizer, text, torch.device(best_device()))

    return _dense.get(key, load, cancelled)


def _dense_measures(dense: Dense, experiment: Experiment, cancelled: Cancel) -> dict:
    """What the dense model reaches, measured when a row first asks."""

    def measure() -> dict:
        # A copy: another row's thread may be copying the dense model at this moment.
        model = dense.model if dense.home.type == "cpu" else _copied(dense.model, dense.home)
        try:
            found = measures(model, dense, experiment, cancelled)
        except ValueError as error:
            # Tasks that cannot be had, or that the dense model cannot be asked.
            raise NotLoaded(str(error)) from error
        return {f"dense_{name}": found[name] for name in ("perplexity", "accuracy") if name in found}

    asked = experiment.tasks, experiment.tasks_dir, experiment.files()[2]
    return _reached.get((dense.key, *asked), measure, cancelled)


def _prepared(experiment: Experiment, dense: Dense, cancelled: Cancel) -> Pruned:
    """The model before its retraining: pruned, and reconstructed where a unit is told."""
    e = experiment
    seed = e.seed if e.criterion == "random" else 0

    def pruned() -> Pruned:
        model = _copied(dense.model, dense.home)
        with Cost(dense.home) as cost, cost.phase("prune"):
            masks = prune(
                model,
                e.criterion,
                sparsity=None if e.pattern else e.sparsity,
                pattern=e.pattern,
                group=e.group,
                allocation=e.allocation,
                calibration=dense.text.calibration if needs_calibration(e) else None,
                seed=seed,
                progress=False,
                cancelled=cancelled,
            )
        check(cancelled)
        waiting = Masks({name: masks[name].cpu() for name in masks})
        return Pruned(_moved(model, "cpu"), waiting, cost.seconds, cost.peak_memory)

    def reconstructed() -> Pruned:
        start = _pruned.get((dense.key, prepared_key(replace(e, unit=None))), pruned, cancelled)
        assert e.unit is not None
        model = _copied(start.model, dense.home)
        target = _copied(dense.model, dense.home)
        options: dict[str, Any] = {"steps": e.unit_steps, "lr": e.unit_lr} if e.unit_steps else {}
        with Cost(dense.home) as cost, cost.phase("reconstruct"):
            reconstruct(
                model,
                target,
                start.masks,
                dense.text.calibration,
                unit=e.unit,
                seed=e.seed,
                progress=False,
                cancelled=cancelled,
                **options,
            )
        check(cancelled)
        peak = max(start.peak, cost.peak_memory)
        return Pruned(_moved(model, "cpu"), start.masks, {**start.seconds, **cost.seconds}, peak)

    make = pruned if e.unit is None else reconstructed
    return _pruned.get((dense.key, prepared_key(e)), make, cancelled)


def prepared_key(experiment: Experiment) -> tuple:
    """What decides a model before its retraining: rows that agree in it share it."""
    e = experiment
    if e.unit is None:
        seed = e.seed if e.criterion == "random" else 0
        source = (e.model, e.text, e.dtype, e.length)
        return (*source, e.criterion, e.sparsity, e.pattern, e.group, e.allocation, seed)
    return (
        *prepared_key(replace(e, unit=None)),
        e.unit,
        e.unit_steps,
        e.unit_lr,
        e.seed if e.unit_steps else 0,
    )


def needs_calibration(experiment: Experiment) -> bool:
    """Whether the criterion or the allocation looks at activations."""
    return experiment.criterion in CALIBRATED or experiment.allocation == "owl"
