"""Pictures that people upload: decoded in memory, never written, and refused in words."""

import io
from typing import Any

import numpy as np
import torch

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
# Nothing that runs another program or reads other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_picture(name: str, content: bytes | memoryview, size: int) -> torch.Tensor:
    """A picture file's content as uint8 `[3, size, size]`: scaled to its shorter side, cut about its middle.

    It is turned as its camera says, and laid on white where it is transparent.

    Raises ValueError, naming the file, for what is over 20 MB, no picture of a known format, damaged,
    animated, and for more than 50 million pixels, which are counted before they are decoded.

    >>> from PIL import Image
    >>> Image.new("RGB", (60, 40), "red").save(file := io.BytesIO(), "PNG")
    >>> read_picture("red.png", file.getvalue(), 32).flatten(1).float().mean(1).tolist()
    [255.0, 0.0, 0.0]
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{name!r} has {len(content) / 2**20:.1f} MB; a picture may have {MOST_BYTES // 2**20} MB: make "
            "it smaller first"
        )
    try:
        opened: Any = Image.open(io.BytesIO(bytes(content)), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name!r} is no picture; the formats are {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name!r} unpacks to more than {MOST_PIXELS // 10**6} million pixels; make it smaller first"
        ) from error
    # Decoders raise whatever the bytes lead them to.
    except Exception as error:
        raise ValueError(f"{name!r} is damaged: {error}") from error
    with opened:
        width, height = opened.size
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"{name!r} unpacks to {width} × {height} pixels, more than {MOST_PIXELS // 10**6} million; "
                "make it smaller first"
            )
        try:
            # Phones put a second view of a still picture into their JPEGs.
            animated = getattr(opened, "is_animated", False) and opened.format != "MPO"
            if not animated:
                # A JPEG need not be decoded finer than it is looked at.
                opened.draft("RGB", (4 * size, 4 * size))
                ImageOps.exif_transpose(opened, in_place=True)
                picture = _in_rgb(_smaller(opened, min(opened.size) // (4 * size)))
                fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        except Exception as error:
            raise ValueError(f"{name!r} is damaged: {error}") from error
    if animated:
        raise ValueError(f"{name!r} is animated or has several pages; save one picture of it")
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def _smaller(picture: Any, factor: int) -> Any:
    """Each side divided by a whole factor: what comes next would take a gigabyte for a large picture."""
    from PIL import Image

    if factor <= 1:
        return picture
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(picture)[::factor, ::factor])
    if picture.mode in ("1", "P"):
        # Of these the numbers cannot be averaged.
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    return picture.reduce(factor)


def _in_rgb(picture: Any) -> Any:
    """In RGB: 16 bits brought to 8, transparency laid on white."""
    from PIL import Image

    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((values / max(values.max(), 65535.0) * 255).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if "A" in picture.mode or "transparency" in picture.info:
        over = picture.convert("RGBA")
        picture = Image.new("RGBA", over.size, "white")
        picture.alpha_composite(over)
    return picture.convert("RGB")
