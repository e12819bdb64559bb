"""Tables of a run's configuration that describe its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

from datamodules.sources import ReadOptions
from kosmos_lit.errors import UserError

Format = Literal["jsonl", "parquet", "img2dataset", "warc", "instruct"]
Unit = Literal["tokens", "loss_tokens", "documents"]
"""Unit of ratios and weights: positions of rows, supervised tokens, or documents."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer's folder, and the files to train it on if it is missing."""

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
    """Patterns of files of which all documents are kept for validation; then `val_share` is not used."""
    max_bad_share: float = 0.1
    """Preparation stops at a shard with more broken records (from 20 records on; a shard cut off has one more), and a run
    stops when one of its loader processes cannot decode more of this source's images (from 200 on)."""
    weight: float = 1.0
    """Share among the sources of the same kind, in the mixture's unit; only their proportion counts."""
    max_epochs: float | None = None
    """Training ends before the source is read more often than this; None: it is read again and again."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How documents are read from the files."""

    def __post_init__(self) -> None:
        # `not` before the comparisons: NaN, which fails them all, is refused too.
        for name in ("val_share", "max_bad_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)} for the index {self.index}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"weight must be finite and not negative, got {self.weight} for the index {self.index}")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise UserError(f"max_epochs must be positive, got {self.max_epochs} for the index {self.index}")


@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """Shares of the corpora in positions; only their proportion counts.

    None is the data module's default share for a configured corpus, and 0 for any other.
    """

    text: float | None = None
    caption: float | None = None
    interleaved: float | None = None
    instruct: float | None = None

    def weights(self, defaults: Sequence[float], is_configured: Sequence[bool]) -> tuple[float, ...]:
        """Return the weights in the order of `CORPORA`; None is replaced by the default of a configured corpus, or 0."""
        defaults = [default if has else 0.0 for default, has in zip(defaults, is_configured, strict=True)]
        # astuple has the fields' order, which is that of CORPORA.
        return tuple(default if w is None else w for w, default in zip(astuple(self), defaults, strict=True))


@dataclass(frozen=True, kw_only=True)
class RatioStage:
    """Ratios that hold from an optimizer step on."""

    from_step: int
    """Optimizer steps before the stage: 1000 changes the rows of step 1,001 of the log."""
    ratio: RatioConfig
    """Shares from there on; None: that corpus's as before."""

    def __post_init__(self) -> None:
        if self.from_step <= 0:
            raise UserError(f"ratio_stages: from_step must be positive, got {self.from_step}; data.ratio holds from step 0")
