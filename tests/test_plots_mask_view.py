"""The picture of a matrix that follows its mask: what its pixels, bars and table hold."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from perpkit.interactive.plots.mask_view import BINS, COMPARED, HEIGHT, Frame, MaskView

NONE = torch.empty(0)


def made(rows=6, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    return scores, torch.rand(rows, columns, generator=generator) > 0.5


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_pruned_entries_are_white_and_larger_ones_darker():
    scores, mask = made()
    whole = MaskView(scores, "score").whole(Frame(mask, None, NONE, "")).astype(int).sum(2)
    assert (whole[~mask.numpy()] == 3 * 255).all()
    darkness = -whole[mask.numpy()]
    order = np.argsort(scores[mask].numpy())
    assert (np.diff(darkness[order]) >= 0).all()
    assert darkness.max() > darkness.min()


def test_two_masks_are_told_apart_by_colour():
    first = torch.tensor([[True, True, False, False]])
    second = torch.tensor([[True, False, True, False]])
    view = MaskView(torch.rand(1, 4), "score", names=("a", "b"))
    frame = Frame(first, second, NONE, "")
    colours = [[round(255 * part) for part in to_rgb(COMPARED[i])] for i in (3, 1, 2, 0)]
    assert view.whole(frame).tolist() == [colours]
    assert view.near(frame).tolist() == [colours]


def test_a_large_matrix_is_averaged():
    scores, mask = torch.ones(1024, 8), torch.zeros(1024, 8, dtype=torch.bool)
    mask[:, :4] = True
    mask[0, 0] = False
    view = MaskView(scores, "score")
    table = view.figure(Frame(mask, None, NONE, "")).table
    assert len(table) == 512 * 4
    assert table.set_index(["row", "column"])["kept"].loc[[(0, 0), (0, 1), (0, 2)]].tolist() == [0.75, 1, 0]
    whole = view.whole(Frame(mask, None, NONE, ""))
    assert (whole[0, 0] > whole[1, 0]).all()
    assert (whole[:, 2:] == 255).all()


def test_the_bars_count_all_scores_and_the_kept_ones():
    scores, mask = made(16, 16)
    view = MaskView(scores, "score")
    assert view.counts(torch.ones_like(mask)).sum() == 256
    assert view.counts(mask).sum() == mask.sum()
    low = scores < view._highest / BINS
    assert view.counts(mask)[0] == (mask & low).sum()


def test_frame_after_frame_is_the_picture_of_the_frame_alone():
    scores, mask = made()
    first = Frame(mask, None, torch.tensor([0.3]), "first of\nthem")
    second = Frame(~mask, None, torch.tensor([0.1, 0.6]), "second")
    view = MaskView(scores, "score", m=4)
    before = view.png(first)
    after = view.png(second)
    assert before != after
    assert view.png(first) == before
    assert MaskView(scores, "score", m=4).png(second) == after


def test_the_figure_shows_what_the_fast_picture_shows():
    scores, mask = made()
    frame = Frame(mask, None, torch.tensor([0.3]), "a title")
    view = MaskView(scores, "score", m=2)
    fast = pixels(view.png(frame)).astype(int)
    slow = pixels(view.figure(frame).png(dpi=120)).astype(int)
    assert fast[2, 2].tolist() == [255, 255, 255]
    assert fast.shape == slow.shape == (round(120 * HEIGHT), 864, 3)
    # Lines may be snapped to other pixels.
    assert (np.abs(fast - slow).max(2) > 60).mean() < 0.01


def test_the_table_has_a_row_for_each_entry():
    scores, mask = made()
    table = MaskView(scores, "score", names=("a", "b")).figure(Frame(mask, ~mask, NONE, "")).table
    assert list(table) == ["row", "column", "score", "kept", "kept_by_other"]
    assert table["score"].tolist() == scores.flatten().tolist()
    assert table["kept"].tolist() == mask.flatten().double().tolist()
    assert (table["kept"] + table["kept_by_other"] == 1).all()


@pytest.mark.parametrize("scores", [torch.zeros(2, 3), torch.full((2, 3), torch.inf), torch.rand(1, 1)])
def test_scores_without_a_scale_are_drawn(scores):
    frame = Frame(torch.ones(scores.shape, dtype=torch.bool), None, scores[:1, 0], "$ _")
    assert MaskView(scores, "score").png(frame).startswith(b"\x89PNG")
    assert MaskView(scores, "score").figure(frame).png().startswith(b"\x89PNG")


def test_a_scale_is_not_ruled_by_few_large_scores():
    scores = torch.ones(100, 100)
    scores[0, 0] = 1e6
    view = MaskView(scores, "score")
    assert view.counts(torch.ones(100, 100, dtype=torch.bool))[-1] == 10_000
    assert (view.whole(Frame(scores > 0, None, NONE, ""))[1, 1] < 100).all()
