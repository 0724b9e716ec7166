"""Models of real shapes with random weights: their sizes, and what is measured on them."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import perpkit as pk
from perpkit.experiments.scale.peft_lora import peft_lora
from perpkit.experiments.scale.pruning import pruning_seconds, reconstruction_seconds
from perpkit.experiments.scale.rows import asked_for, total_memory
from perpkit.experiments.scale.shapes import SHAPES, shape
from perpkit.experiments.scale.throughput import METHODS, Setting, fits, published_ratio, throughput
from perpkit.experiments.scale.weights import empty_model, random_model, retraining_bytes
from perpkit.pruning.prune import prune
from perpkit.retraining.layerwise.reconstruct import reconstruct

SMALL = {"layers": 1, "batch": 1, "length": 8, "steps": 1, "warmup": 1, "device": "cpu"}

# As counted by those who published the weights.
PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.fixture
def tiny_shape(monkeypatch):
    """A model of each kind that is made in a moment."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    opt = {**small, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    monkeypatch.setitem(SHAPES, "opt-125m", ("opt", opt))
    monkeypatch.setitem(SHAPES, "opt-2.7b", ("opt", opt))
    narrow = {**opt, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    monkeypatch.setitem(SHAPES, "opt-350m", ("opt", narrow))
    llama = {**small, "intermediate_size": 48}
    monkeypatch.setitem(SHAPES, "llama-2-7b", ("llama", llama))
    mistral = {**llama, "num_key_value_heads": 1, "max_position_embeddings": 64}
    monkeypatch.setitem(SHAPES, "mistral-7b", ("mistral", {**mistral, "sliding_window": 16}))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(SHAPES, "mixtral-8x7b", ("mixtral", {**mistral, **experts}))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_the_published_weights(name):
    assert sum(parameter.numel() for parameter in empty_model(name).parameters()) == PARAMETERS[name]


def test_layers_cut_a_shape():
    assert len(empty_model("mistral-7b", layers=3).model.layers) == 3
    for layers in (0, 33):
        with pytest.raises(ValueError, match=f"layers is {layers}; mistral-7b has 32"):
            shape("mistral-7b", layers)


def test_an_unknown_shape_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'opt-2\.7b'"):
        shape("opt-2.7")


@pytest.mark.parametrize("name", ["opt-125m", "llama-2-7b"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_make_a_model_that_computes(tiny_shape, name, dtype):
    model = random_model(name, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    tokens = torch.arange(20).view(2, 10)
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    # Of a model that knows nothing of its 99 tokens.
    assert loss == pytest.approx(torch.tensor(99.0).log().item(), abs=0.3)
    again = random_model(name, dtype=dtype, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    tied = name == "opt-125m"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_every_way_to_retrain_is_measured(tiny_shape):
    rows = list(throughput("opt-125m", **SMALL))
    assert [(row["checkpointing"], row["method"]) for row in rows] == [
        (way, method) for way in (False, True) for method in METHODS
    ]
    assert [row["error"] for row in rows if row["error"]] == []
    for row in rows:
        full = next(r for r in rows if r["method"] == "full" and r["checkpointing"] == row["checkpointing"])
        assert row["ratio"] == row["tokens_per_second"] / full["tokens_per_second"]
        assert row["peak_memory"] > 0
    shares = {row["method"]: row["trainable_share"] for row in rows}
    assert shares["full"] == 1
    assert shares["mask_lora"] == shares["lora"] == shares["peft lora"] > shares["biases+norms"]


# Of the whole, where 16 is the rank: the experts of a mixture have factors of their own.
ADAPTED = {
    "opt-350m": (2 * 16 * (4 * 64 + 2 * 96), 2 * 16 * 2 * 64 + 16 * (16 + 99)),
    "mistral-7b": (2 * 16 * (2 * 64 + 2 * 48 + 3 * 80), None),
    "mixtral-8x7b": (2 * 16 * (2 * 64 + 2 * 48 + 4 * (32 + 96 + 48 + 32)), None),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_every_kind_of_model_is_retrained_with_all_its_matrices(tiny_shape, name):
    methods = ("full", "norms", "mask_lora", "lora", "peft lora", "perp")
    rows = {row["method"]: row for row in throughput(name, methods, (True,), **{**SMALL, "layers": None})}
    everywhere, perp = ADAPTED[name]
    if perp is None:
        assert "no biases" in rows.pop("perp")["error"]
    assert [row["error"] for row in rows.values()] == [None] * len(rows)
    trained = {method: round(row["trainable_share"] * row["parameters"]) for method, row in rows.items()}
    assert trained["mask_lora"] == trained["lora"] == trained["peft lora"] == everywhere
    if perp is not None:
        (few,) = throughput(name, ("biases+norms",), (False,), **{**SMALL, "layers": None})
        assert trained["perp"] - perp == round(few["trainable_share"] * few["parameters"])


def test_a_matrix_that_peft_leaves_out_is_an_error(tiny_shape):
    model = random_model("mixtral-8x7b", device="cpu")
    with pytest.raises(ValueError, match=r"PEFT puts no LoRA on model\.layers\.7\.mlp\.experts\.up_proj$"):
        peft_lora(model, ["model.layers.0.self_attn.q_proj", "model.layers.7.mlp.experts.up_proj"], 4, 8.0)


def test_a_published_ratio_is_that_of_its_own_method_and_model():
    given = {"device": "cpu"}
    ratios = {method: published_ratio(Setting("opt-2.7b", method, **given)) for method in METHODS}
    assert {method: ratio for method, ratio in ratios.items() if ratio} == {
        "biases+norms": 7600 / 3500,
        "perp": 6400 / 3500,
    }
    assert published_ratio(Setting("opt-2.7b", "perp", layers=1, **given)) is None
    assert [published_ratio(Setting(name, "perp", **given)) for name in ("llama-2-7b", "opt-6.7b")] == [
        None,
        None,
    ]


def test_ratios_are_to_full_retraining_wherever_it_is_named(tiny_shape):
    rows = list(throughput("opt-125m", ("biases", "norms", "full"), (False, True), **SMALL))
    assert [row["method"] for row in rows] == ["full", "biases", "norms"] * 2
    assert all(row["ratio"] for row in rows)


def test_known_rows_are_not_measured_again_and_ratios_are_to_them(tiny_shape):
    (full,) = throughput("opt-125m", ("full",), (False,), **SMALL)
    known = {asked_for(full): {**full, "tokens_per_second": 10.0}}
    first, biases = throughput("opt-125m", ("biases", "full"), (False,), known=known, **SMALL)
    assert first["tokens_per_second"] == 10.0
    assert biases["ratio"] == biases["tokens_per_second"] / 10.0
    (again,) = throughput("opt-125m", ("full",), (False,), known=known, **{**SMALL, "batch": 2})
    assert again["tokens_per_second"] != 10.0
    # What has failed may go well now.
    known = {asked_for(full): {**full, "tokens_per_second": None, "error": "out of memory"}}
    (again,) = throughput("opt-125m", ("full",), (False,), known=known, **SMALL)
    assert again["error"] is None


def test_a_row_says_what_memory_the_device_has(tiny_shape, monkeypatch):
    card = SimpleNamespace(total_memory=80)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    assert total_memory("cuda:0") == 80
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert total_memory("cpu") == 12288
    (row,) = pruning_seconds("opt-125m", ("magnitude",), samples=1, length=8, device="cpu")
    assert row["device_memory"] == 12288
    monkeypatch.delattr("os.sysconf")
    assert total_memory("cpu") is None


def test_a_warm_up_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="warmup is -1"):
        Setting("opt-125m", "full", warmup=-1)


def test_tokens_a_second_count_the_timed_steps_alone(tiny_shape, monkeypatch):
    """A clock whose n-th look comes n seconds after the one before."""
    ticks = (n * (n + 1) / 2 for n in range(1000))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("perpkit.experiments.scale.throughput.time", clock)
    given = {**SMALL, "steps": 4, "warmup": 3, "batch": 2}
    (row,) = throughput("opt-125m", ("peft lora",), (False,), **given)
    assert row["tokens_per_second"] == 2 * 8 * 4 / (4 + 5 + 6 + 7)
    assert (row["slowest_step"], row["fastest_step"]) == (2 * 8 / 7, 2 * 8 / 4)


def test_what_cannot_be_had_is_said_in_its_row(tiny_shape):
    rows = list(throughput("llama-2-7b", ("biases", "norms"), (False,), **SMALL))
    assert rows[0]["error"] == "a LlamaForCausalLM has no biases; choose another subset"
    assert rows[0]["tokens_per_second"] is None
    assert rows[0]["ratio"] is None
    assert rows[1]["error"] is None


def live_bytes() -> int:
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter))
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_retraining_takes_what_is_said_beforehand(dtype):
    others, measured = live_bytes(), []
    model = random_model("opt-125m", layers=1, dtype=dtype, device="cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    few, full = (retraining_bytes(parameters, dtype, full=each) for each in (False, True))
    assert live_bytes() - others == pytest.approx(few, rel=1e-3)
    masks = prune(model, "magnitude", sparsity=0.5, progress=False)
    given = {"masks": masks, "subset": "full", "steps": 2, "batch": 1, "lr": 1e-3, "progress": False}
    pk.retrain(model, torch.randint(50000, (2, 8)), on_step=lambda *_: measured.append(live_bytes()), **given)
    kept = sum(mask.nbytes for mask in masks.values())
    assert measured[-1] - others == pytest.approx(full + kept, rel=0.01)


def test_too_large_a_model_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("perpkit.experiments.scale.throughput.free_memory", lambda where: 40 * 2**30)
    with pytest.raises(ValueError, match="needs more than 54 GiB; 40 GiB are free"):
        fits(Setting("opt-2.7b", "full", device="cpu"))
    fits(Setting("opt-2.7b", "biases", device="cpu"))
    monkeypatch.setattr("perpkit.experiments.scale.throughput.free_memory", lambda where: None)
    fits(Setting("opt-30b", "full", device="cpu"))


def test_pruning_and_reconstruction_are_timed(tiny_shape):
    given = {"samples": 2, "length": 8, "device": "cpu", "dtype": "float32"}
    rows = [*pruning_seconds("opt-125m", **given), *reconstruction_seconds("opt-125m", **given)]
    assert [(row["what"], row["method"]) for row in rows] == [
        *(("prune", name) for name in ("magnitude", "wanda", "ria", "sparsegpt", "sparsefw")),
        *(("reconstruct", name) for name in ("matrix", "submodule", "block")),
    ]
    assert all(row["seconds"] > 0 and row["peak_memory"] > 0 for row in rows)


def test_a_row_of_pruning_that_cannot_be_had_leaves_the_others(tiny_shape, monkeypatch):
    def short(pruned, criterion, **given):
        if criterion == "wanda":
            # A CPU's own words: no memory is as large as that.
            torch.empty(2**60)
        if criterion == "ria":
            raise RuntimeError("a kernel has failed\nand more")
        return prune(pruned, criterion, **given)

    monkeypatch.setattr("perpkit.experiments.scale.pruning.prune", short)
    given = {"samples": 2, "length": 8, "device": "cpu", "dtype": "float32"}
    rows = list(pruning_seconds("opt-125m", **given))
    errors = [None, "out of memory", "RuntimeError: a kernel has failed", None, None]
    assert [row["error"] for row in rows] == errors
    assert [row["seconds"] is None for row in rows] == [False, True, True, False, False]


def test_a_row_of_reconstruction_that_cannot_be_had_leaves_the_others(tiny_shape, monkeypatch):
    def short(*given, unit, **more):
        if unit == "matrix":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reconstruct(*given, unit=unit, **more)

    monkeypatch.setattr("perpkit.experiments.scale.pruning.reconstruct", short)
    rows = list(reconstruction_seconds("opt-125m", samples=2, length=8, device="cpu", dtype="float32"))
    assert [row["error"] for row in rows] == ["out of memory", None, None]
