"""Images as strangers send them: broken, hostile, rare. Nothing but ImageError, and nothing that costs much."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from kosmos_lit import images
from kosmos_lit.images import ImageError, decode, decode_plain, open_rgb, probe

W, H = 53, 37
RED, GREEN, WHITE = (220, 30, 10), (10, 200, 30), (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
LOADERS = pytest.mark.parametrize("read", [decode, decode_plain])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks about broken metadata


def saved(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = saved(Image.fromarray(NOISE), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif_claiming(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(NOISE), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp_claiming(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(NOISE), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def tiff_claiming(width: int, height: int) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 8}.items():
        tags[tag] = value
    file = io.BytesIO()
    file.write(b"II*\0\x08\0\0\0")
    tags.save(file)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, bytes(10))


CLAIMING = [png_claiming, jpeg_claiming, gif_claiming, bmp_claiming, tiff_claiming]
BOMB = zlib.compress(bytes(40_000_000), 9)  # 39 kB
BOMBS = {
    "zTXt": png(1, 1, 8, 2, bytes(4), chunk(b"zTXt", b"k\0\0" + BOMB)),
    "iTXt": png(1, 1, 8, 2, bytes(4), chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)),
    "iCCP": png(1, 1, 8, 2, bytes(4), chunk(b"iCCP", b"k\0\0" + BOMB)),
    "IDAT": png(1, 1, 8, 2, bytes(40_000_000)),
}


# ---- bombs


@pytest.mark.parametrize("claiming", CLAIMING)
@pytest.mark.parametrize("side", [12_000, 50_000])
@LOADERS
def test_a_header_that_claims_too_many_pixels_is_refused(claiming, side, read):
    with pytest.raises(ImageError) as caught:
        read(claiming(side, side), 23, "crop")

    assert caught.value.reason == "image too large"


@pytest.mark.parametrize("claiming", CLAIMING)
@pytest.mark.parametrize(("width", "height"), [(1, 50_000), (50_000, 1)])
@LOADERS
def test_a_header_that_claims_a_strip_is_refused(claiming, width, height, read):
    with pytest.raises(ImageError) as caught:
        read(claiming(width, height), 23, "crop")

    assert caught.value.reason == "image too elongated"


@pytest.mark.parametrize(("width", "height"), [(1, 200_000), (200_000, 1)])
def test_a_strip_of_200_000_pixels_is_refused(width, height):
    with pytest.raises(ImageError, match=f"{width} x {height} exceeds 1 : 50"):
        decode(saved(Image.new("L", (width, height)), "PNG"), 23, "crop")


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
@pytest.mark.parametrize("read", [probe, open_rgb, lambda data: decode(data, 23, "crop")])
def test_metadata_that_unpack_to_much_are_refused(kind, read):
    with pytest.raises(ImageError):
        read(BOMBS[kind])


def test_bombs_cost_no_memory(tmp_path: Path):
    pytest.importorskip("resource")
    names = []
    for name, data in {
        **{f"{c.__name__}-{side}": c(side, side) for c in CLAIMING for side in (12_000, 50_000)},
        **{f"{c.__name__}-strip": c(50_000, 1) for c in CLAIMING},
        **BOMBS,
    }.items():
        (tmp_path / name).write_bytes(data)
        names.append(name)
    for format_ in ("PNG", "JPEG", "GIF", "BMP", "TIFF"):
        (tmp_path / f"sound.{format_}").write_bytes(saved(Image.fromarray(NOISE), format_))
    program = f"""if True:
        import resource, sys, warnings
        from pathlib import Path
        from kosmos_lit.images import ImageError, decode, probe

        warnings.simplefilter("ignore")
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
        for file in Path().glob("sound.*"):
            decode(file.read_bytes(), 23, "square")
        before = peak()
        for name in {names}:
            for read in (probe, lambda data: decode(data, 23, "square")):
                try:
                    read(Path(name).read_bytes())
                    assert name == "IDAT", name  # its one pixel is sound, what follows is not unpacked
                except ImageError:
                    pass
        print(peak() - before)
        """

    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 16_384  # KiB; unpacked, the images take 400 MiB and more, the metadata 38 MiB each


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(images.__file__).parents[1])}


# ---- what is no image


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html><body>404</body></html>", b"\xff\xd8\xff", b"\xff\xd8", b"\0"])
@LOADERS
def test_what_is_no_image_is_refused_by_the_fast_way_too(data, read):
    with pytest.raises(ImageError) as caught:
        read(data, 23, "crop")

    assert caught.value.reason == "not an image"


@pytest.mark.parametrize("at", [2, 20, 160, 400, 623, 700, 1500])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(at, progressive):
    with pytest.raises(ImageError):
        decode(saved(Image.fromarray(NOISE), "JPEG", progressive=progressive)[:at], 23, "crop")


# ---- rare modes


@pytest.mark.parametrize(("color", "values"), [(0, (40_000,)), (2, (40_000, 300, 65_535))])
def test_sixteen_bits_a_channel_are_scaled(color, values):
    rows = (b"\0" + struct.pack(f">{len(values)}H", *values) * 5) * 5
    decoded = decode(png(5, 5, 16, color, rows), 5, "crop")[:, 2, 2]

    assert np.abs(decoded - np.array(values) / 257).max() <= 1  # clipping would give 255 for each


def test_sixteen_bits_with_alpha_are_laid_over_white():
    rows = (b"\0" + struct.pack(">4H", 65_535, 0, 0, 13_107) * 5) * 5  # a fifth of red

    assert np.abs(decode(png(5, 5, 16, 6, rows), 5, "crop")[:, 2, 2] - np.array([255, 204, 204])).max() <= 1


@pytest.mark.parametrize(
    ("inks", "adobe", "expected"),
    [
        ((77, 178, 127, 0), 0, (178, 77, 128)),
        ((77, 178, 127, 0), None, (178, 77, 128)),  # no Adobe segment: inverted all the same, as Pillow assumes
        ((77, 127, 127, 0), 2, (77, 77, 77)),  # YCCK: a luma of 178 that is not reflected, no chroma, no black
    ],
)
def test_inverted_inks_become_rgb(inks, adobe, expected):
    data = saved(Image.new("CMYK", (W, H), inks), "JPEG", quality=100)
    at = data.index(b"\xff\xee\0\x0eAdobe")
    segment = b"" if adobe is None else data[at : at + 15] + bytes([adobe])
    decoded = decode(data[:at] + segment + data[at + 16 :], 23, "crop")[:, 11, 11]

    assert np.abs(decoded - np.array(expected)).max() <= 3  # a JPEG is lossy


# ---- anything at all

SOUND = {
    "JPEG": saved(Image.fromarray(NOISE), "JPEG"),
    "JPEG, progressive, turned": saved(
        Image.fromarray(NOISE),
        "JPEG",
        progressive=True,
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0",
    ),
    "JPEG, gray": saved(Image.fromarray(NOISE[..., 0]), "JPEG"),
    "JPEG, inks": saved(Image.fromarray(np.dstack([NOISE, NOISE[..., :1]]), "CMYK"), "JPEG"),
    "PNG": saved(Image.fromarray(NOISE), "PNG"),
    "PNG, palette": saved(Image.fromarray(NOISE).quantize(7), "PNG", transparency=3),
    "GIF": saved(Image.fromarray(NOISE), "GIF", save_all=True, append_images=[Image.new("RGB", (W, H))]),
    "WEBP": saved(Image.fromarray(NOISE), "WEBP"),
    "BMP": saved(Image.fromarray(NOISE), "BMP"),
    "TIFF": saved(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw"),
    "AVIF": saved(Image.fromarray(NOISE), "AVIF"),
    "JPEG2000": saved(Image.fromarray(NOISE), "JPEG2000"),
    "PPM": saved(Image.fromarray(NOISE), "PPM"),
    "ICO": saved(Image.fromarray(NOISE), "ICO"),
}
STARTS = [b"", *{data[:12] for data in SOUND.values()}]


def is_an_image_or_refused(data: bytes) -> None:
    for fit in ("crop", "square"):
        try:
            decoded = decode(data, 23, fit)
        except ImageError:
            continue
        assert (decoded.shape, decoded.dtype, decoded.flags.c_contiguous) == ((3, 23, 23), np.uint8, True)
        off = np.abs(decoded - decode_plain(data, 23, fit).astype(int))  # what the fast way reads, the plain one reads too
        assert off.max() <= 2
    with contextlib.suppress(ImageError):
        assert probe(data).width > 0


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_random_bytes_are_refused_or_an_image(start, tail):
    is_an_image_or_refused(start + tail)


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", list(SOUND))
@given(st.data())
def test_a_mutated_file_is_refused_or_an_image(kind, data):
    """Bytes changed, in the header more often than not, and stretches dropped, doubled, or cut off at the end."""
    mutated = bytearray(SOUND[kind])
    for _ in range(data.draw(st.integers(1, 5))):
        reach = max(1, data.draw(st.sampled_from((len(mutated), min(len(mutated), 200)))))
        at, length = data.draw(st.integers(0, reach - 1)), data.draw(st.integers(0, 40))
        match data.draw(st.sampled_from(["change", "change", "drop", "double", "cut"])):
            case "change":
                mutated[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "drop":
                del mutated[at : at + length]
            case "double":
                mutated[at:at] = mutated[at : at + length]
            case "cut":
                del mutated[len(mutated) - length :]
    is_an_image_or_refused(bytes(mutated))
