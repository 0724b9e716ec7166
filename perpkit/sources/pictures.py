"""Pictures in files: finding them, cutting them into splits, and decoding them."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

SPLITS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ON_CORRUPT = ("stop", "skip")


class Stopped(Exception):
    """Somebody has cancelled while pictures were decoded."""


@dataclass(frozen=True)
class Files:
    """Pictures that are not decoded yet, each with what to call it in an error, and their classes `[n]`."""

    pictures: list[tuple[str, Path | bytes]]
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "Files":
        """Some of them."""
        return Files([self.pictures[i] for i in index], self.labels[index])

    def some(self, count: int | None, seed: int) -> "Files":
        """At most `count`, any by the seed, in their old order."""
        if count is None or count >= len(self.pictures):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self.pictures))[:count]))

    def without_tenths(self, tenths: int, seed: int) -> list["Files"]:
        """Cut off so many tenths of each class, any by the seed: what is left, and each tenth."""
        random = np.random.default_rng(seed)
        parts: list[list[int]] = [[] for _ in range(tenths + 1)]
        for label in np.unique(self.labels):
            index = random.permutation(np.flatnonzero(self.labels == label))
            size = len(index) // 10
            for i in range(tenths):
                parts[i + 1] += index[i * size : (i + 1) * size].tolist()
            parts[0] += index[tenths * size :].tolist()
        return [self.take(np.sort(np.array(part, np.int64))) for part in parts]


# --- finding ----------------------------------------------------------------------------------------


def find_pictures(path: Path) -> tuple[dict[str, Files], tuple[str, ...]]:
    """The pictures of each split, or of `"all"` where none are told apart, and the names of the classes.

    `path` is a file `.npz` of encoded pictures or a folder: of `train*.npz` and `test*.npz`, of `train/` and
    `test/` with a folder for each class, or of one folder for each class. The classes are in the order of
    their names, as `torchvision.datasets.ImageFolder` has them.

    Raises ValueError for anything else, a damaged file, and classes that differ between the splits.

    >>> find_pictures(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: there is no folder or file 'nowhere'
    """
    if path.is_file():
        files, classes = _archive(path)
        return {"all": files}, classes
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {str(path)!r}")
    if archives := _one_of_each(path):
        read = {split: _archive(archive) for split, archive in archives.items()}
        classes = read["train"][1]
        for split, (_, others) in read.items():
            # A split need not show every class, but must mean the same by a number.
            if others != classes[: len(others)]:
                raise ValueError(
                    f"{archives[split].name} has the classes {', '.join(others)} and "
                    f"{archives['train'].name} {', '.join(classes)}"
                )
        return {split: files for split, (files, _) in read.items()}, classes
    if (path / "train").is_dir() or (path / "test").is_dir():
        return _class_folders(path)
    classes = _subfolders(path)
    if not classes:
        raise ValueError(
            f"the folder {str(path)!r} has no pictures in a form that is read: want train*.npz and "
            "test*.npz, or train/ and test/ with a folder for each class, or a folder for each class"
        )
    return {"all": _folder(path, classes)}, classes


def cut(files: Files, path: Path, seed: int) -> dict[str, Files]:
    """80 % train, 10 % validation and 10 % test by the seed, each class alike.

    Raises ValueError for fewer than ten pictures of every class.

    >>> parts = cut(Files([("", b"")] * 20, np.arange(20) % 2), Path("mine"), seed=0)
    >>> {split: np.bincount(part.labels).tolist() for split, part in parts.items()}
    {'train': [8, 8], 'validation': [1, 1], 'test': [1, 1]}
    """
    train, validation, test = files.without_tenths(2, seed)
    if not test.pictures:
        raise ValueError(
            f"{str(path)!r} has fewer than ten pictures of every class: too few to cut off a tenth for "
            "validation and one for test; give more, or train/ and test/ folders of your own"
        )
    return {"train": train, "validation": validation, "test": test}


def _one_of_each(path: Path) -> dict[str, Path]:
    """The file of each split in a folder of `.npz` files; nothing in another folder."""
    found = {split: sorted(path.glob(f"{names[0]}*.npz")) for split, names in SPLITS.items()}
    if not found["train"] and not found["test"]:
        return {}
    for split, archives in found.items():
        if len(archives) > 1 or (not archives and split != "validation"):
            names = ", ".join(archive.name for archive in archives) or "none"
            raise ValueError(f"the folder {str(path)!r} must have one {split}*.npz; it has {names}")
    return {split: archives[0] for split, archives in found.items() if archives}


def _archive(path: Path) -> tuple[Files, tuple[str, ...]]:
    """A file with `jpeg` (all files end to end), `offsets` (n + 1), `labels` (n), and perhaps `classes`."""
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file) as stored:
            content, offsets, labels = (stored[name] for name in ("jpeg", "offsets", "labels"))
            classes = tuple(map(str, stored["classes"])) if "classes" in stored else ()
    # A damaged file raises whatever its bytes happen to lead to.
    except Exception as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error}. Want a .npz file with the arrays jpeg (encoded pictures "
            "end to end), offsets (where each begins, and the end) and labels"
        ) from error
    count = len(labels)
    whole = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (content, offsets, labels))
    if not whole or not count or len(offsets) != count + 1 or labels.min() < 0:
        raise ValueError(
            f"{str(path)!r} has {labels.shape} labels ({labels.dtype}) and {offsets.shape} offsets; want n "
            "labels, whole numbers from 0, and n + 1 offsets"
        )
    if (np.diff(offsets.astype(np.int64)) < 0).any() or offsets[0] < 0 or offsets[-1] > len(content):
        raise ValueError(f"the offsets in {str(path)!r} do not lie in order within its {len(content)} bytes")
    highest = int(labels.max())
    if classes and len(classes) <= highest:
        raise ValueError(f"{str(path)!r} names {len(classes)} classes but has the label {highest}")
    encoded = content.astype(np.uint8, copy=False).tobytes()
    pictures: list[tuple[str, Path | bytes]] = [
        (f"picture {i} of {path}", encoded[start:end]) for i, (start, end) in enumerate(pairwise(offsets))
    ]
    return Files(pictures, labels.astype(np.int64)), classes or tuple(map(str, range(highest + 1)))


def _class_folders(path: Path) -> tuple[dict[str, Files], tuple[str, ...]]:
    folders = {
        split: path / name for split, names in SPLITS.items() for name in names if (path / name).is_dir()
    }
    if missing := {"train", "test"} - set(folders):
        there = next(iter(folders.values())).name
        raise ValueError(f"the folder {str(path)!r} has no {min(missing)}/ beside its {there}/")
    classes = _subfolders(folders["train"])
    for folder in folders.values():
        here, others = set(classes), set(_subfolders(folder))
        if here != others:
            apart = [f"only in train/: {', '.join(sorted(here - others))}"] if here - others else []
            apart += [f"only in {folder.name}/: {', '.join(sorted(others - here))}"] if others - here else []
            raise ValueError(f"the class folders of {str(path)!r} differ: {'; '.join(apart)}")
    if not classes:
        raise ValueError(f"{str(path / 'train')!r} has no folder for each class")
    return {split: _folder(folder, classes) for split, folder in folders.items()}, classes


def _subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")))


def _folder(path: Path, classes: tuple[str, ...]) -> Files:
    pictures: list[tuple[str, Path | bytes]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(f for f in (path / name).rglob("*") if _is_picture(f.relative_to(path)))
        if not found:
            raise ValueError(f"the class folder {str(path / name)!r} has no pictures ({', '.join(SUFFIXES)})")
        pictures += [(str(f), f) for f in found]
        labels += [label] * len(found)
    return Files(pictures, np.array(labels, np.int64))


def _is_picture(file: Path) -> bool:
    """By its name; systems and editors keep hidden files and folders of their own beside pictures."""
    return file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in file.parts)


# --- decoding ---------------------------------------------------------------------------------------


def decode(
    files: Files,
    *,
    size: int | None = None,
    on_corrupt: str = "stop",
    progress: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures as uint8 `[n, 3, h, w]` and their classes, int64 `[n]`.

    A picture that is not `size` × `size` is scaled until its shorter side is and cut about its middle.

    Raises ValueError naming a picture that cannot be decoded (or, for `on_corrupt` "skip", warns at the end
    with how many were left out and the first), and for pictures of several sizes without `size`.

    >>> from PIL import Image
    >>> Image.new("RGB", (4, 6)).save(file := io.BytesIO(), "PNG")
    >>> pictures, labels = decode(Files([("mine", file.getvalue())], np.array([3])))
    >>> pictures.shape, labels
    (torch.Size([1, 3, 6, 4]), tensor([3]))
    """
    decoded: np.ndarray | None = None
    kept: list[int] = []
    corrupt: list[str] = []
    bar = tqdm(files.pictures, desc="decode", unit="picture", disable=not progress, leave=False, delay=1)
    for number, (name, content) in enumerate(bar):
        if cancelled is not None and cancelled():
            bar.close()
            raise Stopped
        try:
            picture = _decoded(content, size)
        # Decoders raise whatever the bytes lead them to.
        except Exception as error:
            if on_corrupt == "stop":
                raise ValueError(f"cannot decode {name}: {error}; on_corrupt='skip' leaves it out") from error
            corrupt.append(name)
            continue
        if decoded is None:
            decoded = np.empty((len(files.pictures), *picture.shape), np.uint8)
            first = name
        if picture.shape != decoded.shape[1:]:
            raise ValueError(
                f"the pictures have several sizes (width×height): {first} has {_size(decoded[0])} and {name} "
                f"{_size(picture)}; give size= to bring them to one"
            )
        decoded[len(kept)] = picture
        kept.append(number)
    if corrupt:
        warnings.warn(f"left out {len(corrupt)} corrupt pictures, the first {corrupt[0]}", stacklevel=3)
    if decoded is None:
        raise ValueError("no picture is left")
    channels_first = np.ascontiguousarray(decoded[: len(kept)].transpose(0, 3, 1, 2))
    return torch.from_numpy(channels_first), torch.from_numpy(files.labels[kept])


def _decoded(content: Path | bytes, size: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as opened:
        if opened.mode.startswith(("I", "F")):
            # Made 8 bits, all that is brighter than 255 of 65,535 would be white.
            raise ValueError(f"it has more than 8 bits a pixel (mode {opened.mode}); store it with 8")
        # Straight from a palette it would warn when one of the colours is transparent.
        picture: Any = opened.convert("RGBA").convert("RGB") if opened.mode == "P" else opened.convert("RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _size(picture: np.ndarray) -> str:
    height, width, _ = picture.shape
    return f"{width}×{height}"
