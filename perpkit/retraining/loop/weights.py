"""The weights that a retraining moves: float32 masters, masks that hold, and the last good state."""

import torch
from torch import nn

from ...pruning.masks import Masks

HALVES = (torch.float16, torch.bfloat16)


class Weights:
    """The trained parameters of a model, what is masked of them, and their last good values.

    The optimiser moves `masters`: the parameters themselves, or float32 copies of those in 16 bits, which
    take the rounded values after every step. `buffers` are statistics that training moves as well.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> weights = Weights(dict(model.named_parameters()), Masks({"weight": torch.tensor([[True, False]])}))
    >>> _ = weights.masters[0].data.fill_(3.0)
    >>> weights.settle()
    >>> model.weight.tolist(), weights.finite()
    ([[3.0, 0.0]], True)
    """

    def __init__(
        self, trained: dict[str, nn.Parameter], masks: Masks, buffers: dict[str, torch.Tensor] | None = None
    ):
        self.masks, self.buffers = masks, buffers or {}
        self.bind(trained)
        self._kept: list[torch.Tensor] | None = None

    def bind(self, trained: dict[str, nn.Parameter]) -> None:
        """Take these parameters, for a wrapper may have put others in the place of the first."""
        self.trained = trained
        self.masters = [
            nn.Parameter(p.detach().float()) if p.dtype in HALVES else p for p in trained.values()
        ]
        # Multiplying by bytes is several times as fast as by booleans or as filling.
        self._masked = [
            (name, master, _like(self.masks[name].view(torch.uint8), master))
            for name, master in zip(trained, self.masters, strict=True)
            if name in self.masks
        ]

    def collect(self) -> None:
        """Add the gradients of 16-bit parameters to those of their masters, in float32."""
        for parameter, master in self._pairs():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def mask_gradients(self) -> None:
        """Make the gradients of pruned weights zero: they do not count in the norm that is clipped."""
        for _, weight, kept in self._masked:
            if weight.grad is not None:
                weight.grad.mul_(kept)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the pruned weights exactly zero again after a step, assert it, and round the masters."""
        for _, weight, kept in self._masked:
            weight.mul_(kept)
        self._round()

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError naming a matrix in which a pruned weight is not exactly zero."""
        alive = {name: _whole(((weight != 0) > kept).any()) for name, weight, kept in self._masked}
        # One look at the device for all matrices.
        if alive and torch.stack(list(alive.values())).any():
            raise ValueError(f"{next(name for name in alive if alive[name])!r} is no longer sparse")

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether all weights and statistics are finite numbers."""
        moved = [p.detach() for p in self.trained.values()] + self._floats()
        return not moved or bool(torch.stack(_totals(moved)).isfinite().all())

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present values as the last good ones."""
        values = self._state()
        if self._kept is None:
            self._kept = [value.clone() for value in values]
        else:
            _copy(self._kept, values)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last good values."""
        assert self._kept is not None
        _copy(self._state(), self._kept)
        self._round()

    def state(self) -> dict[str, torch.Tensor]:
        """The masters and statistics by name, to be saved and loaded."""
        return dict(zip(self.trained, (m.detach() for m in self.masters), strict=True)) | self.buffers

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take the values of a saved `state`."""
        for name, value in self.state().items():
            value.copy_(state[name])
        self._round()

    def spread(self) -> bool:
        """Whether the weights are spread over several processes."""
        return any(_spread(p) for p in self.trained.values())

    def _round(self) -> None:
        """Let the parameters in 16 bits take the values of their masters."""
        pairs = self._pairs()
        _copy([parameter for parameter, _ in pairs], [master for _, master in pairs])

    def _state(self) -> list[torch.Tensor]:
        return list(self.state().values())

    def _floats(self) -> list[torch.Tensor]:
        return [value for value in self.buffers.values() if value.is_floating_point()]

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = zip(self.trained.values(), self.masters, strict=True)
        return [(parameter, master) for parameter, master in pairs if parameter is not master]


def _copy(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy values into other tensors, at once: to launch a copy takes a GPU longer than most copies."""
    if any(_spread(value) for value in values):
        for other, value in zip(to, values, strict=True):
            other.copy_(value)
    elif values:
        torch._foreach_copy_(to, values)


def _totals(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """A number of each tensor, NaN or infinite as soon as one value is; ten times as cheap as asking each."""
    if not all(value.is_cuda and not _spread(value) for value in values):
        return [_whole(value.sum(dtype=torch.promote_types(value.dtype, torch.float32))) for value in values]
    found: list[torch.Tensor] = []
    for dtype in {value.dtype for value in values}:
        some = [value for value in values if value.dtype == dtype]
        found += torch._foreach_norm(some, 1, dtype=torch.promote_types(dtype, torch.float32))
    return found


def _like(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mask where the weight is, cut in the same way when it is spread over several processes."""
    if _spread(weight):
        from torch.distributed.tensor import distribute_tensor

        mesh = weight.device_mesh  # type: ignore[attr-defined]
        return distribute_tensor(mask.to(mesh.device_type), mesh, weight.placements)  # type: ignore[attr-defined]
    return mask.to(weight.device)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A number that every process agrees on."""
    return value.full_tensor() if _spread(value) else value  # type: ignore[attr-defined]


def _spread(tensor: torch.Tensor) -> bool:
    # A DTensor, told by what it has: importing the class costs most of a second.
    return hasattr(tensor, "device_mesh")
