"""Augmentation while retraining: drawn by seed, step and batch, whoever computes them and after a restart."""

import copy
import functools
import socket

import pandas as pd
import pytest
import torch
from case_names import named
from torch import nn

from perpkit.pruning.masks import Masks
from perpkit.retraining.iterative import imp
from perpkit.retraining.loop.retrain import retrain
from perpkit.sources.augment import crop_and_flip


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(24, 4)).eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 3, 12, 12, generator=generator), torch.arange(24) % 4


def train(model, data, **changes):
    options = {"subset": "full", "steps": 6, "batch": 4, "lr": 0.05, "optimizer": "sgd", "progress": False}
    return retrain(model, data, masks=Masks({}), **{**options, "augment": crop_and_flip, **changes})


def same(one, other):
    values = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in values)


class Recorder:
    """Remembers its batches and the first number of each generator."""

    def __init__(self):
        self.batches, self.numbers = [], []

    def __call__(self, images, generator):
        self.batches.append(images.clone())
        self.numbers.append(torch.rand((), generator=generator, dtype=torch.float64).item())
        return images


def test_the_model_is_trained_on_what_augment_returns(data, generators_unchanged):
    model, plain, shifted = (network() for _ in range(3))
    train(model, data, augment=lambda images, generator: images + 1)
    train(shifted, (data[0] + 1, data[1]), augment=None)
    train(plain, data, augment=None)
    assert same(model, shifted)
    assert not same(model, plain)


def test_every_batch_has_numbers_of_its_own_fixed_by_the_seed(data):
    first, again, other = Recorder(), Recorder(), Recorder()
    for recorder, seed in ((first, 0), (again, 0), (other, 1)):
        train(network(), data, augment=recorder, accumulate=2, seed=seed)
    assert first.numbers == again.numbers
    # two batches in each of six steps
    assert len(set(first.numbers + other.numbers)) == 24


def test_the_numbers_do_not_depend_on_how_batches_are_shared_out(data):
    """What accumulation takes in one step, another takes in two: the same batches and numbers."""
    one, two = Recorder(), Recorder()
    train(network(), data, augment=one, steps=6, accumulate=1)
    train(network(), data, augment=two, steps=3, accumulate=2)
    assert one.numbers == two.numbers
    assert all(torch.equal(a, b) for a, b in zip(one.batches, two.batches, strict=True))


def test_augmenting_in_place_does_not_reach_the_data(data):
    before = data[0].clone()
    train(network(), data, augment=lambda images, generator: images.mul_(2))
    assert torch.equal(data[0], before)


def test_the_dense_model_is_asked_about_the_same_pictures(data):
    dense, teacher = network(), []
    dense.register_forward_pre_hook(lambda _, args: teacher.append(args[0].clone()))
    recorder = Recorder()

    def augment(images, generator):
        return recorder(2 * images, generator)

    train(network(), data, distill=dense, augment=augment, steps=2)
    # and in the end once about the last batch as it is
    assert len(teacher) == 3
    assert all(torch.equal(a, b) for a, b in zip(teacher[:2], recorder.batches, strict=True))


class Killed(BaseException):
    """Something that no code of ours catches."""


def kill(step, loss):
    if step == 5:
        raise Killed


@pytest.mark.parametrize("augment", [crop_and_flip, functools.partial(torch.Tensor.add, alpha=0)], ids=named)
def test_a_killed_run_goes_on_to_the_same_bits(data, tmp_path, augment):
    if isinstance(augment, functools.partial):
        augment = functools.partial(scaled, by=2.0)
    whole, first, second = network(), network(), network()
    options = {"augment": augment, "accumulate": 2, "steps": 8}
    history = train(whole, data, **options)
    options |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    with pytest.raises(Killed):
        train(first, data, on_step=kill, **options)
    again = train(second, data, **options)
    pd.testing.assert_frame_equal(again, history)
    assert same(second, whole)


def scaled(images, generator, by):
    return images * (1 + by * torch.rand((), generator=generator))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (crop_and_flip, None),
        (None, crop_and_flip),
        (crop_and_flip, functools.partial(scaled, by=2.0)),
        (functools.partial(scaled, by=2.0), functools.partial(scaled, by=3.0)),
        (crop_and_flip, Recorder()),
    ],
)
def test_a_checkpoint_belongs_to_its_augmentation(data, tmp_path, first, then):
    train(network(), data, augment=first, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="belongs to a run with another augment;"):
        train(network(), data, augment=then, checkpoint=tmp_path / "run.pt")
    train(network(), data, augment=copy.copy(first), checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ("crop", "augment is 'crop'; it is a function of images and a generator, such as pk.crop_and_flip"),
        (
            lambda images, generator: images[:2],
            r"made \(2, 3, 12, 12\) of torch.float32 of inputs \(4, 3, 12",
        ),
        (lambda images, generator: images.double(), "made .* of torch.float64 of inputs"),
        (lambda images, generator: None, "augment made NoneType of inputs .*; it must return as many of the"),
    ],
)
def test_what_is_no_augmentation_is_refused(data, augment, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        train(model, data, augment=augment)
    assert same(model, network())


def test_token_windows_are_not_augmented(make_model, windows):
    with pytest.raises(ValueError, match="augment is for labelled inputs; token windows are not augmented"):
        train(make_model("opt"), windows)


# --- two processes --------------------------------------------------------------------------------------


def work(rank, port, folder):
    """One of two processes that share the batches of every step."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from accelerate import Accelerator

    recorder = Recorder()
    data = torch.load(folder / "data.pt")
    # one after the other: batch normalisation would see half a batch each
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    train(model, data, augment=recorder, accelerator=Accelerator(cpu=True), steps=3)
    torch.save((recorder.numbers, recorder.batches), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_draw_what_one_would(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save(data, tmp_path / "data.pt")
    torch.multiprocessing.spawn(work, (port, tmp_path), nprocs=2)
    alone = Recorder()
    train(network(), data, augment=alone, accumulate=2, steps=3)
    for rank in range(2):
        numbers, batches = torch.load(tmp_path / f"{rank}.pt")
        assert numbers == alone.numbers[rank::2]
        assert all(torch.equal(a, b) for a, b in zip(batches, alone.batches[rank::2], strict=True))


def test_iterative_pruning_augments_every_cycle(data):
    recorder, model = Recorder(), network()
    settings = {"subset": "full", "steps": 3, "batch": 4, "lr": 0.01, "optimizer": "sgd"}
    imp(model, "magnitude", data, sparsity=0.5, cycles=2, augment=recorder, progress=False, **settings)
    assert len(recorder.batches) == 6
