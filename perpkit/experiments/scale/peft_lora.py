"""PEFT's LoRA on matrices by name, the experts of a mixture included."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn


def peft_lora(model: nn.Module, targets: Iterable[str], rank: int, alpha: float) -> Any:
    """The model wrapped by PEFT, with LoRA on every target: a module, or a parameter that holds experts.

    The model is changed in place.

    Raises ValueError when PEFT is not installed, and for a target that PEFT leaves out.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    >>> wrapped = peft_lora(model, ["1"], rank=1, alpha=2.0)
    >>> [name.rpartition("model.")[2] for name, p in wrapped.named_parameters() if p.requires_grad]
    ['1.lora_A.default.weight', '1.lora_B.default.weight']
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("PEFT is not installed: pip install peft") from None
    wanted, modules = list(targets), dict(model.named_modules())
    fused = [target for target in wanted if target not in modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha),
        target_modules=[target for target in wanted if target in modules],
        target_parameters=fused or None,
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is to go, and warns of merging into a tied head.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        # Of a target that it misses it may warn; the check below is of all.
        warnings.filterwarnings("ignore", "target_", RuntimeWarning)
        wrapped: Any = get_peft_model(model, config)
    # What it does not find among others it leaves out, mostly without a word.
    found = {*wrapped.base_model.targeted_module_names, *wrapped.base_model.targeted_parameter_names}
    if missing := [target for target in wanted if target not in found]:
        raise ValueError(f"PEFT puts no LoRA on {', '.join(missing)}")
    return wrapped
