"""Tokenizers as folders, and as bytes inside a checkpoint.

A folder that `Tokenizer.save` writes holds the pieces' own file, and what is ours beside it:

    sentencepiece.bpe.model or tokenizer.json
    kosmos_tokenizer.json        {"kind": ..., "extra": [control tokens]}; absent for SentencePiece without extra tokens

Other folders are read too: the released layout (the model, perhaps with fairseq's dict.txt), a Kosmos-2 or XLM-RoBERTa
tokenizer of `transformers`, and any other Hugging Face tokenizer.

As bytes: the line MAGIC, the same JSON in one line, the pieces' own file. It is plain data; reading it runs no code. A
SentencePiece model without extra tokens is its own bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.terminal import program
from kosmos_lit.tokenizer import xlm_roberta
from kosmos_lit.tokenizer.hugging_face import HuggingFacePieces
from kosmos_lit.tokenizer.pieces import Kind, Pieces, SentencePieces
from kosmos_lit.tokenizer.xlm_roberta import JSON_FILE, MODEL_FILE

LAYOUT_FILE = "kosmos_tokenizer.json"
MAGIC = b"kosmos tokenizer 1\n"
PIECES_FILE: dict[Kind, str] = {"sentencepiece": MODEL_FILE, "huggingface": JSON_FILE}


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder has a tokenizer's file."""
    return any((Path(folder) / name).is_file() for name in PIECES_FILE.values())


def read_folder(folder: Path) -> tuple[Pieces, tuple[str, ...]]:
    """Return the pieces and the appended control tokens of a folder.

    Raises: UserError if it holds no tokenizer, or its files contradict each other.
    """
    layout = folder / LAYOUT_FILE
    if layout.is_file():
        kind, extra = _parse_layout(layout.read_bytes(), layout)
        path = folder / PIECES_FILE[kind]
        if not path.is_file():
            raise UserError(f"{folder}: {LAYOUT_FILE} names {path.name}, which is missing")
        return _build(kind, path.read_bytes()), extra
    if (folder / MODEL_FILE).is_file() or xlm_roberta.is_released_layout(folder / JSON_FILE):
        return xlm_roberta.read(folder)
    pieces = HuggingFacePieces.read(folder)
    if pieces is None:
        raise UserError(
            f"no tokenizer in {folder}: {MODEL_FILE} is missing, and there is no {JSON_FILE} or other file of a Hugging "
            f"Face tokenizer; make one with `{program()} prepare tokenizer --input FILES --vocab_size N --output DIR`"
        )
    return pieces, ()


def write_folder(folder: Path, pieces: Pieces, extra: tuple[str, ...]) -> None:
    """Write a folder that `read_folder` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PIECES_FILE[pieces.kind]).write_bytes(pieces.to_bytes())
    layout = folder / LAYOUT_FILE
    if extra or pieces.kind != "sentencepiece":
        layout.write_bytes(_layout(pieces.kind, extra, indent=1))
    else:
        layout.unlink(missing_ok=True)  # of another tokenizer that was saved to this folder before


def to_bytes(pieces: Pieces, extra: tuple[str, ...]) -> bytes:
    """Return pieces and appended control tokens as bytes."""
    if pieces.kind == "sentencepiece" and not extra:
        return pieces.to_bytes()
    return MAGIC + _layout(pieces.kind, extra) + b"\n" + pieces.to_bytes()


def from_bytes(data: bytes) -> tuple[Pieces, tuple[str, ...]]:
    """Return the arguments of `to_bytes`.

    Raises: UserError if `data` is neither its result nor a SentencePiece model.
    """
    if not data.startswith(MAGIC):
        return SentencePieces(data), ()
    layout, _, pieces = data.removeprefix(MAGIC).partition(b"\n")
    kind, extra = _parse_layout(layout, "the tokenizer's bytes")
    return _build(kind, pieces), extra


def _layout(kind: Kind, extra: tuple[str, ...], indent: int | None = None) -> bytes:
    return json.dumps({"kind": kind, "extra": extra}, indent=indent).encode()


def _parse_layout(data: bytes, where: object) -> tuple[Kind, tuple[str, ...]]:
    try:
        table: Any = json.loads(data)
        kind, extra = table["kind"], tuple(table["extra"])
        is_valid = kind in PIECES_FILE and all(isinstance(name, str) for name in extra)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f'{where}: expected {{"kind": {" or ".join(PIECES_FILE)}, "extra": [names]}}, got {data[:80]!r}; '
            "write the tokenizer again with Tokenizer.save"
        )
    return kind, extra


def _build(kind: Kind, data: bytes) -> Pieces:
    return SentencePieces(data) if kind == "sentencepiece" else HuggingFacePieces(data)
