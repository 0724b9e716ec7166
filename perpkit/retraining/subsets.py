"""Which parameters are retrained: biases, normalisations, the head, all, and unions of them."""

import difflib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUBSETS = ("biases", "norms", "head", "full")


def subset_parameters(model: "PreTrainedModel", subset: str) -> dict[str, nn.Parameter]:
    """The parameters of a subset by name; a union is written with plus signs, `"biases+norms"`.

    `biases` are all bias vectors, the shifts of normalisations included, as PERP counts them (0.034 % of
    OPT-2.7B); `norms` are the scales and shifts of normalisations (0.013 %); `head` is the output matrix;
    `full` is everything. A head that is tied to the input embedding must be untied first (`untie_head`).

    Raises ValueError for an unknown subset, one that is empty for this model, and a tied head.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> sorted(subset_parameters(model, "norms"))[:2]
    ['model.decoder.final_layer_norm.bias', 'model.decoder.final_layer_norm.weight']
    """
    chosen: dict[str, nn.Parameter] = {}
    for part in subset_parts(subset):
        found = _PARTS[part](model)
        if not found:
            raise ValueError(f"a {type(model).__name__} has no {part}; choose another subset")
        chosen |= found
    order = dict(model.named_parameters())
    return {name: order[name] for name in order if name in chosen}


def subset_parts(subset: str) -> list[str]:
    """The names in a union of subsets.

    Raises ValueError for one that is no subset.

    >>> subset_parts("biases+norms")
    ['biases', 'norms']
    """
    parts = subset.split("+")
    for part in parts:
        if part not in SUBSETS:
            near = difflib.get_close_matches(part, SUBSETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"unknown subset {part!r}{hint} The subsets are {', '.join(SUBSETS)} and unions such as "
                "'biases+norms'"
            )
    return parts


def _biases(model: "PreTrainedModel") -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def _norms(model: "PreTrainedModel") -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": p
        for prefix, module in model.named_modules()
        if _is_norm(module)
        for name, p in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    # transformers writes an RMSNorm class for every architecture; their names are what they share.
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _head(model: "PreTrainedModel") -> dict[str, nn.Parameter]:
    head = model.get_output_embeddings()
    if head is None:
        return {}
    if head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            "the head is tied to the input embedding; call untie_head(model) before retraining it"
        )
    return {name: p for name, p in model.named_parameters() if p is head.weight or p is head.bias}


def _full(model: "PreTrainedModel") -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


_PARTS = {"biases": _biases, "norms": _norms, "head": _head, "full": _full}


@torch.no_grad()
def untie_head(model: "PreTrainedModel") -> None:
    """Give the head a matrix of its own, in place, when it shares the input embedding's.

    The function does not change; retraining the head afterwards leaves the input embedding as it is.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> untie_head(model)
    >>> list(subset_parameters(model, "head"))
    ['lm_head.weight']
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone())
        model.config.tie_word_embeddings = False


def trainable_share(model: "PreTrainedModel", subset: str) -> float:
    """The fraction of the model's parameters that a subset trains, a tied matrix counted once.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> trainable_share(model, "full")
    1.0
    """
    trained = sum(p.numel() for p in subset_parameters(model, subset).values())
    return trained / sum(p.numel() for p in model.parameters())
