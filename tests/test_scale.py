"""Models of real shapes with random weights: their sizes, and what is measured on them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from perpkit.cli import main
from perpkit.experiments.scale.pruning import pruning_seconds, reconstruction_seconds
from perpkit.experiments.scale.shapes import SHAPES, shape
from perpkit.experiments.scale.throughput import METHODS, Setting, fits, throughput
from perpkit.experiments.scale.weights import empty_model, random_model
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
    monkeypatch.setitem(SHAPES, "llama-2-7b", ("llama", {**small, "intermediate_size": 48}))


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
    published = {row["method"]: row["published_ratio"] for row in rows if row["published_ratio"]}
    assert published == {
        "biases+norms": pytest.approx(2.171, abs=1e-3),
        "mask_lora": pytest.approx(1.829, abs=1e-3),
    }


def test_a_warm_up_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="warmup is -1"):
        Setting("opt-125m", "full", warmup=-1)


def test_tokens_a_second_count_the_timed_steps_alone(tiny_shape, monkeypatch):
    """A clock that moves one second between two looks at it."""
    ticks = iter(range(1000))
    monkeypatch.setattr("perpkit.experiments.scale.throughput.time.perf_counter", lambda: float(next(ticks)))
    given = {**SMALL, "steps": 4, "warmup": 3, "batch": 2}
    (row,) = throughput("opt-125m", ("peft lora",), (False,), **given)
    assert row["tokens_per_second"] == 2 * 8 * 4 / 4


def test_what_cannot_be_had_is_said_in_its_row(tiny_shape):
    rows = list(throughput("llama-2-7b", ("biases", "norms"), (False,), **SMALL))
    assert "no biases" in rows[0]["error"] or "biases" in rows[0]["error"]
    assert rows[0]["tokens_per_second"] is None
    assert rows[0]["ratio"] is None
    assert rows[1]["error"] is None


def test_too_large_a_model_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("perpkit.experiments.scale.throughput.free_memory", lambda where: 40 * 2**30)
    with pytest.raises(ValueError, match="needs more than 44 GiB; 40 GiB are free"):
        fits(Setting("opt-2.7b", "full", device="cpu"))
    fits(Setting("opt-2.7b", "biases", device="cpu"))
    monkeypatch.setattr("perpkit.experiments.scale.throughput.free_memory", lambda where: None)
    fits(Setting("opt-30b", "full", device="cpu"))


def test_pruning_and_reconstruction_are_timed(tiny_shape):
    given = {"samples": 2, "length": 8, "device": "cpu", "dtype": "float32"}
    rows = [*pruning_seconds("opt-125m", **given), *reconstruction_seconds("opt-125m", **given)]
    assert [row["what"] for row in rows] == [
        *("prune: magnitude", "prune: wanda", "prune: ria", "prune: sparsegpt"),
        *("reconstruct a block: matrix", "reconstruct a block: submodule", "reconstruct a block: block"),
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
    errors = [None, "out of memory", "RuntimeError: a kernel has failed", None]
    assert [row["error"] for row in rows] == errors
    assert [row["seconds"] is None for row in rows] == [False, True, True, False]
    done = call("--model", "opt-125m", "--what", "prune", "--length", 8, "--samples", 2, "--device", "cpu")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[2].split() == ["prune:", "wanda", "out", "of", "memory"]


def test_a_row_of_reconstruction_that_cannot_be_had_leaves_the_others(tiny_shape, monkeypatch):
    def short(*given, unit, **more):
        if unit == "matrix":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reconstruct(*given, unit=unit, **more)

    monkeypatch.setattr("perpkit.experiments.scale.pruning.reconstruct", short)
    rows = list(reconstruction_seconds("opt-125m", samples=2, length=8, device="cpu", dtype="float32"))
    assert [row["error"] for row in rows] == ["out of memory", None, None]


# --- the command ----------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_prints_a_line_for_each_row_and_writes_them(tiny_shape, tmp_path):
    out = tmp_path / "rows.csv"
    given = ["--model", "opt-125m", "--random-weights", "--length", 8, "--steps", 1, "--device", "cpu"]
    done = call(*given, "--methods", "full,biases+norms", "--no-checkpointing", "--out", out)
    assert done.exit_code == 0, done.output
    first, full, few = done.stdout.splitlines()
    assert first.startswith("opt-125m, random weights, bfloat16, ")
    assert full.startswith("full")
    assert "1.00 × full" in full
    assert few.endswith("(published 2.17)")
    assert len(out.read_text().splitlines()) == 3


def test_the_command_gives_scripts_a_document(tiny_shape):
    given = ["--model", "opt-125m", "--length", 8, "--samples", 2, "--device", "cpu", "--dtype", "float32"]
    done = call(*given, "--what", "prune,reconstruct", "--json")
    assert [row["what"].split(":")[0] for row in json.loads(done.stdout)["rows"]] == ["prune"] * 4 + [
        "reconstruct a block"
    ] * 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "opt-3b"], "unknown shape 'opt-3b'"),
        (["--model", "opt-125m", "--what", "fly"], "--what is 'fly'; of train, prune, reconstruct"),
        (["--model", "opt-125m", "--methods", "bias"], "--methods is 'bias'; of full, biases"),
        (["--model", "opt-125m", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--model", "opt-125m", "--device", "tpu"], "unknown device 'tpu'"),
        (["--model", "opt-125m", "--layers", 13], "layers is 13; opt-125m has 12"),
        (["--model", "opt-125m", "--length", 2049, "--what", "prune"], "length is 2049; opt-125m has 2048"),
        (["--model", "opt-125m", "--length", 0], "length is 0; opt-125m has 2048 positions"),
        (["--model", "opt-125m", "--samples", 0, "--what", "prune"], "samples is 0; it must be at least 1"),
        (["--model", "opt-125m", "--batch", 0], "batch is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(given, said):
    done = call(*given)
    assert done.exit_code == 1
    assert said in done.stderr
