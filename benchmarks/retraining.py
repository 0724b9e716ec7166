"""What retraining a few parameters costs against the floor and full fine-tuning, and the chunked loss.

One thread on a CPU; on a GPU when there is one. Times are medians of interleaved repetitions.
"""

import copy
from collections.abc import Callable

import torch
import transformers
from _bars import Bars
from _memory import peak_bytes
from _timing import medians
from torch import nn
from torch.nn import functional as F

from perpkit.retraining.loop.loss import chunked_loss, rows_loss
from perpkit.retraining.loop.relu import byte_mask_relus
from perpkit.retraining.subsets import subset_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, VOCABULARY, ROWS = 768, 50272, 2048


def saved_bytes(work: Callable[[], object], parameters: list[nn.Parameter]) -> int:
    """The bytes that autograd keeps for the backward pass, parameters left out, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address could be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


class Block:
    """One block of OPT-125m with only some of its parameters trained, and a batch of 4 x 512 tokens."""

    def __init__(self, model: nn.Module, subset: str | None):
        self.model = copy.deepcopy(model)
        self.trained = subset_parameters(self.model, subset) if subset else {}
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self.trained)
        # The blocks beneath it train parameters too, so the input needs a gradient.
        self.x = torch.randn(4, 512, HIDDEN, device=DEVICE, requires_grad=True)
        self.g = torch.randn(4, 512, HIDDEN, device=DEVICE)

    def forward(self) -> torch.Tensor:
        with byte_mask_relus(self.model, self.trained) if self.trained else torch.enable_grad():
            return self.model.get_submodule("model.decoder.layers.0")(self.x)

    def both(self) -> None:
        self.forward().backward(self.g)
        self.x.grad = None
        self.model.zero_grad(set_to_none=True)

    def saved(self) -> int:
        return saved_bytes(self.forward, list(self.model.parameters()))


def block(bars: Bars) -> None:
    config = transformers.OPTConfig(
        hidden_size=HIDDEN,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=12,
        num_hidden_layers=1,
        word_embed_proj_dim=HIDDEN,
        vocab_size=64,
        dropout=0.0,
    )
    model: nn.Module = transformers.OPTForCausalLM(config)
    model.to(DEVICE)
    subsets = (None, "biases", "norms", "biases+norms", "full")
    blocks = [Block(model, subset) for subset in subsets]
    works = {str(subset): one.both for subset, one in zip(subsets, blocks, strict=True)}
    floor, *some, full = medians(works, DEVICE, turns=21).values()
    whole = blocks[-1].saved()
    bars.at_most("full fine-tuning against the floor (no bar)", full, floor, float("inf"), "s")
    for subset, one, taken in zip(subsets[1:], blocks[1:], some, strict=False):
        bars.at_most(f"OPT block, {subset}, against the floor", taken, floor, 1.1, "s")
        bar = float("inf") if "+" in subset else 0.75
        bars.at_most(f"OPT block, {subset}, against full fine-tuning", taken, full, bar, "s")
        bar = 0.65 if subset == "biases" else float("inf")
        bars.at_most(f"OPT block, {subset}, saved activations", one.saved() / 2**20, whole / 2**20, bar, "M")


def loss(bars: Bars) -> None:
    hidden = torch.randn(ROWS, HIDDEN, device=DEVICE, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,), device=DEVICE)
    for trained in (False, True):
        weight = nn.Parameter(0.02 * torch.randn(VOCABULARY, HIDDEN, device=DEVICE), requires_grad=trained)

        def whole(weight=weight) -> None:
            F.cross_entropy(F.linear(hidden, weight).float(), targets).backward()
            hidden.grad = weight.grad = None

        def chunked(weight=weight) -> None:
            chunked_loss(
                hidden, weight, None, lambda logits, rows: rows_loss(logits, targets[rows])
            ).backward()
            hidden.grad = weight.grad = None

        name = f"loss of {ROWS} x {VOCABULARY}, head {'trained' if trained else 'frozen'}"
        measured, reference = (peak_bytes(work, DEVICE) / 2**20 for work in (chunked, whole))
        bars.at_most(f"{name}, peak memory", measured, reference, 0.2, "M")
        measured, reference = medians({"chunked": chunked, "whole": whole}, DEVICE, turns=7).values()
        bars.at_most(f"{name}, time", measured, reference, 1.15, "s")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("on", torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU, one thread")
    bars = Bars()
    block(bars)
    loss(bars)
    bars.finish()


if __name__ == "__main__":
    main()
