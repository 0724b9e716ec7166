"""Loading classifiers: files of CIFAR ResNets, folders of transformers, torchvision, and what is refused."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from perpkit.evaluation.accuracy import accuracy
from perpkit.sources import classifiers, models
from perpkit.sources.classifiers import load_classifier
from perpkit.sources.images import load_images
from perpkit.sources.resnet import DEPTHS, CifarResNet


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def network(depth=20, classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        return CifarResNet(depth, classes).eval()


FORMS = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state, "best_prec1": 91.7, "note": "a note"},
    "beside an optimiser": lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}}},
    "parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "before batches were counted": lambda state: {k: v for k, v in state.items() if "tracked" not in k},
}


# --- files --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_a_resnet_of_any_depth(tmp_path, images, depth, form):
    model = network(depth, classes=7)
    torch.save(FORMS[form](model.state_dict()), tmp_path / "weights.pt")
    loaded = load_classifier(tmp_path / "weights.pt", device="cpu")
    assert torch.equal(loaded(images), model(images))
    assert not any(module.training for module in loaded.modules())
    assert isinstance(loaded, CifarResNet)


@torch.no_grad()
def test_loading_leaves_the_global_generators_alone(generators_unchanged):
    load_classifier("shapes-resnet")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
def test_whatever_the_suffix_and_however_it_is_named(tmp_path, images, suffix, monkeypatch):
    model, file = network(), tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(model.state_dict(), file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in (file, str(file), file.name, f"./{file.name}", f"~/{file.name}"):
        assert torch.equal(load_classifier(name, device="cpu")(images), model(images))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_weights_come_as_the_dtype_asked_for(tmp_path, dtype):
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    loaded = load_classifier(tmp_path / "weights.pt", dtype=dtype, device="cpu")
    assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{str(dtype).removeprefix('torch.')}"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {"features.0.weight": torch.zeros(2)},
            r"lacks conv1.weight, bn1.weight, bn1.bias, …, and it",
        ),
        (lambda s: {**s, "fc.weight": torch.zeros(2)}, r"layers: it has fc\.weight$"),
        (lambda s: {k: v for k, v in s.items() if k != "bn1.weight"}, r"layers: it lacks bn1\.weight$"),
        (
            lambda s: {k: v for k, v in s.items() if "layer1.2" not in k},
            r"20, 32, 44, 56 layers: it lacks layer1\.2",
        ),
        (
            lambda s: {**s, "conv1.weight": torch.zeros(16, 1, 3, 3)},
            r"conv1.weight has shape \(16, 1, 3, 3\), not",
        ),
        (
            lambda s: {**s, "linear.weight": torch.zeros(10, 32)},
            r"linear.weight has shape \(10, 32\), not \(10, 64",
        ),
        (lambda s: {**s, "linear.weight": torch.zeros(())}, r"linear.weight has shape \(\), not"),
        (lambda s: {}, "lacks conv1.weight"),
        (lambda s: {"state_dict": s, "module": 1} and [s], "holds no weights by name; save model.state_dict"),
        (lambda s: {"epoch": 3}, "holds no weights by name"),
        (lambda s: {"net": s, "epoch": 3}, r"its keys are 'net', 'epoch'\).* under 'state_dict' or 'model'"),
        (
            lambda s: {**s, "layer2.0.bn1.running_var": torch.full((32,), torch.nan)},
            r"are damaged: layer2\.0\.bn1\.running_var has 32 values that are NaN",
        ),
        (lambda s: {0: torch.zeros(3)}, "holds no weights by name"),
        (lambda s: torch.zeros(3), "holds no weights by name"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, words):
    torch.save(change(network().state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=words):
        load_classifier(tmp_path / "weights.pt", device="cpu")


def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": network().state_dict(), "x": Touch(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"weights\.pt' is damaged, or a pickle of more than tensors, which can"
    ):
        load_classifier(tmp_path / "weights.pt", device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_damaged_files(tmp_path, suffix, kept):
    file = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(network().state_dict(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot read .*weights|weights\.pt' is damaged"):
        load_classifier(file, device="cpu")


@pytest.mark.parametrize("name", ["none.pt", "./none.pt", "here/none.pt", "/nowhere/none.safetensors"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ValueError, match="there is no file "):
        load_classifier(name, device="cpu")


# --- transformers -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_a_folder_of_transformers(tmp_path, make_vision, images, kind):
    model = make_vision(kind)
    model.save_pretrained(tmp_path / "mine")
    loaded = load_classifier(tmp_path / "mine", device="cpu")
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert not loaded.training
    assert {
        p.dtype for p in load_classifier(tmp_path / "mine", dtype="bfloat16", device="cpu").parameters()
    } == {torch.bfloat16}


def test_folders_that_are_no_classifier(tmp_path, make_vision, make_model):
    make_model("opt").save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match=r"cannot load '.*language', its files do not fit together: Unrecog"):
        load_classifier(tmp_path / "language", device="cpu")
    make_vision("resnet").resnet.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"weights of '.*headless' are incomplete: no classifier"):
        load_classifier(tmp_path / "headless", device="cpu")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"as a pickle .*: AutoModelForImageClassification\.from_pretrained"):
        load_classifier(tmp_path / "pickled", device="cpu")


def test_unknown_names():
    with pytest.raises(
        ValueError, match=r"'shapes-resnt'; did you mean 'shapes-resnet'.*'microsoft/resnet-50'"
    ):
        load_classifier("shapes-resnt", device="cpu")
    with pytest.raises(ValueError, match=r"there is no folder '\./nowhere'"):
        load_classifier("./nowhere", device="cpu")
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load_classifier("shapes-resnet", dtype="int8")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        load_classifier("shapes-resnet", device="tpu")


def test_a_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    with pytest.raises(
        ValueError, match="the model 'microsoft/resnet-50' is not in the local cache and the hub"
    ) as refused:
        load_classifier("microsoft/resnet-50", device="cpu")
    assert "embedded classifier 'shapes-resnet' and images 'shapes'" in str(refused.value)
    assert "'tiny-opt'" not in str(refused.value)


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-opt-outliers"])
def test_a_language_model_is_no_classifier(name):
    with pytest.raises(ValueError, match=rf"language model; load_model\('{name}'\) loads it"):
        load_classifier(name, device="cpu")


# --- torchvision --------------------------------------------------------------------------------------------


def test_alexnet_needs_torchvision(monkeypatch):
    monkeypatch.setattr(classifiers, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="alexnet comes from torchvision, which is not installed; install the"
    ):
        load_classifier("alexnet", device="cpu")


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in: its alexnet is a linear layer, and it remembers how the weights were asked for."""
    asked = {}

    class Weights:
        @staticmethod
        def get_state_dict(**options):
            asked.update(options)
            return {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}

    package, inner = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.models = inner
    inner.get_model_weights = lambda name: types.SimpleNamespace(DEFAULT=Weights)
    inner.get_model = lambda name: torch.nn.Linear(3, 2)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", inner)
    return inner, asked


def test_alexnet_comes_with_its_weights_and_nothing_is_unpickled(torchvision):
    model = load_classifier("alexnet", device="cpu")
    assert model.weight.tolist() == [[1.0] * 3] * 2
    assert torchvision[1]["weights_only"] is True
    assert torchvision[1]["check_hash"] is True


def test_a_torchvision_that_fails(torchvision):
    del torchvision[0].get_model
    with pytest.raises(ValueError, match=r"cannot load 'alexnet' through torchvision: .*get_model"):
        load_classifier("alexnet", device="cpu")


# --- the public checkpoint ----------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "published"), [("resnet20-12fca82f.th", 0.810), ("resnet20_jpeg_ft2ep.pt", 0.857)]
)
def test_the_public_checkpoints_classify_as_published(real_data, name, published):
    images = load_images(real_data / "cifar10", counts={"train": 10}, progress=False)
    model = load_classifier(real_data / "cifar10" / name, device="cpu")
    # with the mean and deviation that the first was trained with: 80.5 and 86.1 %
    assert accuracy(model, images.test) == pytest.approx(published, abs=0.006)
