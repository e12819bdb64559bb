"""What a run says about its data, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

from datamodules.sources import ReadOptions
from kosmos_lit.errors import UserError

Format = Literal["jsonl", "parquet", "img2dataset", "warc", "instruct"]
Unit = Literal["tokens", "loss_tokens", "documents"]
"""What ratios and weights count: positions of rows, supervised tokens, or documents."""


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
    """A shard with more broken records stops its preparation (from 20 records on; what is cut off counts as one), and a
    run stops when one of its loader processes cannot decode more of this source's images (from 200 on)."""
    weight: float = 1.0
    """Share among the sources of the same kind, in the mixture's unit; only their proportion counts."""
    max_epochs: float | None = None
    """Training ends before the source is read more often than this; None: it is read again and again."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How documents are cut out of the files."""

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, kw_only=True)
class RatioStage:
    """Ratios that hold from an optimizer step on."""

    from_step: int
    """Optimizer steps before the stage: 1000 changes what step 1,001 of the log reads."""
    ratio: RatioConfig
    """Shares from there on; None: that corpus's as before."""

    def __post_init__(self) -> None:
        if self.from_step <= 0:
            raise UserError(f"ratio_stages: from_step must be positive, got {self.from_step}; data.ratio holds from step 0")
