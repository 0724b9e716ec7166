"""Retraining with accelerate: two processes are one with twice the accumulation, and the masks hold."""

import copy
import os
import socket
from contextlib import nullcontext

import pandas as pd
import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.loop.retrain import retrain

OPTIONS = {"steps": 6, "batch": 4, "clip": 0.5, "progress": False}
SUBSETS = {"full": 3e-3, "biases": 3e-2}


def start(model_file):
    """The embedded model, pruned: the same in every process."""
    from perpkit.sources.models import load_model

    model, _ = load_model("tiny-opt", device="cpu")
    masks = prune(model, "magnitude", sparsity=0.5)
    return model, masks, torch.load(model_file)


def work(rank, port, folder):
    """One of two processes: retrain each subset, with one accelerator for both; then spread by FSDP."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    pruned, masks, windows = start(folder / "windows.pt")
    for subset, lr in SUBSETS.items():
        model = copy.deepcopy(pruned)
        history = retrain(
            model, windows, masks=masks, subset=subset, lr=lr, accelerator=accelerator, **OPTIONS
        )
        masks.check(model)
        state = {name: p.detach() for name, p in model.named_parameters()}
        torch.save({"history": history.to_numpy(), "state": state}, folder / f"{subset}{rank}.pt")
    spread(accelerator, pruned, masks, windows, folder / f"fsdp{rank}.pt")
    torch.distributed.destroy_process_group()


def spread(accelerator, model, masks, windows, file):
    """The same with parameters spread by FSDP, which accelerate itself does on GPUs only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def prepare(model, optimizer):
        names = {id(p): name for name, p in model.named_parameters()}
        for part in (*model.model.decoder.layers, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        for group in optimizer.param_groups:
            group["params"] = [model.get_parameter(names[id(p)]) for p in group["params"]]
        return model, optimizer

    accelerator.prepare = prepare
    accelerator.no_sync = lambda model: nullcontext()
    accelerator.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    options = {"masks": masks, "subset": "full", "lr": SUBSETS["full"], "accelerator": accelerator, **OPTIONS}
    with pytest.raises(ValueError, match=r"spread over processes; use accelerator\.save_state"):
        retrain(copy.deepcopy(model), windows, checkpoint=file, **options)
    history = retrain(model, windows, **options)
    state = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save({"history": history.to_numpy(), "state": state}, file)


@pytest.fixture(scope="module")
def processes(tmp_path_factory, text):
    """The folder of what two processes have found."""
    folder = tmp_path_factory.mktemp("accelerate")
    torch.save(text.train, folder / "windows.pt")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("found_in", ["full", "biases", "fsdp"])
def test_two_processes_are_one_with_twice_the_accumulation(processes, found_in):
    subset = "full" if found_in == "fsdp" else found_in
    model, masks, windows = start(processes / "windows.pt")
    wanted = retrain(model, windows, masks=masks, subset=subset, lr=SUBSETS[subset], accumulate=2, **OPTIONS)
    assert wanted.loss.nunique() == len(wanted)
    for rank in (0, 1):
        found = torch.load(processes / f"{found_in}{rank}.pt", weights_only=False)
        history = pd.DataFrame(found["history"], columns=wanted.columns)
        assert history.loss.tolist() == pytest.approx(wanted.loss.tolist(), rel=1e-5)
        assert history.lr.tolist() == wanted.lr.tolist()
        for name, p in model.named_parameters():
            if name.endswith("k_proj.bias"):
                continue  # softmax does not see it: its gradient is rounding, which Adam makes large
            assert (found["state"][name] - p).abs().max() < 0.05 * SUBSETS[subset], name
            if name in masks:
                assert torch.count_nonzero(found["state"][name][~masks[name]]) == 0


def accelerator(**options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def test_one_process_is_retraining_without(tiny_opt, text):
    other, options = copy.deepcopy(tiny_opt), {"masks": Masks({}), "subset": "biases", "lr": 1e-2, **OPTIONS}
    forward = dict(vars(tiny_opt)).get("forward")
    retrain(tiny_opt, text.train, accelerator=accelerator(), accumulate=2, **options)
    retrain(other, text.train, accumulate=2, **options)
    for one, two in zip(tiny_opt.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert dict(vars(tiny_opt)).get("forward") == forward


def test_mixed_precision_is_the_accelerators_and_taken_off_afterwards(tiny_opt, text):
    before = tiny_opt(text.test[:2]).logits.dtype
    options = {"masks": Masks({}), "subset": "biases", "lr": 1e-2, **OPTIONS}
    wide, narrow = copy.deepcopy(tiny_opt), copy.deepcopy(tiny_opt)
    wanted = retrain(wide, text.train, **options)
    history = retrain(narrow, text.train, accelerator=accelerator(mixed_precision="bf16"), **options)
    assert history.loss.tolist() == pytest.approx(wanted.loss.tolist(), rel=0.02)
    assert history.loss[0] != wanted.loss[0]
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    assert narrow(text.test[:2]).logits.dtype == before
    assert "forward" not in vars(narrow)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({}, {"autocast": "bfloat16"}, r"give Accelerator\(mixed_precision='bf16'\) instead"),
        ({"gradient_accumulation_steps": 4}, {}, "the accelerator accumulates 4 steps; leave that at 1"),
    ],
)
def test_what_the_accelerator_decides_is_refused(tiny_opt, text, settings, options, words):
    options = {"masks": Masks({}), "subset": "biases", "lr": 1e-2, **OPTIONS, **options}
    with pytest.raises(ValueError, match=words):
        retrain(tiny_opt, text.train, accelerator=accelerator(**settings), **options)
    with pytest.raises(ValueError, match="with an accelerator the model must be float32"):
        retrain(tiny_opt.bfloat16(), text.train, accelerator=accelerator(), **options | {"autocast": None})
