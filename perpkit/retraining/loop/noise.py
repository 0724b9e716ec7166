"""Dropout that follows a seed without moving the global generators for anybody else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# PyTorch's dropout can draw only from the generator that all threads share.
_GENERATOR = threading.Lock()


def draws_noise(model: nn.Module) -> bool:
    """Whether some dropout, or the noise of a mixture's router, is active in training.

    >>> draws_noise(nn.Sequential(nn.Dropout(0.0))), draws_noise(nn.Sequential(nn.Dropout(0.1)))
    (False, True)
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        # transformers keeps rates as numbers: dropout, attention_dropout, layerdrop, drop_prob, attn_pdrop, …
        # and jitter_noise, router_jitter_noise of mixtures.
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False


class Noise:
    """The random numbers of a retraining, fixed by its seed and the number of the batch.

    A model without active noise never touches a global generator. With it, the generators are lent out for
    one batch, forward and backward, under a lock, and put back as they were: retrainings in several threads
    take turns, and callbacks between the batches find the caller's generators.

    >>> noise, before = Noise(nn.Dropout(0.5), torch.device("cpu"), seed=0), torch.get_rng_state()
    >>> with noise.batch(3):
    ...     first = torch.rand(1)
    >>> with noise.batch(3):
    ...     again = torch.rand(1)
    >>> bool(first == again), torch.equal(torch.get_rng_state(), before)
    (True, True)
    """

    def __init__(self, model: nn.Module, device: torch.device, seed: int):
        self.active = draws_noise(model)
        self.device, self.seed = device, seed

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """The generators of one batch, counted from the start of the run."""
        if not self.active:
            yield
            return
        cuda = [self.device] if self.device.type == "cuda" else []
        with _GENERATOR, torch.random.fork_rng(cuda):
            _seed(self.device, (self.seed * 1_000_003 + number) % 2**63)
            yield


def _seed(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed: it reseeds every device, and only these generators are restored.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
