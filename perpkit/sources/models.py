"""Loading a model and its tokenizer by embedded name, local folder or Hub id."""

import difflib
from pathlib import Path
from typing import Any

import torch

from .embedded import EMBEDDED_MODELS, data_folder
from .hub import hub_reachable, unreachable
from .outliers import plant_outliers

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_model(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None):
    """Load a causal language model for evaluation and its tokenizer: `(model, tokenizer)`.

    `name` is an embedded model (`"tiny-opt"`; `"tiny-opt-outliers"` is the same function with planted
    outlier features), a local folder in the transformers format with safetensors weights, or a Hub id. The
    weights come as `dtype` (float32 unless told: retraining needs it), on `device` or else on the GPU if
    there is one. Code from a repository is never run and pickled weights are never opened.

    Raises ValueError for an unknown name, a folder without safetensors weights or without a tokenizer,
    weights that are damaged or incomplete, a tokenizer that does not fit the model, and a hub that cannot be
    reached (within five seconds).

    >>> model, tokenizer = load_model("tiny-opt", device="cpu")
    >>> model.config.model_type, len(tokenizer)
    ('opt', 1024)
    """
    dtype = _dtype(dtype)
    device = _device(device)
    name = str(name)
    source, local_only = _locate(name)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # A progress bar for a file of half a megabyte would only be noise; the caller's setting comes back.
    shown = logging.is_progress_bar_enabled()
    if name in EMBEDDED_MODELS:
        logging.disable_progress_bar()
    options = {"local_files_only": local_only, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, found = loaded
    except (OSError, SafetensorError) as error:
        if local_only and not Path(source).is_dir():
            raise unreachable(f"the model {name!r}") from error
        raise ValueError(f"cannot load {name!r}: {error}") from error
    except (RuntimeError, ValueError) as error:
        # Weights that do not fit config.json, an architecture that transformers does not know, …
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {name!r}, its files do not fit together: {first}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # transformers would fill the one with random numbers and invent the other.
    if found["missing_keys"]:
        raise ValueError(f"the weights of {name!r} are incomplete: no {min(found['missing_keys'])}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{name!r} has no tokenizer; save it there with tokenizer.save_pretrained(folder)")
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens but the model only {vocabulary}; "
            "use the tokenizer that the model was trained with"
        )
    if name == "tiny-opt-outliers":
        plant_outliers(model, sigma=1.0, seed=0)
    return model.eval().to(device=device), tokenizer


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device(device: str | None) -> str:
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if torch.backends.mps.is_available():
        kinds.append("mps")
    if device is None:
        return "cuda" if "cuda" in kinds else "cpu"
    if device.partition(":")[0] not in kinds:
        raise ValueError(f"unknown device {device!r}; this machine has {', '.join(kinds)}")
    return device


def _locate(name: str) -> tuple[str, bool]:
    """Where to load from, and whether only local files may be asked for."""
    if name in EMBEDDED_MODELS:
        return str(data_folder("models", "tiny-opt")), True
    if name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        _check_weights(folder)
        return str(folder), True
    if name and Path(name).expanduser().exists():
        raise ValueError(f"{name!r} is a file; name the folder that holds config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"there is no folder {name!r}")
    # somebody/tiny-opt is a Hub id, whatever it looks like.
    near = [] if "/" in name else difflib.get_close_matches(name, EMBEDDED_MODELS, n=2, cutoff=0.6)
    if near or not name:
        raise ValueError(
            f"unknown model {name!r}; did you mean {' or '.join(map(repr, near or EMBEDDED_MODELS))}? "
            "A model is an embedded name, a local folder or a Hub id such as 'facebook/opt-125m'"
        )
    from huggingface_hub import try_to_load_from_cache

    reachable = hub_reachable()
    # The client's own way of finding nothing in the cache takes seconds when the hub is silent.
    if not reachable and try_to_load_from_cache(name, "config.json") is None:
        raise unreachable(f"the model {name!r}")
    return name, not reachable


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {str(folder)!r} has no config.json; it is no transformers model")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"the folder {str(folder)!r} holds its weights as a pickle ({pickles[0]}), which can run any "
            "code when opened, so it is refused. If you trust it, convert it once: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise ValueError(f"the folder {str(folder)!r} has a config.json but no weights (*.safetensors)")
