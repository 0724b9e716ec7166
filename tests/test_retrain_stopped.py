"""A retraining that is interrupted: the exception has the history of the finished steps."""

import pytest
import torch
from retrain_parts import train

from perpkit.pruning.prune import prune
from perpkit.retraining.iterative import COLUMNS, imp


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_carries_the_finished_steps(make_model, windows, error):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)

    def stop(step, loss):
        if step == 3:
            raise error("enough")

    with pytest.raises(error) as stopped:
        train(model, windows, masks, steps=6, on_step=stop)
    history = stopped.value.history
    assert list(history.columns) == ["step", "loss", "lr"]
    assert history["step"].tolist() == [1, 2, 3]


def test_an_explosion_carries_the_steps_before_it(make_model, windows):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    bias = model.model.decoder.layers[0].fc1.bias

    def poison(step, loss):
        if step == 2:
            with torch.no_grad():
                bias[0] = float("nan")

    with pytest.raises(ValueError, match="the loss became nan at step 3") as stopped:
        train(model, windows, masks, on_step=poison)
    assert stopped.value.history["step"].tolist() == [1, 2]


def test_an_interrupt_in_a_cycle_carries_all_finished_steps(make_model, windows):
    model, taken = make_model("opt"), []

    def stop(step, loss):
        taken.append(loss)
        if len(taken) == 5:
            raise KeyboardInterrupt

    options = {"subset": "head", "steps": 3, "lr": 1e-3, "batch": 4, "progress": False, "on_step": stop}
    with pytest.raises(KeyboardInterrupt) as stopped:
        imp(model, "magnitude", windows, sparsity=0.9, cycles=3, **options)
    history = stopped.value.history
    assert list(history.columns) == COLUMNS
    assert history["cycle"].tolist() == [1, 1, 1, 2, 2]
    assert history["loss"].tolist() == taken
