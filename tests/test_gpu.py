"""The same on a GPU: pruning, offloading, MaskLoRA, retraining and reconstruction agree with the CPU."""

import copy

import pytest
import torch

import perpkit as pk
from perpkit.pruning.inputs import added_gram
from perpkit.retraining.adapters import masklora
from perpkit.retraining.adapters.masklora import mask_lora_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def on_gpu(model):
    return copy.deepcopy(model).cuda()


def agreement(one: pk.Masks, other: pk.Masks) -> float:
    """The smallest agreement of a layer."""
    moved = pk.Masks({name: mask.cpu() for name, mask in one.items()})
    return moved.overlap(pk.Masks({name: mask.cpu() for name, mask in other.items()}))["agreement"].min()


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "ria", "sparsegpt", "sparsefw"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["50%", "2:4"])
def test_pruning_on_a_gpu_is_pruning_on_a_cpu(make_model, windows, criterion, target):
    model = make_model("opt", dtype=torch.float64)
    gpu = on_gpu(model)
    given = {"calibration": windows, "batch": 5, "progress": False, **target}
    here, there = pk.prune(model, criterion, **given), pk.prune(gpu, criterion, **given)
    there.check(gpu)
    assert all(mask.is_cuda for mask in there.values())
    assert there.sparsity() == here.sparsity()
    assert agreement(there, here) == 1
    for one, other in zip(model.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_masks_that_would_fill_the_gpu_stay_in_the_hosts_memory(make_model, windows, criterion, monkeypatch):
    model = make_model("opt", dtype=torch.float64)
    gpu = on_gpu(model)
    given = {"sparsity": 0.5, "calibration": windows, "batch": 5, "progress": False}
    here = pk.prune(model, criterion, **given)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    there = pk.prune(gpu, criterion, **given)
    assert not any(mask.is_cuda for mask in there.values())
    assert agreement(there, here) == 1
    there.check(gpu)
    pk.retrain(gpu, windows, masks=there, subset="full", steps=2, batch=2, lr=1e-3, progress=False)
    there.check(gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gram_matrix_of_16_bits_is_as_exact_as_in_float32(dtype):
    draw = torch.Generator().manual_seed(0)
    # All alike, as deep models make them, and one input that stands out: sums of numbers of one sign.
    rows = (1 + 0.1 * torch.randn(1, 20_000, 256, generator=draw)).to(dtype).cuda()
    rows[..., 7] *= 30
    exact = rows.double().mT @ rows.double()
    in_float32 = rows.float().mT @ rows.float()
    ours = added_gram(added_gram(None, rows[:, :9000]), rows[:, 9000:])
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= max(1e-5 * exact.norm(), 3 * (in_float32 - exact).norm())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_offloading_leaves_the_model_on_the_cpu(any_model, windows, criterion):
    # The grouped product of a mixture's experts exists on GPUs in float32 at most.
    mixture = any_model.config.model_type in ("mixtral", "qwen3_moe")
    whole = copy.deepcopy(any_model).to(torch.float32 if mixture else torch.float64)
    offloaded = copy.deepcopy(whole)
    given = {"sparsity": 0.5, "calibration": windows, "batch": 5, "progress": False}
    here = pk.prune(whole, criterion, **given)
    there = pk.prune(offloaded, criterion, offload=True, **given)
    assert not any(tensor.is_cuda for tensor in (*offloaded.parameters(), *offloaded.buffers()))
    assert not any(mask.is_cuda for mask in there.values())
    assert agreement(there, here) > 0.99 if mixture else agreement(there, here) == 1


def test_an_error_while_offloading_brings_everything_back(make_model, windows):
    model = make_model("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail_late(event):
        if event.block.endswith("1"):
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        pk.prune(
            model,
            "wanda",
            sparsity=0.5,
            calibration=windows,
            offload=True,
            progress=False,
            on_layer=fail_late,
        )
    for name, value in model.state_dict().items():
        assert not value.is_cuda
        assert torch.equal(value, before[name]), name


def test_offloading_holds_one_block_at_a_time(make_model, windows):
    model = make_model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pk.prune(model, "wanda", sparsity=0.5, calibration=windows, offload=True, progress=False)
    assert torch.cuda.max_memory_allocated() - before < 3 * block


# --- retraining -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kernels", "blocks"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_masklora_on_a_gpu_has_the_gradients_of_the_formula(precision, how, monkeypatch):
    assert masklora.kernels(*torch.zeros(5, 2, 2, device="cuda")) is not None
    if how == "blocks":
        monkeypatch.setattr(masklora, "kernels", lambda *tensors: None)
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 40, 256, generator=draw).cuda() for _ in range(2))
    weight, a, b = (
        torch.randn(shape, generator=draw).cuda() / 16 for shape in ((256, 256), (8, 256), (256, 8))
    )
    mask = torch.rand(256, 256, generator=draw).cuda() > 0.5
    weight = weight * mask
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    effective = weight.double() + mask * 2.0 * (exact[2] @ exact[1])
    wanted = torch.autograd.grad(exact[0] @ effective.T, exact, g.double())
    ours = [t.clone().requires_grad_() for t in (x, a, b)]
    with torch.autocast("cuda", precision or torch.float16, enabled=precision is not None):
        y = mask_lora_linear(ours[0], weight, mask, ours[1], ours[2], scale=2.0)
    found = torch.autograd.grad(y, ours, g.to(y.dtype))
    bound = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[precision]
    for mine, other in zip(found, wanted, strict=True):
        assert (mine.double() - other).norm() <= bound * other.norm()


@pytest.mark.parametrize("subset", ["biases", "full", "lora"])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_retraining_on_a_gpu_follows_the_cpu(make_model, windows, subset, autocast):
    model = make_model("opt")
    gpu = on_gpu(model)
    losses = []
    for each in (model, gpu):
        masks = pk.prune(each, "magnitude", sparsity=0.5)
        if subset == "lora":
            pk.attach(each, masks, "mask_lora", rank=4)
        given = {"lr": 1e-3, "steps": 5, "batch": 4, "checkpointing": True, "progress": False}
        history = pk.retrain(each, windows, masks=masks, subset=subset, autocast=autocast, **given)
        if subset == "lora":
            pk.merge(each)
        masks.check(each)
        losses.append(torch.tensor(history["loss"].to_numpy()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4 if autocast is None else 2e-2, atol=0)


@pytest.mark.parametrize("unit", ["matrix", "submodule"])
@pytest.mark.parametrize("offload", [False, True])
def test_reconstruction_on_a_gpu_is_that_on_a_cpu(make_model, windows, unit, offload):
    dense = make_model("llama", dtype=torch.float64)
    tables = []
    for on, moved in (("cpu", False), ("cpu" if offload else "cuda", offload)):
        model, teacher = copy.deepcopy(dense).to(on), copy.deepcopy(dense).to(on)
        masks = pk.prune(model, "magnitude", sparsity=0.5)
        given = {"unit": unit, "steps": 5, "offload": moved, "progress": False}
        tables.append(pk.reconstruct(model, teacher, masks, windows, **given))
        masks.check(model)
    for column in ("before", "after"):
        torch.testing.assert_close(
            *(torch.tensor(table[column].to_numpy()) for table in tables), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("kind", ["lora", "lora_prune", "scale_lora", "mask_lora"])
def test_only_adapters_that_read_their_masks_have_them_on_the_gpu(make_model, kind):
    model = make_model("opt").cuda()
    masks = pk.prune(model, "magnitude", sparsity=0.0)
    host = pk.Masks({name: mask.cpu() for name, mask in masks.items()})
    pk.attach(model, host, kind, rank=4)
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("_mask")]
    assert buffers
    assert all(buffer.is_cuda == (kind == "mask_lora") for buffer in buffers)
    pk.merge(model)
