"""Images that cannot be read, do not belong together, or lie on a hub out of reach: said in words."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_images import encoded, write_archive, write_folder

from perpkit.sources import images as module
from perpkit.sources.images import SPLITS, load_images

# --- corrupt pictures -----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "archive"])
def corrupt(request, tmp_path):
    """Forty pictures, two of them no pictures, and how the first of these is called."""
    if request.param == "folder":
        path = write_folder(tmp_path / "mine", {"a": range(20), "b": range(20, 40)})
        (path / "a" / "007.png").write_bytes(b"no picture")
        (path / "b" / "030.png").write_bytes(encoded(30)[:40])
        return path, r"a/007\.png"
    values = [b"no picture" if i == 7 else encoded(i)[:40] if i == 30 else i for i in range(40)]
    return write_archive(
        tmp_path / "mine.npz", values, [i // 20 for i in range(40)]
    ), r"picture 7 of .*mine\.npz"


def test_a_corrupt_picture_stops_the_loading(corrupt):
    path, name = corrupt
    with pytest.raises(ValueError, match=f"cannot decode .*({name}|30).*; on_corrupt='skip' leaves it out"):
        load_images(path)


def test_or_is_left_out_with_a_warning(corrupt):
    path, _ = corrupt
    with pytest.warns(UserWarning, match="left out") as warned:
        images = load_images(path, on_corrupt="skip", seed=1)
    said = " ".join(str(warning.message) for warning in warned)
    assert sum(int(str(warning.message).split()[2]) for warning in warned) == 2
    assert "the first " in said
    labels = torch.cat([getattr(images, split)[1] for split in SPLITS])
    assert labels.bincount().tolist() == [19, 19]
    assert all(len(getattr(images, split)[0]) == len(getattr(images, split)[1]) for split in SPLITS)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_not_cut_off(tmp_path, dtype):
    """A grey of 30,000 in 65,535 would come out white."""
    path = write_folder(tmp_path / "mine", {"a": range(20)})
    Image.fromarray(np.full((8, 8), 30_000, dtype)).save(path / "a" / "000.tif")
    with pytest.raises(ValueError, match=r"cannot decode .*000\.tif: it has more than 8 bits a pixel \(mode"):
        load_images(path)


def test_nothing_is_left(tmp_path):
    path = write_archive(tmp_path / "mine.npz", [b"no"] * 20, [0] * 20)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no picture is left"):
        load_images(path, on_corrupt="skip")


# --- folders ----------------------------------------------------------------------------------------------


def test_class_folders_that_differ(tmp_path):
    write_folder(tmp_path / "train", {"cat": [1], "dog": [2], "owl": [3]})
    write_folder(tmp_path / "test", {"cat": [1], "fish": [2], "owl": [3]})
    with pytest.raises(ValueError, match=r"differ: only in train/: dog; only in test/: fish"):
        load_images(tmp_path)
    write_folder(tmp_path / "test" / "..", {"test/dog": [1], "train/fish": [1], "validation/dog": [1]})
    with pytest.raises(ValueError, match=r"differ: only in train/: cat, fish, owl$"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ([], r"has no pictures in a form that is read: want train\*\.npz"),
        (["train/a"], "has no test/ beside its train/"),
        (["test/a"], "has no train/ beside its test/"),
        (["train", "test"], "has no folder for each class"),
        (["train/a", "test/a"], r"class folder .*train/a' has no pictures"),
        ([".hidden"], "has no pictures in a form that is read"),
        (["a", "b"], "class folder .*a' has no pictures"),
    ],
)
def test_folders_without_pictures(tmp_path, folders, words):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        load_images(tmp_path)


def test_splits_of_different_sizes(tmp_path):
    write_folder(tmp_path / "train", {"a": range(20)})
    write_folder(tmp_path / "test", {"a": [1]}, size=(9, 8))
    words = r"several sizes \(width×height\), 8×8 \(validation\) and 9×8 \(test\); give size="
    with pytest.raises(ValueError, match=words):
        load_images(tmp_path)


def test_too_few_to_validate(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split, {"a": range(9)})
    with pytest.raises(ValueError, match=r"the validation split of '.*' is empty; give more pictures"):
        load_images(tmp_path)


# --- archives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.arange(19)}, r"has \(19,\) labels \(int64\) and \(21,\) offsets; want n labels"),
        ({"labels": np.arange(20) - 1}, "whole numbers from 0"),
        ({"labels": np.arange(20) / 2}, r"labels \(float64\)"),
        ({"labels": np.arange(20), "offsets": np.arange(21)[::-1]}, "offsets in .* do not lie in order"),
        ({"offsets": np.arange(21) * 10**6}, "do not lie in order within its"),
        ({"offsets": np.arange(21) - 1}, "do not lie in order"),
        ({"classes": ["a", "b"], "labels": np.arange(20)}, "names 2 classes but has the label 19"),
        ({"labels": np.array([None] * 20)}, r"cannot read .*mine\.npz"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, words):
    path = write_archive(tmp_path / "mine.npz", range(20), **{"labels": [0] * 20, **change})
    with pytest.raises(ValueError, match=words):
        load_images(path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 but cut"])
def test_a_file_that_is_no_archive(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*mine\.npz.* Want a \.npz file with the arrays jpeg"):
        load_images(tmp_path / "mine.npz")


def test_an_archive_that_is_damaged_anywhere(tmp_path):
    """Compressed or not, wherever a byte is another: words, or pictures that are still whole."""
    content = np.frombuffer(b"".join(encoded(grey) for grey in range(20)), np.uint8)
    offsets, file = np.arange(21) * (len(content) // 20), tmp_path / "mine.npz"
    np.savez_compressed(file, jpeg=content, offsets=offsets, labels=np.arange(20) % 2)
    whole, random, refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        try:
            load_images(file, progress=False)
        except ValueError as error:
            refused += "mine.npz" in str(error)
    assert refused > 30


def test_an_archive_without_its_arrays(tmp_path):
    np.savez(tmp_path / "mine.npz", jpeg=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"cannot read .*offsets"):
        load_images(tmp_path / "mine.npz")


def test_archives_that_do_not_belong_together(tmp_path):
    write_archive(tmp_path / "train.npz", range(20), [0, 1] * 10)
    with pytest.raises(ValueError, match=r"must have one test\*\.npz; it has none"):
        load_images(tmp_path)
    write_archive(tmp_path / "test.npz", range(3), [0, 1, 2])
    with pytest.raises(ValueError, match=r"test\.npz has the classes 0, 1, 2 and train\.npz 0, 1$"):
        load_images(tmp_path)
    write_archive(tmp_path / "train_more.npz", range(20), [0, 1] * 10)
    with pytest.raises(ValueError, match=r"one train\*\.npz; it has train\.npz, train_more\.npz"):
        load_images(tmp_path)


def test_a_split_need_not_show_every_class(tmp_path):
    write_archive(tmp_path / "train.npz", range(40), [i % 3 for i in range(40)])
    write_archive(tmp_path / "test.npz", range(3), [0, 1, 0])
    images = load_images(tmp_path)
    assert images.classes == ("0", "1", "2")
    assert images.test[1].tolist() == [0, 1, 0]


# --- the hub ------------------------------------------------------------------------------------------------


def rows(count):
    pictures = [Image.new("RGB", (32, 32), (i, i, i)) for i in range(count)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["airplane", "automobile"])}
    )
    return datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(count)]}, features)


def test_cifar10_is_loaded_by_its_recipe(monkeypatch):
    asked = []

    def load_dataset(**recipe):
        asked.append(recipe)
        return rows({"train": 40, "test": 10}[recipe["split"]])

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = load_images("cifar10")
    assert asked == [{"path": "uoft-cs/cifar10", "split": split} for split in ("train", "test")]
    assert images.classes == ("airplane", "automobile")
    assert [len(getattr(images, split)[0]) for split in SPLITS] == [36, 4, 10]
    assert images.test[1].tolist() == [0, 1] * 5
    assert images.protocol == "cifar10, test split, 10 pictures of 32×32"


@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_that_does_not_give_it(monkeypatch, reachable):
    def load_dataset(**recipe):
        assert reachable != datasets.config.HF_HUB_OFFLINE
        raise OSError("no such data set")

    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(module, "hub_reachable", lambda: reachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = "cannot load the data set 'cifar10': no such" if reachable else "the data set 'cifar10' is not in"
    with pytest.raises(ValueError, match=words) as refused:
        load_images("cifar10")
    assert "'tiny-opt'" not in str(refused.value)
    assert (
        reachable
        or "use the embedded classifier 'shapes-resnet' and images 'shapes', name a local"
        in str(refused.value)
    )
    assert before == datasets.config.HF_HUB_OFFLINE
