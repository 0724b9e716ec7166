"""Scores and masks of one matrix at a time, with what was found before at hand."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from ...experiments.shared import Cancelled
from ...pruning.inputs import Inputs, recorded
from ...pruning.layers import Matrix, is_language_model, prunable_matrices
from ...pruning.method import CALIBRATED, CRITERIA, NEEDS_GRAM, Method
from ...pruning.selection import select
from ...retraining.loop.evaluating import evaluating
from ...retraining.loop.settings import check_whole
from ...sources.text import check_windows

# What the scores are; SparseGPT's change while it prunes, so the sizes stand for them.
SCORES = {
    "magnitude": "score: size |W|",
    "random": "score: noise",
    "wanda": "score: |W| · ‖X‖",
    "ria": "score: relative size · √‖X‖",
    "sparsegpt": "size |W|; the score changes from column to column",
}
KEPT, READ_AT_ONCE = 4, 8


class Scores:
    """What the criteria make of a model's matrices, each pruned alone; the model is not changed.

    Calibrated criteria see the inputs that the dense model makes of the calibration data. Inputs and scores
    are found once for each layer and kept for the few latest.

    >>> scores = Scores(nn.Linear(4, 2), None)
    >>> scores.criteria, scores.mask("weight", "magnitude", 0.5).sum().item()
    (['magnitude', 'random'], 4)
    """

    def __init__(self, model: nn.Module, calibration: torch.Tensor | None, seed: int = 0):
        check_whole(seed=seed)
        if not isinstance(model, nn.Module):
            hint = "; load_model gives a model and its tokenizer" if isinstance(model, tuple) else ""
            raise ValueError(f"the model is a {type(model).__name__}; want a name or a torch module{hint}")
        if not isinstance(calibration, torch.Tensor | None):
            raise ValueError(
                f"the calibration is a {type(calibration).__name__}; want a tensor, of token windows "
                "[n, length] or of inputs [n, ...]"
            )
        if calibration is not None and is_language_model(model):
            check_windows(model, calibration)
        self.matrices: dict[str, Matrix] = prunable_matrices(model)
        self.criteria = [
            name
            for name in CRITERIA
            if name in SCORES and (calibration is not None or name not in CALIBRATED)
        ]
        self._model, self._calibration, self._seed = model, calibration, seed
        self._inputs: OrderedDict[str, Inputs] = OrderedDict()
        self._scores: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def numel(self, layer: str) -> int:
        """How many weights a matrix has."""
        return self._weight(layer).numel()

    def has_inputs(self, layer: str, criterion: str) -> bool:
        """Whether all that the criterion looks at is there already."""
        return criterion not in CALIBRATED or _suffices(self._inputs.get(layer), criterion)

    def look(self, layer: str, criterion: str, watch: Callable[[int, int], bool]) -> Inputs | None:
        """What enters a matrix, gathered if the criterion needs it; whoever is to use it holds it.

        Raises Cancelled when `watch(done, batches)`, asked before each batch and after the last, says so.
        """
        found = self._inputs.get(layer)
        if criterion not in CALIBRATED or _suffices(found, criterion):
            return found
        assert self._calibration is not None
        language = is_language_model(self._model)
        device = next(self._model.parameters()).device
        batches = self._calibration.split(READ_AT_ONCE)
        looked_at = {layer: self.matrices[layer]}
        with evaluating(self._model), recorded(looked_at, gram=criterion in NEEDS_GRAM) as entered:
            for done, batch in enumerate(batches):
                if watch(done, len(batches)):
                    raise Cancelled
                data = batch.to(device)
                self._model(input_ids=data, use_cache=False) if language else self._model(data)
        if watch(len(batches), len(batches)):
            raise Cancelled
        return remember(self._inputs, layer, entered[layer])

    def of(self, layer: str, criterion: str, inputs: Inputs | None = None) -> torch.Tensor:
        """The score of every weight `[out, in]`, on the CPU; of SparseGPT the sizes of the weights.

        `inputs` are what `look` has given, those at hand unless told.
        """
        found = self._scores.get((layer, criterion))
        if found is None:
            if criterion in NEEDS_GRAM:
                scores = self._weight(layer).abs()
            else:
                method = self._method(criterion, "layer", None)
                scores = method.scores(self.matrices[layer], inputs or self._inputs.get(layer), None).detach()
            found = remember(self._scores, (layer, criterion), scores.cpu())
        return found

    def mask(
        self,
        layer: str,
        criterion: str,
        sparsity: float,
        group: str = "layer",
        pattern: tuple[int, int] | None = None,
        inputs: Inputs | None = None,
    ) -> torch.Tensor:
        """The mask `[out, in]` on the CPU that pruning this matrix alone gives; `inputs` as in `of`.

        Raises ValueError as `select` and `sparsegpt` do.
        """
        if criterion not in NEEDS_GRAM:
            return select(self.of(layer, criterion, inputs), sparsity, group=group, pattern=pattern)
        share = sparsity if pattern is None else 1 - pattern[0] / pattern[1]
        method = self._method(criterion, group, pattern)
        with torch.no_grad():
            return method.pruned(self.matrices[layer], inputs or self._inputs[layer], None, share)[1].cpu()

    def _method(self, criterion: str, group: str, pattern: tuple[int, int] | None) -> Method:
        # All the names: each matrix has the noise that it has when the whole model is pruned.
        return Method.checked(criterion, group, None, pattern, self._seed, list(self.matrices), {})

    def _weight(self, layer: str) -> torch.Tensor:
        matrix = self.matrices[layer]
        return matrix.view(matrix.weight()).detach()


def _suffices(inputs: Inputs | None, criterion: str) -> bool:
    return inputs is not None and (inputs.gram is not None or criterion not in NEEDS_GRAM)


def remember(cache: OrderedDict, key, value):
    """Keep a value beside the few latest and return it.

    >>> cache = OrderedDict()
    >>> [remember(cache, i, i) for i in range(9)][-1], list(cache)
    (8, [5, 6, 7, 8])
    """
    cache[key] = value
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return value
