"""Images a second on one core: bytes of a JPEG to (3, 224, 224) uint8, our decoder and the plain Pillow path, in one run.

    python benchmarks/images.py [--tar 'folder/*.tar'] [--images 24] [--rounds 9] [--json figures.json]

The plain path is what released training loaders do: Pillow opens, converts to RGB, scales the shorter side to 224
bicubically and cuts the middle; then planes for torch. Ours is `kosmos_lit.images.decode` with fit `crop`. Both run in one
process with one thread and take turns on the same images; a figure is the median over the rounds, by CPU time, as a
machine may have other work to do. The last columns are how far apart the two results are, in levels of 255.

Images are made: discs of all sizes that hide one another, with 1/f noise on them. They have edges and a spectrum like
photographs', and take as many bytes (2.2 bits a pixel at 640 px and quality 90) or some more, for it is those that cost
both ways the same. `--tar` adds the JPEGs of WebDataset tars, by their shorter side.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kosmos_lit.checks.device import describe_device
from kosmos_lit.images import ImageError, decode

SIDE = 224
SIZES = [(256, 256), (640, 427)]
QUALITIES = [90, 95]
BANDS = [(0, 128), (128, 224), (224, 257), (257, 512), (512, 1 << 30)]
"""Shorter sides, from and below, that images of tars are reported by."""

Pixels = npt.NDArray[np.uint8]


def made(width: int, height: int, quality: int, seed: int) -> bytes:
    """Return a JPEG (4:2:0) with the edges and the spectrum of a photograph."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: 2 * height, : 2 * width] / 2
    scene = np.empty((2 * height, 2 * width, 3))
    scene[:] = draw.uniform(40, 215, 3)
    for radius in 2 + max(width, height) / 3 * np.sort(draw.random(150) ** 3)[::-1]:  # the small ones in front
        inside = (x - draw.uniform(0, width)) ** 2 + (y - draw.uniform(0, height)) ** 2 < radius**2
        scene[inside] = np.clip(draw.normal(128, 50) + draw.normal(0, 25, 3), 0, 255)
    scene = scene.reshape(height, 2, width, 2, 3).mean((1, 3))  # edges no sharper than a lens makes them
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    shade = np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height, width))) / frequency, (height, width))
    grain = draw.normal(0, 1, (height, width, 1))
    pixels = np.clip(scene + 6 * (shade / shade.std())[..., None] + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def of_tars(patterns: Sequence[str], limit: int) -> dict[str, list[bytes]]:
    """Return up to `limit` of the JPEGs of tars in each band of shorter sides, by the band's name."""
    found: dict[str, list[bytes]] = defaultdict(list)
    for path in sorted(path for pattern in patterns for path in glob.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith((".jpg", ".jpeg")) else None
                if file is None:
                    continue
                data = file.read()
                try:
                    decode(data, SIDE, "crop")
                except ImageError:
                    continue
                short = min(Image.open(io.BytesIO(data)).size)
                first, end = next(band for band in BANDS if band[0] <= short < band[1])
                name = f"tars, {first} to {end - 1} px" if end < 1 << 30 else f"tars, {first} px and more"
                if len(found[name]) < limit:
                    found[name].append(data)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split()[1])))


def pillow(data: bytes) -> Pixels:
    """Decode as released training loaders do, with nothing but Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short = min(width, height)
    width, height = SIDE * width // short, SIDE * height // short
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    return np.ascontiguousarray(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).transpose(2, 0, 1))


def ours(data: bytes) -> Pixels:
    """Decode with kosmos-lit."""
    return decode(data, SIDE, "crop")


def rates(images: list[bytes], ways: Sequence[Callable[[bytes], Pixels]], n_rounds: int) -> list[list[float]]:
    """Return images a CPU second of each way and round, ways taking turns."""
    found: list[list[float]] = [[] for _ in ways]
    for number in range(n_rounds + 1):
        for way, kept in zip(ways, found, strict=True):
            start = time.process_time()
            for data in images:
                way(data)
            if number:  # the first round warms up
                kept.append(len(images) / (time.process_time() - start))
    return found


def compare(name: str, images: list[bytes], n_rounds: int) -> dict[str, object]:
    """Return one line of the table."""
    plain, fast = rates(images, (pillow, ours), n_rounds)
    off = np.stack([np.abs(ours(data) - pillow(data).astype(int)) for data in images])
    return {
        "images": name,
        "n": len(images),
        "kB": round(statistics.mean(map(len, images)) / 1000, 1),
        "pillow/s": round(statistics.median(plain)),
        "ours/s": round(statistics.median(fast)),
        "ratio": round(statistics.median(f / p for f, p in zip(fast, plain, strict=True)), 2),
        "mean off": round(float(off.mean()), 4),
        "max off": int(off.max()),
        "off by > 1": float(f"{(off > 1).mean():.1e}"),
    }


def main() -> None:
    """Measure, and print a table and then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", nargs="*", default=[], help="patterns of WebDataset tars with JPEGs to measure as well")
    parser.add_argument("--images", type=int, default=24, help="of each kind; of tars ten times as many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where the figures go, if not to the terminal")
    a = parser.parse_args()
    torch.set_num_threads(1)

    cases = {
        f"{width} x {height}, quality {quality}": [made(width, height, quality, seed) for seed in range(a.images)]
        for width, height in SIZES
        for quality in QUALITIES
    }
    lines = [compare(name, data, a.rounds) for name, data in (cases | of_tars(a.tar, 10 * a.images)).items()]

    where = f"one thread of {describe_device(torch.device('cpu'))}"
    columns = list(lines[0])
    widths = [max(len(str(line[c])) for line in [dict(zip(columns, columns, strict=True)), *lines]) for c in columns]
    print(where)
    for row in [columns, *([line[c] for c in columns] for line in lines)]:
        print("  ".join(str(v).rjust(w) for v, w in zip(row, widths, strict=True)))
    figures = json.dumps({"machine": where, "rounds": a.rounds, "lines": lines}, indent=1)
    if a.json is None:
        print(figures)
    else:
        a.json.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
