"""JPEGs decoded the fast way are the plain way's, and the plain way is the released loaders'."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from benchmarks import images as benchmark
from kosmos_lit import images
from kosmos_lit.images import ImageError, decode, decode_plain, open_rgb

SIDE = 224
SIZES = [
    (256, 256),
    (640, 427),
    (427, 640),
    (1024, 683),
    (300, 225),
    (224, 224),
    (224, 331),
    (200, 200),
    (1, 1),
    (7, 3),
    (1, 50),
    (300, 701),
]


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def clouds(width: int, height: int) -> np.ndarray:
    """Smooth noise of several scales, the coarser the stronger, as photographs have it."""
    draw, pixels = np.random.default_rng(0), np.full((height, width, 3), 128.0)
    for scale in (1, 2, 4, 8, 16, 32, 64):
        grid = draw.integers(-128, 128, (max(1, height // scale), max(1, width // scale), 3)) + 128
        smooth = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth) - 128.0) * scale / 64
    return np.clip(pixels, 0, 255).astype(np.uint8)


def stripes(width: int, height: int) -> np.ndarray:
    """Slanted bands of two strong colors, with edges as sharp as can be."""
    y, x = np.mgrid[:height, :width]
    return np.where(((3 * x + y) // 37 % 2)[..., None], (250, 240, 10), (10, 20, 130)).astype(np.uint8)


def strokes(width: int, height: int) -> np.ndarray:
    """Thin dark lines on white, as in a scanned page."""
    image, draw = Image.new("RGB", (width, height), "white"), np.random.default_rng(0)
    pen = ImageDraw.Draw(image)
    for _ in range(300):
        x, y = draw.integers(0, width), draw.integers(0, height)
        end = (x + draw.integers(-30, 30), y + draw.integers(-30, 30))
        pen.line([(x, y), end], fill=tuple(draw.integers(0, 128, 3).tolist()), width=int(draw.integers(1, 4)))
    return np.asarray(image)


def white_noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain_is_not_asked(monkeypatch) -> None:
    monkeypatch.setattr(images, "decode_plain", lambda *_: pytest.fail("the plain decoder was used"))


# ---- the bound on pixels


@pytest.mark.parametrize("make_pixels", [clouds, stripes, strokes, white_noise])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_cropped_pixels_are_at_most_two_off_the_plain_way(monkeypatch, make_pixels, width, height):
    data = jpeg(make_pixels(width, height))
    plain = decode_plain(data, SIDE, "crop").astype(int)
    plain_is_not_asked(monkeypatch)

    off = np.abs(decode(data, SIDE, "crop") - plain)

    # Both round to bytes after the rows and after the columns. Their weights have 16 and 22 bits, so that a value may round
    # the other way: by 1, which the columns' weights (absolute values add up to 1.4 at most) and own rounding make 2.
    assert off.max() <= 2
    assert (off > 1).mean() <= 1 / 5000  # measured: up to 9e-5
    assert off.mean() < 0.02  # measured: up to 0.009


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_pixels_are_the_plain_way_s(monkeypatch, width, height):
    data = jpeg(white_noise(width, height))
    plain = decode_plain(data, SIDE, "square")
    plain_is_not_asked(monkeypatch)

    assert np.array_equal(decode(data, SIDE, "square"), plain)


@pytest.mark.parametrize("fit", ["crop", "square"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_an_image_of_the_right_size_is_decoded_as_pillow_does(monkeypatch, fit, subsampling, progressive):
    data = jpeg(white_noise(53, 53), subsampling=subsampling, progressive=progressive)
    plain_is_not_asked(monkeypatch)

    assert np.array_equal(decode(data, 53, fit), np.asarray(open_rgb(data)).transpose(2, 0, 1))


@pytest.mark.parametrize("options", [{"keep_rgb": True}, {"restart_marker_blocks": 3}, {"quality": 100}, {"quality": 3}])
def test_a_rarer_kind_of_jpeg_is_decoded_as_pillow_does(monkeypatch, options):
    data = jpeg(white_noise(53, 47), **options)
    plain_is_not_asked(monkeypatch)

    assert np.array_equal(decode(data, 47, "crop"), np.asarray(open_rgb(data))[:, 3:50].transpose(2, 0, 1))


def test_a_gray_jpeg_has_three_equal_planes(monkeypatch):
    data = jpeg(white_noise(53, 53)[..., 0])
    plain_is_not_asked(monkeypatch)

    assert np.array_equal(decode(data, 53, "crop"), np.asarray(Image.open(io.BytesIO(data)))[None].repeat(3, 0))


@pytest.mark.parametrize(("width", "height"), SIZES[:-1])  # the last one's columns would come first, from Pillow 13 on
def test_the_plain_crop_is_torchvision_s_resize_and_center_crop(width, height):
    released = v2.Compose([v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)])
    data = jpeg(clouds(width, height))

    assert np.array_equal(decode_plain(data, SIDE, "crop").transpose(1, 2, 0), np.asarray(released(open_rgb(data))))


@pytest.mark.parametrize("fit", ["crop", "square"])
def test_the_result_lies_in_memory_plane_by_plane(fit):
    decoded = decode(jpeg(clouds(97, 61)), 23, fit)

    assert (decoded.shape, decoded.dtype, decoded.flags.c_contiguous) == ((3, 23, 23), np.uint8, True)


def test_threads_do_not_change_pixels():
    data, before = jpeg(clouds(641, 467)), torch.get_num_threads()
    decoded = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        decoded.append(decode(data, SIDE, "crop"))
    torch.set_num_threads(before)

    assert np.array_equal(*decoded)


@pytest.mark.parametrize(("width", "height"), [(61, 37), (37, 61)])
def test_the_benchmark_measures_against_the_plain_way(width, height):
    data = benchmark.make_jpeg(width, height, 90, seed=0)

    assert np.array_equal(benchmark.pillow(data), decode_plain(data, benchmark.SIDE, "crop"))


# ---- orientation


@pytest.mark.parametrize("fit", ["crop", "square"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined
def test_a_jpeg_is_turned_upright(monkeypatch, fit, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(clouds(61, 37), exif=exif)
    plain = decode_plain(data, 23, fit).astype(int)
    plain_is_not_asked(monkeypatch)

    assert np.abs(decode(data, 23, fit) - plain).max() <= 2


def test_an_orientation_in_xmp_counts_too():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    pixels = clouds(61, 37)

    decoded = decode(jpeg(pixels, xmp=xmp), 37, "crop")

    assert np.array_equal(decoded, np.rot90(decode(jpeg(pixels), 37, "crop"), -1, axes=(1, 2)))


def test_a_thumbnail_before_the_orientation_does_not_hide_it():
    exif = Image.Exif()
    exif[0x0112] = 3
    data, thumbnail = jpeg(clouds(61, 37), exif=exif), jpeg(clouds(5, 5))
    segment = b"\xff\xed" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail  # APP13, with an SOS marker in it
    other = data[:2] + segment + data[2:]

    assert np.array_equal(decode(other, 37, "crop"), decode(data, 37, "crop"))


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\x08\0\0\0\x05\0\x12\x01", b"II*\0\xff\xff\xff\xff", b""])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's remark
def test_a_broken_exif_block_does_not_turn_a_jpeg(exif):
    pixels = clouds(61, 37)

    assert np.array_equal(decode(jpeg(pixels, exif=b"Exif\0\0" + exif), 37, "crop"), decode(jpeg(pixels), 37, "crop"))


# ---- what the plain way decides


@pytest.mark.parametrize("n_bytes", [100, 3, 1])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_without_its_last_bytes_is_refused_though_an_end_marker_is_there(progressive, n_bytes, end):
    data = jpeg(clouds(61, 37), progressive=progressive)

    with pytest.raises(ImageError) as caught:
        decode(data[: -2 - n_bytes] + end, 23, "crop")

    assert caught.value.reason == "image cannot be decoded"


@pytest.mark.parametrize("extra", [b"\n", b"\xff\xd9", bytes(1000), b"<html>"])
def test_bytes_behind_a_jpeg_do_not_matter(extra):
    data = jpeg(clouds(61, 37))

    assert np.array_equal(decode(data + extra, 23, "crop"), decode(data, 23, "crop"))


def test_bytes_between_two_segments_do_not_matter():
    data = jpeg(clouds(61, 37))

    decoded = decode(data[:-2] + b"junk" + data[-2:], 23, "crop")  # the fast decoder remarks on it

    assert np.abs(decoded - decode(data, 23, "crop").astype(int)).max() <= 2


def test_a_file_of_several_jpegs_gives_the_first():
    first = clouds(61, 37)
    file = io.BytesIO()
    others = [Image.fromarray(stripes(61, 37))]
    Image.fromarray(first).save(file, "MPO", save_all=True, append_images=others, quality=90)
    assert Image.open(file).n_frames == 2

    assert np.array_equal(decode(file.getvalue(), 37, "crop"), decode(jpeg(first), 37, "crop"))
