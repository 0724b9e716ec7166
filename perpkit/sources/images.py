"""Loading labelled pictures, normalised, for training, validation and test."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import shapes
from .corruptions import corrupt
from .hub import EMBEDDED_VISION, hub_reachable, reading_dataset
from .pictures import ON_CORRUPT, Files, cut, decode, find_pictures

SPLITS = shapes.SPLITS
SHAPES_COUNTS = {"train": 8000, "validation": 1000, "test": 2000}
# What the public networks for CIFAR-10 and ImageNet were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB_IMAGES = {"cifar10": {"path": "uoft-cs/cifar10"}}

Split = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Images:
    """Split pictures of `classes`: each split is (images float32 `[n, 3, h, w]`, labels int64 `[n]`).

    The images are normalised: a channel's values in [0, 1], less its `mean`, divided by its `std`.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)

    @property
    def protocol(self) -> str:
        """What an accuracy on the test split was measured on, in words."""
        count, _, height, width = self.test[0].shape
        return f"{self.name}, test split, {count} pictures of {width}×{height}"

    def corrupted(self, kind: str, severity: int, seed: int = 0) -> Split:
        """The test split, its pictures corrupted; see `corruptions.corrupt`.

        >>> images = load_images("shapes", counts={"train": 10, "validation": 10, "test": 10})
        >>> worse, labels = images.corrupted("noise", 5)
        >>> worse.shape, torch.equal(labels, images.test[1])
        (torch.Size([10, 3, 32, 32]), True)
        """
        images, labels = self.test
        return corrupt(images, kind, severity, mean=self.mean, std=self.std, seed=seed), labels


def load_images(
    source: str | Path,
    *,
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
    size: int | None = None,
    on_corrupt: str = "stop",
    progress: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> Images:
    """Load labelled pictures, normalised, for train, validation and test.

    `source` is `"shapes"` (embedded and unlimited: ten shapes, 32×32; its test split is always the same
    pictures), `"cifar10"` from the Hub, or local: a `.npz` file of encoded pictures (`jpeg`, all end to end,
    `offsets`, `labels`), a folder of `train*.npz` and `test*.npz`, a folder with `train/`, `test/` and
    perhaps `validation/` or `val/`, each with a folder for each class, or just a folder for each class. What
    is not split is cut into 80 % train, 10 % validation and 10 % test by the `seed`, so a network that was
    trained under one seed has seen test pictures of another; a missing validation split is a tenth of the
    training pictures, always the same.

    `counts` caps the number of pictures by split (of shapes it is the number: 8000, 1000 and 2000 unless
    told); the seed chooses which of train and validation. Pictures that are not `size` × `size` are scaled
    until their shorter side is and cut about their middle. All but shapes are normalised by the mean and
    deviation of ImageNet, as the public networks want. A progress bar shows when decoding takes longer than a
    second; when `cancelled()` says so, `pictures.Stopped` is raised.

    Raises ValueError for an unknown source, split or count, a file that cannot be read, a picture that cannot
    be decoded (`on_corrupt="skip"` leaves it out with a warning), class folders that differ between splits,
    pictures of several sizes without `size`, and a hub that cannot be reached.

    >>> images = load_images("shapes", counts={"train": 100, "validation": 20})
    >>> images.train[0].shape, images.classes[:3]
    (torch.Size([100, 3, 32, 32]), ('circle', 'square', 'triangle'))
    >>> images.protocol
    'shapes, test split, 2000 pictures of 32×32'
    """
    if not isinstance(counts, Mapping | None):
        raise ValueError(f"counts is {counts!r}; it is a mapping from a split to a number of pictures")
    caps = dict(counts or {})
    if unknown := set(caps) - set(SPLITS):
        raise ValueError(f"unknown split {min(unknown)!r} in counts; the splits are {', '.join(SPLITS)}")
    whole = {f"counts[{split!r}]": count for split, count in caps.items()} | {"seed": seed}
    for name, value in (whole | ({} if size is None else {"size": size})).items():
        if not isinstance(value, int | np.integer):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
    for split, count in caps.items():
        if count < 1:
            raise ValueError(f"counts[{split!r}] is {count}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; it is a number of pixels, at least 1")
    if on_corrupt not in ON_CORRUPT:
        raise ValueError(f"unknown on_corrupt {on_corrupt!r}; want {' or '.join(ON_CORRUPT)}")
    if source == "shapes":
        return _shapes(SHAPES_COUNTS | caps, seed, size)
    name, files, classes = _files(source, seed)
    if "validation" not in files:
        # By a seed of its own: what one run is validated on, no other may have been trained on.
        files["train"], files["validation"] = files["train"].without_tenths(1, seed=0)
    found = {}
    for split in SPLITS:
        some = files[split].some(caps.get(split), seed=0 if split == "test" else seed)
        if not some.pictures:
            raise ValueError(f"the {split} split of {name!r} is empty; give more pictures")
        found[split] = decode(some, size=size, on_corrupt=on_corrupt, progress=progress, cancelled=cancelled)
    _check_sizes(name, found)
    return Images(name, classes, MEAN, STD, *(_normalised(found[split], MEAN, STD) for split in SPLITS))


def _shapes(counts: dict[str, int], seed: int, size: int | None) -> Images:
    if size not in (None, shapes.SIDE):
        raise ValueError(f"size is {size}; the shapes are {shapes.SIDE}×{shapes.SIDE}, leave size out")
    # The test split is the same for every seed, so that accuracies can be compared.
    seeds = {split: 0 if split == "test" else seed for split in SPLITS}
    mean, std = shapes.MEAN, shapes.STD
    found = [_normalised(shapes.shapes(split, counts[split], seeds[split]), mean, std) for split in SPLITS]
    return Images(_seeded("shapes", seed), shapes.CLASSES, mean, std, *found)


def _seeded(name: str, seed: int) -> str:
    """The name of pictures that are others by another seed."""
    return name if seed == 0 else f"{name} (seed {seed})"


def _normalised(pictures: Split, mean: tuple[float, ...], std: tuple[float, ...]) -> Split:
    images, labels = pictures
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255).sub_(shift).div_(scale), labels


def _check_sizes(name: str, found: dict[str, Split]) -> None:
    sizes = {tuple(images.shape[2:]): split for split, (images, _) in found.items()}
    if len(sizes) > 1:
        said = " and ".join(f"{width}×{height} ({split})" for (height, width), split in sizes.items())
        raise ValueError(
            f"the splits of {name!r} have pictures of several sizes (width×height), {said}; give size="
        )


def _files(source: str | Path, seed: int) -> tuple[str, dict[str, Files], tuple[str, ...]]:
    """The name, the encoded pictures of each split, and the classes."""
    if isinstance(source, str) and source in HUB_IMAGES:
        return source, *_from_hub(source)
    path = Path(source).expanduser()
    if str(source) and path.exists():
        name, (files, classes) = path.name or path.resolve().name, find_pictures(path)
        if "all" in files:
            return _seeded(name, seed), cut(files["all"], path, seed), classes
        return name, files, classes
    valid = ("shapes", *HUB_IMAGES)
    near = difflib.get_close_matches(str(source), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"unknown images {str(source)!r}{hint} Images are {', '.join(map(repr, valid))}, or the path of an "
        "existing .npz file or folder"
    )


def _from_hub(name: str) -> tuple[dict[str, Files], tuple[str, ...]]:
    """Encoded pictures from the Hub; the cache is enough when the Hub cannot be reached."""
    import datasets

    files = {}
    with reading_dataset(f"the data set {name!r}", hub_reachable(), embedded=EMBEDDED_VISION):
        for split in ("train", "test"):
            rows = datasets.load_dataset(**HUB_IMAGES[name], split=split)
            classes = tuple(rows.features["label"].names)
            encoded = rows.cast_column("img", datasets.Image(decode=False))["img"]
            pictures = [(f"picture {i} of {name} ({split})", row["bytes"]) for i, row in enumerate(encoded)]
            files[split] = Files(pictures, np.array(rows["label"], np.int64))
    return files, classes
