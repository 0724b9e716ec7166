"""The same on a GPU: pruning, offloading, MaskLoRA, retraining and reconstruction agree with the CPU."""

import copy

import pytest
import torch

import perpkit as pk

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


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_offloading_leaves_the_model_on_the_cpu(any_model, windows, criterion):
    whole = copy.deepcopy(any_model).double()
    offloaded = copy.deepcopy(whole)
    given = {"sparsity": 0.5, "calibration": windows, "batch": 5, "progress": False}
    here = pk.prune(whole, criterion, **given)
    there = pk.prune(offloaded, criterion, offload=True, **given)
    assert not any(tensor.is_cuda for tensor in (*offloaded.parameters(), *offloaded.buffers()))
    assert not any(mask.is_cuda for mask in there.values())
    assert agreement(there, here) == 1


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
