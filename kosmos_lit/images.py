"""Bytes of an image to pixels: the one place that opens an image.

Every mode becomes RGB8: EXIF orientation is applied, alpha is laid over white, 16-bit and float values are scaled (not
clipped), an animation gives its first frame. What a hostile or broken file could cost is bounded before decoding.

There are two ways to the same image. The plain one, `decode_plain`, is Pillow throughout. The fast one takes JPEGs, which
corpora are made of: libjpeg-turbo straight into an array and, for the fit `crop`, torch's antialiased bicubic resampling of
bytes. Where the fast one is in any doubt, the plain one decides. How far apart they are, over all pixels of any image:

    decoding                 nothing: both are libjpeg-turbo with its accurate DCT and smooth upsampling
    `square`                 nothing: Pillow resamples either way, as evaluation in transformers does
    `crop`                   at most 2 of 255 anywhere, 2 in no more than 1 of 5,000 values; in the mean under 0.02

Decoding to n/8 of the size (libjpeg's scaled DCT) would help large images only, and shifts pixels by several levels in the
mean and by a hundred at edges: left out. Both ways' images a second, side by side: `python benchmarks/images.py`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

MAX_PIXELS = 64_000_000
"""Larger images are refused before decoding (192 MB of RGB); Pillow alone only warns up to twice 89 million."""
MAX_ASPECT = 50
"""Longer side over shorter side; a 1 x 200,000 strip would leave nothing after resizing."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
"""What is decoded; other formats that Pillow knows (EPS runs a program) have no place in a corpus from strangers."""

Fit = Literal["crop", "square"]
"""How an image becomes square: `crop` scales the shorter side and cuts the middle (released training loaders, that is
torchvision's Resize and CenterCrop); `square` scales both sides (released evaluation)."""

Pixels = npt.NDArray[np.uint8]

ImageLike = str | os.PathLike[str] | bytes | Image.Image | npt.ArrayLike
"""An image as a caller has it; an array or CPU tensor is (3, H, W) uint8."""


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short phrase for counting."""

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
    """Return size and format of an image, and make sure as cheaply as possible that it is whole.

    The file's end is looked at; only where it is not as the format wants it, the image is decoded to find out.

    Raises: ImageError if it is no image, is too large or too elongated, or is cut off.
    """
    image = _open(data)
    info = ImageInfo(*image.size, image.format or "?")
    if not _has_end_marker(data, info.format):
        _load(image)
    return info


def decode(data: bytes, size: int, fit: Fit, out: Pixels | None = None) -> Pixels:
    """Return an image as (3, size, size) uint8 RGB, resized bicubically, in `out` if it is given.

    Equal to `decode_plain` within 2 of 255 (fit `crop` of a JPEG that has to be resized), and exactly otherwise.

    Raises: ImageError as `probe` does, or if its pixels cannot be decoded, or if a JPEG's data stop before its end.
    """
    pixels = _jpeg_pixels(data)
    out = np.empty((3, size, size), dtype=np.uint8) if out is None else out
    if pixels is None:
        out[:] = decode_plain(data, size, fit)
    elif fit == "crop":
        out[:] = _resize_and_crop(pixels, size)
    else:
        fits = pixels.shape[:2] == (size, size)
        out[:] = pixels.transpose(2, 0, 1) if fits else _fit_square(Image.fromarray(pixels), size, fit)
    return out


def decode_plain(data: bytes, size: int, fit: Fit) -> Pixels:
    """Return an image as `decode` does, by Pillow alone: with fit `crop`, what torchvision's Resize and CenterCrop return.

    Rows are resampled before columns, as in every Pillow up to 12; later ones begin with the columns of tall images.

    Raises: ImageError as `probe` does, or if its pixels cannot be decoded.
    """
    return _fit_square(open_rgb(data), size, fit)


def load(image: ImageLike, size: int, fit: Fit) -> Pixels:
    """Return an image as `decode` does, from whatever form it is at hand in.

    Args:
        image: a path, the bytes of a file, a Pillow image, or a (3, H, W) uint8 array or CPU tensor.
        size: side of the result in pixels.
        fit: how it becomes square.

    Raises: ImageError naming the file or what is wrong with the value.
    """
    match image:
        case bytes():
            return decode(image, size, fit)
        case str() | os.PathLike():
            try:
                return decode(Path(image).read_bytes(), size, fit)
            except OSError as error:
                raise ImageError("no such image", f"{image} ({error.strerror})") from error
            except ImageError as error:
                raise ImageError(str(image), str(error)) from error
        case Image.Image():
            _check_size(*image.size)
            _load(image)
            upright = _to_rgb(_apply_orientation(image))
        case _:
            upright = Image.fromarray(np.ascontiguousarray(_to_pixels(image).transpose(1, 2, 0)))
            _check_size(*upright.size)
    return _fit_square(upright, size, fit)


def _to_pixels(image: npt.ArrayLike) -> Pixels:
    try:
        pixels = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # uneven lists, tensors on another device
        raise ImageError("not an image", f"(3, H, W) uint8 was expected, on the CPU: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        found = f"{pixels.shape} {pixels.dtype} of {type(image).__name__}"
        raise ImageError("not an image", f"(3, H, W) uint8 was expected, got {found}")
    if not pixels.size:
        raise ImageError("empty image", f"{pixels.shape}")
    return pixels


def as_list(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """Return images as they are, and a lone one as a list of one."""
    lone = isinstance(images, str | bytes | os.PathLike | Image.Image) or getattr(images, "ndim", None) == 3
    return [images] if lone else images  # type: ignore[list-item, return-value]


def open_rgb(data: bytes) -> Image.Image:
    """Return an image as an upright RGB8 Pillow image of its own size.

    Raises: ImageError as `decode` does.
    """
    image = _open(data)
    _load(image)
    return _to_rgb(_apply_orientation(image))


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError):  # a broken EXIF block says nothing about the pixels
        return image


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # warnings may be errors
        raise ImageError("image too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image", f"none of {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise ImageError("not an image", str(error)) from error
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError("image too large", f"{width} x {height} exceeds {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("image too elongated", f"{width} x {height} exceeds 1 : {MAX_ASPECT}")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError) as error:
        raise ImageError("image cannot be decoded", str(error)) from error


# ---- JPEGs, fast

_ORIENTATIONS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}
"""What makes an image (H, W, 3) upright, by the orientation of the EXIF standard."""


def _jpeg_pixels(data: bytes) -> Pixels | None:
    """Return an upright JPEG as (H, W, 3), or None where the plain way has to decide.

    Raises: ImageError if it is too large or elongated, or its data stop before its end.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colors, _ = decode_jpeg_header(data)
    except (ValueError, KeyError, RuntimeError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    _check_size(width, height)
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        pixels: Pixels = decode_jpeg(data, "RGB")
    except (ValueError, RuntimeError, MemoryError) as error:
        if "premature end of data segment" in str(error):  # Pillow would paint the rest gray
            raise ImageError("image cannot be decoded", str(error)) from error
        return None  # most remarks are on something harmless, such as bytes between two segments
    if _has_no_exif(data):
        return pixels
    turn = _ORIENTATIONS.get(_orientation(_open(data)))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _has_no_exif(data: bytes) -> bool:
    """Whether no APP1 segment, where EXIF and XMP are kept, comes before a JPEG's pixels."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 3 < len(data):
        marker = data[at + 1]
        if marker in (0xDA, 0xE1, 0xFF) or marker < 0xC0 or 0xD0 <= marker < 0xDA:  # 0xFF and on: nothing with a length
            return marker == 0xDA
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError):  # a broken EXIF block says nothing about the pixels
        return None


def _has_end_marker(data: bytes, format_: str) -> bool:
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


# ---- making square


def _channels_first(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _middle(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Return width and height with the shorter side scaled to `size`, and where in that the middle square begins (x, y)."""
    short = min(width, height)
    wide, tall = size * width // short, size * height // short
    return wide, tall, round((wide - size) / 2), round((tall - size) / 2)


def _fit_square(image: Image.Image, size: int, fit: Fit) -> Pixels:
    wide, tall, left, top = (size, size, 0, 0) if fit == "square" else _middle(*image.size, size)
    if fit == "crop" and wide != image.width:
        image = image.resize((wide, image.height), Image.Resampling.BICUBIC)
    if image.size != (wide, tall):
        image = image.resize((wide, tall), Image.Resampling.BICUBIC)
    return _channels_first(np.asarray(image.crop((left, top, left + size, top + size))))


def _resize_and_crop(pixels: Pixels, size: int) -> Pixels:
    """Return what `_fitted` does with fit `crop`, from (H, W, 3), as a view of what was computed."""
    import torch  # preparing a corpus opens images too, and has no need of torch

    height, width, _ = pixels.shape
    wide, tall, left, top = _middle(width, height, size)
    cut = slice(top, top + size), slice(left, left + size)
    if min(width, height) == size:
        return pixels[cut].transpose(2, 0, 1)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W), no copy
    scaled = torch.nn.functional.interpolate(image, size=(tall, wide), mode="bicubic", antialias=True)
    found: Pixels = scaled[0][:, *cut].numpy()
    return found
