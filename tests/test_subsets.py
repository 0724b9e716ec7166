"""Parameter subsets: which parameters, how many of them, and a head that lets go of its embedding."""

import copy
import itertools

import pandas as pd
import pytest
import torch
import transformers

from perpkit.retraining.subsets import (
    SUBSETS,
    subset_parameters,
    subset_parts,
    trainable_share,
    untie_head,
)
from perpkit.sources.embedded import data_folder

WITHOUT_BIASES = "llama mistral mixtral qwen3 qwen3_moe gemma gemma2 gemma3_text phi3".split()
TIED = ("opt", "gemma", "gemma2", "gemma3_text", "gpt2", "bloom", "falcon")
# Hidden size, layers and heads of the published models.
OPT = {
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
}


def empty_opt(size):
    """A published model's shape, without its weights."""
    hidden, layers, heads = OPT[size]
    config = transformers.OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
        vocab_size=50272,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return transformers.OPTForCausalLM(config)


# --- which ------------------------------------------------------------------------------------------


def test_biases_and_norms_of_opt_by_name(make_model):
    model = make_model("opt")
    named = [name for name, _ in model.named_parameters()]
    assert list(subset_parameters(model, "biases")) == [name for name in named if name.endswith(".bias")]
    assert list(subset_parameters(model, "norms")) == [name for name in named if "layer_norm" in name]
    assert len(subset_parameters(model, "biases")) == 2 * (6 + 2) + 1
    assert len(subset_parameters(model, "norms")) == 2 * (2 * 2 + 1)


def test_norms_are_the_vectors_that_are_no_linear_bias(any_model):
    linear = {
        id(module.bias)
        for module in any_model.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    vectors = [name for name, p in any_model.named_parameters() if p.ndim == 1 and id(p) not in linear]
    assert list(subset_parameters(any_model, "norms")) == vectors


def test_biases_are_all_there_are_or_a_clear_error(any_model):
    kind = any_model.config.model_type
    if kind in WITHOUT_BIASES:
        with pytest.raises(ValueError, match=f"a {type(any_model).__name__} has no biases; choose another"):
            subset_parameters(any_model, "biases")
        with pytest.raises(ValueError, match="has no biases"):
            subset_parameters(any_model, "norms+biases")
    else:
        biases = subset_parameters(any_model, "biases")
        assert set(biases) == {name for name, _ in any_model.named_parameters() if name.endswith("bias")}


def test_full_is_every_parameter_once(any_model):
    assert dict(any_model.named_parameters()) == subset_parameters(any_model, "full")
    assert trainable_share(any_model, "full") == 1


def test_parameters_are_the_models_own(any_model):
    for name, parameter in subset_parameters(any_model, "norms").items():
        assert parameter is any_model.get_parameter(name)


@pytest.mark.parametrize("parts", list(itertools.permutations(SUBSETS, 2)), ids="+".join)
def test_a_union_holds_each_parameter_once_in_the_models_order(make_model, parts):
    model = make_model("opt")
    untie_head(model)
    one, other = (subset_parameters(model, part) for part in parts)
    union = subset_parameters(model, "+".join(parts))
    assert list(union) == [name for name, _ in model.named_parameters() if name in one or name in other]


def test_naming_a_part_twice_changes_nothing(make_model):
    model = make_model("opt")
    assert subset_parameters(model, "norms+norms") == subset_parameters(model, "norms")


@pytest.mark.parametrize(
    ("subset", "bad", "near"),
    [
        ("bias", "bias", "; did you mean 'biases'?"),
        ("norms+ful", "ful", "; did you mean 'full'?"),
        ("loar", "loar", "; did you mean 'lora'?"),
        ("", "", "."),
        ("biases+", "", "."),
        ("none", "none", None),
    ],
)
def test_unknown_subsets_are_refused_with_the_known_ones(make_model, subset, bad, near):
    with pytest.raises(ValueError, match="The subsets are biases, norms, head, full, embeddings, ") as found:
        subset_parameters(make_model("opt"), subset)
    assert str(found.value).startswith(f"unknown subset {bad!r}{near or ''}")


def test_parts_of_a_union():
    assert subset_parts("biases+norms+head") == ["biases", "norms", "head"]


# --- how many ---------------------------------------------------------------------------------------


def test_shares_of_opt_are_the_published_ones():
    table = pd.read_csv(data_folder("paper", "talk_zero_shot_opt2.7b.csv"))
    published = table.groupby("method")["trainable_pct"].first()
    model = empty_opt("opt-2.7b")
    assert round(100 * trainable_share(model, "biases"), 3) == published["biases"] == 0.034
    assert round(100 * trainable_share(model, "norms"), 3) == published["ln_parameters"] == 0.013


@pytest.mark.parametrize("size", OPT)
def test_biases_and_norms_together_are_the_nested_subset_of_the_first_version(size):
    # PERP v1 counts the normalisations on top of the biases
    table = pd.read_csv(data_folder("paper", "perp_v1_table5_subset_perplexity.csv"))
    published = table[(table.model == size) & (table.method == "ln_parameters")]["trainable_pct"].unique()
    assert abs(100 * trainable_share(empty_opt(size), "biases+norms") - published.item()) <= 0.005


def test_a_tied_matrix_is_counted_once(make_model):
    model = make_model("opt")
    total = sum(value.numel() for name, value in model.state_dict().items() if name != "lm_head.weight")
    norms = sum(p.numel() for name, p in model.named_parameters() if "layer_norm" in name)
    assert trainable_share(model, "norms") == norms / total
    untie_head(model)
    assert trainable_share(model, "norms") == norms / (total + 64 * 32)
    assert trainable_share(model, "head") == 64 * 32 / (total + 64 * 32)


# --- the head ---------------------------------------------------------------------------------------


def test_a_tied_head_is_refused_and_another_is_the_output_matrix(any_model):
    if any_model.config.model_type in TIED:
        with pytest.raises(ValueError, match=r"tied to the input embedding; call untie_head\(model\)"):
            subset_parameters(any_model, "head")
        with pytest.raises(ValueError, match="tied to the input embedding"):
            subset_parameters(any_model, "norms+head")
    else:
        (head,) = subset_parameters(any_model, "head").values()
        assert head is any_model.get_output_embeddings().weight


def test_a_head_with_a_bias_is_retrained_whole(make_model):
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, 64)
    assert list(subset_parameters(model, "head")) == ["lm_head.weight", "lm_head.bias"]


@torch.no_grad()
def test_untying_keeps_the_function_and_frees_the_embedding(any_model, windows):
    before = any_model(windows).logits
    embedding = any_model.get_input_embeddings().weight
    state = copy.deepcopy(any_model.state_dict())
    untie_head(any_model)
    untie_head(any_model)
    # what transformers does after loading and resizing
    any_model.tie_weights()
    head = any_model.get_output_embeddings().weight
    assert head is not embedding
    assert head.data_ptr() != embedding.data_ptr()
    assert any_model.get_input_embeddings().weight is embedding
    assert torch.equal(any_model(windows).logits, before)
    assert list(any_model.state_dict()) == list(state)
    (name,) = subset_parameters(any_model, "head")
    assert any_model.get_parameter(name).requires_grad
    head.zero_()
    assert torch.count_nonzero(embedding) > 0


@torch.no_grad()
def test_an_untied_model_is_the_same_after_saving_and_loading(any_model, windows, tmp_path):
    untie_head(any_model)
    any_model.get_output_embeddings().weight.mul_(-2)
    any_model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, one), (other_name, other) in zip(
        any_model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name
    assert torch.equal(any_model(windows).logits, again(windows).logits)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


def test_biases_are_told_by_the_last_word_of_their_name():
    config = transformers.GptOssConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 64},
        **{"head_dim": 8, "layer_types": ["full_attention"], "pad_token_id": 0},
    )
    found = {
        name.rpartition(".")[2]
        for name in subset_parameters(transformers.GptOssForCausalLM(config), "biases")
    }
    assert found == {"bias", "gate_up_proj_bias", "down_proj_bias"}
    attention = torch.nn.MultiheadAttention(8, 2)
    assert sorted(subset_parameters(attention, "biases")) == ["in_proj_bias", "out_proj.bias"]
    module = torch.nn.Module()
    module.unbias = module.bias_scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="has no biases"):
        subset_parameters(module, "biases")
