"""What the tests of pruning share: whether a model is as it was, and slow ways to see what enters a layer."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from perpkit.pruning.layers import decoder_blocks, is_language_model, prunable_matrices


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    """Whether all values are bit for bit those of the snapshot, NaN included."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(value.isnan(), before[name].isnan())
        and torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))
        for name, value in now.items()
    )


def untouched(model):
    """Whether no hook and no replaced forward pass is left."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def parts_of(model):
    """The names of the matrices that are pruned together: those of each block, or of each layer."""
    names = list(prunable_matrices(model))
    if not is_language_model(model):
        return [[name] for name in names]
    prefix, blocks = decoder_blocks(model)
    return [[name for name in names if name.startswith(f"{prefix}.{i}.")] for i in range(len(blocks))]


@torch.no_grad()
def entered(model, data, batch):
    """What enters each matrix, `[groups, tokens, in]`, when the whole model runs; in float64.

    For one expert: the tokens that chose it, and what its own rows of the other matrix make of them.
    """
    seen = {}
    matrices = prunable_matrices(model)

    def layer(module, arguments, name):
        x = arguments[0].double()
        plain = not isinstance(module, nn.Conv1d | nn.Conv2d)
        seen.setdefault(name, []).append(x.reshape(1, -1, x.shape[-1]) if plain else patches(module, x))

    def experts(module, arguments):
        hidden, chosen = (tensor.reshape(-1, tensor.shape[-1]) for tensor in arguments[:2])
        for name, matrix in matrices.items():
            if matrix.module is module:
                rows = torch.stack(
                    [h for h, c in zip(hidden, chosen, strict=True) if matrix.expert in c] or [hidden[0]]
                )
                rows = rows if any(matrix.expert in c for c in chosen) else rows[:0]
                if "down_proj" in name:
                    gate, up = (rows @ module.gate_up_proj[matrix.expert].T).chunk(2, -1)
                    rows = module.act_fn(gate) * up
                seen.setdefault(name, []).append(rows.double()[None])

    hooks = [
        m.module.register_forward_pre_hook(lambda module, x, name=name: layer(module, x, name))
        for name, m in matrices.items()
        if m.expert is None
    ]
    mixtures = {m.module: None for m in matrices.values() if m.expert is not None}
    hooks += [module.register_forward_pre_hook(experts) for module in mixtures]
    for part in data.split(batch):
        model(part)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows, 1) for name, rows in seen.items()}


def patches(module, x):
    """What each output pixel of a convolution sees, `[groups, pixels, in]`, pixel by pixel."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    ends = module.padding
    if ends == "valid":
        ends = (0,) * len(module.kernel_size)
    if ends == "same":
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        ends = [(each // 2, each - each // 2) for each in whole]
    else:
        ends = [(each, each) for each in ends]
    x = F.pad(x, [side for each in reversed(ends) for side in each], mode)
    size = [
        (length - d * (k - 1) - 1) // s + 1
        for length, d, k, s in zip(
            x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True
        )
    ]
    channels = module.in_channels // module.groups
    found = []
    for group in range(module.groups):
        rows = []
        for image, *place in itertools.product(range(len(x)), *map(range, size)):
            row = []
            for channel, *offset in itertools.product(range(channels), *map(range, module.kernel_size)):
                at = [
                    p * s + o * d
                    for p, s, o, d in zip(place, module.stride, offset, module.dilation, strict=True)
                ]
                row.append(x[(image, group * channels + channel, *at)])
            rows.append(torch.stack(row))
        found.append(torch.stack(rows))
    return torch.stack(found)
