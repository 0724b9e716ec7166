"""What prune refuses, in words a student understands, and that the model is left as it was."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from pruning_parts import snapshot, unchanged, untouched
from torch import nn

from perpkit.pruning.method import CALIBRATED, CRITERIA
from perpkit.pruning.prune import prune

FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def refused(make_model, windows):
    """Check that these arguments are refused in these words."""

    def check(words, criterion="magnitude", model=None, **options):
        model = make_model("opt") if model is None else model
        options = {"calibration": windows[:4], "batch": 2, "progress": False, **options}
        before, modes = snapshot(model), [module.training for module in model.modules()]
        with pytest.raises(ValueError, match=words):
            prune(model, criterion, **options)
        assert unchanged(model, before)
        assert untouched(model)
        assert modes == [module.training for module in model.modules()]

    return check


# --- how much -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, 60, math.nan, math.inf, "0.5", "half", [0.5]])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_a_sparsity_is_a_fraction(refused, criterion, sparsity):
    words = rf"sparsity is {re.escape(repr(sparsity))}; it is the fraction of pruned weights, between 0 and 1"
    refused(words, criterion, sparsity=sparsity)


def test_any_number_is_a_sparsity(make_model):
    for half in (0.5, np.float32(0.5), np.float64(0.5)):
        assert prune(make_model("opt"), "magnitude", sparsity=half).sparsity() == 0.5
    for whole in (1, True, np.int64(1)):
        assert prune(make_model("opt"), "magnitude", sparsity=whole).sparsity() == 1


def test_how_much_is_to_be_said(refused, make_vision, images):
    refused(r"say how much to prune: sparsity=0\.5, or pattern='2:4'")
    refused("say how much to prune", model=make_vision("cifar"), calibration=images)


def test_a_mapping_names_layers(refused):
    refused(rf"sparsity of '{FC1}' is 2; it is the fraction", sparsity={FC1: 2})
    refused(
        rf"no prunable layer 'model\.decoder\.layers\.1\.fc1'; did you mean '{FC1}'",
        sparsity={"model.decoder.layers.1.fc1": 0.5},
    )
    refused("there is no prunable layer 'lm_head.weight'", sparsity={"lm_head.weight": 0.5})
    refused("sparsity names its layers; allocation='erk' does not", sparsity={FC1: 0.5}, allocation="erk")


@pytest.mark.parametrize("pattern", ["2/4", "4", "two:four", "", "-1:4"])
def test_a_pattern_is_n_to_m(refused, pattern):
    refused(
        f"the pattern is '{pattern}'; write N:M to keep N of every M weights, such as '2:4'", pattern=pattern
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_fits_the_layers(refused, make_vision, images, criterion):
    refused("the pattern is 5:4; N:M keeps N of every M", criterion, pattern="5:4")
    refused("the pattern is 0:0", criterion, pattern="0:0")
    refused(
        r"the width 32 of 'model.*k_proj\.weight' is no multiple of 3; it cannot", criterion, pattern="1:3"
    )
    refused(
        "2:4 is a sparsity of 0.5, but sparsity is 0.6; leave one out", criterion, pattern="2:4", sparsity=0.6
    )
    refused("allocation='owl' does not go with it", criterion, pattern="2:4", allocation="owl")
    network = {"model": make_vision("sequential"), "calibration": images}
    refused(r"the width 27 of '0\.weight' is no multiple of 4", criterion, pattern="2:4", **network)


def test_uniform_plus_that_cannot_reach(refused, make_vision, images):
    network = {"model": make_vision("cifar"), "calibration": images}
    refused(r"uniform\+ prunes at most 0\.\d+ of this", sparsity=0.999, allocation="uniform+", **network)


# --- how ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["wander", "", "Magnitude", "sparse-gpt", None])
def test_unknown_criteria_are_refused_with_the_known_ones(refused, criterion):
    refused(
        f"unknown criterion {criterion!r}.* the criteria are magnitude, random, wanda, ria",
        criterion,
        sparsity=0.5,
    )


def test_a_near_miss_is_suggested(refused):
    refused("unknown criterion 'sparsgpt'; did you mean 'sparsegpt'?", "sparsgpt", sparsity=0.5)


def test_unknown_groups_and_allocations(refused):
    refused(
        "unknown comparison group 'column'; the groups are row, layer, global", sparsity=0.5, group="column"
    )
    refused(
        r"unknown allocation 'uniform-'; the allocations are uniform, uniform\+, global, erk, lamp, owl, or",
        sparsity=0.5,
        allocation="uniform-",
    )


def test_what_does_not_go_together(refused):
    refused(
        "group='global' is an allocation of its own; 'erk'", sparsity=0.5, group="global", allocation="erk"
    )
    for criterion in ("sparsegpt", "sparsefw"):
        refused(f"{criterion} compares the weights of one layer", criterion, sparsity=0.5, group="global")
        refused(
            f"{criterion} compares the weights of one layer", criterion, sparsity=0.5, allocation="global"
        )
    refused("a global threshold and a pattern do not go", pattern="2:4", allocation="global")
    refused("a global threshold and group='row' do not go", sparsity=0.5, group="row", allocation="global")
    refused("sparsity names its layers; allocation='global'", sparsity={FC1: 0.5}, group="global")


def test_unknown_parameters(refused):
    refused("no parameter 'power', and wanda takes no further parameters", "wanda", sparsity=0.5, power=1)
    refused("no parameter 'sparcity', and magnitude takes no", sparcity=0.5)
    refused(
        "no parameter 'blocksize', and sparsegpt takes damping, block", "sparsegpt", sparsity=0.5, blocksize=1
    )
    refused("sparsefw takes iterations, alpha, warm_start", "sparsefw", sparsity=0.5, steps=3)
    # what prune itself gives a criterion is nobody's parameter
    for given in ("kept", "gram", "name", "norms", "weight", "generator"):
        refused(f"no parameter '{given}'", "sparsegpt", sparsity=0.5, **{given: None})


def test_parameters_out_of_range(refused):
    refused("cannot prune 'model.*k_proj.weight': damping is -1", "sparsegpt", sparsity=0.5, damping=-1)
    refused("block is 0", "sparsegpt", sparsity=0.5, block=0)
    refused("alpha is 2", "sparsefw", sparsity=0.5, alpha=2)
    refused("unknown warm start 'cold'", "sparsefw", sparsity=0.5, warm_start="cold")
    refused("length=1, batch=2: want length >= 2", "wanda", sparsity=0.5, length=1)
    refused("length=2048, batch=0: want", "wanda", sparsity=0.5, batch=0)


# --- calibration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_calibration_that_is_missing(refused, criterion):
    refused(f"{criterion} looks at activations: give calibration=", criterion, sparsity=0.5, calibration=None)


def test_owl_needs_calibration_too(refused):
    refused("owl looks at the activations' outliers: give", sparsity=0.5, allocation="owl", calibration=None)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_calibration_that_is_no_token_windows(refused, text, make_vision, criterion):
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    for data, words in (
        (tokens[:0], r"calibration has the shape \(0, 16\); want token windows, \[n, length\]"),
        (tokens[0], r"calibration has the shape \(16,\); want token windows"),
        (tokens[0, 0], r"calibration has the shape \(\); want token windows"),
        (tokens[:, :1], r"windows have shape \(4, 1\); want \[windows, length >= 2\]"),
        (tokens[None], r"windows have shape \(1, 4, 16\)"),
        (tokens.float(), r"calibration is torch\.float32; want token windows, which are whole numbers"),
        (tokens + 64, "a token id is 64 but the model's vocabulary has 64 tokens: the text was cut"),
        (tokens - 1, "a token id is -1 but"),
        (torch.zeros(2, 17, dtype=torch.int64), "windows of 17 tokens exceed the model's context of 16"),
        (tokens.tolist(), "calibration is a list; want a tensor, such as text.calibration"),
        ("wikitext2", "calibration is a str; want a tensor"),
        (text, r"this is a whole text; give one split of it"),
    ):
        refused(words, criterion, sparsity=0.5, calibration=data)
    for data, words in (
        (
            torch.zeros(0, 3, 8, 8),
            r"calibration has the shape \(0, 3, 8, 8\); want at least one input, \[n, …\]",
        ),
        (torch.zeros(8), r"calibration has the shape \(8,\)"),
        ([torch.zeros(3, 8, 8)], "calibration is a list; want a tensor"),
        (text, "calibration is a Text; want a tensor"),
    ):
        refused(words, criterion, make_vision("cifar"), sparsity=0.5, calibration=data)


# --- broken numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", CALIBRATED)
@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("model.decoder.embed_tokens.weight", "layers.0.self_attn.k_proj"),
        ("model.decoder.layers.0.self_attn_layer_norm.weight", "layers.0.self_attn.k_proj"),
        ("model.decoder.layers.1.final_layer_norm.bias", "layers.1.fc1"),
        ("model.decoder.layers.0.fc2.bias", "layers.1.self_attn.k_proj"),
    ],
)
def test_an_activation_that_is_not_finite_names_its_layer(
    refused, make_model, criterion, place, layer, value
):
    model = make_model("opt")
    nn.init.constant_(model.get_parameter(place), value)
    refused(
        rf"an activation that enters '.*{layer}\.weight' is NaN or infinite", criterion, model, sparsity=0.5
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_weights_are_named_and_nothing_is_pruned(refused, make_model, criterion):
    model = make_model("opt")
    with torch.no_grad():
        model.get_parameter(FC1)[3, 4] = math.nan
    refused(f"cannot prune '{FC1}': some of its weights are NaN", criterion, model, sparsity=0.5)


@torch.no_grad()
def test_infinite_weights_are_kept(make_model):
    model = make_model("opt")
    weight = model.model.decoder.layers[0].fc1.weight
    weight[0, 0], weight[0, 1] = math.inf, -math.inf
    masks = prune(model, "magnitude", sparsity=0.9)
    assert masks["model.decoder.layers.0.fc1.weight"][0, :2].all()


def test_an_image_that_is_not_finite(refused, make_vision, images):
    images[1, 0, 3, 3] = math.nan
    network = {"model": make_vision("cifar"), "calibration": images}
    refused("a value of the calibration data is NaN or infinite", "wanda", sparsity=0.5, **network)


def test_too_few_tokens_for_a_hessian_raise_the_damping_with_a_warning(make_model):
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    options = {"sparsity": 0.5, "calibration": tokens, "progress": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = prune(make_model("opt"), "sparsegpt", damping=0, **options)
    assert masks.sparsity() == 0.5
    for warning in caught:
        assert re.search(
            r"\.weight is not positive definite at damping 0; used 0\.0001", str(warning.message)
        )
    assert len({str(warning.message) for warning in caught}) == 12
    prune(make_model("opt"), "sparsegpt", **options)


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_model_without_values(make_model, windows, criterion):
    with torch.device("meta"):
        model = type(make_model("opt"))(make_model("opt").config)
    with pytest.raises(
        ValueError, match="the model is on the meta device: its weights have no values; load it"
    ):
        prune(model, criterion, sparsity=0.5, calibration=windows)


def test_a_model_without_matrices(refused):
    refused("found no linear layers or convolutions in a LayerNorm", model=nn.LayerNorm(3), sparsity=0.5)


def test_three_dimensional_convolutions(refused):
    network = {"model": nn.Sequential(nn.Conv3d(1, 2, 2)), "calibration": torch.ones(1, 1, 4, 4, 4)}
    refused(
        "three-dimensional convolutions can be pruned by magnitude or at random",
        "wanda",
        sparsity=0.5,
        **network,
    )
    assert prune(nn.Sequential(nn.Conv3d(1, 2, 2)), "magnitude", sparsity=0.5).sparsity() == 0.5
