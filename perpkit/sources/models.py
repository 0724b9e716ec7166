"""Loading a model and its tokenizer by embedded name, local folder or Hub id."""

import difflib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .embedded import EMBEDDED_CLASSIFIERS, EMBEDDED_MODELS, data_folder
from .hub import EMBEDDED, hub_reachable, unreachable
from .outliers import plant_outliers

DTYPES = ("float32", "bfloat16", "float16", "float64")
_READING = threading.RLock()


def load_model(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None):
    """Load a causal language model for evaluation and its tokenizer: `(model, tokenizer)`.

    `name` is an embedded model (`"tiny-opt"`; `"tiny-opt-outliers"` is the same function with planted
    outlier features), a local folder in the transformers format with safetensors weights, or a Hub id. The
    weights come as `dtype` (float32 unless told: retraining needs it), on `device` or else on the GPU if
    there is one; `"auto"` spreads them over all GPUs and what does not fit there over the host's memory. Code
    from a repository is never run and pickled weights are never opened.

    Raises ValueError for an unknown name, a folder without safetensors weights or without a tokenizer,
    weights that are damaged or incomplete, a tokenizer that does not fit the model, and a hub that cannot be
    reached (within five seconds).

    >>> model, tokenizer = load_model("tiny-opt", device="cpu")
    >>> model.config.model_type, len(tokenizer)
    ('opt', 1024)
    """
    dtype = check_dtype(dtype)
    spread = device == "auto"
    device = None if spread else check_device(device)
    name = str(name)
    if name in EMBEDDED_CLASSIFIERS:
        raise ValueError(f"{name!r} is a classifier of images; load_classifier({name!r}) loads it")
    source, local_only = locate(name, EMBEDDED_MODELS)
    options = {"local_files_only": local_only, "trust_remote_code": False}
    with reading(name, source, local_only):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map="auto" if spread else None,
            **options,
        )
        model, found = loaded
    check_complete(name, found)
    check_numbers(name, model)
    # transformers would invent one.
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
    return (model.eval() if spread else model.eval().to(device=device)), tokenizer


@contextmanager
def reading(name: str, source: str, local_only: bool, embedded: str = EMBEDDED) -> Iterator[None]:
    """Inside, files are read by transformers, and what goes wrong with them is said in a ValueError.

    One thread at a time: while it loads, transformers changes itself and torch, and two that do so at once
    leave both changed.

    >>> with reading("mine", ".", local_only=True):
    ...     raise OSError("no weights")
    Traceback (most recent call last):
    ValueError: cannot load 'mine': no weights
    """
    with _READING, _telling(name, source, local_only, embedded):
        yield


@contextmanager
def _telling(name: str, source: str, local_only: bool, embedded: str) -> Iterator[None]:
    from safetensors import SafetensorError
    from transformers.utils import logging

    # A progress bar for a file of half a megabyte would only be noise; the caller's setting comes back.
    shown = logging.is_progress_bar_enabled()
    if name in EMBEDDED_MODELS:
        logging.disable_progress_bar()
    try:
        yield
    except (OSError, SafetensorError) as error:
        if local_only and not Path(source).is_dir():
            raise unreachable(f"the model {name!r}", embedded) from error
        raise ValueError(f"cannot load {name!r}: {error}") from error
    except (RuntimeError, ValueError) as error:
        # Weights that do not fit config.json, an architecture that transformers does not know, …
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {name!r}, its files do not fit together: {first}") from error
    finally:
        if shown:
            logging.enable_progress_bar()


def check_complete(name: str, found: dict[str, Any]) -> None:
    """Raise ValueError when weights are missing, which transformers fills with random numbers.

    >>> check_complete("mine", {"missing_keys": {"lm_head.weight"}})
    Traceback (most recent call last):
    ValueError: the weights of 'mine' are incomplete: no lm_head.weight
    """
    if found["missing_keys"]:
        raise ValueError(f"the weights of {name!r} are incomplete: no {min(found['missing_keys'])}")


def check_numbers(name: str, model: torch.nn.Module) -> None:
    """Raise ValueError naming a tensor of the weights in which a value is NaN.

    >>> check_numbers("mine", torch.nn.Linear(2, 1))
    """
    for tensor, value in model.state_dict().items():
        # A sum is NaN if a value is, and needs no memory; it may also be of infinities alone.
        if value.is_floating_point() and not value.is_meta and value.sum().isnan() and value.isnan().any():
            raise ValueError(
                f"the weights of {name!r} are damaged: {tensor} has {int(value.isnan().sum())} values that "
                "are NaN; get them again where they came from"
            )


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name.

    Raises ValueError for one that models are not loaded in.

    >>> check_dtype("bfloat16")
    torch.bfloat16
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    return getattr(torch, name)


def best_device() -> str:
    """The device that models are loaded on unless told: the GPU if there is one.

    >>> best_device() in ("cuda", "cpu")
    True
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str | None) -> str:
    """The device named, or the best one.

    Raises ValueError for one that this machine does not have.

    >>> check_device("cpu")
    'cpu'
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if torch.backends.mps.is_available():
        kinds.append("mps")
    if device is None:
        return best_device()
    if device.partition(":")[0] not in kinds:
        raise ValueError(f"unknown device {device!r}; this machine has {', '.join(kinds)}, or 'auto'")
    return device


def locate(
    name: str,
    names: Sequence[str],
    example: str = "facebook/opt-125m",
    loader: str = "AutoModelForCausalLM",
    embedded: str = EMBEDDED,
) -> tuple[str, bool]:
    """Where to load a model of transformers from, and whether only local files may be asked for.

    `names` are those of no folder and no Hub id; `example` is a Hub id, `loader` a class of transformers
    and `embedded` what is always there, for the errors.

    Raises ValueError for a name that leads nowhere, and a folder without safetensors weights.

    >>> source, local_only = locate("tiny-opt", EMBEDDED_MODELS)
    >>> Path(source).name, local_only
    ('tiny-opt', True)
    """
    if name in EMBEDDED_MODELS:
        return str(data_folder("models", "tiny-opt")), True
    if name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        _check_weights(folder, loader)
        return str(folder), True
    if name and Path(name).expanduser().exists():
        raise ValueError(f"{name!r} is a file; name the folder that holds config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"there is no folder {name!r}")
    # somebody/tiny-opt is a Hub id, whatever it looks like.
    near = [] if "/" in name else difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near or not name:
        raise ValueError(
            f"unknown model {name!r}; did you mean {' or '.join(map(repr, near or names))}? "
            f"A model is an embedded name, a local folder or a Hub id such as {example!r}"
        )
    from huggingface_hub import try_to_load_from_cache

    reachable = hub_reachable()
    # The client's own way of finding nothing in the cache takes seconds when the hub is silent.
    if not reachable and try_to_load_from_cache(name, "config.json") is None:
        raise unreachable(f"the model {name!r}", embedded)
    return name, not reachable


def _check_weights(folder: Path, loader: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {str(folder)!r} has no config.json; it is no transformers model")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"the folder {str(folder)!r} holds its weights as a pickle ({pickles[0]}), which can run any "
            "code when opened, so it is refused. If you trust it, convert it once: "
            f"{loader}.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise ValueError(f"the folder {str(folder)!r} has a config.json but no weights (*.safetensors)")
