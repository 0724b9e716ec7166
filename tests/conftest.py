"""What the tests share: small models, the embedded model loaded once, and a store of their own."""

import copy
import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
VOCABULARY, CONTEXT = 64, 16
ARCHITECTURES = (
    "opt",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "bloom",
    "falcon",
)

VISION = ("resnet", "convnext", "cifar", "sequential")

hypothesis.settings.register_profile("perpkit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("perpkit")


# Files that take minutes. Begun last, they would leave one worker to itself.
LONGEST = ("test_notebooks.py", "browser", "test_paper_figures.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that workers are done at about the same time."""

    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONGEST) if name in item.path.parts), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread: the models are so small that more only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def store_in_tmp(tmp_path, monkeypatch):
    """No test reads or writes the rows of the person who runs it."""
    monkeypatch.setenv("PERPKIT_STORE", str(tmp_path / "results.sqlite"))


@pytest.fixture
def generators_unchanged():
    """The test leaves the global random generators as it found them."""

    def states() -> tuple:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy generator is the global one
        return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()

    before = states()
    yield
    for generator, now, then in zip(("Python", "numpy", "torch"), states(), before, strict=True):
        assert now == then, f"the global generator of {generator} has moved"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, which is not part of the project."""
    named = os.environ.get("PERPKIT_REAL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"*** REAL DATA NOT TESTED: {folder} is no folder; name one with PERPKIT_REAL_DATA ***")
    return folder


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def loaded():
    """The embedded model and its tokenizer, loaded once; not to be changed."""
    from perpkit.sources.models import load_model

    return load_model("tiny-opt", device="cpu")


@pytest.fixture
def tiny_opt(loaded):
    """A copy of the embedded model, free to be pruned and retrained."""
    return copy.deepcopy(loaded[0])


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def text(tokenizer):
    """A little of the story world."""
    from perpkit.sources.text import load_text

    return load_text("storyworld", tokenizer, windows={"train": 64, "calibration": 8, "test": 24})


@pytest.fixture(scope="session")
def asked():
    """Eight hundred questions for each ability."""
    from perpkit.sources.storyworld import ABILITIES, questions

    return {ability: questions(ability, 800) for ability in ABILITIES}


@pytest.fixture(scope="session")
def make_model():
    """Build a tiny random model of any architecture: `make_model("opt", dropout=0.1)`."""
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    wide = {**shape, "max_position_embeddings": CONTEXT, "intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    settings = {
        "opt": {
            **{**shape, "max_position_embeddings": CONTEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
            **special,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.2,
        },
        "llama": {**wide, "num_key_value_heads": 2, "initializer_range": 0.2},
        "mistral": {**wide, "num_key_value_heads": 2},
        # So small a window that it hides tokens, where an architecture has one.
        "mixtral": {
            **{**wide, "num_key_value_heads": 2, "sliding_window": 8},
            **{"num_local_experts": 4, "num_experts_per_tok": 2},
        },
        "qwen2": {**wide, "num_key_value_heads": 2},
        "qwen3": {**wide, "num_key_value_heads": 2, "head_dim": 8},
        "qwen3_moe": {
            **{**wide, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24},
            **{"num_experts": 6, "num_experts_per_tok": 2},
        },
        "gemma": {**wide, "num_key_value_heads": 2, "head_dim": 8},
        "gemma2": {**wide, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        "gemma3_text": {
            **{**wide, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gpt2": {
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
            **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1},
        },
        "gpt_neox": wide,
        "phi3": {**wide, **special, "num_key_value_heads": 2},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        "falcon": shape,
    }

    def make(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
        config = transformers.AutoConfig.for_model(architecture, **{**settings[architecture], **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            # A fresh bias is zero and a fresh gain one: make all of them matter.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_vision():
    """Build a small random network for images `[n, 3, 32, 32]`: `make_vision("resnet")`."""
    from torch import nn

    def make(kind: str, *, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _vision(kind)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    # Statistics and gains as training leaves them, so that all of them matter.
                    nn.init.uniform_(module.running_mean, -0.2, 0.2)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.2, 0.2)
        return model.eval()

    return make


def _vision(kind: str):
    import transformers
    from torch import nn

    from perpkit.sources.resnet import CifarResNet

    if kind == "cifar":
        return CifarResNet(20)
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=10))
    if kind == "convnext":
        sizes = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2}
        return transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(**sizes, num_labels=10)
        )
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2, padding_mode="reflect"), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    )


@pytest.fixture(params=VISION)
def any_vision(request, make_vision):
    """A small random network of every kind for images, one after the other."""
    return make_vision(request.param)


@pytest.fixture
def images():
    """Random images `[5, 3, 32, 32]`."""
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=ARCHITECTURES)
def any_model(request, make_model):
    """A tiny random model of every architecture, one after the other."""
    return make_model(request.param)


@pytest.fixture
def windows():
    """Random token windows `[12, 16]` for the tiny random models."""
    return torch.randint(VOCABULARY, (12, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_scale(monkeypatch):
    """The scale "quick" of the papers' figures takes seconds."""
    from paper_parts import TINY

    from perpkit.experiments.paper.scales import SCALES

    monkeypatch.setitem(SCALES, "quick", TINY)
