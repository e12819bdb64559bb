import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kosmos_lit import images
from kosmos_lit.images import ImageError, ImageInfo, decode, open_rgb, probe

W, H = 11, 7
RED, GREEN, WHITE = (220, 30, 10), (10, 200, 30), (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def saved(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def with_exif(format_: str, exif: bytes) -> bytes:
    return saved(Image.new("RGB", (W, H), GREEN), format_, exif=exif)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


# ---- every mode to RGB


def test_rgb_stays_as_it_is():
    assert np.array_equal(np.asarray(open_rgb(saved(Image.fromarray(NOISE)))), NOISE)


@pytest.mark.parametrize(
    ("mode", "color", "format_", "expected"),
    [
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", WHITE),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("LA", (0, 51), "PNG", (204, 204, 204)),  # a fifth of black over white
        ("RGBA", (*RED, 255), "PNG", RED),
        ("RGBA", (*RED, 0), "PNG", WHITE),
        ("RGBA", (0, 255, 0, 51), "PNG", (204, 255, 204)),
        ("RGBA", (*RED, 0), "WEBP", WHITE),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("YCbCr", (255, 128, 128), "TIFF", WHITE),
        ("I;16", 65535, "PNG", WHITE),
        ("I;16", 257 * 77, "PNG", (77, 77, 77)),
        ("I;16", 300, "TIFF", (1, 1, 1)),  # clipping at 255 would give white
        ("I", 257 * 77, "TIFF", (77, 77, 77)),
        ("F", 0.5, "TIFF", (128, 128, 128)),  # in [0, 1]
        ("F", 77.0, "TIFF", (77, 77, 77)),  # in [0, 255]
    ],
)
def test_a_mode_becomes_rgb(mode, color, format_, expected):
    options = {"lossless": True} if format_ == "WEBP" else {}
    assert pixel(saved(Image.new(mode, (W, H), color), format_, **options)) == expected


def test_a_cmyk_photograph_becomes_rgb():
    red = pixel(saved(Image.new("CMYK", (W, H), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(red, (255, 0, 0))).max() <= 3  # JPEG is lossy


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, W * H).astype(np.uint16).reshape(H, W)
    pixels = np.asarray(open_rgb(saved(Image.fromarray(values))))
    assert np.array_equal(pixels, np.repeat(np.rint(values / 257).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_transparent_palette_color_is_laid_over_white(transparency):
    image = Image.new("P", (W, H), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    data = saved(image, transparency=transparency)
    assert (pixel(data, 0), pixel(data, 1)) == (WHITE, GREEN)


def test_an_opaque_palette_gives_its_colors():
    image = Image.new("P", (W, H), 0)
    image.putpalette([*RED, *GREEN])
    assert pixel(saved(image)) == RED


def test_values_that_are_no_numbers_do_not_stop_anything():
    values = np.full((H, W), 0.5, dtype=np.float32)
    values[0, 0] = np.nan
    image = open_rgb(saved(Image.fromarray(values), "TIFF"))
    assert image.getpixel((3, 3)) == (128, 128, 128)


# ---- orientation and frames


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_an_image_is_turned_upright(orientation, format_):
    # How each orientation of the EXIF standard is stored, as turns and mirrorings of the upright image.
    stored = {
        1: NOISE,
        2: NOISE[:, ::-1],
        3: NOISE[::-1, ::-1],
        4: NOISE[::-1],
        5: NOISE.transpose(1, 0, 2),
        6: np.rot90(NOISE),
        7: NOISE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(NOISE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), format_, exif=exif, **options)
    assert np.array_equal(np.asarray(open_rgb(data)), NOISE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's remark
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"garbage that is no TIFF", b"II*\0\x08\0\0\0\x05\0\x12\x01", b"II*\0\xff\xff\xff\xff", b""]
)
def test_a_broken_exif_block_leaves_the_image_as_it_is(format_, exif):
    image = open_rgb(with_exif(format_, b"Exif\0\0" + exif))
    assert image.size == (W, H)
    assert np.abs(np.subtract(image.getpixel((5, 3)), GREEN)).max() <= 5  # JPEG and WEBP are lossy


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format_):
    frames = [Image.new("RGB", (W, H), color) for color in (RED, GREEN, WHITE)]
    options = {"lossless": True} if format_ == "WEBP" else {}
    assert pixel(saved(frames[0], format_, save_all=True, append_images=frames[1:], **options)) == RED


# ---- limits


@pytest.mark.parametrize(("width", "height"), [(1, 2000), (2000, 1), (51, 1)])
def test_an_elongated_image_is_refused(width, height):
    with pytest.raises(ImageError, match=f"{width} x {height} exceeds 1 : 50") as caught:
        decode(saved(Image.new("RGB", (width, height))), 5, "crop")
    assert caught.value.reason == "image too elongated"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1)])
def test_a_small_image_is_fine(width, height):
    assert decode(saved(Image.new("RGB", (width, height), RED)), 5, "crop").shape == (3, 5, 5)


@pytest.mark.parametrize("side", [8_001, 20_000])  # beyond the second, Pillow itself refuses
@pytest.mark.parametrize("read", [probe, open_rgb])
def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch, side, read):
    monkeypatch.setattr(images, "_load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ImageError) as caught:
        read(png_header(side, side))
    assert caught.value.reason == "image too large"


@pytest.mark.parametrize("data", [b"", b"GIF", b"<html></html>", bytes(100)])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError) as caught:
        probe(data)
    assert caught.value.reason == ("not an image" if data else "empty image")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("read", [probe, lambda data: decode(data, 5, "crop")])
def test_an_image_that_is_cut_off_is_refused(format_, read):
    noise = np.random.default_rng(0).integers(0, 256, (47, 53, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format_)
    with pytest.raises(ImageError) as caught:
        read(data[: len(data) * 2 // 3])
    assert caught.value.reason in ("image cannot be decoded", "not an image")
    assert len(str(caught.value)) > len(caught.value.reason) + 2  # says more than the reason


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow remarks about a broken TIFF
def test_a_damaged_file_gives_pixels_or_an_image_error(format_):
    data, draw, n_refused = saved(Image.fromarray(NOISE), format_), random.Random(3), 0
    for _ in range(97):
        damaged = bytearray(data)
        reach = draw.choice((len(data), min(len(data), 120)))  # headers more often than pixels
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(reach)] = draw.randrange(256)
        try:
            probe(bytes(damaged))
            assert decode(bytes(damaged), 5, "crop").shape == (3, 5, 5)
        except ImageError:
            n_refused += 1
    assert n_refused > 0


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("extra", [b"", b"\n"])  # a file may go on after its end
def test_a_whole_image_is_probed(format_, extra):
    assert probe(saved(Image.fromarray(NOISE), format_) + extra) == ImageInfo(W, H, format_)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP"])
def test_probing_a_whole_image_does_not_decode_it(monkeypatch, format_):
    monkeypatch.setattr(images, "_load", lambda image: pytest.fail("decoded"))
    assert probe(saved(Image.fromarray(NOISE), format_)).width == W


# ---- geometry


def quarters(width: int, height: int) -> bytes:
    """Red left of the middle, green right of it, white in the outer quarters of the width."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, GREEN
    pixels[:, : width // 4] = pixels[:, -(width // 4) :] = WHITE
    return saved(Image.fromarray(pixels))


@pytest.mark.parametrize("side", [10, 20, 40])
def test_crop_keeps_the_middle_and_its_proportions(side):
    pixels = decode(quarters(40, 20), side, "crop")  # the middle 20 x 20: nothing white
    assert pixels.shape == (3, side, side)
    assert tuple(pixels[:, side // 2, side // 4]) == RED
    assert tuple(pixels[:, side // 2, side - 1 - side // 4]) == GREEN


@pytest.mark.parametrize("side", [20, 40])
def test_square_keeps_everything(side):
    pixels = decode(quarters(40, 20), side, "square")
    assert pixels.shape == (3, side, side)
    assert tuple(pixels[:, side // 2, 0]) == tuple(pixels[:, side // 2, -1]) == WHITE
    assert tuple(pixels[:, side // 2, side // 2 - 3]) == RED
    assert tuple(pixels[:, side // 2, side // 2 + 2]) == GREEN


def test_crop_takes_the_middle_of_a_tall_image():
    pixels = decode(saved(open_rgb(quarters(40, 20)).rotate(90, expand=True)), 20, "crop")
    assert tuple(pixels[:, 0, 10]) == GREEN
    assert tuple(pixels[:, -1, 10]) == RED


@pytest.mark.parametrize("fit", ["crop", "square"])
def test_an_image_of_the_right_size_is_not_resampled(fit):
    square = np.random.default_rng(1).integers(0, 256, (13, 13, 3), dtype=np.uint8)
    pixels = decode(saved(Image.fromarray(square)), 13, fit)
    assert np.array_equal(pixels, square.transpose(2, 0, 1))
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)


def test_crop_cuts_without_resampling_where_the_shorter_side_fits():
    wide = np.random.default_rng(1).integers(0, 256, (13, 19, 3), dtype=np.uint8)
    assert np.array_equal(decode(saved(Image.fromarray(wide)), 13, "crop"), wide[:, 3:16].transpose(2, 0, 1))


def test_crop_is_what_resizing_the_shorter_side_and_cutting_the_middle_gives():
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (7, 21, 3), dtype=np.uint8))
    expected = noise.resize((15, 5), Image.Resampling.BICUBIC).crop((5, 0, 10, 5))
    assert np.array_equal(decode(saved(noise), 5, "crop"), np.asarray(expected).transpose(2, 0, 1))


def test_square_resizes_bicubically():
    noise = Image.fromarray(NOISE)
    expected = noise.resize((5, 5), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(saved(noise), 5, "square"), np.asarray(expected).transpose(2, 0, 1))
