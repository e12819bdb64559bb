"""The world's corpora on disk, in the formats of real ones: JSONL, img2dataset tars with Parquet, WARC."""

from __future__ import annotations

import hashlib
import html
import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from datamodules.io.compression import compress_zstd
from datamodules.io.hashing import hash_key
from datamodules.io.pool import Progress, run_all
from datamodules.world.language import caption, page_texts, text
from datamodules.world.scene import SIDE, Holdout, encode_png, paint_jpeg, training_scene
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_folder

KINDS = {"object": 5, "count": 3, "pair": 2, "group": 1, "word": 0.4}
"""Relative frequencies of the kinds of scenes in captions and pages."""
SITE = "https://world.example"
DATE = "2024-01-01T00:00:00Z"
IDENTITY = "world.json"


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How much of the world is drawn, and where."""

    path: str
    """Folder of the drawn corpora."""
    seed: int = 0
    """Seed of every scene, sentence and stroke."""
    held_out: float = 0.28
    """Share of the combinations that are held out of training."""
    n_pairs: int = 16_000
    """Caption pairs."""
    n_pages: int = 3_000
    """Pages of several images."""
    n_texts: int = 12_000
    """Texts without images."""
    shards: int = 4
    """Files per corpus."""
    workers: int = 2
    """Processes that draw."""


def is_drawn(file: Path, identity: dict[str, object], what: str) -> bool:
    """Whether the folder of `file`, where its identity is stored, already holds what is to be drawn.

    Raises: UserError if it holds anything else.
    """
    advice = f"choose another data.{what}.path, or delete it"
    if file.exists():
        if (existing := json.loads(file.read_text(encoding="utf-8"))) != identity:
            differing = {key: value for key, value in identity.items() if existing.get(key) != value}
            wrong = ", ".join(
                f"{key} is {existing.get(key)} on disk, {value} in the run" for key, value in differing.items()
            )
            raise UserError(f"{file.parent} holds another {what}: {wrong}; {advice}")
        return True
    if file.parent.exists() and any(file.parent.iterdir()):
        raise UserError(f"{file.parent} holds other things than a {what}; {advice}")
    return False


def write_world(config: WorldConfig) -> None:
    """Draw the corpora, unless they are already there.

    Raises: UserError if the folder holds another world.
    """
    folder = Path(config.path)
    identity = {k: v for k, v in asdict(config).items() if k not in ("path", "workers")}
    if is_drawn(folder / IDENTITY, identity, "world"):
        return
    with atomic_folder(folder) as temporary:
        kinds = ("caption", "pages", "text")
        tasks = [_Shard(config, kind, shard, temporary) for kind in kinds for shard in range(config.shards)]
        run_all(_write_shard, tasks, config.workers, "drawing the world", "documents")
        (temporary / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")


class _Shard(NamedTuple):
    config: WorldConfig
    kind: str
    number: int
    folder: Path


def _write_shard(task: _Shard, progress: Progress) -> None:
    config, kind, shard, folder = task
    random = Random(hash_key("world", config.seed, kind, shard))
    holdout = Holdout(config.seed, config.held_out)
    write = {"caption": _write_captions, "pages": _write_pages, "text": _write_texts}[kind]
    total = {"caption": config.n_pairs, "pages": config.n_pages, "text": config.n_texts}[kind]
    n = total * (shard + 1) // config.shards - total * shard // config.shards
    write(folder, shard, n, random, holdout)
    progress(n)


def _draw_kind(random: Random) -> str:
    return random.choices(list(KINDS), weights=list(KINDS.values()))[0]


def _write_captions(folder: Path, shard: int, n: int, random: Random, holdout: Holdout) -> None:
    rows = []
    with tarfile.open(folder / f"caption-{shard:05d}.tar", "w") as tar:
        for i in range(n):
            scene = training_scene(random, _draw_kind(random), holdout)
            image = paint_jpeg(scene, random)
            row = {
                "caption": caption(scene, random),
                "url": f"{SITE}/{shard}/{i}.jpg",
                "key": f"{shard:05d}{i:04d}",
                "status": "success",
                "error_message": None,
                "width": SIDE,
                "height": SIDE,
                "original_width": SIDE,
                "original_height": SIDE,
                "exif": "{}",
                "sha256": hashlib.sha256(image).hexdigest(),
            }
            rows.append(row)
            members = {"jpg": image, "json": json.dumps(row).encode(), "txt": str(row["caption"]).encode()}
            for extension, data in members.items():
                # The time stays 0, so that another drawing has the same bytes.
                member = tarfile.TarInfo(f"{row['key']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), folder / f"caption-{shard:05d}.parquet")


def _write_pages(folder: Path, shard: int, n: int, random: Random, holdout: Holdout) -> None:
    with (folder / f"pages-{shard:05d}.warc.gz").open("wb") as file:
        warc = WARCWriter(file, gzip=True)
        icon = encode_png(Image.new("RGB", (16, 16), "navy"))
        _write_response(warc, f"{SITE}/icon.png", "image/png", icon, random)
        for i in range(n):
            url = f"{SITE}/{shard}/page{i}.html"
            scenes = [
                training_scene(random, _draw_kind(random), holdout) for _ in range(random.choice((1, 2, 3, 3, 4, 5, 6)))
            ]
            for j, scene in enumerate(scenes):
                # Some links are dead, as in any crawl.
                if random.random() > 0.01:
                    _write_response(warc, f"{SITE}/{shard}/p{i}-{j}.jpg", "image/jpeg", paint_jpeg(scene, random), random)
            opening, paragraphs, closing = page_texts(scenes, random)
            figures = "\n".join(
                f'<p><img src="p{i}-{j}.jpg" alt=""></p>\n<p>{html.escape(paragraph)}</p>'
                for j, paragraph in enumerate(paragraphs)
            )
            page = (
                f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>Page {i}</title></head><body>'
                f'<nav><a href="/"><img src="/icon.png">Home</a></nav>\n<h1>{html.escape(opening)}</h1>\n{figures}\n'
                f"<p>{html.escape(closing)}</p></body></html>"
            )
            _write_response(warc, url, "text/html; charset=utf-8", page.encode(), random)


def _write_response(warc: WARCWriter, url: str, mime: str, body: bytes, random: Random) -> None:
    headers = StatusAndHeaders("200 OK", [("Content-Type", mime), ("Content-Length", str(len(body)))], protocol="HTTP/1.1")
    # warcio's own ids and dates would differ from drawing to drawing.
    number = f"{random.getrandbits(128):032x}"
    record = warc.create_warc_record(
        url,
        "response",
        payload=io.BytesIO(body),
        length=len(body),
        http_headers=headers,
        warc_headers_dict={"WARC-Date": DATE, "WARC-Record-ID": f"<urn:uuid:{number}>"},
    )
    warc.write_record(record)


def _write_texts(folder: Path, shard: int, n: int, random: Random, holdout: Holdout) -> None:
    lines = (json.dumps({"text": text(random, holdout), "meta": {"shard": shard, "n": i}}) for i in range(n))
    compressed = compress_zstd("".join(line + "\n" for line in lines).encode())
    (folder / f"text-{shard:05d}.jsonl.zst").write_bytes(compressed)
