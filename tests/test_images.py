"""Loading images: the embedded ones, files and folders made by hand, and how they are split."""

import io
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from perpkit.sources import shapes as drawing
from perpkit.sources.images import MEAN, SPLITS, STD, load_images
from perpkit.sources.pictures import Stopped

SMALL = {"train": 20, "validation": 10, "test": 10}


def encoded(value, size=(8, 8), form="PNG"):
    """A picture of one grey, as the bytes of a file."""
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, form)
    return file.getvalue()


def write_archive(path, values, labels, **more):
    files = [value if isinstance(value, bytes) else encoded(value) for value in values]
    offsets = np.cumsum([0, *map(len, files)])
    content = np.frombuffer(b"".join(files), np.uint8)
    np.savez(path, **{"jpeg": content, "offsets": offsets, "labels": np.array(labels), **more})
    return path


def write_folder(path, values, size=(8, 8)):
    """A folder for each class with a picture of each grey value."""
    for name, greys in values.items():
        (path / name).mkdir(parents=True)
        for grey in greys:
            (path / name / f"{grey:03}.png").write_bytes(encoded(grey, size))
    return path


def greys(labelled):
    """The grey value of each picture, after checking that it is normalised and of one colour."""
    images, labels = labelled
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    plain = 255 * (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    assert torch.allclose(plain, plain[:, :1, :1, :1], atol=1e-3)
    return plain[:, 0, 0, 0].round().int().tolist()


# --- shapes -----------------------------------------------------------------------------------------


def test_shapes_are_normalised_drawings():
    images = load_images("shapes", counts=SMALL, seed=3)
    assert images.classes == drawing.CLASSES
    for split in SPLITS:
        found, labels = getattr(images, split)
        pictures, wanted = drawing.shapes(split, SMALL[split], 0 if split == "test" else 3)
        assert torch.equal(labels, wanted)
        plain = found * torch.tensor(images.std).view(3, 1, 1) + torch.tensor(images.mean).view(3, 1, 1)
        assert torch.allclose(255 * plain, pictures.float(), atol=1e-3)
    assert images.protocol == "shapes (seed 3), test split, 10 pictures of 32×32"
    other = load_images("shapes", counts=SMALL, seed=4)
    assert torch.equal(other.test[0], images.test[0])
    assert not torch.equal(other.train[0], images.train[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"counts": {"calibration": 3}},
            "unknown split 'calibration' in counts; the splits are train, valid",
        ),
        ({"counts": {"test": 0}}, r"counts\['test'\] is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"size": 64}, "size is 64; the shapes are 32×32"),
        ({"size": 0}, "size is 0; it is a number of pixels"),
        ({"size": 32.0}, r"size is 32\.0; it must be a whole number"),
        ({"seed": 0.5}, r"seed is 0\.5; it must be a whole number"),
        ({"counts": {"train": "10"}}, r"counts\['train'\] is '10'; it must be a whole number"),
        ({"counts": 10}, "counts is 10; it is a mapping from a split"),
        ({"on_corrupt": "ignore"}, "unknown on_corrupt 'ignore'; want stop or skip"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        load_images("shapes", **options)


@pytest.mark.parametrize(
    ("name", "near"), [("shape", "; did you mean 'shapes'"), ("photos", r"\."), ("", "")]
)
def test_unknown_images(name, near):
    with pytest.raises(
        ValueError, match=f"unknown images '{name}'{near}.*Images are 'shapes', 'cifar10', or"
    ):
        load_images(name)


# --- one file, or one level ---------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    """Thirty pictures of three classes, each of another grey; class = grey % 3."""
    return write_archive(tmp_path / "mine.npz", range(30), [grey % 3 for grey in range(30)])


@pytest.fixture
def level(tmp_path):
    return write_folder(tmp_path / "mine", {f"class {c}": range(c, 60, 3) for c in range(3)})


@pytest.mark.parametrize("source", ["archive", "level"])
def test_what_is_not_split_is_split_by_the_seed(source, request, generators_unchanged):
    path = request.getfixturevalue(source)
    count = 10 if source == "archive" else 20
    found = [load_images(path, seed=seed) for seed in (0, 0, 1)]
    for images in found:
        splits = {split: greys(getattr(images, split)) for split in SPLITS}
        assert sorted(chain(*splits.values())) == list(range(3 * count))
        assert [len(splits[split]) for split in SPLITS] == [
            3 * count - 6 * count // 10,
            *[3 * count // 10] * 2,
        ]
        for split in SPLITS:
            labels = getattr(images, split)[1]
            assert labels.tolist() == [grey % 3 for grey in splits[split]]
            assert labels.bincount().tolist() == [len(labels) // 3] * 3
    assert torch.equal(found[0].test[0], found[1].test[0])
    assert greys(found[0].test) != greys(found[2].test)
    assert found[0].classes == (("0", "1", "2") if source == "archive" else ("class 0", "class 1", "class 2"))


def test_counts_take_some_of_what_there_is(level):
    whole, some = load_images(level), load_images(level, counts={"train": 9, "test": 100})
    assert len(some.train[0]) == 9
    assert set(greys(some.train)) < set(greys(whole.train))
    assert greys(some.test) == greys(whole.test)
    # not the first class only
    assert len(some.train[1].unique()) > 1


def test_too_few_to_split(tmp_path):
    path = write_folder(tmp_path / "few", {"a": range(9), "b": range(9)})
    with pytest.raises(ValueError, match="fewer than ten pictures of every class"):
        load_images(path)


# --- several files, or two levels -----------------------------------------------------------------------


@pytest.fixture
def two_levels(tmp_path):
    for split, values in (("train", range(100, 140)), ("test", range(200, 206))):
        write_folder(tmp_path / "mine" / split, {"a": values[::2], "b": values[1::2]})
    return tmp_path / "mine"


@pytest.fixture
def archives(tmp_path):
    (tmp_path / "mine").mkdir()
    values = list(range(100, 140))
    write_archive(tmp_path / "mine" / "train_40.npz", values, [v % 2 for v in values], classes=["a", "b"])
    values = list(range(200, 206))
    write_archive(tmp_path / "mine" / "test_6.npz", values, [v % 2 for v in values], classes=["a", "b"])
    return tmp_path / "mine"


@pytest.mark.parametrize("source", ["two_levels", "archives"])
def test_validation_is_always_the_same_tenth_of_train(source, request):
    path = request.getfixturevalue(source)
    first, second = (load_images(path, seed=seed) for seed in (0, 1))
    for images in (first, second):
        assert images.classes == ("a", "b")
        assert images.name == "mine"
        assert sorted(greys(images.train) + greys(images.validation)) == list(range(100, 140))
        assert sorted(greys(images.test)) == list(range(200, 206))
        assert images.validation[1].bincount().tolist() == [2, 2]
    assert greys(first.validation) == greys(second.validation)
    assert first.protocol == "mine, test split, 6 pictures of 8×8"


def test_a_validation_folder_is_taken(two_levels):
    write_folder(two_levels / "validation", {"a": [1], "b": [2]})
    images = load_images(two_levels)
    assert greys(images.validation) == [1, 2]
    assert len(images.train[0]) == 40


@pytest.mark.parametrize("source", ["two_levels", "archives"])
def test_which_is_called_val_as_well(source, request):
    """As ImageNet has it: left unread, its pictures would be missed and others taken from train."""
    path = request.getfixturevalue(source)
    if source == "archives":
        write_archive(path / "val_2.npz", [1, 2], [0, 1], classes=["a", "b"])
    else:
        write_folder(path / "val", {"a": [1], "b": [2]})
    assert greys(load_images(path).validation) == [1, 2]
    assert len(load_images(path).train[0]) == 40


def test_the_words_of_an_accuracy_tell_test_splits_apart(level):
    said = [load_images(level, seed=seed).protocol for seed in (0, 1)]
    assert said == [f"{name}, test split, 6 pictures of 8×8" for name in ("mine", "mine (seed 1)")]


def test_hidden_files_are_no_pictures(level):
    (level / "class 0" / "._000.png").write_bytes(b"what a Mac keeps beside a picture")
    (level / "class 0" / ".ipynb_checkpoints").mkdir()
    (level / "class 0" / ".ipynb_checkpoints" / "000-checkpoint.png").write_bytes(encoded(0))
    images = load_images(level)
    assert sorted(chain(*(greys(getattr(images, split)) for split in SPLITS))) == list(range(60))


def test_a_path_may_start_at_home(two_levels, monkeypatch):
    monkeypatch.setenv("HOME", str(two_levels.parent))
    monkeypatch.setenv("USERPROFILE", str(two_levels.parent))
    assert len(load_images("~/mine").train[0]) == 36


def test_it_can_be_cancelled(two_levels):
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > 5

    with pytest.raises(Stopped):
        load_images(two_levels, cancelled=cancelled)
    assert len(asked) == 6


def test_pictures_are_brought_to_one_size(tmp_path):
    path = write_folder(tmp_path / "mine", {"a": range(10), "b": range(10, 20)})
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    # more than the middle 20 × 20 that are cut out and halved, for scaling looks a little over the cut
    wide.paste((90, 90, 90), (7, 0, 33, 20))
    wide.save(path / "b" / "015.png")
    with pytest.raises(
        ValueError, match=r"\(width×height\): .*\.png has 8×8 and .*015\.png 40×20; give size="
    ):
        load_images(path)
    images = load_images(path, size=10)
    found = chain(*(greys(getattr(images, split)) for split in SPLITS))
    assert sorted(found) == sorted([*range(15), *range(16, 20), 90])
    assert images.test[0].shape[1:] == (3, 10, 10)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_kind_of_picture_becomes_red_green_and_blue(tmp_path, mode):
    path = write_folder(tmp_path / "mine", {"a": range(10)})
    picture = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = b"\x00" * 256
    picture.save(path / "a" / "003.png", **picture.info) if mode != "CMYK" else picture.save(
        path / "a" / "003.tif"
    )
    images = load_images(path)
    assert 255 in greys(images.train) + greys(images.validation) + greys(images.test)
