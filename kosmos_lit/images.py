"""Bytes of a picture to pixels: the one place that opens an image.

Every mode becomes RGB8: EXIF orientation is applied, alpha is laid over white, 16-bit and float values are scaled (not
clipped), an animation gives its first frame. What a hostile or broken file could cost is bounded before decoding.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before decoding (192 MB of RGB); Pillow alone only warns up to twice 89 million."""
MAX_ASPECT = 50
"""Longer side over shorter side; a 1 x 200,000 strip would leave nothing after resizing."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
"""What is decoded; other formats that Pillow knows (EPS runs a program) have no place in a corpus from strangers."""

Fit = Literal["crop", "square"]
"""How a picture becomes square: `crop` scales the shorter side and cuts the middle (released training loaders);
`square` scales both sides (released evaluation)."""

Pixels = npt.NDArray[np.uint8]

Picture = str | os.PathLike[str] | bytes | Image.Image | npt.ArrayLike
"""A picture as a caller has it; an array or CPU tensor is (3, H, W) uint8."""


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is a short phrase for counting."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says."""

    width: int
    height: int
    format: str


def probe(data: bytes) -> ImageInfo:
    """Return size and format of a picture, and make sure as cheaply as possible that it is whole.

    The file's end is looked at; only where it is not as the format wants it, the picture is decoded to find out.

    Raises: ImageError if it is no picture, is too large or too elongated, or is cut off.
    """
    image = _open(data)
    info = ImageInfo(*image.size, image.format or "?")
    if not _ends_well(data, info.format):
        _load(image)
    return info


def decode(data: bytes, size: int, fit: Fit) -> Pixels:
    """Return a picture as (3, size, size) uint8 RGB, resized bicubically.

    Raises: ImageError as `probe` does, or if its pixels cannot be decoded.
    """
    return np.ascontiguousarray(np.asarray(_fitted(open_rgb(data), size, fit)).transpose(2, 0, 1))


def load(picture: Picture, size: int, fit: Fit) -> Pixels:
    """Return a picture as `decode` does, from whatever form it is at hand in.

    Args:
        picture: a path, the bytes of a file, a Pillow image, or a (3, H, W) uint8 array or CPU tensor.
        size: side of the result in pixels.
        fit: how it becomes square.

    Raises: ImageError naming the file or what is wrong with the value.
    """
    match picture:
        case bytes():
            return decode(picture, size, fit)
        case str() | os.PathLike():
            try:
                return decode(Path(picture).read_bytes(), size, fit)
            except OSError as error:
                raise ImageError("no such picture", f"{picture} ({error.strerror})") from error
            except ImageError as error:
                raise ImageError(str(picture), str(error)) from error
        case Image.Image():
            _check_size(*picture.size)
            _load(picture)
            upright = _to_rgb(_upright(picture))
        case _:
            upright = Image.fromarray(np.ascontiguousarray(_array_of(picture).transpose(1, 2, 0)))
            _check_size(*upright.size)
    return np.ascontiguousarray(np.asarray(_fitted(upright, size, fit)).transpose(2, 0, 1))


def _array_of(picture: npt.ArrayLike) -> Pixels:
    try:
        pixels = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError) as error:  # uneven lists, tensors on another device
        raise ImageError("not a picture", f"(3, H, W) uint8 was expected, on the CPU: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        found = f"{pixels.shape} {pixels.dtype} of {type(picture).__name__}"
        raise ImageError("not a picture", f"(3, H, W) uint8 was expected, got {found}")
    if not pixels.size:
        raise ImageError("empty picture", f"{pixels.shape}")
    return pixels


def several(pictures: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """Return pictures as they are, and a lone one as a list of one."""
    lone = isinstance(pictures, str | bytes | os.PathLike | Image.Image) or getattr(pictures, "ndim", None) == 3
    return [pictures] if lone else pictures  # type: ignore[list-item, return-value]


def open_rgb(data: bytes) -> Image.Image:
    """Return a picture as an upright RGB8 Pillow image of its own size.

    Raises: ImageError as `decode` does.
    """
    image = _open(data)
    _load(image)
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError):  # a broken EXIF block says nothing about the pixels
        return image


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the limit below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("picture too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("not a picture", f"none of {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise ImageError("not a picture", str(error)) from error
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError("picture too large", f"{width} x {height} exceeds {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("picture too elongated", f"{width} x {height} exceeds 1 : {MAX_ASPECT}")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError) as error:
        raise ImageError("picture cannot be decoded", str(error)) from error


def _ends_well(data: bytes, format_: str) -> bool:
    match format_:
        case "JPEG":
            return data.endswith(b"\xff\xd9")
        case "PNG":
            return data.endswith(b"IEND\xaeB`\x82")
        case "GIF":
            return data.endswith(b";")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 == len(data)
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        high = 65535.0 if image.mode != "F" else (1.0 if values.max(initial=0) <= 1 else 255.0)
        return Image.fromarray(np.clip(np.rint(values * (255.0 / high)), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _fitted(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    width, height = image.size
    if fit == "square":
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == size:
        return image.crop((round(left), round(top), round(left) + size, round(top) + size))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
