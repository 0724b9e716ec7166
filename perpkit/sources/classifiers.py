"""Loading a classifier of images by embedded name, file, local folder or Hub id."""

import pickle
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .embedded import EMBEDDED_CLASSIFIERS, EMBEDDED_MODELS, data_folder
from .hub import EMBEDDED_VISION
from .models import check_complete, check_device, check_dtype, check_numbers, locate, reading
from .resnet import DEPTHS, CifarResNet

PICKLES = (".pt", ".pth", ".th")
SUFFIXES = (*PICKLES, ".safetensors")
# Where training scripts keep the weights beside their epoch and optimiser.
NESTED = ("state_dict", "model")
TORCHVISION = ("alexnet",)
EXAMPLE = "microsoft/resnet-50"


def load_classifier(
    name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None
) -> nn.Module:
    """Load a classifier of images for evaluation.

    `name` is `"shapes-resnet"` (embedded), a file `.safetensors`, `.pt`, `.pth` or `.th` with the weights of
    a ResNet for CIFAR-10 (20, 32, 44 or 56 layers, told by its keys; also nested under `state_dict` or
    `model` and prefixed `module.`, as the public ones are), a local folder in the transformers format with
    safetensors weights, a Hub id (ResNet-50, ConvNeXt, …), or `"alexnet"` where torchvision is installed. The
    weights come as `dtype`, on `device` or else on the GPU if there is one. Code from a repository or a file
    is never run.

    Raises ValueError for an unknown name, a file with more than tensors in it or the weights of another
    architecture, weights that are damaged or incomplete, and a hub that cannot be reached.

    >>> model = load_classifier("shapes-resnet", device="cpu")
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    dtype, device, name = check_dtype(dtype), check_device(device), str(name)
    path = Path(name).expanduser()
    if name in EMBEDDED_MODELS:
        raise ValueError(f"{name!r} is a language model; load_model({name!r}) loads it")
    if name in EMBEDDED_CLASSIFIERS:
        model: nn.Module = _cifar_resnet(data_folder("models", name, "model.safetensors"))
    elif path.suffix in SUFFIXES and not path.is_dir():
        model = _cifar_resnet(path)
    elif name in TORCHVISION:
        model = _torchvision(name)
    else:
        model = _transformers(name)
    check_numbers(name, model)
    return model.eval().to(device=device, dtype=dtype)


# --- ResNets for CIFAR-10 -----------------------------------------------------------------------------


def _cifar_resnet(path: Path) -> CifarResNet:
    """The network whose weights a file holds."""
    state = _state(path)
    blocks = {match[1] for key in state if (match := re.match(r"layer1\.(\d+)\.", key))}
    depth = 6 * len(blocks) + 2
    head = state.get("linear.weight")
    classes = len(head) if head is not None and head.ndim else 10
    # Its first weights, of no use here, are drawn from the global generator.
    with torch.random.fork_rng(devices=[]):
        model = CifarResNet(depth if depth in DEPTHS else 20, classes)
    wanted = model.state_dict()
    # Checkpoints from before PyTorch 0.4.1 do not count batches, and nothing here reads the count.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    if missing or unknown or depth not in DEPTHS:
        apart = [f"it lacks {_first(missing)}"] if missing else []
        apart += [f"it has {_first(unknown)}"] if unknown else []
        raise ValueError(
            f"{str(path)!r} is no ResNet for CIFAR-10 of {', '.join(map(str, DEPTHS))} layers: "
            f"{', and '.join(apart)}"
        )
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise ValueError(
                f"{str(path)!r} is no ResNet for CIFAR-10: {key} has shape {tuple(value.shape)}, not "
                f"{tuple(wanted[key].shape)}"
            )
    model.load_state_dict(state, strict=False)
    return model


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file by name, without the nesting and prefix of training scripts."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    found: Any = _unpickled(path) if path.suffix in PICKLES else _safetensors(path)
    if isinstance(found, Mapping):
        found = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
    named = isinstance(found, Mapping) and all(isinstance(key, str) for key in found)
    if not named or not all(isinstance(value, torch.Tensor) for value in found.values()):
        keys = f" (its keys are {_first([repr(key) for key in found])})" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"{str(path)!r} holds no weights by name{keys}; save model.state_dict() there, by itself or "
            f"under {' or '.join(map(repr, NESTED))}"
        )
    if all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return dict(found)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def _unpickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or a pickle of more than tensors, which can run any code once open, "
            "so it is refused. If you trust it, convert it once: open it where it came from and write "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    # A damaged file raises whatever its bytes happen to lead to.
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


# --- other libraries ----------------------------------------------------------------------------------


def _transformers(name: str) -> nn.Module:
    names = (*EMBEDDED_CLASSIFIERS, *TORCHVISION)
    loader = "AutoModelForImageClassification"
    source, local_only = locate(name, names, EXAMPLE, loader, EMBEDDED_VISION)
    with reading(name, source, local_only, EMBEDDED_VISION):
        from transformers import AutoModelForImageClassification

        loaded: Any = AutoModelForImageClassification.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=local_only,
            trust_remote_code=False,
        )
    model, found = loaded
    check_complete(name, found)
    return model


def _torchvision(name: str) -> nn.Module:
    if find_spec("torchvision") is None:
        raise ValueError(
            f"{name} comes from torchvision, which is not installed; install the version that goes with "
            f"torch {torch.__version__}, or load {EXAMPLE!r}, which needs nothing more"
        )
    try:
        from torchvision import models  # type: ignore[import-not-found]

        weights = models.get_model_weights(name).DEFAULT
        model = models.get_model(name)
        # Passed on to torch: by itself it would open the file as any pickle.
        model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    # A build for another torch fails in its import, a download as the network pleases.
    except Exception as error:
        raise ValueError(f"cannot load {name!r} through torchvision: {error}") from error
    return model
