"""Which parameters are retrained: biases, normalisations, the head, all, and unions of them."""

import difflib
import re
from collections.abc import Callable

import torch
from torch import nn

from ..pruning.layers import is_language_model
from .batchnorm import batchnorms

# The subsets of PERP's later version and of the talk, which use them separately.
SUBSETS = ("biases", "norms", "head", "full")
# PERP v1, section 3.1, nests them: each trains what the one before it trains, and more.
NESTED = tuple(f"perp_v1:{name}" for name in ("bn_recalibrate", "biases", "norms", "linear_probing", "full"))
ALL_SUBSETS = (*SUBSETS, "embeddings", "lora", *NESTED)

Parameters = dict[str, nn.Parameter]


def subset_parameters(model: nn.Module, subset: str) -> Parameters:
    """The parameters of a subset by name; a union is written with plus signs, `"biases+norms"`.

    - `biases`: all bias vectors, the shifts of normalisations included, as PERP counts them (0.034 % of
      OPT-2.7B).
    - `norms`: the scales and shifts of normalisations (0.013 %).
    - `head`: the output matrix and its bias; of a model that reads no tokens its last linear layer.
    - `embeddings`: the token and position embeddings.
    - `lora`: the adapters, when some are attached; the matrices beneath stay as they are.
    - `full`: everything.
    - `perp_v1:bn_recalibrate` ⊂ `perp_v1:biases` ⊂ `perp_v1:norms` ⊂ `perp_v1:linear_probing` ⊂
      `perp_v1:full`: the nested subsets of PERP v1. The first has no parameters, only the statistics of batch
      normalisations (`recalibrate_batchnorm`), which all of them re-estimate; its biases are those outside
      normalisations (0.004 % of ResNet-50); linear probing adds the head. (The published linear probing of
      OPT trains a low-rank adapter in place of the head itself.)

    A head that is tied to the input embedding must be untied (`untie_head`) before one of the two is
    retrained without the other: neither may change silently. `full` trains the common matrix in both roles.

    Raises ValueError for an unknown subset, one that is empty for this model, and a tied head.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> sorted(subset_parameters(model, "norms"))[:2]
    ['model.decoder.final_layer_norm.bias', 'model.decoder.final_layer_norm.weight']
    """
    chosen: Parameters = {}
    for part in subset_parts(subset):
        found = _PARTS[part](model)
        if part == "perp_v1:bn_recalibrate":
            if not batchnorms(model):
                raise ValueError(
                    f"a {type(model).__name__} has no batch normalisation; choose another subset"
                )
        elif not found and part == "lora":
            raise ValueError(
                "the model has no adapters; attach some first, with attach(model, masks, 'mask_lora')"
            )
        elif not found:
            raise ValueError(f"a {type(model).__name__} has no {part}; choose another subset")
        chosen |= found
    return {name: p for name, p in model.named_parameters() if name in chosen}


def subset_parts(subset: str) -> list[str]:
    """The names in a union of subsets.

    Raises ValueError for one that is no subset.

    >>> subset_parts("biases+norms")
    ['biases', 'norms']
    """
    if not isinstance(subset, str):
        raise ValueError(f"subset is {subset!r}; write a union with plus signs, 'biases+norms'")
    parts = [part.strip() for part in subset.split("+")]
    for part in parts:
        if part not in ALL_SUBSETS:
            near = difflib.get_close_matches(part, ALL_SUBSETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"unknown subset {part!r}{hint} The subsets are {', '.join(ALL_SUBSETS)} and unions such as "
                "'biases+norms'"
            )
    return parts


def trainable_share(model: nn.Module, subset: str | None = None) -> float:
    """The fraction of the model's parameters that a subset trains, a tied matrix counted once.

    Without a subset it counts the parameters that require gradients now.

    Raises ValueError as `subset_parameters` does.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> trainable_share(model, "full")
    1.0
    """
    if subset is None:
        trained = [p for p in model.parameters() if p.requires_grad]
    else:
        trained = list(subset_parameters(model, subset).values())
    return sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())


def dotted(module: str, name: str) -> str:
    """The name within the model of something in a module of it, the model itself being called "".

    >>> dotted("fc1", "bias"), dotted("", "bias")
    ('fc1.bias', 'bias')
    """
    return f"{module}.{name}" if module else name


# --- the head -------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits: a language model's output matrix, else the last linear layer.

    >>> head_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 5)))
    Linear(in_features=2, out_features=5, bias=True)
    """
    named = getattr(model, "get_output_embeddings", lambda: None)()
    if named is not None or is_language_model(model):
        return named
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head's matrix is the input embedding's.

    >>> head_is_tied(nn.Linear(2, 2))
    False
    """
    if not is_language_model(model) or (head := head_of(model)) is None:
        return False
    return _own(head).get("weight") is _own(model.get_input_embeddings()).get("weight")  # type: ignore[operator]


@torch.no_grad()
def untie_head(model: nn.Module) -> None:
    """Give the head a matrix of its own, in place, when it shares the input embedding's.

    The function does not change; retraining one of the two afterwards leaves the other as it is.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> untie_head(model)
    >>> list(subset_parameters(model, "head"))
    ['lm_head.weight']
    """
    if head_is_tied(model):
        head = head_of(model)
        assert head is not None
        head.weight = nn.Parameter(_own(head)["weight"].detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def tie_head(model: nn.Module) -> None:
    """Share the input embedding's matrix with the head again, in place: the way back from `untie_head`."""
    head = head_of(model)
    assert head is not None
    head.weight = model.get_input_embeddings().weight  # type: ignore[operator]
    model.config.tie_word_embeddings = True  # type: ignore[union-attr]


def needs_untied_head(subset: str) -> bool:
    """Whether a subset trains the head or the embeddings, and so not a matrix that is both.

    >>> needs_untied_head("head+norms"), needs_untied_head("full")
    (True, False)
    """
    return bool({"head", "embeddings", "perp_v1:linear_probing"} & set(subset_parts(subset)))


def _own(module: nn.Module) -> Parameters:
    # Not by attribute: an adapter puts the effective weight in its place.
    return dict(module.named_parameters(recurse=False))


# --- the parts ------------------------------------------------------------------------------------


# GPT-OSS and PyTorch's attention name theirs after the matrix: `gate_up_proj_bias`, `in_proj_bias`.
_BIAS = re.compile(r"(^|_)bias$")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _biases(model: nn.Module) -> Parameters:
    return {name: p for name, p in model.named_parameters() if _BIAS.search(_last(name))}


def _norms(model: nn.Module) -> Parameters:
    return {
        dotted(prefix, name): p
        for prefix, module in model.named_modules()
        if _is_norm(module)
        for name, p in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    # transformers writes an RMSNorm class for every architecture; their names are what they share.
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _head(model: nn.Module) -> Parameters:
    _refuse_tied(model)
    head = head_of(model)
    mine = {id(p) for name, p in _own(head).items() if "lora_" not in name} if head is not None else set()
    return {name: p for name, p in model.named_parameters() if id(p) in mine}


def _embeddings(model: nn.Module) -> Parameters:
    _refuse_tied(model)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    mine = {id(p) for table in tables for p in _own(table).values()}
    return {name: p for name, p in model.named_parameters() if id(p) in mine}


def _refuse_tied(model: nn.Module) -> None:
    if head_is_tied(model):
        raise ValueError(
            "the head is tied to the input embedding; call untie_head(model) before retraining one of them"
        )


def _lora(model: nn.Module) -> Parameters:
    return {name: p for name, p in model.named_parameters() if "lora_" in _last(name)}


def _full(model: nn.Module) -> Parameters:
    return dict(model.named_parameters())


def _nested_biases(model: nn.Module) -> Parameters:
    norms = _norms(model)
    return {name: p for name, p in _biases(model).items() if name not in norms}


def _nested_norms(model: nn.Module) -> Parameters:
    return _nested_biases(model) | _norms(model)


def _linear_probing(model: nn.Module) -> Parameters:
    return _nested_norms(model) | _head(model)


_PARTS: dict[str, Callable[[nn.Module], Parameters]] = {
    "biases": _biases,
    "norms": _norms,
    "head": _head,
    "full": _full,
    "embeddings": _embeddings,
    "lora": _lora,
    "perp_v1:bn_recalibrate": lambda model: {},
    "perp_v1:biases": _nested_biases,
    "perp_v1:norms": _nested_norms,
    "perp_v1:linear_probing": _linear_probing,
    "perp_v1:full": _full,
}
