"""Any Hugging Face tokenizer as the text half of a vocabulary.

Numbers are its own ids. Its special tokens (`special` in tokenizer.json) keep their numbers, so that all ids stay the same,
but text never becomes one: our control tokens stand for them. A special token spelled out in a text is read as text.

Byte-level BPE and models with byte fallback decode a newline to a newline. Others (WordPiece, most Unigram models) lose it
and get text line by line. Trying the tokenizer shows which kind it is, and how it treats blanks.

Byte-level BPE and Llama-like models decode every text exactly, so its UTF-8 bytes are counted exactly. WordPiece loses
the blanks around punctuation; its decoder puts one between all words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer.pieces import SPACE, UNKNOWN, UNKNOWN_TEXT, Kind
from kosmos_lit.tokenizer.vocabulary import Ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files of folders that `transformers` can convert."""
DECIDES_IDS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
PROBES = ("a\nb", "a\n\n b\n", "\na")
ANCHORS = ("a", "A", "the", "0", "x")


class HuggingFacePieces:
    """A tokenizer.json; number k is its id k."""

    kind: Kind = "huggingface"

    def __init__(self, data: bytes) -> None:
        """Raises: UserError if `data` is no tokenizer.json."""
        self._data = data
        try:
            self._table: dict[str, Any] = json.loads(data)
            specials = {t["id"]: t["content"] for t in self._table["added_tokens"] if t["special"]}
            self._backend = _backend(self._table)
        except (ValueError, KeyError, TypeError, AttributeError, _RefusedError) as error:
            why = str(error) if isinstance(error, _RefusedError) else f"{type(error).__name__}: {error}"
            raise UserError(f"not a tokenizer.json of the `tokenizers` library ({len(data)} bytes): {why}") from error
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._tokens = {id_: token for token, id_ in vocabulary.items()} | specials
        self.n_text = self.n_pieces = max(self._tokens) + 1
        self._numbers = np.arange(self.n_text, dtype=np.int64)
        self._numbers[list(specials)] = UNKNOWN  # text never becomes a special token
        unknown = self._unknown_id()
        if unknown is not None:
            self._numbers[unknown] = UNKNOWN
        self._anchor = next((ids for ids in map(self._ids, ANCHORS) if (self._numbers[ids] >= 0).all() and ids), [])
        self.puts_space = self.decode(self._anchor, begins=False).startswith(" ")
        self.absorbs_space = self._ids(" a") == self._ids("a")
        self.reads_newlines = all(self.decode(self.encode([text])[0].tolist()) == text for text in PROBES)

    @classmethod
    def read(cls, folder: Path) -> HuggingFacePieces | None:
        """Return the tokenizer of a folder, or None if it holds none; one without tokenizer.json is converted.

        Raises: UserError if the files are broken.
        """
        if (folder / FILE).is_file():
            return cls((folder / FILE).read_bytes())
        if any((folder / name).is_file() for name in OTHER_FILES):
            return cls(_converted(folder))
        return None

    def _unknown_id(self) -> int | None:
        model = self._backend.model
        token = getattr(model, "unk_token", None)
        unknown: int | None = self._table["model"].get("unk_id") if token is None else model.token_to_id(token)
        return unknown

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [self._numbers[np.asarray(self._ids(text), dtype=np.int64)] for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        numbers = self.encode(texts)
        return np.concatenate([np.empty(0, dtype=np.int64), *numbers]), np.array([len(n) for n in numbers], dtype=np.int64)

    def decode(self, numbers: Sequence[int], *, begins: bool = True) -> str:
        # Decoders treat the first token specially, so an anchor token goes in front of each run.
        before = self._backend.decode(self._anchor, skip_special_tokens=False)
        text, run = "", list[int]()
        for number in (*numbers, UNKNOWN):
            if number != UNKNOWN:
                run += [number] if self._numbers[number] != UNKNOWN else []
                continue
            decoded = self._backend.decode([*self._anchor, *run], skip_special_tokens=False).removeprefix(before)
            text, run = text + decoded + UNKNOWN_TEXT, []
        text = text.removesuffix(UNKNOWN_TEXT)
        return text.removeprefix(" ") if begins and self.puts_space else text

    def name(self, number: int) -> str:
        text = self.decode([number], begins=False)
        return text if text and "\ufffd" not in text else self._tokens.get(number, "")

    def sizes(self) -> Ids:
        """Return the bytes of each token by the decoder's kind; special tokens stand for none."""
        sizes = np.zeros((2, self.n_text), dtype=np.int64)
        for number, token in self._tokens.items():
            if self._numbers[number] != UNKNOWN:
                text = self._bytes(token)
                sizes[:, number] = len(text), len(text) - (self.puts_space and text.startswith(b" "))
        return sizes

    def _bytes(self, token: str) -> bytes:
        decoders = self._decoders
        if token in self._added:
            return token.encode()
        if "ByteLevel" in decoders:  # writes each byte as one character; a space as Ġ
            return token.replace("Ġ", " ").encode("ascii", "replace")
        if "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if "WordPiece" in decoders:
            prefix = decoders["WordPiece"]["prefix"]
            return token.removeprefix(prefix).encode() if token.startswith(prefix) else b" " + token.encode()
        if "BPEDecoder" in decoders:
            return token.replace(decoders["BPEDecoder"]["suffix"], " ").encode()
        return token.replace(SPACE, " ").encode() if decoders else b" " + token.encode()

    @cached_property
    def _added(self) -> set[str]:
        return {t["content"] for t in self._table["added_tokens"]}

    @cached_property
    def _decoders(self) -> dict[str, dict[str, Any]]:
        decoder = self._table.get("decoder")
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        return {step["type"]: step for step in steps}

    def to_bytes(self) -> bytes:
        return self._data

    def identity(self) -> bytes:
        # Decoders, templates and padding change no ids.
        parts = {key: self._table.get(key) for key in DECIDES_IDS}
        return json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()


class _RefusedError(Exception):
    """An error of the `tokenizers` library, which raises plain Exception."""


def _backend(table: dict[str, Any]) -> Backend:
    """Return the tokenizer without templates, truncation and padding; no text becomes one of its special tokens."""
    from tokenizers import Tokenizer

    hidden = _hide_special_tokens(table) | {"post_processor": None, "truncation": None, "padding": None}
    try:
        backend = Tokenizer.from_str(json.dumps(hidden))
    except Exception as error:  # the library raises no narrower one
        raise _RefusedError(str(error)) from error
    backend.encode_special_tokens = True  # names of special tokens in a text are encoded like other text
    for token, spelt in zip(table["added_tokens"], hidden["added_tokens"], strict=True):
        if backend.token_to_id(spelt["content"]) != token["id"]:
            raise _RefusedError(f"added token {token['content']!r} cannot have id {token['id']}; ids must leave none out")
    return backend


def _hide_special_tokens(table: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json whose special tokens are spelled with NUL characters.

    A Unigram, WordLevel or merge-ignoring BPE model matches every entry of its vocabulary in a text, special ones too.
    """
    model = table["model"]
    merged = {"".join(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or ()}
    hidden = {t["content"]: f"\x00{t['content']}\x00" for t in table["added_tokens"] if t["special"]}
    hidden = {name: spelt for name, spelt in hidden.items() if name not in merged}  # merges name their results
    vocabulary = model["vocab"]
    changed: dict[str, Any] = {}
    if isinstance(vocabulary, dict):
        changed["vocab"] = {hidden.get(token, token): id_ for token, id_ in vocabulary.items()}
    else:
        changed["vocab"] = [[hidden.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") is not None:
        changed["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    added = [token | {"content": hidden.get(token["content"], token["content"])} for token in table["added_tokens"]]
    return table | {"model": model | changed, "added_tokens": added}


def _converted(folder: Path) -> bytes:
    """Return the tokenizer.json that `transformers` makes of a folder's files."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} has no {FILE}, and transformers cannot make one of its files: {error}; "
            f"save the tokenizer with AutoTokenizer(...).save_pretrained where it can be loaded"
        ) from error
    return text.encode()
