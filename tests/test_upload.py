"""Uploaded pictures: read as they are meant, or refused in words."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from perpkit.interactive.upload import FORMATS, MOST_BYTES, read_picture


def file(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return written.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that claims a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    begin = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + begin + struct.pack(">I", 40) + b"IDAT" + b"\0" * 44


def halves(first: str = "red", second: str = "blue", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """One colour on the left, another on the right."""
    picture = Image.new("RGB", size, first)
    picture.paste(Image.new("RGB", (size[0] // 2, size[1]), second), (size[0] // 2, 0))
    return picture


def colour(picture: torch.Tensor, x: int, y: int) -> list[int]:
    return picture[:, y, x].tolist()


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind):
    picture = read_picture("a", file(halves(), kind), 32)
    assert picture.shape == (3, 32, 32)
    assert picture.dtype == torch.uint8
    torch.testing.assert_close(picture[:, 16, 4].int(), torch.tensor([255, 0, 0]).int(), rtol=0, atol=6)
    torch.testing.assert_close(picture[:, 16, 28].int(), torch.tensor([0, 0, 255]).int(), rtol=0, atol=6)


def test_the_browser_sends_a_view_of_memory():
    assert colour(read_picture("a", memoryview(file(halves())), 8), 0, 0) == [255, 0, 0]


def test_a_wide_picture_is_cut_about_its_middle():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste(Image.new("RGB", (100, 100), "green"), (100, 0))
    picture = read_picture("a", file(wide), 10)
    assert {tuple(colour(picture, x, 5)) for x in range(1, 9)} == {(0, 128, 0)}


def test_the_camera_says_what_is_up():
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of what is seen is the bottom of what is stored
    picture = read_picture("a", file(halves(), "PNG", exif=exif), 16)
    assert colour(picture, 8, 1) == [255, 0, 0]
    assert colour(picture, 8, 14) == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    if mode == "P":
        clear = Image.new("P", (8, 8), 0)
        clear.putpalette([255, 0, 0] + [0] * 765)
        content = file(clear, transparency=0)
    else:
        content = file(Image.new(mode, (8, 8), (0,) * len(mode)))
    assert colour(read_picture("a", content, 8), 3, 3) == [255, 255, 255]


def test_16_bits_are_brought_to_8():
    grey = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert colour(read_picture("a", file(grey), 8), 3, 3) == [127, 127, 127]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes(mode):
    content = file(Image.new("RGB", (8, 8), "white").convert(mode), "TIFF")
    assert colour(read_picture("a", content, 8), 3, 3) == [255, 255, 255]


def test_a_phone_photograph_with_a_second_view_is_a_picture():
    content = file(halves(), "MPO", save_all=True, append_images=[halves("green")])
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 2
    assert colour(read_picture("a", content, 32), 4, 4)[0] > 245


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"%PDF-1.4",
    ],
)
def test_no_picture(content):
    with pytest.raises(ValueError, match=r"^'notes.txt' is no picture; the formats are PNG, JPEG"):
        read_picture("notes.txt", content, 32)


def test_over_20_mb():
    with pytest.raises(ValueError, match=r"'big.png' has 20.0 MB; a picture may have 20 MB"):
        read_picture("big.png", bytes(MOST_BYTES + 1), 32)
    with pytest.raises(ValueError, match="no picture"):
        read_picture("big.png", bytes(MOST_BYTES), 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated(kind):
    content = file(halves(), kind, save_all=True, append_images=[halves("green"), halves("white")])
    with pytest.raises(ValueError, match=r"'a.gif' is animated or has several pages"):
        read_picture("a.gif", content, 32)


def test_a_decompression_bomb_is_not_decoded():
    small = file(Image.new("1", (8000, 8000)))
    assert len(small) < 20_000
    with pytest.raises(ValueError, match=r"unpacks to 8000 × 8000 pixels, more than 50 million"):
        read_picture("a.png", small, 32)


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_claimed_size_is_enough(side):
    # Of the smaller one the library would only warn, of the larger one it raises.
    with pytest.raises(ValueError, match="million"):
        read_picture("a.png", png_header(side, side), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="million"):
            read_picture("a.png", png_header(side, side), 32)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_off(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = file(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"'a' is (damaged|no picture)"):
        read_picture("a", content[: len(content) // 2], 32)


def test_pixels_of_floats():
    with pytest.raises(ValueError, match="damaged: its pixels are floating-point"):
        read_picture("a", file(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), 32)


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    read_picture("../a.png", file(halves()), 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16"])
def test_a_large_picture_is_seen_as_a_small_one(mode):
    """Left half dark, right half light, transparent below where there is transparency."""
    small = Image.new("RGBA", (60, 40), "black")
    small.paste("white", (30, 0, 60, 40))
    if mode in ("RGBA", "LA"):
        small.paste((0, 0, 0, 0), (0, 20, 60, 40))
    seen = []
    for picture in (small, small.resize((3000, 2000), Image.Resampling.NEAREST)):
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        else:
            picture = picture.convert(mode)
        seen.append(read_picture("a", file(picture), 32).float())
    assert (seen[0] - seen[1]).abs().mean() < 3
    assert seen[1][:, 2, 2].tolist() == [0, 0, 0]
    assert seen[1][:, 2, -2].tolist() == [255, 255, 255]
    if mode in ("RGBA", "LA"):
        assert seen[1][:, -2, 2].tolist() == [255, 255, 255]


def test_a_large_picture_is_turned_as_its_camera_says():
    picture = halves("white", "black", (3000, 2000))
    exif = Image.Exif()
    exif[0x0112] = 3
    seen = read_picture("a", file(picture, "TIFF", exif=exif), 32)
    assert seen[:, 16, 2].tolist() == [0, 0, 0]
    assert seen[:, 16, -2].tolist() == [255, 255, 255]
