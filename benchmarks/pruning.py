"""How fast masks are chosen and SparseGPT prunes, against full sorts and the published loop.

    python benchmarks/pruning.py [DEVICE]

Everything runs in one thread, on a GPU where there is one; each reference runs in turn with what it is
compared with, and the ratios are those of the medians. The references prune exact counts too.
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from _bars import Bars
from _memory import peak_bytes
from _timing import medians

from perpkit.pruning.prune import prune
from perpkit.pruning.selection import select
from perpkit.pruning.sparsegpt import sparsegpt

SIZE, SELECTED = 2048, 4096
REPEATS = 5


def both(ours: Callable[[], object], reference: Callable[[], object], device: str) -> tuple[float, float]:
    """How often each runs in a second."""
    taken = medians({"ours": ours, "reference": reference}, device, REPEATS)
    return 1 / taken["ours"], 1 / taken["reference"]


# --- references -------------------------------------------------------------------------------------


def sorted_mask(groups: torch.Tensor, pruned: int) -> torch.Tensor:
    """Prune the lowest of each row by sorting it: the straightforward way."""
    mask = torch.ones_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.sort(dim=1, stable=True).indices[:, :pruned], False)


def published_loop(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None,
    block: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT as in algorithm 1 of the paper, one column of `[out, in]` after the other."""
    new, (rows, width) = weight.clone(), weight.shape
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        here, local = new[:, start:stop].clone(), factor[start:stop, start:stop]
        errors, gone = torch.zeros_like(here), torch.zeros_like(here, dtype=torch.bool)
        if pattern is None:
            scores = here**2 / local.diagonal() ** 2
            count = round(sparsity * stop * rows) - round(sparsity * start * rows)
            lowest = scores.flatten().sort().indices[:count]
            gone.view(-1)[lowest] = True
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                scores = here[:, group] ** 2 / local.diagonal()[group] ** 2
                lowest = scores.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
                gone[:, group] = gone[:, group].scatter(1, lowest, True)
            column = here[:, j]
            error = (column - torch.where(gone[:, j], 0, column)) / local[j, j]
            here[:, j:] -= error[:, None] @ local[j, j:][None]
            errors[:, j] = error
        new[:, start:stop] = torch.where(gone, 0, here)
        pruned[:, start:stop] = gone
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new, ~pruned


# --- sections ---------------------------------------------------------------------------------------


def selection(bars: Bars, device: str) -> None:
    scores = torch.randn(SELECTED, SELECTED, generator=torch.Generator().manual_seed(0)).abs().to(device)
    cases: tuple[tuple[str, tuple[int, int], dict[str, Any], float], ...] = (
        ("per layer", (1, -1), {"group": "layer"}, 5),
        ("per row", (SELECTED, -1), {"group": "row"}, 3),
        ("2:4", (-1, 4), {"pattern": (2, 4)}, 3),
        ("4:8", (-1, 8), {"pattern": (4, 8)}, 3),
    )
    for what, shape, how, bar in cases:
        groups = scores.view(shape)
        ours = partial(select, scores, 0.5, **how)
        reference = partial(sorted_mask, groups, groups.shape[1] // 2)
        if not torch.equal(ours(), reference().view_as(scores)):
            bars.missed.append(f"selection {what}, the mask is that of the sort")
        speeds = both(ours, reference, device)
        bars.at_least(f"selection {what}, {SELECTED} x {SELECTED}, against a full sort", *speeds, bar, "/s")


def sparse_gpt(bars: Bars, device: str) -> None:
    exact = layer(device)
    rounded = [tensor.float() for tensor in exact]
    for what, pattern, bar in (("50 %", None, 3), ("2:4", (2, 4), 2), ("4:8", (4, 8), 2)):
        ours = partial(sparsegpt, sparsity=0.5, pattern=pattern)
        reference = partial(published_loop, sparsity=0.5, pattern=pattern)
        speeds = both(partial(ours, *rounded), partial(reference, *rounded), device)
        bars.at_least(f"SparseGPT {what}, {SIZE} x {SIZE}, against the published loop", *speeds, bar, "/s")
        # In float32 the rounding of either decides between weights that score alike, and one that falls
        # otherwise moves the rest of its row; in float64 no two are as close as that.
        expected = reference(*exact)[1]
        differ = _share(ours(*exact)[1] != expected)
        bars.at_most(f"SparseGPT {what}, share of the mask that differs (float64)", differ, 1e-6, 1)
        shares = [_share(loop(*rounded)[1] != expected) for loop in (ours, reference)]
        print(
            "  (masks of float32 differ from that of float64 in {:.1e}, the loop's in {:.1e})".format(*shares)
        )


def _share(mask: torch.Tensor) -> float:
    return int(mask.sum()) / mask.numel()


def layer(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the XᵀX of inputs that depend on each other, in float64."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=draw) / SIZE**0.5
    inputs = torch.randn(4 * SIZE, SIZE, generator=draw) @ mixed
    weight = torch.randn(SIZE, SIZE, generator=draw)
    return weight.to(device).double(), (inputs.T @ inputs).to(device).double()


def memory(bars: Bars, device: str) -> None:
    """Peak memory beyond the model itself, of a deep model against a shallow one of the same width."""
    windows = torch.randint(512, (64, 256), generator=torch.Generator().manual_seed(0))
    for criterion in ("wanda", "sparsegpt"):
        peaks = {}
        for depth in (2, 12):
            shape: Any = {
                "hidden_size": 256,
                "ffn_dim": 1024,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 256,
            }
            config: Any = transformers.OPTConfig(
                **shape, vocab_size=512, num_hidden_layers=depth, max_position_embeddings=512
            )
            model: Any = transformers.OPTForCausalLM(config)
            model.to(device)
            work = partial(prune, model, criterion, sparsity=0.5, calibration=windows, progress=False)
            peaks[depth] = peak_bytes(work, device) / 2**20
        name = f"peak memory of {criterion}, 12 blocks against 2"
        bars.at_most(name, peaks[12], peaks[2], 1.3, "M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("device", nargs="?", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread")
    bars = Bars()
    selection(bars, device)
    sparse_gpt(bars, device)
    memory(bars, device)
    bars.finish()


if __name__ == "__main__":
    main()
