"""Import and export of the released vocabulary as files of `transformers`.

In transformers, a Kosmos-2 tokenizer is an XLM-RoBERTa one: a Unigram model over the same pieces with the same ids, whose
control tokens behind `<mask>` are added tokens that absorb the blanks to their left. Version 5 writes `tokenizer.json`
alone. Older folders have the SentencePiece model too, which is preferred: the released models were trained with it.

Texts differ in transformers (docs/tokenizers.md): a newline is a blank; names of control tokens in a text are control
tokens; decomposed accents are normalised grapheme by grapheme.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kosmos_lit.errors import UserError
from kosmos_lit.terminal import program
from kosmos_lit.tokenizer.pieces import Pieces, SentencePieces
from kosmos_lit.tokenizer.vocabulary import LEADING, N_CONTROL_PIECES, TRAILING

if TYPE_CHECKING:
    from transformers import XLMRobertaTokenizer

MODEL_FILE = "sentencepiece.bpe.model"
"""The file's name in the released models; despite it, the model is a Unigram one."""
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
DICT_FILE = "dict.txt"
"""fairseq's: a piece and a count per line, in the order of the ids."""

UNIGRAM, NORMAL, UNKNOWN, CONTROL = 1, 1, 2, 3
"""SentencePiece's numbers for the model's type, and for those of pieces."""


# ---- import


def read(folder: Path) -> tuple[SentencePieces, tuple[str, ...]]:
    """Return the SentencePiece model and the control tokens behind `</line>` of a folder.

    Raises: UserError if it holds no such vocabulary, or its files contradict each other.
    """
    table = _json(folder / JSON_FILE)
    if (folder / MODEL_FILE).is_file():
        pieces = SentencePieces((folder / MODEL_FILE).read_bytes())
    elif table and _is_released_layout(table):
        pieces = SentencePieces(_rebuild(table))
    else:
        raise UserError(
            f"{folder} holds no Kosmos-2 or XLM-RoBERTa tokenizer: expected {MODEL_FILE}, or a {JSON_FILE} with a Unigram "
            f"model that begins with {', '.join(LEADING)}; Tokenizer.load reads other Hugging Face tokenizers"
        )
    _check_dict(folder / DICT_FILE, pieces)
    return pieces, _extra(folder, table, len(LEADING) + pieces.n_text)


def is_released_layout(path: Path) -> bool:
    """Return whether a tokenizer.json has the pieces of a SentencePiece model at the released models' ids."""
    return _is_released_layout(_json(path))


def _is_released_layout(table: dict[str, Any]) -> bool:
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return (
        isinstance(model, dict)
        and isinstance(vocabulary, list)
        and len(vocabulary) > len(LEADING)
        and tuple(piece for piece, _ in vocabulary[: len(LEADING)]) == LEADING
        and vocabulary[-1][0] == TRAILING[0]
        and not model.get("byte_fallback")
        and {step["type"] for step in _steps(table, "normalizer")} <= {"Precompiled", "Strip", "Replace"}
        and {step["type"] for step in _steps(table, "pre_tokenizer")} <= {"WhitespaceSplit", "Metaspace"}
        and all(_prepends_space(step) for step in _steps(table, "pre_tokenizer") if step["type"] == "Metaspace")
    )


def _prepends_space(metaspace: dict[str, Any]) -> bool:
    return bool(metaspace.get("prepend_scheme", "always") == "always" and metaspace.get("add_prefix_space", True))


def _steps(table: dict[str, Any], part: str) -> list[dict[str, Any]]:
    step = table.get(part)
    if step is None:
        return []
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[part]
    return list(step[plural]) if step["type"] == "Sequence" else [step]


def _rebuild(table: dict[str, Any]) -> bytes:
    """Return the SentencePiece model whose pieces, scores and normaliser a tokenizer.json holds."""
    model = _message()
    for name, type_ in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        model.pieces.add(piece=name, score=0.0, type=type_)
    for piece, score in table["model"]["vocab"][len(LEADING) : -1]:
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    model.trainer_spec.model_type = UNIGRAM
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    rules = model.normalizer_spec
    charsmaps = [s["precompiled_charsmap"] for s in _steps(table, "normalizer") if s["type"] == "Precompiled"]
    rules.name = "precompiled" if charsmaps else "identity"
    rules.precompiled_charsmap = base64.b64decode(charsmaps[0]) if charsmaps else b""
    # What the normaliser and Metaspace do: a space in front, runs of blanks as one, "▁" for a space.
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = rules.escape_whitespaces = True
    data: bytes = model.SerializeToString()
    return data


def _message() -> Any:
    """Return an empty SentencePiece model, as sentencepiece_model.proto defines it."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # defined at run time


def _extra(folder: Path, table: dict[str, Any], first: int) -> tuple[str, ...]:
    """Return the added tokens behind `</line>`; `first` is the id behind the pieces."""
    added = {first: TRAILING[0]}  # some files do not list <mask>
    added |= {token["id"]: token["content"] for token in table.get("added_tokens", [])}
    added |= {id_: name for name, id_ in _json(folder / ADDED_FILE).items()}
    listed = _json(folder / CONFIG_FILE).get("added_tokens_decoder", {})
    added |= {int(id_): token["content"] for id_, token in listed.items()}
    behind = sorted(id_ for id_ in added if id_ >= first)
    names = [added[id_] for id_ in behind]
    if behind != list(range(first, first + len(behind))):
        gap = next(first + i for i, id_ in enumerate(behind) if id_ != first + i)
        raise UserError(f"{folder}: its added tokens leave out id {gap}; expected one for each id from {first} on")
    for i, (actual, expected) in enumerate(zip(names, TRAILING, strict=False), start=first):
        if actual != expected:
            raise UserError(
                f"{folder}: id {i} is {actual}, expected {expected}; the order is {', '.join(TRAILING)}, then others"
            )
    return tuple(names[len(TRAILING) :])


def _check_dict(path: Path, pieces: SentencePieces) -> None:
    """Make sure that fairseq's dictionary lists the pieces in order, if there is one.

    Raises: UserError naming the first difference.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    listed = [line.rsplit(" ", 1)[0] for line in lines]
    names = [pieces.raw_name(number) for number in range(pieces.n_text)]
    for i, (a, b) in enumerate(zip(listed, names, strict=False), start=1):
        if a != b:
            raise UserError(f"{path}: line {i} is {a!r}, but piece {i + 2} of {MODEL_FILE} is {b!r}; they are of two models")
    if len(listed) != len(names):
        raise UserError(f"{path} has {len(listed)} lines, but {MODEL_FILE} has {len(names)} pieces of text")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(table).__name__}")
    return table


# ---- export


def convert(pieces: Pieces, extra: tuple[str, ...]) -> XLMRobertaTokenizer:
    """Return the tokenizer of `transformers` with the same ids for the same text.

    Raises: UserError if the pieces have no counterpart.
    """
    from transformers import AddedToken, XLMRobertaTokenizer

    model = _parse(pieces)
    texts = [(piece.piece, piece.score) for piece in model.pieces[N_CONTROL_PIECES:]]
    tokenizer = XLMRobertaTokenizer(
        vocab=[*((name, 0.0) for name in LEADING), *texts, (TRAILING[0], 0.0)],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None,
    )
    # `lstrip` absorbs blanks to the left of a name, as the released tokenizer does.
    names = (*TRAILING[1:], *extra)
    tokenizer.add_tokens([AddedToken(name, lstrip=True, rstrip=False, normalized=False) for name in names])
    assert len(tokenizer) == len(LEADING) + len(texts) + len(TRAILING) + len(extra)
    return tokenizer


def write(folder: Path, pieces: Pieces, extra: tuple[str, ...]) -> None:
    """Write the files that `transformers` reads, and the SentencePiece model.

    Raises: UserError as `convert` does.
    """
    convert(pieces, extra).save_pretrained(folder)
    (folder / MODEL_FILE).write_bytes(pieces.to_bytes())


def _parse(pieces: Pieces) -> Any:
    """Return the SentencePiece model as a message.

    Raises: UserError if it is of another kind than the released one.
    """
    if pieces.kind != "sentencepiece":
        raise UserError(
            "only a SentencePiece vocabulary becomes a Kosmos-2 tokenizer of transformers; the pieces of this one are a "
            "Hugging Face tokenizer's, whose ids 0 to 3 mean something else: keep its folder, and add 4 to its ids"
        )
    model = _message()
    model.ParseFromString(pieces.to_bytes())
    rules = model.normalizer_spec
    other_types = {piece.type for piece in model.pieces[N_CONTROL_PIECES:]} - {NORMAL}
    wrong = [
        reason
        for reason, is_so in (
            ("its type is not Unigram", model.trainer_spec.model_type != UNIGRAM),
            ("byte_fallback is on", model.trainer_spec.byte_fallback),
            ("add_dummy_prefix is off", not rules.add_dummy_prefix),
            ("remove_extra_whitespaces is off", not rules.remove_extra_whitespaces),
            ("treat_whitespace_as_suffix is on", model.trainer_spec.treat_whitespace_as_suffix),
            (f"it has pieces of types {sorted(other_types)}", bool(other_types)),
        )
        if is_so
    ]
    if wrong:
        raise UserError(
            f"transformers would read this SentencePiece model differently: {', '.join(wrong)}; "
            f"train one with `{program()} prepare tokenizer`"
        )
    return model
