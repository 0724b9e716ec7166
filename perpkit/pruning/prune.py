"""The one call that prunes a model."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from .calibration import stream
from .checks import check_not_below, check_weights, checked_calibration, kept_before
from .inputs import Inputs, recorded
from .layers import Matrix, block_name, is_language_model, prunable_matrices
from .masks import Masks
from .method import CALIBRATED, CRITERIA, NEEDS_GRAM, Method, output_error
from .plan import Stopped, planned
from .selection import parse_pattern
from .undo import Undo

__all__ = ["CALIBRATED", "CRITERIA", "Pruned", "prune"]


@dataclass(frozen=True)
class Pruned:
    """One matrix is pruned: what `on_layer` is told.

    `error` is the relative squared error of the layer's output, `‖XWᵀ − XŴᵀ‖² / ‖XWᵀ‖²`, estimated from what
    the criterion has gathered: the Gram matrix; or the inputs' norms, as if the inputs were uncorrelated; or
    without calibration the weights alone. `done` of `total` matrices are pruned.
    """

    block: str
    layer: str
    seconds: float
    error: float
    done: int
    total: int


@torch.no_grad()
def prune(
    model: nn.Module,
    criterion: str,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str | None = None,
    group: str | None = None,
    allocation: str | Mapping[str, float] | None = None,
    calibration: torch.Tensor | None = None,
    masks: Masks | None = None,
    seed: int = 0,
    batch: int = 8,
    length: int = 2048,
    offload: bool = False,
    progress: bool = True,
    on_layer: Callable[[Pruned], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **parameters,
) -> Masks:
    """Prune a language or vision model in place and return its masks, exact to the weight.

    `criterion` is `"magnitude"`, `"random"` (from `seed`), `"wanda"`, `"ria"`, `"sparsegpt"` or `"sparsefw"`
    (methods, section 2), with its own parameters as further keywords: `power` of RIA, `damping` and `block`
    of SparseGPT, `iterations`, `alpha` and `warm_start` of SparseFW. The last four need `calibration`: token
    windows `[n, length]`, of which the first `length` tokens are read, or inputs `[n, …]` of any other model,
    `batch` at a time. Blocks are pruned in order, each with the inputs that the pruned blocks before it make;
    with `offload` the model stays on the CPU and one block at a time moves to the GPU.

    A comparison group of n weights loses exactly `round(sparsity · n)`: a `"row"`, a `"layer"`, or all
    together, `"global"`. Unless told, magnitude and random compare by layer in language models and globally
    in others, SparseGPT by layer inside each block of columns, the rest by row. `pattern="2:4"` keeps 2 of
    every 4 consecutive weights along the inputs. `allocation` spreads the sparsity over the layers:
    `"uniform"`, `"uniform+"`, `"global"`, `"erk"`, `"lamp"` or `"owl"`; a mapping from layer to sparsity, as
    the one or the other, says it outright (layers that it does not name stay as they are).

    `masks` are those of an earlier pruning: what they prune stays pruned, so pruning again to a higher
    sparsity is iterative; a row or N:M group that has lost more than its share already keeps all its zeros.
    Without them, a layer in which more than one weight in a hundred is zero counts as pruned before.

    `on_layer(Pruned(...))` is called after every matrix. When `cancelled()`, asked before each, says True,
    the masks of what is pruned so far are returned and the rest is untouched; Ctrl-C does the same and leaves
    those masks in the exception's `masks`. A mask lies where its weight does, or in the host's memory where
    the masks of all would take more than half of what is free on a GPU.

    Raises ValueError, leaving the model as it was, for an unknown name or parameter, a sparsity outside
    [0, 1] or below what is pruned already, a pattern that does not divide a layer's width, calibration that
    is missing, empty or of another vocabulary, a NaN or infinite activation, a model with adapters on it, and
    one without values (meta device). Warns when an expert or layer saw no calibration data and is pruned by
    magnitude.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 8, "calibration": 8})
    >>> prune(model, "wanda", sparsity=0.5, calibration=text.calibration, progress=False)
    Masks(18 matrices, sparsity 0.5000)
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: its weights have no values; load it first")
    if any("lora_" in name.rpartition(".")[2] for name, _ in model.named_parameters()):
        raise ValueError("there are adapters on the model; merge(model) before it is pruned")
    if isinstance(allocation, Mapping):
        if sparsity is not None:
            raise ValueError("the allocation names each layer's sparsity; leave sparsity= out")
        sparsity, allocation = allocation, None
    language = is_language_model(model)
    matrices = prunable_matrices(model)
    nm = parse_pattern(pattern) if pattern is not None else None
    free = allocation is None and nm is None and not isinstance(sparsity, Mapping)
    if free and group is None and not language and criterion in ("magnitude", "random"):
        allocation = "global"
    method = Method.checked(criterion, group, allocation, nm, seed, list(matrices), parameters)
    if calibration is not None or criterion in CALIBRATED:
        calibration = checked_calibration(model, criterion, calibration, length, batch)
    check_weights(matrices)
    kept = {name: kept_before(matrix, masks) for name, matrix in matrices.items()}
    if masks is not None:
        masks.check(model)
    try:
        sparsities = planned(
            model,
            matrices,
            sparsity=sparsity,
            pattern=nm,
            allocation=method.allocation,
            scores=lambda matrix, inputs: method.scores(matrix, inputs, kept[matrix.name]),
            calibration=calibration,
            calibrated=criterion in CALIBRATED,
            batch=batch,
            offload=offload,
            cancelled=cancelled,
        )
    except Stopped:
        return Masks(masks or {})
    except KeyboardInterrupt as stopped:
        stopped.masks = Masks(masks or {})  # type: ignore[attr-defined]
        raise
    for name, matrix in matrices.items():
        # A layer that a mapping does not name stays as it is.
        if not isinstance(sparsity, Mapping) or name in sparsity:
            check_not_below(matrix, kept[name], sparsities[name])

    work = _Work(model, method, matrices, kept, sparsities, masks, on_layer, cancelled)
    if criterion not in CALIBRATED:
        work.at_once(progress)
    else:
        assert calibration is not None
        work.streamed(calibration, batch, offload, progress)
    return Masks(work.masks)


class _Work:
    """One call of `prune`, after its arguments are understood."""

    def __init__(self, model, method: Method, matrices, kept, sparsities, masks, on_layer, cancelled):
        self.model, self.method, self.matrices = model, method, matrices
        self.kept, self.sparsities = kept, sparsities
        self.masks: dict[str, torch.Tensor] = {n: m.clone() for n, m in masks.items()} if masks else {}
        self.on_layer, self.cancelled = on_layer, cancelled
        self.done = 0
        self.homes = homes(matrices.values())

    def at_once(self, progress: bool) -> None:
        """Prune every matrix by what it is alone."""
        # The weights are known not to be NaN: only the caller's own functions can fail on the way.
        undone = self.matrices.values() if self.on_layer or self.cancelled else ()
        with self._bar(progress) as bar, self._consistent(undone) as undo:
            for matrix in self.matrices.values():
                if self._stopped():
                    return
                self._prune(matrix, None, undo if undone else None)
                bar.update()

    def streamed(self, calibration: torch.Tensor, batch: int, offload: bool, progress: bool) -> None:
        """Prune block after block, each with the inputs that the pruned blocks before it make."""
        gram = self.method.criterion in NEEDS_GRAM
        parts = stream(self.model, calibration, batch=batch, offload=offload)
        undone = self.matrices.values()
        with self._bar(progress) as bar, self._consistent(undone) as undo, closing(parts):
            for part in parts:
                if self._stopped():
                    return
                with recorded(part.matrices, gram=gram) as inputs:
                    part.run()
                for name, matrix in part.matrices.items():
                    if self._stopped():
                        return
                    self._prune(matrix, inputs.pop(name), undo)
                    bar.update()

    def _bar(self, progress: bool) -> tqdm:
        total = len(self.matrices)
        # What is done within a second needs no bar.
        return tqdm(total=total, desc="prune", unit="matrix", disable=not progress, leave=False, delay=1)

    def _stopped(self) -> bool:
        return self.cancelled is not None and self.cancelled()

    @contextmanager
    def _consistent(self, matrices: Iterable[Matrix]) -> Iterator[Undo]:
        """What goes wrong inside is undone; what is interrupted stays, recorded in the exception's masks."""
        with Undo(matrices) as undo:
            try:
                yield undo
            except KeyboardInterrupt as stopped:
                done = Masks(self.masks)
                # It may have come between a mask and its weights.
                done.apply(self.model)
                stopped.masks = done  # type: ignore[attr-defined]
                stopped.add_note(
                    f"{self.done} of {len(self.matrices)} matrices are pruned; their masks are in this "
                    "exception's masks"
                )
                raise
            except Exception:
                undo.restore()
                raise

    def _prune(self, matrix: Matrix, inputs: Inputs | None, undo: Undo | None) -> None:
        started = time.perf_counter()
        new, mask = self._chosen(matrix, inputs)
        if undo is not None:
            undo.remember(matrix)
        self._write(matrix, new, mask, inputs, time.perf_counter() - started)

    def _chosen(self, matrix: Matrix, inputs: Inputs | None) -> tuple[torch.Tensor, torch.Tensor]:
        name = matrix.name
        kept = self.kept[name]
        if kept is not None:
            # The block may have moved to the GPU since it was looked at.
            kept = kept.to(matrix.weight().device)
        try:
            return self.method.pruned(matrix, inputs, kept, self.sparsities[name])
        except ValueError as error:
            raise ValueError(f"cannot prune {name!r}: {error}") from error

    def _write(self, matrix: Matrix, new, mask, inputs: Inputs | None, seconds: float) -> None:
        parameter = matrix.weight()
        before = matrix.view(parameter).clone() if self.on_layer else None
        if matrix.parameter not in self.masks:
            home = self.homes[matrix.parameter]
            self.masks[matrix.parameter] = torch.ones(parameter.shape, dtype=torch.bool, device=home)
        matrix.assign(self.masks[matrix.parameter], mask)
        matrix.assign(parameter, new)
        self.done += 1
        if self.on_layer is not None and before is not None:
            error = output_error(before, new, inputs)
            block = block_name(matrix.name)
            self.on_layer(Pruned(block, matrix.name, seconds, error, self.done, len(self.matrices)))


def homes(matrices: Iterable[Matrix]) -> dict[str, torch.device]:
    """Where the mask of each parameter is kept: where it lives, not where its block may be computed.

    A mask takes half of what a weight in 16 bits does: beside a model that nearly fills its GPU the masks
    would not leave room for anything else, so they stay in the host's memory.
    """
    weights = {matrix.parameter: matrix.weight() for matrix in matrices}
    needed: Counter[torch.device] = Counter()
    for weight in weights.values():
        needed[weight.device] += weight.numel()
    full = {
        device
        for device, size in needed.items()
        if device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(device)[0]
    }
    return {
        name: torch.device("cpu") if weight.device in full else weight.device
        for name, weight in weights.items()
    }
