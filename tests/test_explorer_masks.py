"""The mask explorer: its masks are those of pruning, each position of the slider is drawn."""

import copy
import threading

import pandas as pd
import pytest
import torch
from explorer_parts import SOON, words
from torch import nn

import perpkit as pk
from perpkit.experiments.shared import Cancelled
from perpkit.interactive.explorers import masks as explored
from perpkit.interactive.explorers.masks import MaskExplorer
from perpkit.interactive.explorers.scores import Scores

FC1 = "model.decoder.layers.0.fc1.weight"


@pytest.fixture
def explorer(tmp_path):
    explorer = MaskExplorer(export_folder=tmp_path)
    assert explorer.wait(SOON)
    return explorer


@pytest.fixture(scope="module")
def calibration():
    return explored._loaded("tiny-opt")[1]


def linear(rows=8, columns=8):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(rows, columns, generator=generator))
    return model, torch.randn(32, columns, generator=generator)


def shown_mask(explorer, layer=FC1) -> torch.Tensor:
    assert explorer.wait(SOON)
    assert explorer.error is None
    table = explorer.figure().table
    return torch.tensor(table["kept"].to_numpy() == 1).view(explorer._scores.of(layer, "magnitude").shape)


# --- the masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_the_mask_is_that_of_pruning_the_layer(explorer, tiny_opt, calibration, criterion, pattern):
    explorer.show(0.6, layer=FC1, criterion=criterion, pattern="unstructured", group="row")
    explorer.show(pattern=pattern)
    model = tiny_opt
    # Layers that are not named stay, so the inputs are the dense model's.
    how = {"sparsity": {FC1: 0.6}, "group": "row"}
    if pattern != "unstructured":
        # A pattern prunes all layers, those before this one too: its inputs are not the dense ones.
        if criterion not in ("magnitude", "random"):
            inside = Scores(model, calibration)
            inside.look(FC1, criterion, lambda *_: False)
            n, m = map(int, pattern.split(":"))
            assert torch.equal(shown_mask(explorer), inside.mask(FC1, criterion, 0, "row", (n, m)))
            assert (shown_mask(explorer).view(-1, m).sum(1) == n).all()
            return
        how = {"pattern": pattern}
    masks = pk.prune(model, criterion, calibration=calibration, progress=False, **how)
    assert torch.equal(shown_mask(explorer), masks[FC1])


def test_the_layer_loses_exactly_its_share(explorer):
    explorer.show(0.37, layer=FC1, group="layer")
    mask = shown_mask(explorer)
    assert (~mask).sum() == round(0.37 * mask.numel())
    assert words(explorer).startswith("0.fc1: 37 % of 12,544 weights pruned, threshold 0.12")


def test_the_threshold_is_the_lowest_kept_score(explorer):
    explorer.show(0.5, layer=FC1, criterion="wanda", group="row")
    mask, scores = shown_mask(explorer), explorer._scores.of(FC1, "wanda")
    lowest = scores.masked_fill(~mask, torch.inf).amin(1)
    assert f"between {lowest.min():.3g} and {lowest.max():.3g}" in words(explorer)
    assert torch.equal(explorer._shown[1].thresholds, lowest)


def test_two_criteria_are_compared(explorer):
    explorer.show(0.5, layer=FC1, criterion="magnitude", other="random")
    assert explorer.wait(SOON)
    table = explorer.figure().table
    one, two = table["kept"] == 1, table["kept_by_other"] == 1
    said = (
        f"with random it agrees on {100 * (one == two).mean():.1f} % of the weights; of those that either "
        f"keeps, both keep {100 * (one & two).sum() / (one | two).sum():.1f} %"
    )
    assert said in words(explorer)


def test_the_model_is_left_as_it_was(calibration, tiny_opt):
    model = tiny_opt.train()
    before = copy.deepcopy(model.state_dict())
    explorer = MaskExplorer(model, calibration=calibration, background=False)
    explorer.show(0.9, criterion="sparsegpt", other="wanda")
    assert explorer.error is None
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_vision_model(tmp_path):
    explorer = MaskExplorer("shapes-resnet", background=False)
    explorer.show(0.8, criterion="wanda", layer="layer1.0.conv1.weight")
    assert explorer.error is None
    kept = explorer.figure().table["kept"]
    assert kept.mean() == pytest.approx(0.2, abs=0.001)


# --- moving it ------------------------------------------------------------------------------------


def test_every_position_of_a_drag_is_drawn():
    explorer = MaskExplorer(linear()[0])
    pictures = []
    explorer.picture.observe(lambda change: pictures.append(change.new), names="value")
    for step in range(12):
        explorer.sparsity.value = 0.1 + 0.05 * step
    assert len(set(pictures)) == 12
    assert explorer.sparsity.continuous_update


def test_scores_and_inputs_are_found_once_for_a_layer(explorer, monkeypatch):
    explorer.show(0.5, criterion="wanda", layer=FC1)
    assert explorer.wait(SOON)
    asked = []
    whole = explorer._scores._method
    monkeypatch.setattr(explorer._scores, "_method", lambda *a: asked.append(a) or whole(*a))
    monkeypatch.setattr(explorer._scores, "_model", None)
    for step in range(5):
        explorer.show(0.1 * step)
    assert asked == []
    assert explorer.error is None


def test_a_pattern_takes_the_slider_away_and_gives_it_back(explorer):
    explorer.show(pattern="2:4")
    assert explorer.sparsity.disabled
    assert explorer.group.disabled
    assert words(explorer).endswith("2 of every 4 consecutive inputs of a row are kept")
    explorer.show(pattern="unstructured")
    assert not explorer.sparsity.disabled
    assert "threshold" in words(explorer)


def test_hands_in_many_threads_leave_one_consistent_picture(explorer):
    def move(offset):
        for step in range(8):
            explorer.show(((step * offset) % 90) / 100, criterion=["magnitude", "wanda", "ria"][step % 3])

    threads = [threading.Thread(target=move, args=[offset]) for offset in (1, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    explorer.show(0.3, criterion="magnitude", layer=FC1)
    assert explorer.wait(SOON)
    view, frame, _ = explorer._shown
    assert explorer.error is None
    assert words(explorer).startswith("0.fc1: 30 %")
    assert explorer.picture.value == view.png(frame)


def test_a_matrix_too_large_for_the_callback_is_drawn_in_the_background(monkeypatch):
    monkeypatch.setattr(explored, "AT_ONCE", 10)
    explorer = MaskExplorer(linear()[0])
    assert explorer.wait(SOON)
    threads = []
    explorer.picture.observe(lambda _: threads.append(threading.current_thread()), names="value")
    explorer.sparsity.value = 0.75
    assert explorer.wait(SOON)
    assert threads == [each for each in threads if each is not threading.current_thread()]
    assert words(explorer).startswith("0: 75 % of 64 weights")


def test_export_writes_the_picture_and_its_table(explorer, tmp_path):
    for ending in (".png", ".csv", ".svg", ".pdf"):
        explorer.exports[ending].click()
        assert explorer.error is None
        assert (tmp_path / f"mask{ending}").stat().st_size
    table = pd.read_csv(tmp_path / "mask.csv")
    assert table.columns[:4].tolist() == ["row", "column", "score", "kept"]
    # What it is of.
    assert table["layer"].unique().tolist() == [FC1]
    assert table["sparsity"].unique().tolist() == [0.5]
    assert {"criterion", "other", "pattern", "group"} < {*table.columns}


# --- what goes wrong ------------------------------------------------------------------------------


def test_looking_at_inputs_can_be_cancelled(calibration, tiny_opt):
    model = tiny_opt
    scores = Scores(model, calibration)
    asked = []

    def watch(done, batches):
        asked.append((done, batches))
        return done == 2

    with pytest.raises(Cancelled):
        scores.look(FC1, "wanda", watch)
    assert asked == [(0, 4), (1, 4), (2, 4)]
    assert not scores.has_inputs(FC1, "wanda")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_looked_at_stays_while_a_cancelled_look_ends(calibration, tiny_opt):
    scores = Scores(tiny_opt, calibration)
    layers = [name for name in scores.matrices if "fc" in name] + list(scores.matrices)[:3]
    held = scores.look(FC1, "sparsegpt", lambda *_: False)
    expected = scores.mask(FC1, "sparsegpt", 0.5, inputs=held)
    # Cancelled after its last batch, it takes nobody's place.
    with pytest.raises(Cancelled):
        scores.look(layers[-1], "sparsegpt", lambda done, batches: done == batches)
    assert scores.has_inputs(FC1, "sparsegpt")
    for layer in layers:
        if layer != FC1:
            scores.look(layer, "sparsegpt", lambda *_: False)
    assert not scores.has_inputs(FC1, "sparsegpt")
    assert torch.equal(scores.mask(FC1, "sparsegpt", 0.5, inputs=held), expected)
    assert torch.equal(scores.of(FC1, "wanda", held), Scores(tiny_opt, calibration).of(FC1, "wanda", held))


def test_a_pattern_that_does_not_fit_is_told_and_the_controls_go_on():
    explorer = MaskExplorer(linear(columns=6)[0], background=False)
    explorer.show(pattern="2:4")
    assert words(explorer) == "ValueError: the width 6 is no multiple of 4: no 2:4 pattern fits"
    explorer.show(0.5, pattern="unstructured")
    assert words(explorer).startswith("0: 50 % of 48 weights")


def test_broken_weights_are_told():
    model, _ = linear()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    explorer = MaskExplorer(model, background=False)
    assert "a score is NaN" in words(explorer)
    with pytest.raises(ValueError, match=r"this has failed: ValueError: .*a score is NaN"):
        explorer.figure()


def test_a_model_alone_offers_what_needs_no_data():
    model, data = linear()
    assert MaskExplorer(model, background=False).criterion.options == ("magnitude", "random")
    assert "sparsegpt" in MaskExplorer(model, calibration=data, background=False).criterion.options


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"criterion": "wanda"}, "criterion is 'wanda'; the explorer offers magnitude, random"),
        ({"layer": "x"}, "layer is 'x'; the explorer offers 0.weight"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity is 0.6, but the pattern is 2:4, which is 0.5"),
        ({"sparsity": "60 %"}, "sparsity is '60 %'; want a number"),
        (
            {"group": "row", "pattern": "2:4"},
            "group is 'row', but the pattern 2:4 compares weights within groups",
        ),
        ({"pattern": "1:2"}, "pattern is '1:2'"),
        ({"sparsity": 1.5}, "sparsity is 1.5; the explorer offers 0 to 0.99"),
    ],
)
def test_what_is_not_offered_is_refused(chosen, said):
    explorer = MaskExplorer(linear()[0], background=False)
    with pytest.raises(ValueError, match=said):
        explorer.show(**chosen)


def test_a_pattern_stays_until_another_is_given():
    explorer = MaskExplorer(linear()[0], background=False)
    explorer.show(0.25, pattern="unstructured")
    explorer.show(pattern="2:4")
    with pytest.raises(ValueError, match="give pattern='unstructured' with it"):
        explorer.show(0.6)
    assert words(explorer).startswith("0: 50 % of 64 weights pruned, 2 of every 4")
    explorer.show(0.6, pattern="unstructured")
    assert words(explorer).startswith("0: 59.4 % of 64 weights pruned, threshold")


def test_a_layer_may_be_given_by_the_end_of_its_name(explorer):
    for end in ("0.fc1", "layers.0.fc1", "0.fc1.weight", FC1):
        explorer.show(layer="0.fc2", criterion="magnitude", pattern="unstructured")
        explorer.show(layer=end)
        assert explorer.wait(SOON)
        assert explorer.layer.value == FC1
    with pytest.raises(ValueError, match=r"layer is 'fc1'; it could be .*0\.fc1\.weight, .*1\.fc1\.weight"):
        explorer.show(layer="fc1")
    with pytest.raises(ValueError, match=r"did you mean '.*0\.fc1\.weight'\?"):
        explorer.show(layer="0.fc11")


def test_where_nothing_goes_there_is_no_threshold():
    explorer = MaskExplorer(linear()[0], background=False)
    explorer.show(0)
    assert words(explorer) == "0: 0 % of 64 weights pruned"


def test_calibration_of_another_kind_is_told(tiny_opt):
    with pytest.raises(ValueError, match=r"windows are of torch\.float32; token ids are whole numbers"):
        MaskExplorer(tiny_opt, calibration=torch.zeros(2, 8))


def test_a_model_with_its_tokenizer_is_told_apart(tiny_opt):
    with pytest.raises(ValueError, match=r"the model is a tuple; .*load_model gives a model and"):
        MaskExplorer((tiny_opt, None))


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="did you mean 'tiny-opt'"):
        MaskExplorer("tiny-op")
