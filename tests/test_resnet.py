"""The CIFAR ResNets: the published sizes, shortcuts without parameters, and the public checkpoint."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch

from perpkit.pruning.prune import prune
from perpkit.sources.resnet import DEPTHS, Block, CifarResNet


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_published_sizes_in_millions(depth, published):
    model = CifarResNet(depth)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(published, abs=0.006)
    # of the n layers all but the last are convolutions
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == depth - 1
    assert depth in DEPTHS


@pytest.mark.parametrize("depth", [0, 18, 110, "20"])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}; the depths are 20, 32, 44, 56"):
        CifarResNet(depth)


@torch.no_grad()
def test_a_shortcut_takes_every_second_pixel_and_pads_channels():
    block = Block(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    y = block(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, [0, 1, 6, 7]].any()
    block = Block(4, 4, stride=1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)


@torch.no_grad()
def test_shapes_on_the_way(images):
    model = CifarResNet(20, classes=7).eval()
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, x, y: sizes.append(tuple(y.shape)))
    assert model(images).shape == (5, 7)
    assert sizes == [(5, 16, 32, 32), (5, 32, 16, 16), (5, 64, 8, 8)]


# --- the public checkpoint ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(real_data):
    """The test images as JPEG has left them, normalised as the checkpoint was trained, and their labels."""
    from PIL import Image

    stored = np.load(real_data / "cifar10" / "test_4000.npz")
    files = [stored["jpeg"][start:end].tobytes() for start, end in pairwise(stored["offsets"])]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    images = torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), torch.from_numpy(stored["labels"]).long()


def checkpoint(real_data, name):
    state = torch.load(real_data / "cifar10" / name, weights_only=True, map_location="cpu")["state_dict"]
    model = CifarResNet(20)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "published"), [("resnet20-12fca82f.th", 0.81), ("resnet20_jpeg_ft2ep.pt", 0.857)]
)
def test_the_public_checkpoints_classify_as_published(real_data, pictures, name, published):
    images, labels = pictures
    assert len(labels) == 4000
    assert accuracy(checkpoint(real_data, name), images, labels) == pytest.approx(published, abs=0.01)


@pytest.mark.real
def test_trained_weights_survive_what_random_pruning_does_not(real_data, pictures):
    images, labels = (tensor[:500] for tensor in pictures)
    found = {"dense": accuracy(checkpoint(real_data, "resnet20_jpeg_ft2ep.pt"), images, labels)}
    for criterion in ("random", "magnitude", "sparsegpt"):
        model = checkpoint(real_data, "resnet20_jpeg_ft2ep.pt")
        prune(model, criterion, sparsity=0.5, calibration=pictures[0][-64:], progress=False)
        found[criterion] = accuracy(model, images, labels)
    assert found["random"] < 0.3, found
    assert found["magnitude"] > 0.6, found
    assert found["sparsegpt"] > found["dense"] - 0.05, found
