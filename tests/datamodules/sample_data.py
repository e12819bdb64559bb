"""Sample data for tests: sentences, images, and small files in every format, generated from numbers."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from datamodules.corpus import IndexedCorpus
from datamodules.io.compression import compress_zstd
from datamodules.mixture import Mixture
from datamodules.packing import RowLayout, RowPlan
from datamodules.packing.split import Split
from datamodules.stream import PackedSource, Row, Stream
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import SpecialTokens

INPUTS = {
    "text": ("jsonl", "text/*.jsonl*"),
    "caption": ("img2dataset", "pairs/*.tar"),
    "interleaved": ("warc", "pages/*.warc*"),
}
"""Format and pattern of each corpus that `write_raw` writes, except the instruction data."""
N_TEXTS, N_PAIRS, N_PAGES, N_EXAMPLES = 17 + 13 + 11, 23 + 19, 11 + 7, 19 + 13
SITE = "https://pages.example"
SUBJECTS = ("the cat", "a dog", "my uncle", "the moon", "one horse", "our ship", "a small bird", "the old king")
VERBS = ("sees", "likes", "draws", "follows", "forgets", "finds", "carries")
OBJECTS = ("a red ball", "the green hill", "two boats", "his hat", "the blue sea", "a letter", "some bread", "Jazz & quiz")
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
"""Syllables of names: enough for a vocabulary of a few hundred pieces."""


def sentences(n: int, seed: int = 0) -> list[str]:
    random = Random(seed)

    def sentence() -> str:
        name = "".join(random.choices(SYLLABLES, k=random.choice((2, 3))))
        return f"{random.choice(SUBJECTS)} {random.choice(VERBS)} {random.choice(OBJECTS)} in {name}.".capitalize()

    return [sentence() for _ in range(n)]


def texts(n: int, seed: int) -> list[str]:
    """Texts of one to five sentences, some of two lines."""
    random = Random(seed)
    return [(" " if i % 3 else "\n").join(sentences(1 + i % 5, random.randrange(1 << 30))) for i in range(n)]


# ---- images


def drawn_image(number: int, width: int = 72, height: int = 67) -> Image.Image:
    """An image that no other number has, and that is not of one colour."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([3 * x + 5 * number, 3 * y + 7 * number, np.full_like(x, number)], axis=2) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format_: str) -> bytes:
    data = io.BytesIO()
    image.save(data, format_)
    return data.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(drawn_image(number), "JPEG")


def png(number: int, width: int = 72, height: int = 67) -> bytes:
    return encoded(drawn_image(number, width, height), "PNG")


def plain_png(colour: str = "teal") -> bytes:
    return encoded(Image.new("RGB", (72, 67), colour), "PNG")


def hollow_png() -> bytes:
    """An image with a sound header and end but without pixels, which only decoding detects."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 71, 67, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no deflate stream") + chunk(b"IEND", b"")


def broken_within(kind: int) -> bytes:
    """A small image with a sound header and end, broken between them in one of four ways, which only decoding detects."""
    data = encoded(drawn_image(3, 19, 17), ("PNG", "WEBP", "JPEG", "JPEG")[kind % 4])
    match kind % 4:
        case 0:
            start, stop = data.index(b"IDAT") + 16, data.index(b"IDAT") + 28  # inside the deflate stream
        case 1:
            start, stop = 32, len(data) - 2  # behind the size
        case 2:
            start, stop = data.index(b"\xff\xc4") + 5, data.index(b"\xff\xc4") + 21  # how long Huffman codes are
        case _:
            return data[: data.index(b"\xff\xda")] + b"\xff\xd9"  # no pixels at all
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start:stop]) + data[stop:]


# ---- files


def write_jsonl(path: Path, values: Iterable[str]) -> None:
    """One {"text": ...} a line, compressed by the ending of the name."""
    write_lines(path, [json.dumps({"text": value}).encode() for value in values])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = compress_zstd(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_parquet(path: Path, columns: Mapping[str, Sequence[str | int | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], mtime: float = 0, format_: int = tarfile.DEFAULT_FORMAT
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime  # type: ignore[assignment]
            tar.addfile(member, io.BytesIO(data))


def pairs(n: int, first: int) -> list[tuple[str, bytes]]:
    """Members of an img2dataset shard: JPEGs and PNGs with their captions."""
    members = []
    for i, caption in enumerate(sentences(n, first), start=first):
        extension, data = ("jpg", jpeg(i)) if i % 2 else ("png", png(i))
        members += [(f"{i:09d}.{extension}", data), (f"{i:09d}.txt", caption.encode()), (f"{i:09d}.json", b"{}")]
    return members


Record = tuple[str, str, bytes]
"""URL, Content-Type and body of a response."""


def warc_record(
    url: str, mime: str, body: bytes, *, compressed: bool = True, headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    data = io.BytesIO()
    writer = WARCWriter(data, gzip=compressed)
    fields = [("Content-Type", mime), ("Content-Length", str(len(body))), *headers]
    identity = {"WARC-Date": "2024-01-01T00:00:00Z", "WARC-Record-ID": f"<urn:uuid:{zlib.crc32(url.encode()):032x}>"}
    record = writer.create_warc_record(
        url,
        "response",
        payload=io.BytesIO(body),
        length=len(body),
        http_headers=StatusAndHeaders("200 OK", fields, protocol="HTTP/1.1"),
        warc_headers_dict=identity,
    )
    writer.write_record(record)
    return data.getvalue()


def write_warc(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(warc_record(*record, compressed=path.suffix == ".gz") for record in records))


def page(*blocks: str, head: str = "") -> bytes:
    """An HTML page; a block that ends on an image's extension becomes that image, another one a paragraph."""
    images = (".jpg", ".png", ".svg")
    body = "\n".join(f'<p><img src="{b}"></p>' if b.endswith(images) else f"<p>{b}</p>" for b in blocks)
    return f"<!DOCTYPE html><html><head>{head}<title>T</title></head><body>{body}</body></html>".encode()


def crawl(n: int, first: int) -> list[Record]:
    """Pages of two, three, five, two ... images, each with its images in front of it."""
    records: list[Record] = []
    for number in range(first, first + n):
        n_images = (2, 3, 5)[number % 3]
        blocks = ["A page."]
        for j, sentence in enumerate(sentences(n_images, number)):
            name = f"{number}-{j}.{'jpg' if j % 2 else 'png'}"
            image = 100 + 7 * number + j
            mime, data = ("image/jpeg", jpeg(image)) if j % 2 else ("image/png", png(image))
            records.append((f"{SITE}/{name}", mime, data))
            blocks += [name, sentence]
        records.append((f"{SITE}/{number}.html", "text/html; charset=utf-8", page(*blocks)))
    return records


def examples(n: int, first: int) -> list[dict[str, object]]:
    """Records of instruction data in turn: a completion, a conversation of text, one of two turns and two images."""
    records: list[dict[str, object]] = []
    for number in range(first, first + n):
        question, answer, second_question, second_answer = sentences(4, 1000 + number)
        names = [f"p/{number}-{j}.png" for j in range(number % 3)]
        turns = [
            ("user", question),
            ("assistant", answer),
            ("user", f"<image> <image> {second_question}"),
            ("assistant", second_answer),
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        match number % 3:
            case 0:
                records.append({"prompt": question, "completion": answer})
            case 1:
                records.append({"images": names, "messages": messages[:2]})
            case 2:
                records.append({"images": names, "messages": messages})
    return records


def write_examples(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """One record a line, and the images that `images` names beside the file."""
    write_lines(path, [json.dumps(record).encode() for record in records])
    for i, name in enumerate(name for record in records for name in record.get("images", ())):  # type: ignore[attr-defined]
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(png(300 + i))


def write_raw(folder: Path) -> None:
    write_jsonl(folder / "text/a.jsonl", texts(17, 1))
    write_jsonl(folder / "text/b.jsonl.gz", texts(13, 2))
    write_jsonl(folder / "text/c.jsonl.zst", texts(11, 3))
    write_parquet(folder / "table/d.parquet", {"text": texts(7, 4), "n": list(range(7))})
    write_tar(folder / "pairs/00000.tar", pairs(23, 0))
    write_tar(folder / "pairs/00001.tar", pairs(19, 23))
    write_warc(folder / "pages/a.warc.gz", crawl(11, 0))
    write_warc(folder / "pages/b.warc", crawl(7, 11))
    write_examples(folder / "tuning/a.jsonl", examples(19, 0))
    write_examples(folder / "tuning/b.jsonl.gz", examples(13, 19))


# ---- streams


def plan(name: str, corpus: IndexedCorpus, seq_len: int, n_latents: int, seed: int) -> RowPlan:
    """A row plan over all documents of a corpus."""
    layout = RowLayout(seq_len=seq_len, n_latents=n_latents, seed=seed)
    return RowPlan(name, corpus, Split(corpus, 0.0, None), "train", layout)


def documents_of(plan: RowPlan) -> list[int]:
    """The documents of a plan, each once."""
    return sorted({document for row in range(plan.n_rows) for document, _, _ in plan.segments(row)})


def stream(
    corpora: Mapping[str, IndexedCorpus],
    special: SpecialTokens,
    *,
    ratio: Sequence[float] = (5, 5, 2),
    seq_len: int = 101,
    n_latents: int = 3,
    seed: int = 7,
) -> Stream:
    """A stream over all documents of the corpora."""
    packed: list[PackedSource | None] = [None] * len(CORPORA)
    for name, corpus in corpora.items():
        kind = CORPORA.index(name)
        packed[kind] = PackedSource(name, kind, corpus, plan(name, corpus, seq_len, n_latents, seed))
    return Stream(packed, Mixture.constant(ratio), special, seq_len)


def plain(row: Row) -> tuple[object, ...]:
    """A row as values that `==` compares."""
    return (
        row.number,
        row.corpus,
        row.source,
        row.epoch,
        row.tokens.tolist(),
        row.targets.tolist(),
        row.segments,
        row.images,
        row.image_segments,
        row.slots.tolist(),
    )
