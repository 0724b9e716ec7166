"""Accuracy: right guesses counted by hand, on clean and corrupted pictures, the model left as it was."""

import math

import pytest
import torch
import transformers
from torch import nn

from perpkit.evaluation.accuracy import accuracy, corrupted_accuracy
from perpkit.sources.corruptions import KINDS, SEVERITIES
from perpkit.sources.images import load_images


class Says(nn.Module):
    """Says for each input what is written in it, and remembers what it was asked."""

    def __init__(self, classes=5, wrapped=False, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes, dtype=dtype))
        self.inner, self.wrapped, self.batches, self.modes = nn.Dropout(), wrapped, [], []

    def forward(self, x):
        self.batches.append(len(x))
        self.modes += [self.training, self.inner.training, torch.is_grad_enabled()]
        assert x.dtype == self.scale.dtype
        logits = nn.functional.one_hot(x.flatten(1)[:, 0].long(), len(self.scale)) * self.scale
        return transformers.modeling_outputs.ImageClassifierOutput(logits=logits) if self.wrapped else logits


@pytest.fixture(scope="module")
def images():
    return load_images("shapes", counts={"train": 10, "validation": 10, "test": 40})


INPUTS = torch.tensor([0.0, 1, 2, 3, 4, 0, 1, 2]).view(8, 1, 1, 1)
LABELS = torch.tensor([0, 1, 2, 0, 0, 0, 1, 1])  # five of eight


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_it_is_the_share_of_right_answers(wrapped, dtype, batch):
    model = Says(wrapped=wrapped, dtype=dtype)
    assert accuracy(model, (INPUTS, LABELS), batch=batch) == 5 / 8
    assert sum(model.batches) == 8
    assert max(model.batches) == min(batch, 8)


def test_the_model_is_asked_in_evaluation_mode_and_left_as_it_was():
    model = Says().train()
    model.inner.eval()
    accuracy(model, (INPUTS, LABELS))
    assert not any(model.modes)
    assert model.training
    assert not model.inner.training
    with pytest.raises(ValueError, match="a label is 5 but the model has 5 classes, 0 to 4"):
        accuracy(model, (INPUTS, LABELS.clone().fill_(5)))
    assert model.training


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((INPUTS, LABELS.float()), r"labels have shape \(8,\) and are torch.float32 beside 8 inputs"),
        ((INPUTS, LABELS[:7]), "want one int64 label for each"),
        ((INPUTS[:0], LABELS[:0]), "beside 0 inputs"),
        ((INPUTS, LABELS - 1), "a label is -1 but the model has 5 classes"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        accuracy(Says(), data)


def test_tokens_stay_whole_numbers():
    model = nn.Sequential(nn.Embedding(3, 3), nn.Flatten()).bfloat16()
    model[0].weight.data = torch.eye(3, dtype=torch.bfloat16)
    assert accuracy(model, (torch.tensor([[0], [1], [2]]), torch.tensor([0, 1, 1]))) == 2 / 3


def test_bad_calls_are_refused(images):
    with pytest.raises(ValueError, match=r"these are all splits; give one of them, such as images\.test"):
        accuracy(Says(), images)
    with pytest.raises(ValueError, match="the data is a Tensor; give a tuple"):
        accuracy(Says(), INPUTS)
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        accuracy(Says(), (INPUTS, LABELS), batch=0)


def test_it_can_be_cancelled():
    model = Says()
    asked = iter([False, False, True])
    assert math.isnan(accuracy(model, (INPUTS, LABELS), batch=2, cancelled=lambda: next(asked)))
    assert model.batches == [2, 2]
    assert model.training


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def test_corrupted_accuracy_has_a_row_for_every_kind_and_severity(images):
    model = linear()
    found = corrupted_accuracy(model, images, seed=2, progress=False)
    assert list(zip(found.kind, found.severity, strict=True)) == [(k, s) for k in KINDS for s in SEVERITIES]
    for row in found.itertuples():
        assert row.accuracy == accuracy(model, images.corrupted(row.kind, row.severity, seed=2))
    assert found.accuracy.nunique() > 3


def test_corrupted_accuracy_shows_that_it_moves(images, capsys):
    corrupted_accuracy(linear(), images)
    assert "corrupted accuracy: " in capsys.readouterr().err


def test_cancelled_it_keeps_its_finished_rows(images):
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > 6

    # asked before each row and each of its two batches: in the third row it is told so
    found = corrupted_accuracy(linear(), images, batch=20, cancelled=cancelled)
    assert list(found.columns) == ["kind", "severity", "accuracy"]
    assert len(found) == 2
    assert found.accuracy.notna().all()
