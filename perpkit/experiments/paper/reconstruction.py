"""Jobs with language models that no sweep has: reconstruction by adapters."""

import copy
from functools import lru_cache
from typing import Any

import torch

from ...evaluation.perplexity import perplexity
from ...evaluation.zero_shot import mean_accuracy, zero_shot
from ...pruning.prune import CALIBRATED, prune
from ...retraining.layerwise.reconstruct import reconstruct
from ...sources.models import best_device, load_model
from ...sources.text import Text, load_text
from ..run import NotLoaded

UNIT = "submodule"


@lru_cache(maxsize=1)
def _loaded(model: str, text: str, dtype: str) -> tuple[Any, Any, Text]:
    try:
        # In the host's memory: two models of the largest sizes fit on no card.
        dense, tokenizer = load_model(model, dtype=dtype, device="cpu")
        return dense, tokenizer, load_text(text, tokenizer)
    except ValueError as error:
        raise NotLoaded(str(error)) from error


def reconstructed(
    model: str,
    text: str,
    dtype: str,
    tasks: str,
    tasks_dir: str | None,
    criterion: str,
    sparsity: float,
    rank: int,
    steps: int,
    lr: float,
    seed: int,
) -> list[dict]:
    """Prune, reconstruct attention and MLP parts one after the other by MaskLoRA, and ask: one row."""
    dense, tokenizer, windows = _loaded(model, text, dtype)
    device = best_device()
    # Then one block at a time moves to the GPU, and in the end the mended model.
    offload = torch.device(device).type == "cuda"
    mended = copy.deepcopy(dense)
    calibration = windows.calibration if criterion in CALIBRATED else None
    masks = prune(
        mended, criterion, sparsity=sparsity, calibration=calibration, offload=offload, progress=False
    )
    reconstruct(
        mended,
        dense,
        masks,
        windows.calibration,
        unit=UNIT,
        trainable="mask_lora",
        rank=rank,
        alpha=2.0 * rank,
        steps=steps,
        lr=lr,
        seed=seed,
        offload=offload,
        progress=False,
    )
    mended.to(device)
    masks.check(mended)
    asked = zero_shot(mended, tokenizer, tasks=tasks, tasks_dir=tasks_dir, progress=False)
    accuracy, stderr = mean_accuracy(asked)
    return [
        {
            **{"model": model, "criterion": criterion, "sparsity": sparsity, "seed": seed},
            **{"accuracy": accuracy, "accuracy_stderr": stderr},
            **{"perplexity": perplexity(mended, windows.test), "protocol": windows.protocol},
        }
    ]
