"""perpkit doctor"""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .exits import ERROR
from .sweep import JsonOption, StoreOption
from .tables import print_json

if TYPE_CHECKING:
    from ..experiments.store import Store

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PACKAGES = ("torch", "transformers", "lm-eval", "accelerate", "datasets", "ipywidgets", "jupyterlab")
OPTIONAL = {
    "peft": "importing LoRA adapters that PEFT has trained",
    "distributed": "sweeps on clusters that survive dying workers",
    "torchvision": "AlexNet (take the build that goes with your torch)",
}
GIB = 2**30
# A model of the papers' smallest size with its text, and the embedded one with torch.
LITTLE_DISK, LITTLE_MEMORY = 2 * GIB, 2 * GIB
# The embedded model on other processors.
TOLERANCE = 0.01
# Enough to see damage: an accuracy of so few may differ by this from that of all.
PICTURES, OF_SO_FEW = 500, 0.05


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do when it is not well."""

    what: str
    state: str
    found: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def doctor(
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at what perpkit needs: device, memory, packages, Hub, embedded data, and a store of results."""
    checks: dict[str, Check] = {check.__name__.strip("_"): check for check in CHECKS}
    checks["store"] = partial(_store, store)
    found = []
    for name, check in checks.items():
        try:
            findings = list(check())
        except Exception as error:
            findings = [Finding(name, PROBLEM, f"{type(error).__name__}: {error}", "reinstall perpkit")]
        for finding in findings:
            found.append(finding)
            if not as_json:
                typer.echo(_line(finding))
    problems = sum(finding.state == PROBLEM for finding in found)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in found], "problems": problems})
    else:
        typer.echo(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "all is there")
    if problems:
        raise typer.Exit(ERROR)


def _line(finding: Finding) -> str:
    remedy = f"\n{'':23}→ {finding.remedy}" if finding.remedy else ""
    return f"{finding.state:8} {finding.what:13} {finding.found}{remedy}"


def _python() -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("perpkit", OK, importlib.metadata.version("perpkit"))


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, PROBLEM, "is not installed", "install perpkit again, which brings it")
    for name, use in OPTIONAL.items():
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, OK, f"optional, not installed; it is for {use}", f"pip install {name}")


def _devices() -> Iterator[Finding]:
    import torch

    from ..evaluation.cost import device_name

    yield Finding("CPU", OK, device_name("cpu"))
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        memory = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
        yield Finding(f"GPU {number}", OK, f"{torch.cuda.get_device_name(number)}, {memory}")
    if not torch.cuda.is_available():
        nvidia = shutil.which("nvidia-smi") is not None
        remedy = "install a CUDA build of torch to use the GPU" if nvidia else ""
        words = "none that torch can use; the embedded model needs none"
        yield Finding("GPU", WARNING if nvidia else OK, words, remedy)


def _memory() -> Iterator[Finding]:
    from ..evaluation.cost import free_memory

    if (free := free_memory("cpu")) is not None:
        little = free < LITTLE_MEMORY
        remedy = "close other programs, or take a smaller model" if little else ""
        yield Finding("memory", WARNING if little else OK, f"{free / GIB:.1f} GiB free", remedy)


def _disks() -> Iterator[Finding]:
    from huggingface_hub import constants

    from ..experiments.store import default_store

    yield _disk("disk", default_store().parent, "PERPKIT_STORE")
    yield _disk("Hub cache", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE or HF_HOME")


def _disk(what: str, folder: Path, variable: str) -> Finding:
    free = shutil.disk_usage(_there(folder)).free
    little = free < LITTLE_DISK
    remedy = f"free some, or name another place with {variable}" if little else ""
    return Finding(what, WARNING if little else OK, f"{free / GIB:.1f} GiB free for {folder}", remedy)


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    from ..sources.hub import hub_reachable

    if hub_reachable():
        yield Finding("Hub", OK, f"{constants.ENDPOINT} answers")
    else:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} is silent"
        remedy = "the embedded model and text, local folders and what is in the cache work without it"
        yield Finding("Hub", WARNING, offline, remedy)


def _embedded() -> Iterator[Finding]:
    from ..evaluation.perplexity import perplexity
    from ..sources.embedded import data_folder
    from ..sources.models import load_model
    from ..sources.text import load_text

    told = json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())["measured"]
    model, tokenizer = load_model("tiny-opt", device="cpu")
    reached = perplexity(model, load_text("storyworld", tokenizer).test)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    well = abs(reached / told["perplexity"] - 1) < TOLERANCE and parameters == told["parameters"]
    words = (
        f"tiny-opt, {parameters:,} parameters, perplexity {reached:.3f} (should be {told['perplexity']:.3f})"
    )
    yield Finding("model", OK if well else PROBLEM, words, "" if well else "reinstall perpkit")
    tables = sorted(data_folder("paper").glob("*.csv"))
    for table in tables:
        table.read_text(encoding="utf-8")
    yield Finding("papers", OK if tables else PROBLEM, f"{len(tables)} published tables")


def _classifier() -> Iterator[Finding]:
    from ..evaluation.accuracy import accuracy
    from ..sources.classifiers import load_classifier
    from ..sources.embedded import data_folder
    from ..sources.images import load_images

    told = json.loads(data_folder("models", "shapes-resnet", "recipe.json").read_text())["measured"]
    images = load_images("shapes", counts={"train": 10, "validation": 10, "test": PICTURES}, progress=False)
    reached = accuracy(load_classifier("shapes-resnet", device="cpu"), images.test)
    well = abs(reached - told["test_accuracy"]) < OF_SO_FEW
    near = f"{PICTURES} pictures (should be near {told['test_accuracy']:.3f})"
    words = f"shapes-resnet, accuracy {reached:.3f} on {near}"
    yield Finding("classifier", OK if well else PROBLEM, words, "" if well else "reinstall perpkit")


def _store(named: Path | None) -> Iterator[Finding]:
    from ..experiments.store import Store, default_store

    path = default_store() if named is None else named.expanduser()
    elsewhere = "name another with PERPKIT_STORE" if named is None else "name another with --store"
    if named is None and not path.exists():
        found = f"{path}: not there yet, the first sweep makes it"
    else:
        try:
            found = f"{path}: {_contents(Store(path, readonly=True))}"
        except ValueError as error:
            remedy = "move it away" if path.exists() else "there is none there yet: a sweep makes it"
            yield Finding("store", PROBLEM, str(error), f"{remedy}, or {elsewhere}")
            return
    # Beside the rows SQLite writes a journal into the folder.
    if os.access(_there(path), os.W_OK) and os.access(_there(path.parent), os.W_OK):
        yield Finding("store", OK, found)
    else:
        remedy = f"allow yourself to write it, or {elsewhere}; perpkit results reads it as it is"
        yield Finding("store", PROBLEM, f"{found}; it or its folder is not writable", remedy)


def _contents(store: "Store") -> str:
    """What a store holds, in words. Raises ValueError for a damaged one: every row is read, in both ways."""
    from ..experiments.outdated import outdated
    from ..experiments.rows import FORMAT

    table = store.table(failed=None)
    if len(store.get(table["key"])) != len(table):
        raise ValueError(f"the index of the store {str(store.path)!r} is damaged: it does not find all rows")
    failed = int(table["error"].notna().sum()) if "error" in table else 0
    old = sum(outdated(row) is not None for row in table.to_dict("records"))
    later = f" (a sweep brings it to format {FORMAT})" if store.format < FORMAT else ""
    words = f"{len(table)} rows, {failed} of them failed, {old} outdated, format {store.format}{later}"
    return words + (f"; perpkit results --outdated --store {store.path} lists those" if old else "")


CHECKS: tuple[Check, ...] = (
    _python,
    _packages,
    _devices,
    _memory,
    _disks,
    _hub,
    _embedded,
    _classifier,
)
