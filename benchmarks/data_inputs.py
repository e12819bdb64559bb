"""The inputs of benchmarks/data.py: generated images with captions in img2dataset's tars, and texts, with their indexes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.images import make_jpeg
from datamodules import MixtureData
from datamodules.config import CorpusConfig, Format, TokenizerConfig

SHAPES = {"256 px": (256, 256, 95), "640 x 427": (640, 427, 90)}
"""Width, height, JPEG quality: of img2dataset's default resizing, and of photographs that are not resized."""
DISTINCT = 32
"""Different images; each pair has a copy of one of them."""
CAPTION_WORDS = 14.0
"""Median; about 17 tokens, as in LAION."""
TEXT_WORDS = 300.0
"""Median of the texts."""
SPREAD = 0.6
"""Standard deviation of the logarithm of lengths."""
VOCAB_SIZE = 2000
PAIRS_PER_TAR = 256
SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]


class Words:
    """Draws sentences of random words, the k-th of which has a frequency of 1 / (k + 2)."""

    def __init__(self, seed: int, n_words: int = 5000) -> None:
        self.draw = np.random.default_rng(seed)
        lexicon = np.random.default_rng(0)
        self.words = ["".join(lexicon.choice(SYLLABLES, int(lexicon.integers(1, 4)))) for _ in range(n_words)]
        frequency = 1 / (2 + np.arange(n_words))
        self.ends = np.cumsum(frequency / frequency.sum())

    def text(self, median: float) -> str:
        """Draw a text whose number of words is log-normal."""
        n = max(1, round(float(self.draw.lognormal(np.log(median), SPREAD))))
        ids = np.searchsorted(self.ends, self.draw.random(n)).clip(max=len(self.words) - 1)
        return " ".join(self.words[k] for k in ids.tolist())


@dataclass(frozen=True)
class Inputs:
    """A folder of generated files, and the data modules that read their indexes."""

    folder: Path
    vocab_size: int = VOCAB_SIZE

    def tars(self, name: str) -> list[str]:
        """Return the tars of a shape, or of the corpus for start-up."""
        return sorted(str(path) for path in (self.folder / name).glob("*.tar"))

    def data(self, name: str, **settings: object) -> MixtureData:
        """Return an opened data module of one indexed corpus."""
        format_: Format = "jsonl" if name == "text" else "img2dataset"
        ending = "jsonl" if name == "text" else "tar"
        files, index = self.folder / name / f"*.{ending}", self.folder / "index" / name
        corpus = CorpusConfig(format=format_, input=[str(files)], index=str(index), val_share=0)
        kind = "text" if name == "text" else "caption"
        tokenizer = TokenizerConfig(path=str(self.folder / "tokenizer"), vocab_size=self.vocab_size)
        data = MixtureData(tokenizer, **{kind: corpus}, **settings)  # type: ignore[arg-type]
        data.prepare_data()
        data.setup("validate")
        return data


def make(folder: Path, n_pairs: int, n_texts: int, n_documents: int, vocab_size: int = VOCAB_SIZE) -> Inputs:
    """Write what is missing in `folder`, and index it.

    Args:
        folder: of the files; those of an earlier run with the same numbers are used again.
        n_pairs: caption pairs of each shape.
        n_texts: texts.
        n_documents: caption pairs of the corpus for start-up, in links to the tars of 256 px.
        vocab_size: SentencePiece pieces of the tokenizer, which is trained on the texts.
    """
    folder = folder / f"{n_pairs}-{n_texts}-{n_documents}"
    inputs = Inputs(folder, vocab_size)
    if not (folder / "made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_texts(folder / "text" / "0.jsonl", n_texts)
        for name in SHAPES:
            _write_pairs(folder / name, name, n_pairs)
        _link(inputs.tars("256 px"), folder / "many", n_documents // PAIRS_PER_TAR)
        (folder / "made").touch()
    for name in ("text", *SHAPES, "many"):  # the tokenizer is trained on the texts
        inputs.data(name, prepare_workers=os.cpu_count() or 1)
    return inputs


def _write_texts(path: Path, n_texts: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = Words(seed=1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n_texts):
            file.write(json.dumps({"text": words.text(TEXT_WORDS)}) + "\n")


def _write_pairs(folder: Path, name: str, n_pairs: int) -> None:
    """Write tars with img2dataset's three members of each pair."""
    width, height, quality = SHAPES[name]
    images = [make_jpeg(width, height, quality, seed) for seed in range(min(DISTINCT, n_pairs))]
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    words = Words(seed=2)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, n_pairs, PAIRS_PER_TAR):
        with tarfile.open(folder / f"{first // PAIRS_PER_TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + PAIRS_PER_TAR, n_pairs)):
                key, caption, at = f"{number:09d}", words.text(CAPTION_WORDS), number % len(images)
                fields = {
                    "caption": caption,
                    "url": f"https://images.example/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": width,
                    "height": height,
                    "original_width": width,
                    "original_height": height,
                    "exif": "{}",
                    "sha256": digests[at],
                }
                for extension, data in _members(images[at], caption, fields):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _members(image: bytes, caption: str, fields: dict[str, object]) -> Iterator[tuple[str, bytes]]:
    yield "jpg", image
    yield "json", json.dumps(fields).encode()
    yield "txt", caption.encode()


def _link(tars: Sequence[str], folder: Path, n_tars: int) -> None:
    """Make a corpus of many documents from few files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_tars):
        os.link(tars[number % len(tars)], folder / f"{number:05d}.tar")
