"""perpkit doctor"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from .exits import ERROR
from .sweep import JsonOption
from .tables import print_json

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PACKAGES = ("torch", "transformers", "lm-eval", "accelerate", "datasets", "ipywidgets", "jupyterlab")
OPTIONAL = {
    "peft": ("peft", "import LoRA adapters that PEFT has trained"),
    "distributed": ("distributed", "sweeps on clusters that survive dying workers"),
    "torchvision": ("torchvision", "AlexNet"),
}
GIB = 2**30
# A model of the papers' smallest size with its text, and the embedded one with torch.
LITTLE_DISK, LITTLE_MEMORY = 2 * GIB, 2 * GIB
# The embedded model on other processors.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do when it is not well."""

    what: str
    state: str
    found: str
    remedy: str = ""


def doctor(
    as_json: JsonOption = False,
) -> None:
    """Look at what perpkit needs: device, memory, packages, Hub, embedded data, store."""
    found = []
    for check in CHECKS:
        try:
            findings = list(check())
        except Exception as error:
            name = check.__name__.strip("_")
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
    for name, (module, use) in OPTIONAL.items():
        if importlib.util.find_spec(module):
            yield Finding(name, OK, importlib.metadata.version(name))
        else:
            yield Finding(name, OK, f"not installed; only for this: {use}")


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
    from ..experiments.store import default_store

    if (free := _free_memory()) is not None:
        little = free < LITTLE_MEMORY
        remedy = "close other programs, or take a smaller model" if little else ""
        yield Finding("memory", WARNING if little else OK, f"{free / GIB:.1f} GiB free", remedy)
    folder = default_store().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    little = free < LITTLE_DISK
    remedy = "free some, or name other folders with PERPKIT_STORE and HF_HOME" if little else ""
    yield Finding("disk", WARNING if little else OK, f"{free / GIB:.0f} GiB free at {folder}", remedy)


def _free_memory() -> int | None:
    """Bytes that programs can still have, where the system says so."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


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


def _store() -> Iterator[Finding]:
    from ..experiments.store import Store, default_store

    path = default_store()
    try:
        if path.exists():
            rows = Store(path, readonly=True).table(failed=None)
            failed = int(rows["error"].notna().sum()) if "error" in rows else 0
            words = f"{path}: {len(rows)} rows, {failed} of them failed"
        else:
            words = f"{path}: not there yet, the first sweep makes it"
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        if os.access(path if path.exists() else folder, os.W_OK):
            yield Finding("store", OK, words)
        else:
            yield Finding("store", PROBLEM, f"{words}; not writable", "name another with PERPKIT_STORE")
    except ValueError as error:
        yield Finding("store", PROBLEM, str(error), "move it away, or name another with PERPKIT_STORE")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _devices,
    _memory,
    _hub,
    _embedded,
    _store,
)
