"""Whether MaskLoRA's kernels for GPUs can be used."""

import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def kernels(x: Tensor, weight: Tensor, mask: Tensor, lora_a: Tensor, lora_b: Tensor) -> ModuleType | None:
    """The module `fused` if its kernels can work on these tensors, else None.

    They are for NVIDIA's GPUs from Ampere on, where Triton is there, as it comes with torch, and can compile;
    not for float64.

    >>> kernels(*torch.zeros(5, 2, 2)) is None
    True
    """
    if not x.is_cuda or torch.float64 in (x.dtype, weight.dtype) or weight.numel() >= 2**31:
        return None
    module = _kernels_on(x.device)
    if module is None or len(lora_a) > module.LARGEST_RANK:
        return None
    plain = weight.is_contiguous() and mask.is_contiguous()
    if not (plain or (weight.t().is_contiguous() and mask.t().is_contiguous())):
        return None
    return module if lora_a.is_contiguous() and lora_b.is_contiguous() else None


@cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import fused

        ones = torch.ones(1, 1, device=device)
        fused.effective(ones, ones > 0, ones, ones, 1.0, torch.empty_like(ones))
    except Exception as error:
        # Triton needs a C compiler and Python's headers, which a machine need not have.
        warnings.warn(f"MaskLoRA works without its kernels, slower: Triton cannot run: {error}", stacklevel=3)
        return None
    return fused
