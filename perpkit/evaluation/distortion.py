"""Feature distortion: how far pruning moves what a network computes inside, by feature map and by block."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn

from ..pruning.layers import decoder_blocks, is_language_model
from ..sources.text import check_windows


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """The relative error ‖X − X̂‖ / ‖X‖ of a tensor against its reference of the same shape, in float64.

    The norm is that of all values together. Against zeros it is 0 for zeros and infinite for all else.

    Raises ValueError for tensors of two shapes.

    >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    0.8
    """
    if reference.shape != other.shape:
        shapes = f"{list(reference.shape)} and {list(other.shape)}"
        raise ValueError(f"the tensors have the shapes {shapes}; an error is between two of one shape")
    x, y = _wide(reference), _wide(other)
    return _ratio(float((x - y).norm()), float(x.norm()))


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """The linear CKA of two representations `[n, d]` and `[n, e]` of the same n inputs, in float64.

    With the columns centred it is ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms (Kornblith et al. 2019): 1 when one
    is a rotation and scaling of the other, 0 when no column of the one is correlated with one of the other.
    NaN when one of the two is the same for all inputs.

    Raises ValueError for other shapes, and for less than two inputs.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> round(linear_cka(x, 3 * x.flip(1)), 6)
    1.0
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"the representations are {list(x.shape)} and {list(y.shape)}; want [n, d] and [n, e] of the "
            "same n inputs, at least two"
        )
    seen = _Compared()
    seen.add(_wide(x), _wide(y))
    return seen.cka()


@torch.no_grad()
def block_distortion(
    dense: nn.Module,
    other: nn.Module,
    windows: torch.Tensor,
    *,
    batch: int = 8,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Compare the hidden state after each decoder block of two language models: a row a block.

    `windows` are tokens `[windows, length]`. The columns are `block` (from 0), `layer` (its name), `error`,
    the relative error of the hidden states of all tokens, and `cka`, their linear CKA (methods, section 8).
    Both models run on their own inputs: errors of early blocks go on into the later ones. They are left as
    they are. Nothing but three float64 matrices `[d, d]` a block is kept between batches. All values are NaN
    when cancelled.

    Raises ValueError for windows that one of the models cannot read, and models of different shapes.

    >>> import copy
    >>> import perpkit as pk
    >>> dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 1, "test": 4})
    >>> pruned = copy.deepcopy(dense)
    >>> _ = pk.prune(pruned, "magnitude", sparsity=0.6, progress=False)
    >>> table = block_distortion(dense, pruned, text.test)
    >>> table["block"].tolist(), bool((table["error"] > 0).all()), bool((table["cka"] < 1).all())
    ([0, 1, 2], True, True)
    """
    for model in (dense, other):
        if not is_language_model(model):
            raise ValueError(f"a {type(model).__name__} reads no tokens; want two language models")
        check_windows(model, windows)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    name, blocks = decoder_blocks(dense)
    _, others = decoder_blocks(other)
    if len(blocks) != len(others):
        raise ValueError(f"one model has {len(blocks)} blocks and the other {len(others)}; want two versions")
    compared = [_Compared() for _ in blocks]
    stopped = False
    with _outputs(dense, list(blocks)) as wanted, _outputs(other, list(others)) as found:
        for tokens in windows.split(batch):
            stopped = cancelled is not None and cancelled()
            if stopped:
                break
            for model in (dense, other):
                model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
            for i, seen in enumerate(compared):
                x, y = _wide(wanted.pop(i)), _wide(found.pop(i))
                if x.shape != y.shape:
                    raise ValueError(
                        f"the hidden states have the shapes {list(x.shape)} and {list(y.shape)}; want two "
                        "versions of one model"
                    )
                seen.add(x.flatten(0, 1), y.flatten(0, 1).to(x.device))
    rows = [
        (i, f"{name}.{i}", math.nan if stopped else seen.error(), math.nan if stopped else seen.cka())
        for i, seen in enumerate(compared)
    ]
    return pd.DataFrame(rows, columns=["block", "layer", "error", "cka"])


def map_layers(model: nn.Module) -> dict[str, int]:
    """The layers whose feature maps can be looked at, and how many each has, in the order of the model.

    These are the convolutions over pictures and the batch normalisations after them, whose scale and shift
    are part of the feature that the next layer sees.

    >>> import perpkit as pk
    >>> list(map_layers(pk.load_classifier("shapes-resnet", device="cpu")).items())[:2]
    [('conv1', 16), ('bn1', 16)]
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = module.out_channels
        elif isinstance(module, nn.BatchNorm2d):
            found[name] = module.num_features
    return found


@torch.no_grad()
def feature_maps(model: nn.Module, pictures: torch.Tensor, layer: str) -> torch.Tensor:
    """The feature maps `[n, filters, height, width]` that a layer makes of pictures `[n, 3, height, width]`.

    They are what the convolution, or the normalisation after it, hands on, before any activation (PERP's
    figure of a first-layer filter). The model is left as it is; the maps are a copy, in its dtype.

    Raises ValueError for a layer that is not among the `map_layers`, one that the pictures do not pass, and
    pictures of another shape.

    >>> import perpkit as pk
    >>> model = pk.load_classifier("shapes-resnet", device="cpu")
    >>> feature_maps(model, torch.zeros(2, 3, 32, 32), "conv1").shape
    torch.Size([2, 16, 32, 32])
    """
    if layer not in (layers := map_layers(model)):
        raise ValueError(f"no layer {layer!r} makes feature maps; those that do are {', '.join(layers)}")
    if pictures.ndim != 4 or not len(pictures):
        raise ValueError(f"the pictures are {list(pictures.shape)}; want [n, channels, height, width]")
    with _outputs(model, [model.get_submodule(layer)]) as found:
        # A network in 16 bits takes pictures in 16 bits.
        model(pictures.to(next(model.parameters())))
    if not found:
        raise ValueError(f"the pictures do not pass the layer {layer!r}; choose another")
    return found[0]


@torch.no_grad()
def class_probabilities(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """What a classifier takes pictures `[n, 3, height, width]` for: probabilities `[n, classes]`, float32.

    The model is left as it is.

    >>> import perpkit as pk
    >>> images = pk.load_images("shapes", counts={"train": 10, "validation": 10, "test": 10})
    >>> seen = class_probabilities(pk.load_classifier("shapes-resnet", device="cpu"), images.test[0])
    >>> [images.classes[i] for i in seen.argmax(1)] == [images.classes[i] for i in images.test[1]]
    True
    """
    with _outputs(model, []):
        output = model(pictures.to(next(model.parameters())))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits.float().softmax(-1)


# --- inside ---------------------------------------------------------------------------------------------


class _Compared:
    """Sums over the rows of X and X̂, from which their relative error and linear CKA follow.

    Rows are shifted by the first batch's means before they are multiplied: features with a large mean, as
    those of large language models, would else lose the digits that CKA is about.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows `[n, d]` and `[n, e]` in float64."""
        if self.count == 0:
            self.shifts = x.mean(0), y.mean(0)
            self.squares = [0.0, 0.0]
            self.sums = [torch.zeros_like(shift) for shift in self.shifts]
            self.products = [torch.zeros(1, dtype=x.dtype, device=x.device) for _ in range(3)]
        if x.shape == y.shape:
            self.squares[0] += float((x - y).square().sum())
        self.squares[1] += float(x.square().sum())
        x, y = x - self.shifts[0], y - self.shifts[1]
        self.sums = [self.sums[0] + x.sum(0), self.sums[1] + y.sum(0)]
        for i, (one, two) in enumerate(((y, x), (x, x), (y, y))):
            self.products[i] = self.products[i] + one.T @ two
        self.count += len(x)

    def error(self) -> float:
        return _ratio(math.sqrt(self.squares[0]), math.sqrt(self.squares[1]))

    def cka(self) -> float:
        x, y = self.sums
        pairs = ((y, x), (x, x), (y, y))
        yx, xx, yy = (
            float((product - torch.outer(one, two) / self.count).norm())
            for product, (one, two) in zip(self.products, pairs, strict=True)
        )
        # What rounding leaves of equal rows is no variance.
        least = [1e-28 * self.count * float(shift.square().sum()) for shift in self.shifts]
        if not (xx > least[0] and yy > least[1]):
            return math.nan
        return min(1.0, yx**2 / (xx * yy))


@contextmanager
def _outputs(model: nn.Module, modules: list[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, the model evaluates and what these modules put out is found by their position in the list."""
    found: dict[int, torch.Tensor] = {}
    modes = [(module, module.training) for module in model.modules()]

    def keep(i: int):
        def hook(module, arguments, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # A copy: an activation after it may work in place.
            found[i] = hidden.detach().clone()

        return hook

    hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    model.eval()
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, which Apple's GPUs do not have."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _ratio(error: float, size: float) -> float:
    if size == 0:
        return math.inf if error > 0 else error
    return error / size
