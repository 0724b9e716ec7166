"""Streaming: each part sees what the pruned parts before it make, and nothing is left behind."""

import copy
import gc

import pytest
import torch
from pruning_parts import entered, parts_of, snapshot, unchanged, untouched
from torch import nn

from perpkit.pruning import calibration
from perpkit.pruning.calibration import stream
from perpkit.pruning.inputs import recorded
from perpkit.pruning.layers import decoder_blocks, is_language_model, prunable_matrices


def half_pruned(part):
    """Set every other weight of the part's matrices to zero."""
    for matrix in part.matrices.values():
        values = matrix.view(matrix.weight()).detach().clone()
        values.flatten()[::2] = 0
        matrix.assign(matrix.weight(), values)


def precise(model):
    return model if hasattr(model.config, "num_experts_per_tok") else model.double()


def compare(model, data, batch):
    """Every part's sums against one forward pass of the whole model, its earlier parts pruned."""
    names = []
    for part in stream(model, data, batch=batch):
        wanted = entered(copy.deepcopy(model), data, batch)
        with recorded(part.matrices, gram=True) as inputs:
            part.run()
        assert inputs.keys() == part.matrices.keys()
        for name, seen in inputs.items():
            rows = wanted[name]
            assert seen.tokens == rows.shape[1], name
            if seen.tokens:
                # (the grouped products of mixtures are not made for double precision)
                exact = 1e-9 if seen.squares.dtype == torch.float64 else 1e-5
                scale = float(rows.square().sum(1).max())
                options = {
                    "rtol": exact,
                    "atol": exact * scale,
                    "msg": lambda text, name=name: f"{name}: {text}",
                }
                torch.testing.assert_close(seen.squares.double(), rows.square().sum(1), **options)
                torch.testing.assert_close(seen.gram.double(), rows.mT @ rows, **options)
        names.append(list(part.matrices))
        half_pruned(part)
    assert sorted(names) == sorted(parts_of(model))
    assert is_language_model(model) <= (names == parts_of(model))
    assert untouched(model)


@torch.no_grad()
def test_a_language_model_streams_what_a_whole_forward_pass_sees(any_model, windows):
    # batches of 2, 2 and 1
    compare(precise(any_model), windows[:5], 2)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["gemma3_text", "mixtral", "falcon"])
def test_whichever_way_attention_is_computed(make_model, windows, architecture, attention):
    model = precise(make_model(architecture, attn_implementation=attention))
    assert model.config._attn_implementation == attention
    compare(model, windows[:3], 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnet", "convnext", "sequential"])
def test_a_vision_model_streams_what_a_whole_forward_pass_sees(make_vision, images, kind):
    compare(make_vision(kind).double(), images[:3, :, ::2, ::2].double(), 2)


class Biased(nn.Module):
    """A block that adds something that depends on the tokens."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, *args, shift, **kwargs):
        return self.block(hidden + shift, *args, **kwargs)


@torch.no_grad()
def test_arguments_that_depend_on_the_tokens_are_kept_for_each_batch(make_model, windows):
    model = make_model("llama").double()
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        blocks[index] = Biased(block)
    inner = model.model.forward
    model.model.forward = lambda input_ids, **kwargs: inner(
        input_ids, **kwargs, shift=input_ids[..., None].double() / 64
    )
    data = windows[:5]
    wanted = {}
    for part in stream(model, data, batch=2):
        with recorded(part.matrices, gram=False) as inputs:
            part.run()
        wanted = wanted or entered(model, data, 2)
        for name, seen in inputs.items():
            torch.testing.assert_close(seen.squares, wanted[name].square().sum(1), rtol=1e-9, atol=0)


@torch.no_grad()
def test_windows_of_several_blocks(make_model, windows):
    model = make_model("gemma2", num_hidden_layers=5).double()
    names, sizes = [], []
    for part in stream(model, windows[:3], batch=2, window=2):
        wanted = entered(copy.deepcopy(model), windows[:3], 2)
        with recorded(part.matrices, gram=False) as inputs:
            part.run()
        for name, seen in inputs.items():
            torch.testing.assert_close(seen.squares, wanted[name].square().sum(1), rtol=1e-9, atol=0)
        half_pruned(part)
        names.append(part.name)
        sizes.append(len(part.matrices))
    assert names == ["model.layers.0-1", "model.layers.2-3", "model.layers.4"]
    assert sizes == [14, 14, 7]


def test_a_parts_output_is_the_models_hidden_state_with_gradients(make_model, windows):
    model = make_model("opt").double()
    states = model(windows[:3], output_hidden_states=True).hidden_states
    for index, part in enumerate(stream(model, windows[:3], batch=2)):
        assert torch.is_grad_enabled()
        made = torch.cat([part.forward(i) for i in range(part.batches)])
        assert made.requires_grad
        # the last hidden state is given after the final norm
        if index == 0:
            torch.testing.assert_close(made, states[1])
    with torch.no_grad():
        assert not part.forward(0).requires_grad


@torch.no_grad()
def test_a_layers_output_is_its_own(make_vision, images):
    model = make_vision("resnet")
    for part in stream(model, images, batch=2):
        outputs = []
        module = next(iter(part.matrices.values())).module
        hook = module.register_forward_hook(lambda _, x, y, outputs=outputs: outputs.append(y))
        model(images)
        hook.remove()
        made = torch.cat([part.forward(i) for i in range(part.batches)])
        torch.testing.assert_close(made, outputs[0], rtol=1e-4, atol=1e-5)


def test_a_layer_that_no_data_reaches_comes_last():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.used = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    parts = list(stream(Idle(), torch.ones(3, 2)))
    assert [part.name for part in parts] == ["used.weight", "idle.weight"]
    with recorded(parts[1].matrices, gram=True) as inputs:
        parts[1].run()
    assert inputs["idle.weight"].tokens == 0


@torch.no_grad()
def test_only_one_block_boundary_is_kept(make_model, windows):
    """While block l is at its turn no other block's activations are alive."""
    alive = []
    model = make_model("llama", num_hidden_layers=4)
    _, blocks = decoder_blocks(model)

    for _ in stream(model, windows, batch=3):
        gc.collect()
        shape = torch.Size([3, 16, 32])
        alive.append(sum(type(o) is torch.Tensor and o.shape == shape for o in gc.get_objects()))
    assert len(alive) == len(blocks)
    assert set(alive) == {4}


# --- nothing is left behind -------------------------------------------------------------------------


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("end", ["all", "break", "error"])
@pytest.mark.parametrize("kind", ["llama", "convnext"])
def test_modes_come_back(make_model, make_vision, windows, images, kind, end):
    model, data = (make_vision(kind), images) if kind == "convnext" else (make_model(kind), windows)
    model.train()
    next(model.children()).eval()
    before, values = modes(model), snapshot(model)
    assert len(set(before)) == 2
    parts = stream(model, data)
    for part in parts:
        assert not any(modes(model))
        part.run()
        if end != "all":
            break
    if end == "break":
        parts.close()
    if end == "error":
        with pytest.raises(RuntimeError, match="stop"):
            parts.throw(RuntimeError("stop"))
    assert modes(model) == before
    assert untouched(model)
    assert unchanged(model, values)


def test_an_error_in_the_model_leaves_no_patches(make_model, make_vision, images):
    model = make_model("llama")
    with pytest.raises(IndexError):
        next(stream(model, torch.full((2, 8), 64)))
    assert untouched(model)
    network = make_vision("sequential")
    with pytest.raises(RuntimeError, match="channels"):
        list(stream(network, images.movedim(1, -1)))
    assert untouched(network)


def test_a_forward_of_the_blocks_own_comes_back(make_model, windows):
    model = make_model("llama")
    block = decoder_blocks(model)[1][1]
    calls = []
    inner = block.forward

    def own(*args, **kwargs):
        calls.append(len(args[0]))
        return inner(*args, **kwargs)

    block.forward = own
    for part in stream(model, windows[:3], batch=2):
        part.run()
    assert vars(block)["forward"] is own
    assert calls == [2, 1]


# --- devices ----------------------------------------------------------------------------------------


def test_offloading_moves_one_block_at_a_time(make_model, windows, monkeypatch):
    model = make_model("llama", num_hidden_layers=3)
    _, blocks = decoder_blocks(model)
    moves = []
    there = torch.device("cpu", 0)
    monkeypatch.setattr(calibration, "_compute_device", lambda model, offload: there)
    for index, block in enumerate(blocks):
        inner = block.to
        block.to = lambda device, index=index, inner=inner: (moves.append((index, device)), inner(device))[1]
    home = torch.device("cpu")
    for part in stream(model, windows, offload=True):
        part.run()
    assert moves == [(i, device) for i in range(3) for device in (there, home)]
    moves.clear()
    parts = stream(model, windows, offload=True)
    next(parts)
    with pytest.raises(RuntimeError, match="stop"):
        parts.throw(RuntimeError("stop"))
    assert moves == [(0, there), (0, home)]


def test_offloading_without_a_gpu_is_refused(make_model, make_vision, windows, images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="offload=True moves one block at a time to a GPU, and there is none"
    ):
        next(stream(make_model("opt"), windows, offload=True))
    with pytest.raises(ValueError, match="offload=True moves decoder blocks, and a CifarResNet has none"):
        next(stream(make_vision("cifar"), images, offload=True))
    assert len(prunable_matrices(make_model("opt"))) == 12
