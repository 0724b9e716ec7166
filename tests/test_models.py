"""Loading models: what is found, what is refused, and in which words."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perpkit.pruning.layers import prunable_matrices
from perpkit.sources.embedded import data_folder
from perpkit.sources.models import load_model


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model in a folder of the user's."""
    return shutil.copytree(data_folder("models", "tiny-opt"), tmp_path / "mine")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- what is loaded ---------------------------------------------------------------------------------


def test_the_embedded_model_is_ready_for_evaluation(generators_unchanged):
    model, tokenizer = load_model("tiny-opt", device="cpu")
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_every_call_gives_a_model_of_its_own(loaded):
    other, _ = load_model("tiny-opt", device="cpu")
    for one, another in zip(loaded[0].parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)
        assert one.data_ptr() != another.data_ptr()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_weights_come_as_the_dtype_asked_for(dtype, loaded):
    model, _ = load_model("tiny-opt", dtype=dtype, device="cpu")
    wanted = {"bfloat16": torch.bfloat16}.get(dtype, dtype)
    for one, another in zip(loaded[0].parameters(), model.parameters(), strict=True):
        assert another.dtype == wanted
        assert torch.equal(one.to(wanted), another)


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"'int8'; the dtypes are float32, bfloat16, float16, float64"):
        load_model("tiny-opt", dtype="int8")


@torch.no_grad()
def test_a_local_folder_is_loaded_however_it_is_named(folder, loaded, text, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    wanted = loaded[0](text.test[:2]).logits
    for name in (folder, str(folder), "mine", "./mine", "~/mine"):
        model, tokenizer = load_model(name, device="cpu")
        assert torch.equal(model(text.test[:2]).logits, wanted)
        assert tokenizer("It is a").input_ids == loaded[1]("It is a").input_ids


def test_a_model_saved_by_the_user_is_loaded_again(make_model, tokenizer, tmp_path):
    model = make_model("llama", vocab_size=1024)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    again, _ = load_model(tmp_path / "llama", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


LOADING_TOGETHER = """
import threading
import perpkit as pk

loaded = []
threads = [threading.Thread(target=lambda: loaded.append(pk.load_model("tiny-opt"))) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
weights = [model.lm_head.weight for model, _ in loaded]
assert len(loaded) == 6
assert all((weight == weights[0]).all() for weight in weights)
"""


def test_many_threads_may_load_at_once():
    # Of its own: what goes wrong in transformers then stays wrong in this process.
    program = [sys.executable, "-c", LOADING_TOGETHER]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-opt-outliers", Path("tiny-opt-outliers")])
def test_the_outliers_variant_is_the_same_function_from_other_weights(loaded, text, name):
    planted, _ = load_model(name, device="cpu")
    before, after = loaded[0](text.test[:8]).logits, planted(text.test[:8]).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    read = [
        name for name in prunable_matrices(planted) if not name.endswith(("out_proj.weight", "fc2.weight"))
    ]
    assert len(read) == 4 * planted.config.num_hidden_layers
    for name in read:
        old, new = loaded[0].get_parameter(name), planted.get_parameter(name)
        assert (new - old).norm() > 0.2 * old.norm(), name


def test_the_callers_progress_bars_come_back():
    from transformers.utils import logging

    load_model("tiny-opt", device="cpu")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        load_model("tiny-opt", device="cpu")
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


# --- what is refused --------------------------------------------------------------------------------


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"mine' has no config\.json; it is no transformers model"):
        load_model(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"mine' has a config\.json but no weights \(\*\.safetensors\)"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_pickle_is_refused_unopened_and_the_way_out_is_named(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "opened")))
    with pytest.raises(ValueError, match=rf"pickle \({name}\).*refused.*save_pretrained\(new_folder\)"):
        load_model(folder)
    assert not (tmp_path / "opened").exists()


def test_a_pickle_beside_safetensors_is_not_opened(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "opened")))
    load_model(folder, device="cpu")
    assert not (tmp_path / "opened").exists()


def test_code_from_the_folder_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut off", "not safetensors", "empty"])
def test_damaged_weights_are_named(folder, damage):
    file = folder / "model.safetensors"
    content = {"cut off": file.read_bytes()[:-1000], "not safetensors": b"hello" * 100, "empty": b""}
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"cannot load .*mine'"):
        load_model(folder, device="cpu")


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot load .*mine'"):
        load_model(folder, device="cpu")


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ffn_dim": config["ffn_dim"] + 8}))
    with pytest.raises(ValueError, match=r"cannot load .*mine', its files do not fit together"):
        load_model(folder, device="cpu")


def test_an_unknown_architecture_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))
    with pytest.raises(ValueError, match=r"mine'.*perceptron"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cudda", "xla:0"])
def test_an_unknown_device_is_refused_with_the_known_ones(device):
    with pytest.raises(ValueError, match=f"unknown device '{device}'; this machine has cpu"):
        load_model("tiny-opt", device=device)


def test_the_weights_may_be_spread_by_what_there_is():
    model, _ = load_model("tiny-opt", device="auto")
    plain, _ = load_model("tiny-opt")
    assert not model.training
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_weights_that_lack_a_matrix_are_refused(folder):
    # transformers would fill it with random numbers and only say so in its log
    weights = load_file(folder / "model.safetensors")
    lost = "model.decoder.layers.0.fc1.weight"
    save_file(
        {name: w for name, w in weights.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=rf"mine' .*{lost}"):
        load_model(folder, device="cpu")


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"mine"):
        load_model(folder, device="cpu")


def test_a_tokenizer_that_does_not_fit(make_model, tokenizer, tmp_path):
    make_model("opt", vocab_size=1000).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small' has 1024 tokens but the model only 1000"):
        load_model(tmp_path / "small", device="cpu")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ValueError, match=r"is a file; name the folder that holds config\.json"):
        load_model(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "C:\\models"])
def test_a_path_that_does_not_exist_is_no_hub_id(name):
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(name)


@pytest.mark.parametrize("name", ["tiny-opts", "tinyopt", "tiny_opt"])
def test_a_near_miss_suggests_the_embedded_model(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean 'tiny-opt'"):
        load_model(name)


def test_a_near_miss_of_the_outliers_variant():
    with pytest.raises(ValueError, match="did you mean 'tiny-opt-outliers'"):
        load_model("tiny-opt-outlier")


def test_an_empty_name_lists_what_there_is():
    with pytest.raises(ValueError, match="did you mean 'tiny-opt' or 'tiny-opt-outliers'"):
        load_model("")


def test_somebodys_tiny_opt_on_the_hub_is_no_near_miss(monkeypatch):
    from perpkit.sources import models

    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match="the model 'somebody/tiny-opt' is not in the local cache"):
        load_model("somebody/tiny-opt")


def test_a_classifier_is_no_language_model():
    with pytest.raises(
        ValueError, match=r"is a classifier of images; load_classifier\('shapes-resnet'\) loads"
    ):
        load_model("shapes-resnet", device="cpu")


def test_weights_that_are_no_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[1] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"are damaged: (model\.)?{name} has 1 values that are NaN"):
        load_model(folder, device="cpu")
