"""One run: every input does what the call of its name does, and what rows share is computed once."""

import copy
import time
import weakref

import pytest
import task_parts
import torch

import perpkit as pk
from perpkit.experiments import retraining
from perpkit.experiments import run as running
from perpkit.experiments.run import run

SHORT = {"length": 16, "steps": 2, "batch": 2}


@pytest.fixture
def dense():
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    return model, pk.load_text("storyworld", tokenizer, length=16)


def reached(model, text) -> float:
    return pytest.approx(pk.perplexity(model, text.test), rel=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [
        {"pattern": "2:4"},
        {"group": "row", "sparsity": 0.6},
        {"allocation": "erk", "sparsity": 0.7},
        {"criterion": "wanda", "sparsity": 0.6},
        {"criterion": "random", "sparsity": 0.1, "seed": 3},
        {"criterion": "wanda", "allocation": "owl", "sparsity": 0.6},
        {"allocation": "owl", "sparsity": 0.6},
    ],
    ids=str,
)
def test_a_run_prunes_as_the_call_does(dense, inputs):
    model, text = dense
    row = run(pk.Experiment(length=16, **inputs))
    needed = text.calibration if inputs.get("criterion") == "wanda" or "owl" in inputs.values() else None
    masks = pk.prune(model, **{"criterion": "magnitude", **inputs}, calibration=needed)
    assert row["perplexity"] == reached(model, text)
    assert row["reached_sparsity"] == pytest.approx(masks.sparsity())


@pytest.mark.parametrize("unit", ["matrix", "block"])
def test_a_run_reconstructs_as_the_call_does_and_then_retrains(dense, unit):
    model, text = dense
    inputs = {"sparsity": 0.7, "unit": unit, "unit_steps": 3, "unit_lr": 0.01, "seed": 1, **SHORT}
    row = run(pk.Experiment(**inputs))
    original = copy.deepcopy(model)
    masks = pk.prune(model, "magnitude", sparsity=0.7)
    options = {} if unit == "matrix" else {"steps": 3, "lr": 0.01, "seed": 1}
    pk.reconstruct(model, original, masks, text.calibration, unit=unit, progress=False, **options)
    assert row["perplexity"] == reached(model, text)
    assert row["seconds_reconstruct"] > 0
    assert row["seconds"] == pytest.approx(
        row["seconds_prune"] + row["seconds_reconstruct"] + row["seconds_retrain"]
    )
    both = run(pk.Experiment(**inputs, retrain="biases", lr=0.01))
    settings = {"steps": 2, "batch": 2, "lr": 0.01, "seed": 1, "progress": False}
    pk.retrain(model, text.train, masks=masks, subset="biases", **settings)
    assert both["perplexity"] == reached(model, text)


@pytest.mark.parametrize("retrain", ["mask_lora", "biases+norms+lora_prune", "scale_lora", "lora"])
def test_adapters_are_attached_trained_and_merged(dense, retrain):
    model, text = dense
    row = run(pk.Experiment(sparsity=0.7, retrain=retrain, rank=2, lr=0.01, seed=1, **SHORT))
    masks = pk.prune(model, "magnitude", sparsity=0.7)
    kind = retrain.rpartition("+")[2]
    pk.attach(model, masks, kind, rank=2, alpha=4, seed=1)
    subset = retrain.replace(kind, "lora")
    assert row["trainable_share"] == pk.trainable_share(model, subset)
    settings = {"steps": 2, "batch": 2, "lr": 0.01, "seed": 1, "progress": False}
    pk.retrain(model, text.train, masks=masks, subset=subset, **settings)
    if kind != "lora":
        pk.merge(model)
    assert row["perplexity"] == reached(model, text)


def test_all_settings_of_the_retraining_are_passed_on(dense):
    model, text = dense
    settings = {"accumulate": 2, "schedule": "constant", "weight_decay": 0.5, "lr": 0.01, **SHORT}
    row = run(pk.Experiment(sparsity=0.6, retrain="biases", **settings))
    masks = pk.prune(model, "magnitude", sparsity=0.6)
    settings.pop("length")
    pk.retrain(model, text.train, masks=masks, subset="biases", progress=False, **settings)
    assert row["perplexity"] == reached(model, text)
    assert row["tokens_per_second"] * row["seconds_retrain"] == pytest.approx(2 * 2 * 2 * 16)


@pytest.mark.parametrize("retrain", ["biases", "mask_lora", "full"])
def test_a_retraining_for_which_memory_is_short_computes_activations_again(monkeypatch, retrain):
    experiment = pk.Experiment(sparsity=0.6, retrain=retrain, rank=2, lr=0.01, **SHORT)
    wanted = run(experiment)
    real, ways, models = retraining.retrain, [], []

    def short(*given, checkpointing, **more):
        ways.append(checkpointing)
        assert not any(model() for model in models), "the first model still takes the memory"
        models.append(weakref.ref(given[0]))
        if not checkpointing:
            # In its midst: what it has done to the model must not be seen afterwards.
            real(*given, checkpointing=False, **{**more, "steps": 1})
            time.sleep(3)
            raise torch.OutOfMemoryError("no room")
        return real(*given, checkpointing=True, **more)

    monkeypatch.setattr(retraining, "retrain", short)
    row = run(experiment)
    assert ways == [False, True]
    assert row["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    assert (row["checkpointing"], wanted["checkpointing"]) == (True, False)
    assert row["seconds_retrain"] < 3, "what was lost takes no part in the speed"


def test_a_retraining_for_which_memory_is_too_short_either_way_fails_with_its_own_error(monkeypatch):
    ways = []

    def too_short(*given, checkpointing, **more):
        ways.append(checkpointing)
        raise torch.OutOfMemoryError(f"no room {len(ways)}")

    monkeypatch.setattr(retraining, "retrain", too_short)
    with pytest.raises(torch.OutOfMemoryError, match="no room 2"):
        run(pk.Experiment(sparsity=0.6, retrain="biases", lr=0.01, **SHORT))
    assert ways == [False, True]
    # A model that has no checkpointing is not asked for it.
    monkeypatch.setattr(running, "has_gradient_checkpointing", lambda model: False)
    with pytest.raises(torch.OutOfMemoryError, match="no room 3"):
        run(pk.Experiment(sparsity=0.6, retrain="biases", lr=0.01, **SHORT))


def test_the_dtype_is_that_of_the_weights():
    whole, half = (run(pk.Experiment(length=16, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half["dense_perplexity"] != whole["dense_perplexity"]
    assert half["dense_perplexity"] == pytest.approx(whole["dense_perplexity"], rel=0.02)


@pytest.mark.slow
def test_tasks_are_asked_of_the_pruned_and_of_the_dense_model():
    experiment = pk.Experiment(length=128, sparsity=0.9, tasks="agreement,counting")
    row = run(experiment)
    model, tokenizer = pk.load_model("tiny-opt")
    asked = pk.zero_shot(model, tokenizer, tasks="agreement,counting", progress=False)
    assert row["dense_accuracy"] == pytest.approx(asked.accuracy.mean())
    pk.prune(model, "magnitude", sparsity=0.9)
    asked = pk.zero_shot(model, tokenizer, tasks="agreement,counting", progress=False)
    assert row["accuracy"] == pytest.approx(asked.accuracy.mean())
    assert [row["accuracy_agreement"], row["accuracy_counting"]] == pytest.approx(asked.accuracy.tolist())
    assert 0 < row["accuracy_stderr"] < 0.1
    assert row["accuracy"] < row["dense_accuracy"]
    assert "dense_accuracy" not in run(pk.Experiment(length=16))


# --- sharing --------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often each function is called, from an empty memory on."""
    running.forget()
    counted = {}
    for name in ("load_model", "load_text", "prune", "reconstruct", "retrain", "perplexity"):
        where = retraining if name == "retrain" else running
        real = getattr(where, name)

        def counting(*args, name=name, real=real, **kwargs):
            counted[name] = counted.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, counting)
    yield counted
    running.forget()


def test_rows_share_the_dense_the_pruned_and_the_reconstructed_model(calls, tmp_path):
    grid = pk.Grid(
        seed=range(2), unit=[None, "matrix"], retrain=["none", "biases"], sparsity=[0.3, 0.6], **SHORT
    )
    assert len(grid) == 2 * 2 * (1 + 2)
    results = pk.sweep(grid, store=tmp_path / "results.sqlite", progress=False)
    assert calls == {
        "load_model": 1,
        "load_text": 1,
        "prune": 2,
        "reconstruct": 2,
        "retrain": 8,
        "perplexity": 1 + 12,
    }
    # The price of what is shared stands in every row.
    assert results.groupby("sparsity").seconds_prune.nunique().tolist() == [1, 1]


def test_rows_that_ask_share_the_models_of_rows_that_do_not(calls, tmp_path):
    task_parts.write(tmp_path, "rte")
    for tasks in (None, "rte"):
        run(pk.Experiment(tasks=tasks, tasks_dir=str(tmp_path), length=16))
    assert calls["load_model"] == calls["prune"] == 1
    # Other questions are asked of the dense model anew.
    task_parts.write(tmp_path, "rte", task_parts.QUESTIONS["rte"][:1])
    row = run(pk.Experiment(tasks="rte", tasks_dir=str(tmp_path), length=16))
    assert row["dense_accuracy"] in (0.0, 1.0)
    assert calls["load_model"] == 1


def test_what_is_shared_is_as_it_was_after_every_row(calls):
    def weights(shared):
        return {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}

    run(pk.Experiment(unit="matrix", **SHORT))
    values = [*running._dense._values.values(), *running._pruned._values.values()]
    assert len(values) == 3
    before = [weights(value) for value in values]
    for retrain in ("full", "head", "mask_lora", "embeddings"):
        run(pk.Experiment(unit="matrix", retrain=retrain, rank=2, lr=0.01, **SHORT))
    for value, state in zip(values, before, strict=True):
        assert list(value.model.state_dict()) == list(state)
        assert all(torch.equal(value.model.state_dict()[name], state[name]) for name in state)


def test_random_pruning_of_another_seed_is_another_model(calls):
    for seed in (0, 1, 1):
        run(pk.Experiment(criterion="random", sparsity=0.1, seed=seed, length=16))
    assert calls["prune"] == 2


def test_weights_that_change_on_disk_belong_to_other_models(calls, tmp_path):
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        for sparsity in (0.1, 0.2):
            run(pk.Experiment(model=str(tmp_path), sparsity=sparsity, length=16))
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.neg_()
    assert calls["load_model"] == 2
    assert calls["prune"] == 4
