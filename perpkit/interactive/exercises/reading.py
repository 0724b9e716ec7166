"""Exercises about reading the papers' tables: how much is recovered, and how much was trained for it."""

import math
from collections.abc import Callable, Sequence

from ...retraining.freezing import gradual_layers
from .verdict import Wrong, call, check, number


@check("the share of the gap in log-perplexity that retraining closes")
def check_recovered(my_recovered: Callable[[float, float, float], float]) -> None:
    """Check `my_recovered(pruned, retrained, dense)`: how much of the gap retraining closes.

    All three are perplexities. The gap is that between the pruned and the dense model in log-perplexity, the
    loss per token; closed whole it is 1, not at all 0, and below 0 when retraining has made it wider.

    >>> check_recovered(lambda pruned, retrained, dense: (pruned - retrained) / (pruned - dense))
    ✗ not yet: pruned 265.19, retrained 16.38, dense 12.47 gives 0.9845; want 0.9108. You compare \
perplexities, of which an exploded one hides all else; compare their logarithms
    """
    for pruned, retrained, dense in (
        (265.19, 16.38, 12.47),
        (8.0, 2.0, 2.0),
        (8.0, 8.0, 2.0),
        (4.0, 8.0, 2.0),
    ):
        want = (math.log(pruned) - math.log(retrained)) / (math.log(pruned) - math.log(dense))
        got = number("the answer", call(my_recovered, pruned, retrained, dense))
        if math.isclose(got, want, abs_tol=1e-4):
            continue
        plain = (pruned - retrained) / (pruned - dense)
        hints = {
            plain: "You compare perplexities, of which an exploded one hides all else; compare "
            "their logarithms",
            1 - want: "That is the share of the gap that is left",
            100 * want: "Give a share, not per cent",
            retrained / dense: "That says how far the retrained model is from the dense one, not what it won",
            -want: "The sign is that of a loss; closing the gap counts as positive",
        }
        hint = next(
            (f". {words}" for value, words in hints.items() if math.isclose(got, value, abs_tol=1e-4)), ""
        )
        given = f"pruned {pruned:g}, retrained {retrained:g}, dense {dense:g}"
        raise Wrong(f"{given} gives {got:.4g}; want {want:.4g}{hint}")


@check("the parameters that train, averaged over the stages")
def check_aggregated(my_aggregated: Callable[[Sequence[int], int, int], float]) -> None:
    """Check `my_aggregated(sizes, always, stages)`: the share of parameters that gradual freezing trains.

    `sizes` are the layers' parameters from input to output, `always` counts those that train in every stage.
    By stage e, counted from 0, the first `⌊(e + 1) · n / stages⌋` of n layers are frozen. Wanted is the mean
    over the stages of the share of all parameters that trains.

    >>> check_aggregated(lambda sizes, always, stages: 0.5)
    ✗ not yet: layers of [4, 2, 2, 2] parameters, 0 that always train and 4 stages give 0.5; want 0.3
    """
    for sizes, always, stages in (
        ([4, 2, 2, 2], 0, 4),
        ([1, 2, 3, 4, 10], 5, 2),
        ([8, 1, 1], 2, 5),
        ([3], 1, 1),
    ):
        want = _aggregated(sizes, always, stages)
        got = number("the answer", call(my_aggregated, sizes, always, stages))
        if math.isclose(got, want, abs_tol=1e-6):
            continue
        whole = sum(sizes)
        late = sum(whole - sum(sizes[: e * len(sizes) // stages]) + always for e in range(stages))
        back = _aggregated(sizes[::-1], always, stages)
        layers = sum(len(sizes) - (e + 1) * len(sizes) // stages for e in range(stages)) / len(sizes) / stages
        hints = {
            late / (whole + always) / stages: "The first stage already has a part of the layers frozen",
            back: "The layers at the input freeze first",
            want * stages: "Take the mean over the stages, not the sum",
            want * (whole + always) / whole: "The whole has the parameters that always train too",
            want - always / (whole + always): "You leave out the parameters that always train",
            layers: "You count layers; count their parameters",
        }
        hint = next(
            (f". {words}" for value, words in hints.items() if math.isclose(got, value, abs_tol=1e-6)), ""
        )
        given = f"layers of {sizes} parameters, {always} that always train and {stages} stages"
        raise Wrong(f"{given} give {got:.4g}; want {want:.4g}{hint}")


def _aggregated(sizes: Sequence[int], always: int, stages: int) -> float:
    names = [str(place) for place in range(len(sizes))]
    trained = 0
    for stage in range(stages):
        active = gradual_layers(names, stage, stages, gradual="freeze")
        trained += always + sum(sizes[int(name)] for name in active)
    return trained / stages / (sum(sizes) + always)
