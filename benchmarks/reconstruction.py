"""Exact reconstruction of one matrix against gradient steps of MaskLoRA on the activations.

On a GPU where there is one, else on a CPU with one thread. The gradient steps take 4096 tokens each, two
windows of 2048 as PERP does, the time of 200 being measured on fewer.
"""

import statistics
import time
from collections.abc import Callable

import torch
from _bars import Bars
from torch.nn import functional as F

from perpkit.pruning.selection import select
from perpkit.retraining.adapters.masklora import mask_lora_linear
from perpkit.retraining.layerwise.optimum import Moments, optimum

SIZE, TOKENS, CHUNK, STEP_TOKENS, STEPS, RANK = 1024, 65536, 8192, 4096, 200, 16


def activations(device: str) -> torch.Tensor:
    """Correlated inputs with outliers, as they are in language models: variances fall over two decades."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    rows = torch.randn(TOKENS, SIZE, generator=generator) * torch.logspace(0, -1, SIZE)
    rows = rows @ mixed
    rows[:, ::200] *= 20
    return rows.to(device)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class MaskLoRA:
    """Gradient steps on batches of the activations, the adapter as `attach` starts it."""

    def __init__(self, x: torch.Tensor, dense: torch.Tensor, mask: torch.Tensor, lr: float):
        self.x, self.dense, self.mask, self.lr = x, dense, mask, lr
        self.weight = dense * mask
        generator = torch.Generator().manual_seed(0)
        bound = SIZE**-0.5
        a = torch.empty(RANK, SIZE).uniform_(-bound, bound, generator=generator).to(x.device)
        self.factors = [a.requires_grad_(), torch.zeros(SIZE, RANK, device=x.device, requires_grad=True)]
        self.optimizer = torch.optim.Adam(self.factors, lr=lr)
        self.done = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            start = self.done * STEP_TOKENS % TOKENS
            x = self.x[start : start + STEP_TOKENS]
            out = mask_lora_linear(x, self.weight, self.mask, self.factors[0], self.factors[1], scale=2.0)
            loss = F.mse_loss(out, x @ self.dense.T)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.done += 1

    def merged(self) -> torch.Tensor:
        a, b = self.factors
        return (self.weight + 2.0 * (b @ a)).detach() * self.mask


def main() -> None:
    torch.set_num_threads(1)
    device, measured = ("cuda", 50) if torch.cuda.is_available() else ("cpu", 5)
    print("on", torch.cuda.get_device_name() if device == "cuda" else "the CPU, one thread")
    x = activations(device)
    dense = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / SIZE**0.5).to(device)
    mask = select(dense.abs() * x.norm(dim=0), 0.5, group="row")
    pruned = dense * mask

    def exact(method: str = "auto") -> torch.Tensor:
        moments = Moments()
        for rows in x.split(CHUNK):
            moments.add(rows[None])
        return optimum(pruned, dense, mask, moments, method=method)

    trained = MaskLoRA(x, dense, mask, lr=3e-3)
    exact()
    trained.steps(1)
    ours, theirs = [], []
    for _ in range(5):
        ours.append(seconds(exact))
        theirs.append(seconds(lambda: trained.steps(measured)) * STEPS / measured)
    found, best = exact(), exact("cholesky")
    exactly = Moments()
    for rows in x.split(CHUNK):
        exactly.add(rows[None].double())
    error = {
        name: float(exactly.errors(weight, dense).sum()) / exactly.target(dense)
        for name, weight in (("before", pruned), ("cg", found), ("cholesky", best))
    }
    print({name: f"{value:.5f}" for name, value in error.items()})
    bars = Bars()
    fast, slow = statistics.median(ours), statistics.median(theirs)
    bars.at_least("200 steps of MaskLoRA, against the exact optimum", slow, fast, 10, "s")
    bars.at_most("error of the exact optimum, against Cholesky", error["cg"], error["cholesky"], 1.01)
    trained.steps(STEPS - trained.done)
    theirs_error = float(exactly.errors(trained.merged(), dense).sum()) / exactly.target(dense)
    bars.at_most("error of the exact optimum, against MaskLoRA", error["cg"], theirs_error, 1)
    bars.finish()


if __name__ == "__main__":
    main()
