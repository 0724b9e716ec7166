"""Checkpoints: a killed run goes on to the same bits, another run is told so, nothing is lost."""

import copy
import subprocess
import sys

import pandas as pd
import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.loop import checkpoint as checkpoints
from perpkit.retraining.loop.checkpoint import checksum
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.schedules import plateau
from perpkit.sources.resnet import CifarResNet


class Killed(BaseException):
    """Something that no code of ours catches."""


def train(model, windows, masks, subset="full", **changes):
    options = {"steps": 9, "lr": 1e-2, "batch": 5, "progress": False, "checkpoint_every": 2, **changes}
    return retrain(model, windows, masks=masks, subset=subset, **options)


def killed(model, windows, masks, step, *args, **options):
    def kill(done, loss):
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        train(model, windows, masks, *args, on_step=kill, **options)


def same(model, other):
    return all(
        torch.equal(v, o)
        for v, o in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.fixture
def pruned(make_model):
    model = make_model("opt", dropout=0.1)
    return model, prune(model, "magnitude", sparsity=0.6)


@pytest.mark.parametrize(
    "options",
    [
        {"subset": "biases"},
        {"subset": "head"},
        {"optimizer": "sgd", "accumulate": 2, "clip": 0.1},
        {"autocast": "float16"},
        {"checkpointing": True, "weight_decay": 0.1, "schedule": "cosine"},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_killed_run_goes_on_to_the_same_bits(pruned, windows, tmp_path, options, step):
    model, masks = pruned
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    history = train(whole, windows, masks, **options)
    killed(first, windows, masks, step, checkpoint=tmp_path / "run.pt", **options)
    ran = []
    again = train(
        second, windows, masks, checkpoint=tmp_path / "run.pt", on_step=lambda s, _: ran.append(s), **options
    )
    assert ran[0] == step // 2 * 2 + 1
    pd.testing.assert_frame_equal(again, history)
    assert same(second, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_on_too(make_model, windows, tmp_path, dtype):
    model = make_model("llama", dtype=dtype)
    masks = prune(model, "magnitude", sparsity=0.6)
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    train(whole, windows, masks)
    killed(first, windows, masks, 5, checkpoint=tmp_path / "run.pt")
    train(second, windows, masks, checkpoint=tmp_path / "run.pt")
    assert same(second, whole)


def test_batch_statistics_go_on_too(tmp_path):
    data = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10
    model = CifarResNet(20)
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    options = {"optimizer": "sgd", "steps": 5}
    train(whole, data, Masks({}), **options)
    killed(first, data, Masks({}), 3, checkpoint=tmp_path / "run.pt", **options)
    train(second, data, Masks({}), checkpoint=tmp_path / "run.pt", **options)
    assert second.bn1.num_batches_tracked == 5
    assert same(second, whole)


def test_a_process_that_dies_leaves_a_checkpoint(tiny_opt, tmp_path):
    script = """
import os, sys, torch, perpkit as pk
from perpkit.pruning.masks import Masks
torch.set_num_threads(1)
model, _ = pk.load_model("tiny-opt", device="cpu")
windows = torch.arange(512).view(16, 32)
pk.retrain(model, windows, masks=Masks({}), subset="norms", steps=6, lr=1e-2, batch=4, progress=False,
           on_step=lambda done, loss: done < 3 or os._exit(9), checkpoint=sys.argv[1], checkpoint_every=1)
"""
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run.pt")], check=False)
    assert died.returncode == 9
    whole, windows = copy.deepcopy(tiny_opt), torch.arange(512).view(16, 32)
    options = {"steps": 6, "batch": 4, "checkpoint_every": 1}
    ran = []
    train(whole, windows, Masks({}), "norms", **options)
    options |= {"checkpoint": tmp_path / "run.pt", "on_step": lambda done, _: ran.append(done)}
    train(tiny_opt, windows, Masks({}), "norms", **options)
    assert ran == [4, 5, 6]
    assert same(tiny_opt, whole)


def test_a_cancelled_run_goes_on_in_the_same_model(pruned, windows, tmp_path):
    model, masks = pruned
    whole = copy.deepcopy(model)
    train(whole, windows, masks)
    asked = []
    part = train(
        model,
        windows,
        masks,
        checkpoint=tmp_path / "run.pt",
        cancelled=lambda: asked.append(0) or len(asked) > 3,
    )
    assert len(part) == 3
    assert len(train(model, windows, masks, checkpoint=tmp_path / "run.pt")) == 9
    assert same(model, whole)


def test_a_finished_run_comes_back_as_it_is(pruned, windows, tmp_path):
    model, masks = pruned
    again = copy.deepcopy(model)
    path, ran = tmp_path / "run.pt", []
    stop = plateau(2, improvement=100.0)
    history = train(model, windows, masks, checkpoint=path, stop=stop)
    assert len(history) == 4
    for other in (again, model):
        back = train(other, windows, masks, checkpoint=path, stop=stop, on_step=lambda *_: ran.append(0))
        pd.testing.assert_frame_equal(back, history)
    assert ran == []
    assert same(again, model)


def test_weights_that_have_exploded_are_never_written(pruned, windows, tmp_path):
    model, masks = pruned
    whole, path = copy.deepcopy(model), tmp_path / "run.pt"
    bias = model.model.decoder.layers[0].fc1.bias

    def poison(done, loss):
        if done == 3:
            with torch.no_grad():
                bias.fill_(1e30)

    with pytest.raises(ValueError, match=r"the loss became .* after step 1"):
        train(copy.deepcopy(model), windows, masks, checkpoint=path, lr=1e6, checkpoint_every=1)
    assert not path.exists()
    with pytest.raises(ValueError, match="has the weights of step 2"):
        train(model, windows, masks, checkpoint=path, on_step=poison)
    train(model, windows, masks, checkpoint=path)
    train(whole, windows, masks)
    assert same(model, whole)


# --- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lr": 2e-2}, "learning rates"),
        ({"steps": 10}, "learning rates"),
        ({"schedule": "constant"}, "learning rates"),
        ({"subset": "biases"}, "subset"),
        ({"batch": 6}, "batch"),
        ({"accumulate": 2}, "accumulate"),
        ({"seed": 1}, "seed"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"clip": 1.0}, "clip"),
        ({"autocast": "bfloat16"}, "autocast"),
        ({"distill": True}, "distillation"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(pruned, windows, tmp_path, options, word):
    model, masks = pruned
    path = tmp_path / "run.pt"
    killed(copy.deepcopy(model), windows, masks, 4, checkpoint=path)
    content = path.read_bytes()
    before = copy.deepcopy(model)
    if "distill" in options:
        options = {"distill": copy.deepcopy(model)}
    with pytest.raises(
        ValueError, match=f"belongs to a run with another .*{word}.*; resume with the same, or delete"
    ):
        train(model, windows, masks, checkpoint=path, **options)
    assert same(model, before)
    assert path.read_bytes() == content


def test_a_teacher_of_other_statistics_is_another(tmp_path):
    """Its predictions, and so the loss, follow from its batch statistics too."""
    model, teacher = CifarResNet(20), CifarResNet(20)
    data = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    options = {
        "subset": "biases",
        "steps": 1,
        "lr": 1e-3,
        "progress": False,
        "checkpoint": tmp_path / "run.pt",
    }
    retrain(model, data, masks=Masks({}), distill=teacher, **options)
    teacher.bn1.running_var.mul_(2)
    with pytest.raises(ValueError, match="with another distillation;"):
        retrain(model, data, masks=Masks({}), distill=teacher, **options)


def test_other_data_masks_and_models_are_refused(pruned, make_model, windows, tmp_path):
    model, masks = pruned
    path = tmp_path / "run.pt"
    killed(copy.deepcopy(model), windows, masks, 4, "biases", checkpoint=path)
    with pytest.raises(ValueError, match="with another data;"):
        train(copy.deepcopy(model), windows.flip(0), masks, "biases", checkpoint=path)
    with pytest.raises(ValueError, match="with another masks;"):
        train(copy.deepcopy(model), windows, Masks({}), "biases", checkpoint=path)
    other = make_model("opt", dropout=0.1, seed=1)
    with pytest.raises(ValueError, match="with another model"):
        train(other, windows, Masks({}), "biases", checkpoint=path)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias += 1
    with pytest.raises(ValueError, match="began from other weights; prune the same model in the same way"):
        train(model, windows, masks, "biases", checkpoint=path)


def test_bad_places_are_refused(pruned, windows, tmp_path):
    model, masks = pruned
    with pytest.raises(ValueError, match="is a folder; name a file"):
        train(model, windows, masks, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="lies in a folder that does not exist"):
        train(model, windows, masks, checkpoint=tmp_path / "none" / "run.pt")
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        train(model, windows, masks, checkpoint=tmp_path / "run.pt", checkpoint_every=0)


def test_a_full_disk_loses_nothing(pruned, windows, tmp_path, monkeypatch):
    model, masks = pruned
    path, whole = tmp_path / "run.pt", copy.deepcopy(model)
    start = copy.deepcopy(model)
    train(whole, windows, masks)
    save = torch.save

    def full(state, target):
        if len(state["history"]) >= 6:
            target.write_bytes(b"half of it")
            raise OSError("No space left on device")
        save(state, target)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(ValueError, match=r"No space left.* an earlier checkpoint is still there"):
        train(model, windows, masks, checkpoint=path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    train(start, windows, masks, checkpoint=path)
    assert same(start, whole)


def test_checksums_see_every_bit():
    value = torch.randn(40, dtype=torch.float64)
    other = value.clone()
    other[17] = torch.nextafter(other[17], torch.tensor(9.0, dtype=torch.float64))
    assert checksum({"a": value}) == checksum({"a": value.clone()}) != checksum({"a": other})
    assert checksum({"a": value.bfloat16()}) != checksum({"a": value.half()})
