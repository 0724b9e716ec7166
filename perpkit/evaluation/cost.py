"""What a run costs: its seconds, phase by phase, and its peak memory, measured, with the device's name."""

import platform
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

Where = nn.Module | torch.device | str


def device_name(where: Where) -> str:
    """The name of a device, or of those that a model is spread over: "2 × NVIDIA H200".

    A CPU comes with the number of threads that torch uses.

    >>> device_name("cpu").endswith(("threads", "thread"))
    True
    """
    names = Counter(map(_kind, _devices(where)))
    return " + ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items())


def free_memory(where: Where) -> int | None:
    """Bytes that can still be had on a device, or on those of a model together; None where nobody says.

    >>> free_memory("cpu") is None or free_memory("cpu") > 2**20
    True
    """
    free = [
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_on_host()
        for device in _devices(where)
    ]
    return None if None in free else sum(filter(None, free))


def _free_on_host() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory; torch has no exception of its own for that of a CPU.

    >>> out_of_memory(MemoryError()), out_of_memory(ValueError("rank is 0"))
    (True, False)
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Cost:
    """Measures the work inside its `with` block: `seconds` by phase, and `peak_memory` in bytes.

    `phase` counts wall-clock seconds, with a GPU until it has finished; a phase entered again adds to them.

    `peak_memory` is that of the block alone, in which other threads may have worked too:

    - on GPUs, the most bytes that torch's allocator had handed out for tensors at one time, those from
      before the block included, summed over the devices (not what it keeps in reserve, nor CUDA itself);
    - on a CPU, the most memory of the whole process that was resident, the interpreter and its libraries
      included. Where the system does not let the process reset that mark (macOS, some containers), it is
      the peak since the process began.

    >>> with Cost("cpu") as cost:
    ...     with cost.phase("retrain"):
    ...         total = torch.ones(100).sum()
    >>> list(cost.seconds), cost.peak_memory > 2**20, cost.tokens_per_second(100) > 0
    (['retrain'], True, True)
    """

    def __init__(self, where: Where):
        devices = _devices(where)
        # Beside GPUs the host's memory is not what a run is short of.
        gpus = [device for device in devices if device.type == "cuda"]
        self.seconds: dict[str, float] = {}
        self._peaks = dict.fromkeys(gpus or [torch.device("cpu")], 0)

    def __enter__(self) -> "Cost":
        with _counting:
            # A mark has no owner: whoever resets it tells the others before.
            _note_all()
            for device in self._peaks:
                _reset(device)
            _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        with _counting:
            _note_all()
            _open.remove(self)

    @property
    def peak_memory(self) -> int:
        """Bytes, up to now or to the end of the block."""
        with _counting:
            _note_all()
        return sum(self._peaks.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of this block as those of a phase, also when it raises."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def tokens_per_second(self, tokens: int) -> float | None:
        """Tokens retrained on per second of the phase "retrain", None without that phase."""
        spent = self.seconds.get("retrain")
        return tokens / spent if spent else None

    def _synchronize(self) -> None:
        for device in self._peaks:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _note(self) -> None:
        for device, peak in self._peaks.items():
            self._peaks[device] = max(peak, _peak(device))


_counting = threading.Lock()
_open: list[Cost] = []


def _note_all() -> None:
    for cost in _open:
        cost._note()


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        # 5: set the peak of the resident memory to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    # Bytes on macOS, else kibibytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _devices(where: Where) -> list[torch.device]:
    """The devices of a model, in the order of its parameters, or the one that is named."""
    if not isinstance(where, nn.Module):
        device = torch.device(where)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return [device]
    # Weights that wait in the host's memory for their turn are on no device until then.
    found = (torch.device("cpu") if tensor.is_meta else tensor.device for tensor in where.parameters())
    return list(dict.fromkeys(found)) or [torch.device("cpu")]


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{platform.processor() or platform.machine()} {device.type.upper()}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "CPU"
