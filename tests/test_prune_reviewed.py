"""Promises of `prune` that are easily broken: adapters, mappings, memory, full disks, cancelling early."""

import errno
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from pruning_parts import snapshot, unchanged

import perpkit as pk
from perpkit.pruning import sparsegpt as module
from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import homes, prune
from perpkit.pruning.undo import Undo


def test_a_model_with_adapters_is_refused_until_they_are_merged(make_model):
    model = make_model("mixtral")
    masks = prune(model, "magnitude", sparsity=0.5)
    pk.attach(model, masks, "mask_lora", rank=2, targets=["down_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge\(model\) before it is pruned"):
        prune(model, "magnitude", sparsity=0.7, masks=masks)
    assert unchanged(model, before)
    pk.merge(model)
    assert prune(model, "magnitude", sparsity=0.7, masks=masks).sparsity() == pytest.approx(0.7, abs=1e-3)


def test_a_mapping_is_an_allocation_too(make_model):
    name = "model.decoder.layers.0.fc1.weight"
    masks = prune(make_model("opt"), "magnitude", allocation={name: 0.5})
    assert masks.sparsity(by="layer").set_index("layer")["sparsity"][name] == 0.5
    with pytest.raises(ValueError, match="leave sparsity= out"):
        prune(make_model("opt"), "magnitude", sparsity=0.5, allocation={name: 0.5})


@pytest.mark.parametrize("pattern", [(2, 4), "2-4", 24])
def test_a_pattern_is_written_with_a_colon(make_model, pattern):
    with pytest.raises(ValueError, match="write N:M"):
        prune(make_model("opt"), "magnitude", pattern=pattern)


def test_sparsegpt_leaves_layers_with_dead_inputs_that_a_mapping_does_not_name(make_model, windows):
    model = make_model("opt")
    # Neurons that never fire: the columns of fc2 that read them could be cleared at no loss.
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[:5] = -100.0
    before = snapshot(model)
    named = "model.decoder.layers.0.fc1.weight"
    prune(model, "sparsegpt", sparsity={named: 0.5}, calibration=windows, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {named}


def test_sparsegpt_keeps_no_work_space_until_the_collector_comes(monkeypatch):
    seen = []
    inner = module._prune_block

    def watched(columns, *rest):
        seen.append(weakref.ref(columns))
        return inner(columns, *rest)

    monkeypatch.setattr(module, "_prune_block", watched)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=draw)
    gc.disable()
    try:
        module.sparsegpt(torch.randn(8, 32, generator=draw), rows.T @ rows, sparsity=0.5, block=16)
        assert len(seen) == 2
        assert [columns() for columns in seen] == [None, None]
    finally:
        gc.enable()


def test_a_disk_that_fills_up_leaves_the_model_as_it_was(make_model, windows, monkeypatch):
    model = make_model("opt")
    before = snapshot(model)
    written = []

    class Full:
        """A file on a disk with room for three matrices."""

        def __init__(self, file):
            self._file = file

        def write(self, data):
            written.append(data.nbytes)
            return self._file.write(data)

        def flush(self):
            if len(written) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._file.flush()

        def __getattr__(self, name):
            return getattr(self._file, name)

    enter = Undo.__enter__

    def entered(self):
        enter(self)
        self._file = Full(self._file)
        return self

    monkeypatch.setattr(Undo, "__enter__", entered)
    with pytest.raises(OSError, match="No space left"):
        prune(model, "wanda", sparsity=0.5, calibration=windows, progress=False)
    assert len(written) == 4
    assert unchanged(model, before)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_a_cancel_that_fails_leaves_the_model_as_it_was(make_model, windows, criterion):
    model = make_model("opt")
    before = snapshot(model)
    asked = []

    def cancelled():
        asked.append(1)
        if len(asked) == 6:
            raise RuntimeError("the widget is gone")
        return False

    with pytest.raises(RuntimeError, match="the widget is gone"):
        prune(model, criterion, sparsity=0.5, calibration=windows, cancelled=cancelled, progress=False)
    assert unchanged(model, before)


@pytest.mark.parametrize("seed", [2**64 - 1, -3])
def test_any_seed_will_do(make_model, seed):
    assert prune(make_model("opt"), "random", sparsity=0.5, seed=seed).sparsity() == 0.5


@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_cancelling_while_the_dense_model_is_looked_at_prunes_nothing(make_model, windows, allocation):
    model = make_model("opt")
    before = snapshot(model)
    options = {"allocation": allocation, "calibration": windows, "progress": False}
    masks = prune(model, "wanda", sparsity=0.5, cancelled=lambda: True, **options)
    assert len(masks) == 0
    assert unchanged(model, before)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        prune(model, "wanda", sparsity=0.5, cancelled=interrupt, **options)
    assert isinstance(stopped.value.masks, Masks)
    assert unchanged(model, before)


def test_boolean_windows_and_plain_configurations(make_model, windows):
    with pytest.raises(ValueError, match="whole numbers"):
        prune(make_model("opt"), "wanda", sparsity=0.5, calibration=windows > 3, progress=False)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
    plain.config = {"width": 8}
    assert prune(plain, "magnitude", sparsity=0.5).sparsity() == 0.5


def test_masks_of_a_model_that_fills_its_gpu_stay_in_the_hosts_memory(monkeypatch):
    def matrix(name: str, device: str, size: int):
        weight = SimpleNamespace(device=torch.device(device), numel=lambda: size)
        return SimpleNamespace(parameter=name, weight=lambda: weight)

    free = {torch.device("cuda:0"): 100, torch.device("cuda:1"): 121}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1000))
    # Two matrices of one parameter, as the experts of a mixture are, have one mask.
    several = [matrix("a", "cuda:0", 30), matrix("b", "cuda:0", 30), matrix("c", "cuda:1", 60)]
    several += [matrix("c", "cuda:1", 60), matrix("d", "cpu", 10**12)]
    assert homes(several) == {
        "a": torch.device("cpu"),
        "b": torch.device("cpu"),
        "c": torch.device("cuda:1"),
        "d": torch.device("cpu"),
    }
