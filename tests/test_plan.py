"""How much of each matrix is pruned: what each allocation looks at in a model, and what it makes of it."""

import pytest
import torch
from pruning_parts import entered
from torch import nn

from perpkit.pruning.allocation import erk, lamp, outlier_ratio, owl, uniform_plus
from perpkit.pruning.layers import block_name, prunable_matrices
from perpkit.pruning.prune import prune
from perpkit.pruning.selection import select


def matrices_of(model):
    return {name: m.view(m.weight()).detach().clone() for name, m in prunable_matrices(model).items()}


def lost(model, masks):
    """The share that each matrix has lost."""
    found = {name: matrix.view(masks[matrix.parameter]) for name, matrix in prunable_matrices(model).items()}
    return {name: float((~mask).sum()) / mask.numel() for name, mask in found.items()}


def run(model, data, criterion="magnitude", **options):
    return lost(model, prune(model, criterion, calibration=data, progress=False, **options))


def test_uniform_is_the_default_of_language_models(make_model):
    model = make_model("mixtral")
    assert set(run(model, None, sparsity=0.5).values()) == {0.5}


def test_uniform_plus_knows_the_first_convolution_and_the_classifier(make_vision):
    for kind, first, classifier in (
        ("resnet", "resnet.embedder.embedder.convolution.weight", "classifier.1.weight"),
        ("convnext", "convnext.embeddings.patch_embeddings.weight", "classifier.weight"),
        ("cifar", "conv1.weight", "linear.weight"),
        ("sequential", "0.weight", "7.weight"),
    ):
        model = make_vision(kind)
        sizes = {name: weight.numel() for name, weight in matrices_of(model).items()}
        sparsity = 0.6
        found = run(model, None, sparsity=sparsity, allocation="uniform+")
        assert found[first] == 0
        assert found[classifier] <= 0.8
        assert found == pytest.approx(uniform_plus(sizes, sparsity, first=first, classifier=classifier))
        others = {share for name, share in found.items() if name not in (first, classifier)}
        assert max(others) - min(others) < 1 / 90


def test_uniform_plus_of_a_model_without_either_is_uniform(make_model):
    assert set(run(make_model("opt"), None, sparsity=0.5, allocation="uniform+").values()) == {0.5}
    # a network that ends in a convolution has no classifier
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert run(model, None, sparsity=0.5, allocation="uniform+") == pytest.approx(
        {"0.weight": 0, "1.weight": 396 / 576}
    )


def test_erk_sees_kernels_and_single_experts(make_vision, make_model):
    model = make_vision("cifar")
    shapes = {name: tuple(m.weight().shape) for name, m in prunable_matrices(model).items()}
    assert run(model, None, sparsity=0.9, allocation="erk") == pytest.approx(erk(shapes, 0.9))
    assert len(shapes["conv1.weight"]) == 4
    model = make_model("qwen3_moe")
    shapes = {name: tuple(weight.shape) for name, weight in matrices_of(model).items()}
    found = run(model, None, sparsity=0.6, allocation="erk")
    assert found == pytest.approx(erk(shapes, 0.6))
    # small matrices keep more
    assert found["model.layers.0.self_attn.q_proj.weight"] > found["model.layers.0.self_attn.k_proj.weight"]


def test_lamp_sees_the_weights(make_vision):
    model = make_vision("sequential")
    weights = matrices_of(model)
    assert run(model, None, sparsity=0.6, allocation="lamp") == pytest.approx(lamp(weights, 0.6))


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "ria"])
def test_a_global_threshold_prunes_as_many_as_one_sort(make_model, windows, criterion):
    model = make_model("opt")
    found = run(model, windows[:4], criterion, sparsity=0.6, allocation="global")
    sizes = {name: weight.numel() for name, weight in matrices_of(model).items()}
    pruned = sum(round(found[name] * sizes[name]) for name in sizes)
    assert pruned == round(0.6 * sum(sizes.values()))
    assert len(set(found.values())) > 1


def test_a_global_threshold_looks_at_the_dense_models_scores(make_model, windows):
    model = make_model("llama").double()
    seen = entered(model, windows[:4], 8)
    scores = {
        name: weight.abs() * seen[name][0].square().sum(0).sqrt()
        for name, weight in matrices_of(model).items()
    }
    kept = select(torch.cat([score.flatten() for score in scores.values()]), 0.6)
    wanted = {
        name: float((~part).sum()) / part.numel()
        for name, part in zip(scores, kept.split([s.numel() for s in scores.values()]), strict=True)
    }
    assert run(model, windows[:4], "wanda", sparsity=0.6, group="global") == pytest.approx(wanted)


def test_owl_counts_the_outliers_of_each_block(make_model, windows):
    model = make_model("gpt2", n_layer=3).double()
    with torch.no_grad():
        # a few large inputs in the last block
        model.transformer.h[2].ln_2.weight[:2] *= 50
    seen = entered(model, windows[:4], 8)
    weights = matrices_of(model)
    blocks = {}
    for name, weight in weights.items():
        blocks.setdefault(block_name(name), []).append(weight.abs() * seen[name][0].square().sum(0).sqrt())
    ratios = {name: outlier_ratio(blocks[block_name(name)]) for name in weights}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    found = run(model, windows[:4], "wanda", sparsity=0.6, allocation="owl", group="layer")
    assert found == pytest.approx(owl(sizes, ratios, 0.6))
    assert found["transformer.h.2.mlp.c_fc.weight"] < 0.56
    # any criterion can follow it
    for criterion in ("magnitude", "sparsegpt"):
        other = make_model("gpt2")
        sizes = sum(weight.numel() for weight in matrices_of(other).values())
        masks = prune(
            other, criterion, sparsity=0.6, allocation="owl", calibration=windows[:4], progress=False
        )
        assert masks.sparsity() == round(0.6 * sizes) / sizes


def test_owl_leaves_out_experts_without_tokens(make_model, windows):
    """Else a block would seem to have fewer outliers than one whose experts are all used."""
    model = make_model("mixtral", num_hidden_layers=3)
    # In the first block all scores are equal, and of equal scores the same two win for every token.
    nn.init.zeros_(model.model.layers[0].mlp.gate.weight)
    with torch.no_grad():
        for matrix in prunable_matrices(model).values():
            matrix.weight().copy_(matrix.weight().sign() * matrix.weight().abs().pow(2) * 20)
    seen = entered(model, windows[:4], 8)
    weights = matrices_of(model)
    blocks = {}
    for name, weight in weights.items():
        if seen[name].shape[1]:
            score = weight.abs() * seen[name][0].square().sum(0).sqrt()
            blocks.setdefault(block_name(name), []).append(score)
    assert [len(scores) for scores in blocks.values()] == [8, 12, 12]
    ratios = {name: outlier_ratio(blocks[block_name(name)]) for name in weights}
    assert min(ratios.values()) > 0
    sizes = {name: weight.numel() for name, weight in weights.items()}
    found = run(model, windows[:4], sparsity=0.6, allocation="owl")
    assert found == pytest.approx(owl(sizes, ratios, 0.6), abs=0.001)  # a weight more or less


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_a_mapping_says_it_outright(make_model, windows, criterion):
    model = make_model("mixtral")
    names = list(prunable_matrices(model))
    wanted = dict.fromkeys(names, 0.0) | {names[0]: 0.25, names[5]: 1.0, names[-1]: 0.5}
    given = {name: share for name, share in wanted.items() if share}
    found = run(model, windows[:4], criterion, sparsity=given, group="layer")
    assert found == wanted


def test_a_mapping_of_a_vision_model_is_compared_by_layer(make_vision):
    model = make_vision("sequential")
    found = run(model, None, sparsity={"7.weight": 0.5, "0.weight": 0.25})
    assert found == {"0.weight": 0.25, "3.weight": 0, "7.weight": 0.5}
