"""Checkpoints that are damaged or something else: refused with the same words, and kept."""

import copy
import zipfile

import pytest
import torch
from retrain_parts import train

from perpkit.pruning.prune import prune
from perpkit.retraining.loop import checkpoint as checkpoints


@pytest.fixture
def pruned(make_model):
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.6)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half", "other"])
def test_a_damaged_file_is_refused_and_kept(pruned, windows, tmp_path, content):
    model, masks = pruned
    path = tmp_path / "run.pt"
    if content == "other":
        torch.save({"weights": torch.ones(2)}, path)
    elif content == "half":
        train(copy.deepcopy(model), windows, masks, checkpoint=path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)
    kept = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"damaged or something else. Delete it|is no checkpoint of a retraining"
    ):
        train(model, windows, masks, checkpoint=path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("error", [KeyError, AttributeError, UnicodeDecodeError, zipfile.BadZipFile])
def test_whatever_a_damaged_file_raises_is_said(pruned, windows, tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error("utf-8", b"", 0, 1, "x") if error is UnicodeDecodeError else error("x")

    model, masks = pruned
    (tmp_path / "run.pt").write_bytes(b"x")
    monkeypatch.setattr(checkpoints.torch, "load", broken)
    with pytest.raises(ValueError, match=r"damaged or something else\. Delete it"):
        train(model, windows, masks, checkpoint=tmp_path / "run.pt")


def test_a_checkpoint_that_lacks_a_part_is_refused(pruned, windows, tmp_path):
    model, masks = pruned
    path = tmp_path / "run.pt"
    train(copy.deepcopy(model), windows, masks, checkpoint=path)
    whole = torch.load(path, weights_only=True)
    for part in ("same", "start", "weights", "history"):
        torch.save({name: value for name, value in whole.items() if name != part}, path)
        with pytest.raises(ValueError, match=r"damaged or something else\. Delete it"):
            train(model, windows, masks, checkpoint=path)
