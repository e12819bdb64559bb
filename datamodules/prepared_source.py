"""A run's sources: indexed if an index is missing, opened, and packed into rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from datamodules.config import TokenizerConfig
from datamodules.corpus import IndexedCorpus, read_manifest
from datamodules.io.paths import matches
from datamodules.mixture.history import contents
from datamodules.mixture.shares import NamedSource
from datamodules.packing import RowLayout, RowPlan
from datamodules.packing.split import Split
from datamodules.prepare.index import check_identity, index_identity, prepare_corpus
from datamodules.prepare.report import describe
from datamodules.prepare.tokenizer import train_tokenizer
from datamodules.stream import PackedSource
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError
from kosmos_lit.terminal import table
from kosmos_lit.tokenizer import Tokenizer, has_tokenizer


def prepare_tokenizer(config: TokenizerConfig, sources: Iterable[NamedSource]) -> None:
    """Train the tokenizer if it is missing."""
    if not has_tokenizer(config.path) and config.vocab_size:
        instruct = CORPORA.index("instruct")
        inputs = config.input or [p for source in sources if source.kind != instruct for p in source.config.input]
        rank_zero_info(f"training a tokenizer of {config.vocab_size} pieces in {config.path}")
        train_tokenizer(inputs, config.vocab_size, Path(config.path))


def prepare_source(source: NamedSource, tokenizer: str, workers: int) -> None:
    """Build a source's index if it is missing.

    Raises: UserError if a shard is gone, or is not the file that was indexed.
    """
    config = source.config
    if read_manifest(Path(config.index)) is None:
        corpus = prepare_corpus(
            format=config.format,
            inputs=[*config.input, *(config.val_input or ())],
            tokenizer=Path(tokenizer),
            output=Path(config.index),
            options=config.read,
            workers=workers,
            max_bad_share=config.max_bad_share,
        )
        rank_zero_info(describe(corpus))
    # Once, not on each rank: that is a system call per shard.
    IndexedCorpus(config.index).check_shards()


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer.

    Raises: UserError if it is missing, or its size is not that of the config.
    """
    tokenizer = Tokenizer.load(config.path)
    if config.vocab_size not in (None, tokenizer.n_pieces):
        raise UserError(
            f"the tokenizer in {config.path} has {tokenizer.n_pieces} pieces, but the config's "
            f"vocab_size for it is {config.vocab_size}; set that to {tokenizer.n_pieces}, or choose another folder"
        )
    return tokenizer


class PreparedSource:
    """An index, its split, and the rows of both parts."""

    def __init__(self, source: NamedSource, tokenizer: Tokenizer, layout: RowLayout, workers: int) -> None:
        """Open the index and pack its documents into rows.

        Raises: UserError if the index is missing, or was made of other files or with other options.
        """
        self.name, self.kind, config = source.name, source.kind, source.config
        self.config = config
        self.corpus = IndexedCorpus(config.index, tokenizer)
        self._check(tokenizer)
        self.split = Split(self.corpus, config.val_share, config.val_input)
        self.train = self._packed(RowPlan(self.name, self.corpus, self.split, "train", layout, workers=workers))
        # Seed 0, default blocks and no shuffling: validation rows are the same for all runs of these documents.
        held_out = RowLayout(seq_len=layout.seq_len, n_latents=layout.n_latents, seed=0)
        self.val: PackedSource | None = None
        """None where nothing is held out."""
        # A row plan refuses an empty split.
        if len(self.split.first("val", 1)):
            plan = RowPlan(self.name, self.corpus, self.split, "val", held_out, shuffle=False, workers=workers)
            self.val = self._packed(plan)
        self.contents = contents(source, self.corpus, self.split.key)
        for part in (self.train, self.val):
            if part is not None:
                self._report_dropped(part.plan)

    def held_out(self) -> Iterator[int]:
        """Yield the numbers of the documents kept for validation, in order."""
        for documents in self.split.chunks("val"):
            yield from documents.tolist()

    def _check(self, tokenizer: Tokenizer) -> None:
        """Raises: UserError if the index was not made as the config describes."""
        config, folder = self.config, Path(self.config.index)
        patterns = [*config.input, *(config.val_input or ())]
        files = matches(patterns, folders=True)  # none: an index may be used where its raw text is not
        # Every rank runs this. Files with the names of the index's shards are not opened: preparation has checked them.
        if files and [file.name for file in files] != [name for name, _ in self.corpus.shards_key]:
            files = matches(patterns)
        else:
            files = []
        check_identity(self.corpus, index_identity(config.format, tokenizer, config.read, files, folder), shards=bool(files))

    def _packed(self, plan: RowPlan) -> PackedSource:
        return PackedSource(self.name, self.kind, self.corpus, plan)

    def _report_dropped(self, plan: RowPlan) -> None:
        for reason, n in plan.totals.dropped.items():
            shard, first = self.corpus.shard_and_name(plan.totals.first_dropped[reason])
            rank_zero_info(
                f"{self.name}: {n} {plan.blocks.part} documents are dropped: {reason}; the first: {shard}, {first}. "
                f"Rows have {plan.blocks.layout.seq_len} positions (data.seq_len)"
            )


def describe_sources(sources: Mapping[str, PreparedSource], n_read: Mapping[str, int], n_total: int, seq_len: int) -> str:
    """Return a table of the sources and their rows, and of how much of them a run reads.

    Args:
        sources: by name.
        n_read: rows that the run reads of each.
        n_total: rows that the run reads of all.
        seq_len: T.
    """
    rows = []
    for name, source in sources.items():
        plan, read = source.train.plan, n_read[name]
        t = plan.totals
        padding = 1 - t.positions / (t.rows * seq_len)
        read_columns = (f"{read / max(1, n_total):.1%}", f"{read / t.rows:.2f}")
        rows.append((name, t.documents, t.images, t.rows, f"{padding:.2%}", plan.window().documents, *read_columns))
    return table(("source", "documents", "images", "rows", "padding", "shuffled", "share", "epochs"), rows)
