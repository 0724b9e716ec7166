"""Pictures uploaded into the distortion explorer, without a browser: looked at, or refused in words."""

import datetime
import io

import pytest
from explorer_parts import SOON, words
from PIL import Image

from perpkit.interactive.explorers.distortion import UPLOADED, DistortionExplorer
from perpkit.interactive.upload import MOST_BYTES


@pytest.fixture(scope="module")
def seeing():
    """An explorer of pictures that has shown its first point; every retraining takes a step."""
    return DistortionExplorer(steps=1, background=False)


def give(explorer, name: str, content: bytes) -> str:
    """Upload a file as the browser does."""
    file = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    explorer.upload.value = ({**file, "last_modified": datetime.datetime.now(datetime.UTC)},)
    assert explorer.wait(SOON)
    return words(explorer)


def png(colour: str = "red", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 40), colour).save(file, options.pop("kind", "PNG"), **options)
    return file.getvalue()


def test_an_upload_is_looked_at_and_written_nowhere(seeing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeing.show("shapes-resnet", layer="conv1", filter=2)
    assert give(seeing, "mine.png", png()).startswith("filter 2 of conv1: relative error")
    assert seeing.subject.value == UPLOADED
    table = seeing.figure().table
    picture = table[table["title"] == "picture"]
    assert picture.groupby("channel")["value"].unique().map(list).tolist() == [[1.0], [0.0], [0.0]]
    seeing.show(picture="star")
    before = bytes(seeing.picture.value)
    seeing.show(picture=UPLOADED)
    assert bytes(seeing.picture.value) != before
    assert list(tmp_path.iterdir()) == []


def test_a_second_upload_takes_the_place_of_the_first(seeing):
    give(seeing, "red.png", png("red"))
    before = bytes(seeing.picture.value)
    give(seeing, "blue.png", png("blue"))
    assert seeing.subject.options.count(UPLOADED) == 1
    assert bytes(seeing.picture.value) != before
    assert seeing.upload.value == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", b"hello", "'notes.txt' is no picture"),
        ("big.png", bytes(MOST_BYTES + 1), "a picture may have 20 MB"),
        (
            "moves.gif",
            png(kind="GIF", save_all=True, append_images=[Image.new("RGB", (48, 40), "blue")]),
            "'moves.gif' is animated",
        ),
        ("half.png", png()[:60], "'half.png' is "),
        ("<img src=x onerror=alert(1)>.png", b"", "'<img src=x onerror=alert(1)>.png' is no picture"),
    ],
)
def test_a_bad_upload_is_told_and_the_controls_go_on(seeing, name, content, said):
    seeing.show("shapes-resnet", picture="star", filter=2)
    good = words(seeing)
    assert said in give(seeing, name, content)
    assert words(seeing).startswith("ValueError: ")
    assert "<img" not in seeing.message.value
    assert "<img" not in seeing.details.value
    assert seeing.subject.value == "star"
    assert (seeing.cancel.disabled, seeing.again.disabled, seeing.upload.value) == (True, False, ())
    assert seeing.figure().png() == seeing.picture.value
    seeing.again.click()
    assert words(seeing) == good
    assert give(seeing, "good.png", png()).startswith("filter 2")


def test_a_bomb_is_told(seeing):
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    assert "unpacks to 8000 × 8000 pixels" in give(seeing, "bomb.png", file.getvalue())


def test_a_bad_upload_during_a_retraining_stays_to_be_read():
    explorer = DistortionExplorer(steps=100_000)
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    assert "is no picture" in give(explorer, "notes.txt", b"hello")
    assert explorer.cancel.disabled
    # The picture so far.
    assert explorer.figure().table["title"].nunique() == 3
