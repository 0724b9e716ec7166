"""What MaskLoRA's linear map costs, against a dense one that only passes gradients through.

The floor is a dense forward pass and the gradient of its input. Everything is timed in turns, the medians of
all turns compared. On a CPU one thread works and its CPU time counts, so that a busy machine does not spoil
the ratios; memory is the rise of the process's peak, in a process of its own. On a GPU, whose allocator
counts, the bars are others: the kernels against the same by blocks, and the peak against that of LoRA.
"""

import argparse
import multiprocessing
import platform
import re
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from _bars import Bars
from _memory import peak_bytes
from _timing import medians
from torch import Tensor, nn
from torch.nn import functional as F

from perpkit.retraining.adapters import masklora
from perpkit.retraining.adapters.masklora import mask_lora_linear

WIDTH, RANK, SCALE = 4096, 16, 2.0
# dtype: tokens: bar of the time
TIME = {torch.float32: {2048: 1.65, 512: 1.7}, torch.bfloat16: {2048: 1.75, 512: 1.9}}
PEAK, PEAK_TOKENS = 1.4, 2048
# On a GPU: of the time by blocks; weights beyond LoRA's peak.
FUSED_TIME, FUSED_PEAK = 0.85, 1.0
OURS, FLOOR = "MaskLoRA", "dense forward + input gradient"
BLOCKS, LORA = "MaskLoRA by blocks", "LoRA, dense when merged"


class Layer:
    """A pruned layer, an input and the gradient of the output; made without passing temporaries."""

    def __init__(self, width: int, tokens: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)
        new = partial(torch.empty, dtype=dtype, device=device)
        self.weight = new(width, width).normal_(std=width**-0.5, generator=generator)
        self.mask = torch.empty(width, width, dtype=torch.bool, device=device)
        self.mask.bernoulli_(0.5, generator=generator)
        for some in range(0, width, 64):
            self.weight[some : some + 64] *= self.mask[some : some + 64]
        factors = torch.empty(2, RANK, width, device=device).normal_(std=width**-0.5, generator=generator)
        self.a, self.b = factors[0].requires_grad_(), factors[1].t().contiguous().requires_grad_()
        self.x = new(tokens, width).normal_(generator=generator).requires_grad_()
        self.grad = new(tokens, width).normal_(generator=generator)

    def dense(self) -> None:
        self._backward(F.linear(self.x, self.weight))

    def ours(self) -> None:
        self._backward(self._ours(), self.a, self.b)

    def blocks(self) -> None:
        """As on a CPU, an operation after the other."""
        with mock.patch.object(masklora, "kernels", return_value=None):
            self.ours()

    def lora(self) -> None:
        low = F.linear(F.linear(self.x, self.a.to(self.x.dtype)), self.b.to(self.x.dtype))
        self._backward(F.linear(self.x, self.weight) + SCALE * low, self.a, self.b)

    def plain(self) -> None:
        self._backward(self._plain(), self.a, self.b)

    def full(self) -> None:
        weight = self.weight.detach().requires_grad_()
        self._backward(F.linear(self.x, weight), weight)

    def peft(self) -> Callable[[], None] | None:
        """PEFT's LoRA on the layer, if PEFT is there."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            return None
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.in_features = linear.out_features = len(self.weight)
        settings = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["0"])
        model = get_peft_model(nn.Sequential(linear), settings)
        factors = [p for p in model.parameters() if p.requires_grad]
        return lambda: self._backward(model(self.x), *factors)

    def saved_bytes(self, plain: bool = False) -> int:
        """Bytes that autograd keeps beyond the input, the parameters and the mask."""
        known = {t.untyped_storage().data_ptr() for t in (self.x, self.weight, self.mask, self.a, self.b)}
        extra: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                extra[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = self._plain() if plain else self._ours()
        assert kept.requires_grad
        return sum(extra.values())

    def _ours(self) -> Tensor:
        return mask_lora_linear(self.x, self.weight, self.mask, self.a, self.b, scale=SCALE)

    def _plain(self) -> Tensor:
        update = self.mask * (SCALE * (self.b @ self.a))
        return F.linear(self.x, (self.weight + update).to(self.weight.dtype))

    def _backward(self, y: Tensor, *trained: Tensor) -> None:
        torch.autograd.grad(y, (self.x, *trained), self.grad)


def contenders(layer: Layer) -> dict[str, Callable[[], None]]:
    named = {
        FLOOR: layer.dense,
        OURS: layer.ours,
        "plain autograd on the formula": layer.plain,
        "full fine-tuning": layer.full,
    }
    if layer.x.is_cuda:
        named |= {BLOCKS: layer.blocks, LORA: layer.lora}
    peft = layer.peft()
    return named | ({"PEFT's LoRA": peft} if peft else {})


def peak_rise(name: str, dtype: torch.dtype, device: str) -> int:
    """Bytes by which the peak rises over what the layer, its input and its gradient take."""
    torch.set_num_threads(1)
    contenders(Layer(128, 128, dtype, device))[name]()
    layer = Layer(WIDTH, PEAK_TOKENS, dtype, device)
    work = contenders(layer)[name]
    if device == "cpu":
        before = _highest()
        work()
        return _highest() - before
    return peak_bytes(work, device)


def _highest() -> int:
    """The most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, which on Linux counts the process that started this one too.
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(what: str, measured: float, reference: float, unit: str) -> None:
    values = f"{measured:>8.3g} {unit:1} {reference:>8.3g} {unit:1} {measured / reference:>7.3g}"
    print(f"  {what:56} {values}  for comparison", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=7)
    chosen = parser.parse_args()
    device = chosen.device
    torch.set_num_threads(1)
    where = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, {WIDTH} x {WIDTH}, rank {RANK}")
    bars = Bars()
    for dtype, by_tokens in TIME.items():
        short = str(dtype).removeprefix("torch.")
        for tokens, bar in by_tokens.items():
            seconds = medians(contenders(Layer(WIDTH, tokens, dtype, device)), device, chosen.turns)
            floor = seconds.pop(FLOOR)
            what, ours = f"{OURS}, {short}, {tokens} tokens, time", seconds.pop(OURS)
            if device == "cpu":
                bars.at_most(what, ours, floor, bar, "s")
            else:
                compare(OURS, ours, floor, "s")
                bars.at_most(f"{what} against blocks", ours, seconds[BLOCKS], FUSED_TIME, "s")
            for name, measured in seconds.items():
                compare(name, measured, floor, "s")
        layer = Layer(WIDTH, PEAK_TOKENS, dtype, device)
        size = float(layer.weight.nbytes) / 2**20
        bars.at_most(f"{OURS}, {short}, saved by autograd", layer.saved_bytes() / 2**20, size, 0, "M")
        compare("plain autograd on the formula", layer.saved_bytes(plain=True) / 2**20, size, "M")
        names = list(contenders(layer))
        del layer
        peaks: dict[str, float] = {}
        for name in names:
            if device == "cpu":
                # A process of its own each time: a peak never falls.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    rise = process.submit(peak_rise, name, dtype, device).result()
            else:
                rise = peak_rise(name, dtype, device)
            peaks[name] = rise / 2**20
        what, ours = f"{OURS}, {short}, {PEAK_TOKENS} tokens, peak rise", peaks.pop(OURS)
        if device == "cpu":
            bars.at_most(what, ours, size, PEAK, "M")
        else:
            compare(OURS, ours, size, "M")
            bars.at_most(f"{what} beyond LoRA's", max(ours - peaks[LORA], 0), size, FUSED_PEAK, "M")
        for name, peak in peaks.items():
            compare(name, peak, size, "M")
    bars.finish()


if __name__ == "__main__":
    main()
