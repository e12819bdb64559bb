"""What a run says about its data, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

from datamodules.sources import ReadOptions
from kosmos_lit.errors import UserError

Format = Literal["jsonl", "parquet", "img2dataset", "warc", "instruct"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer lies, and what to train it on if it is not there."""

    path: str
    """Folder of a tokenizer: made by `prepare tokenizer`, a released model's, or any Hugging Face tokenizer's."""
    vocab_size: int | None = None
    """SentencePiece pieces of a tokenizer to be trained; None: the folder must exist."""
    input: list[str] | None = None
    """Files to train it on; None: the corpora's own."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One corpus: its raw files, and the index made of them."""

    format: Format
    input: list[str]
    """Patterns of the raw files; `**` reaches into sub-folders."""
    index: str
    """Folder of the index; made by `fit` if it is missing."""
    val_share: float = 0.01
    """Share of the documents kept for validation, drawn by document number."""
    val_input: list[str] | None = None
    """Patterns of files that are kept for validation as a whole; then `val_share` does not count."""
    max_bad_share: float = 0.1
    """A shard with more broken records, or a run with more undecodable pictures of this corpus, than this stops."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How documents are cut out of the files."""

    def __post_init__(self) -> None:
        for name in ("val_share", "max_bad_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)} for the index {self.index}")


@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """Shares of the corpora in positions; only their proportion counts.

    None is the data module's own share of a corpus that is given, and 0 of one that is not.
    """

    text: float | None = None
    caption: float | None = None
    interleaved: float | None = None
    instruct: float | None = None

    def weights(self, defaults: Sequence[float], given: Sequence[bool]) -> tuple[float, ...]:
        """Return the weights in the order of `CORPORA`, with `defaults` for those corpora that are `given`."""
        own = (default if there else 0.0 for default, there in zip(defaults, given, strict=True))
        return tuple(own if share is None else share for share, own in zip(astuple(self), own, strict=True))
