"""Train a SentencePiece Unigram model with the settings of the released KOSMOS vocabulary (section 2 of the facts).

The facts: Unigram, character coverage 0.99999, pieces of at most 16 characters, no byte fallback, nmt_nfkc normalisation,
at most 15 M sentences sampled.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from datamodules.document import Tally
from datamodules.io.paths import expand
from datamodules.sources import SOURCES, ReadOptions, Source
from kosmos_lit.errors import UserError
from kosmos_lit.files import write_atomically
from kosmos_lit.terminal import Progress, write_line
from kosmos_lit.tokenizer import LEADING, MODEL_FILE, Tokenizer, clean, has_tokenizer

MAX_SENTENCE_BYTES = 4000
"""SentencePiece skips longer sentences, so lines are cut at a space before that."""
ORIGIN_FILE = "origin.json"
ENDINGS = {".tar": "img2dataset", ".parquet": "parquet", ".warc": "warc", ".warc.gz": "warc"}


def train_tokenizer(inputs: Sequence[str], vocab_size: int, output: Path) -> Tokenizer:
    """Train a tokenizer on all text of the files and write its folder, or reuse a folder of the same origin.

    Args:
        inputs: patterns of files in any format that `prepare corpus` reads; their endings tell the format.
        vocab_size: SentencePiece pieces, its 3 control pieces included; the model's vocabulary is 7 larger.
        output: the folder.

    Raises: UserError if nothing matches, the folder holds another tokenizer, or the text is too little for the size.
    """
    files = expand(inputs, "prepare tokenizer")
    origin = {"vocab_size": vocab_size, "files": [[f.name, f.stat().st_size] for f in files]}
    if has_tokenizer(output):
        return _reuse(output, origin)
    if vocab_size <= len(LEADING):
        raise UserError(f"--vocab_size {vocab_size} is too small; the released models have 64,000 pieces")
    tally = Tally()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(files, tally),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=0.99999,
            max_sentencepiece_length=16,
            input_sentence_size=15_000_000,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        why = f"the text is enough for at most {most[1]}" if most else str(error)
        raise UserError(f"prepare tokenizer: {vocab_size} pieces out of {len(files)} files: {why}") from error
    tokenizer = Tokenizer(model.getvalue())
    # The model last: a folder that has one is complete.
    write_atomically(output / ORIGIN_FILE, json.dumps(origin, indent=1).encode())
    write_atomically(output / MODEL_FILE, model.getvalue())
    return tokenizer


def _reuse(output: Path, origin: dict[str, object]) -> Tokenizer:
    path = output / ORIGIN_FILE
    made_from = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if made_from != origin:
        raise UserError(
            f"{output} already holds a tokenizer made from other input or of another size; "
            "choose another --output, or delete it"
        )
    return Tokenizer.load(output)


def _sentences(files: Sequence[Path], tally: Tally) -> Iterator[str]:
    options = ReadOptions()
    progress, n_texts = Progress("reading text", len(files), "files"), 0
    for path in files:
        for text in _format_of(path).texts(path, options, tally):
            n_texts += 1
            progress.note = f"{n_texts:,} texts"
            progress.add(0)
            for line in clean(text).split("\n"):
                yield from _cut(line.strip())
        progress.add()
    progress.end()
    write_line("training the tokenizer", keep=True)  # by SentencePiece, which does not say how far it is


def _format_of(path: Path) -> Source:
    name = path.name.lower()
    return SOURCES[next((format_ for ending, format_ in ENDINGS.items() if name.endswith(ending)), "jsonl")]


def _cut(line: str) -> Iterator[str]:
    while len(line.encode()) > MAX_SENTENCE_BYTES:
        limit = MAX_SENTENCE_BYTES // 4  # characters have at most 4 bytes
        at = line.rfind(" ", 1, limit)
        at = limit if at < 0 else at
        yield line[:at]
        line = line[at:].lstrip()
    if line:
        yield line
