"""Parameter subsets beyond the first four: embeddings, adapters, vision models, and PERP v1's nested ones."""

import itertools

import pandas as pd
import pytest
import torch
import transformers
from torch import nn

from perpkit.retraining.subsets import (
    NESTED,
    head_of,
    needs_untied_head,
    subset_parameters,
    trainable_share,
    untie_head,
)
from perpkit.sources.embedded import data_folder


def resnet50():
    """The shape of ResNet-50, without weights."""
    with torch.device("meta"):
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def names(model, subset):
    return set(subset_parameters(model, subset))


# --- PERP v1 ----------------------------------------------------------------------------------------


def test_shares_of_resnet50_are_the_published_ones():
    table = pd.read_csv(data_folder("paper", "perp_v1_resnet50_trainable_share.csv"))
    published = table.set_index("method").trainable_pct
    model = resnet50()
    shares = {subset: 100 * trainable_share(model, subset) for subset in NESTED}
    assert shares["perp_v1:bn_recalibrate"] == published.bn_recalibrate == 0
    assert round(shares["perp_v1:biases"], 3) == published.biases == 0.004
    assert round(shares["perp_v1:norms"], 2) == published.bn_parameters == 0.21
    assert shares["perp_v1:linear_probing"] == pytest.approx(published.linear_probing, abs=0.03)  # "around"
    assert shares["perp_v1:full"] == 100


@pytest.mark.parametrize(
    ("size", "hidden", "layers", "heads"), [("opt-1.3b", 2048, 24, 32), ("opt-13b", 5120, 40, 40)]
)
def test_shares_of_opt_are_the_published_ones(size, hidden, layers, heads):
    # Two sizes where counting the shifts of normalisations among the biases would round differently.
    table = pd.read_csv(data_folder("paper", "perp_v1_table5_subset_perplexity.csv"))
    published = table[table.model == size].groupby("method").trainable_pct.first()
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = transformers.OPTConfig(**shape, ffn_dim=4 * hidden, word_embed_proj_dim=hidden, vocab_size=50272)
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    assert round(100 * trainable_share(model, "perp_v1:biases"), 2) == published.biases
    assert round(100 * trainable_share(model, "perp_v1:norms"), 2) == published.ln_parameters


@pytest.mark.parametrize("make", [resnet50, "opt", "gpt_neox"])
def test_each_holds_the_one_before(make_model, make):
    model = make() if callable(make) else make_model(make)
    untie_head(model)
    chain = NESTED if callable(make) else NESTED[1:]
    for less, more in itertools.pairwise(chain):
        assert names(model, less) < names(model, more), more
    assert names(model, "perp_v1:norms") == names(model, "biases+norms")
    assert names(model, "perp_v1:linear_probing") == names(model, "biases+norms+head")


def test_without_batch_norm_there_is_nothing_to_recalibrate(make_model):
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no batch normalisation; choose another"):
        subset_parameters(make_model("llama"), "perp_v1:bn_recalibrate")


def test_a_nested_subset_may_lack_biases(make_model):
    assert names(make_model("llama"), "perp_v1:norms") == names(make_model("llama"), "norms")
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no perp_v1:biases"):
        subset_parameters(make_model("llama"), "perp_v1:biases")


# --- embeddings, heads, adapters --------------------------------------------------------------------


def test_embeddings_are_the_tables_of_tokens_and_positions(make_model):
    model = make_model("opt")
    with pytest.raises(ValueError, match=r"tied to the input embedding; call untie_head\(model\)"):
        subset_parameters(model, "embeddings")
    untie_head(model)
    assert names(model, "embeddings") == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    }
    assert names(make_model("llama"), "embeddings") == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("subset", ["embeddings", "head", "perp_v1:linear_probing", "norms+embeddings"])
def test_one_of_two_tied_matrices_asks_to_be_untied(subset):
    assert needs_untied_head(subset)
    assert not needs_untied_head("biases+norms+full+lora")


def test_the_head_of_a_vision_model_is_its_last_linear_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    assert list(subset_parameters(model, "head")) == ["4.weight", "4.bias"]
    assert head_of(nn.Conv2d(1, 1, 1)) is None
    with pytest.raises(ValueError, match="a Conv2d has no head"):
        subset_parameters(nn.Conv2d(1, 1, 1), "head")


def test_a_language_model_without_head_has_none(make_model):
    with pytest.raises(ValueError, match="a OPTModel has no head"):
        subset_parameters(make_model("opt").model, "head")


def test_adapters_are_found_by_name_and_only_on_demand(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"has no adapters; attach some first, with attach\("):
        subset_parameters(model, "norms+lora")
    query = model.model.layers[0].self_attn.q_proj
    query.lora_A, query.lora_B = nn.Parameter(torch.ones(2, 32)), nn.Parameter(torch.zeros(32, 2))
    model.lm_head.lora_A = nn.Parameter(torch.ones(2, 32))
    prefix = "model.layers.0.self_attn.q_proj"
    adapters = {f"{prefix}.lora_A", f"{prefix}.lora_B", "lm_head.lora_A"}
    assert names(model, "lora") == adapters
    assert names(model, "norms+lora") == names(model, "norms") | adapters
    assert names(model, "head") == {"lm_head.weight"}


def test_the_share_of_what_requires_gradients(make_model):
    model = make_model("llama")
    assert trainable_share(model) == 1
    chosen = subset_parameters(model, "norms")
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    assert trainable_share(model) == trainable_share(model, "norms") < 0.1
