"""The verbs `prepare tokenizer` and `prepare corpus`: raw files to a tokenizer or an indexed corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.config import Format
from datamodules.sources import ReadOptions
from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a SentencePiece Unigram tokenizer."""

    input: tuple[str, ...]
    """Patterns of files in any format that `prepare corpus` reads; their endings tell the format."""
    vocab_size: int
    """Pieces; the model's vocabulary is 7 larger."""
    output: Path
    """Folder to write."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Index raw files."""

    format: Format
    """Format of the files."""
    input: tuple[str, ...]
    """Patterns of the files."""
    tokenizer: Path
    """Folder of the tokenizer."""
    output: Path
    """Folder of the index."""
    workers: int = 1
    """Number of processes."""
    part: str = "1/1"
    """I/N: only shards I, I + N, ...; machines that share the output take one part each, and the last to end joins them."""
    max_bad_share: float = 0.1
    """Largest share of broken records in a shard; more is an error."""

    def __post_init__(self) -> None:
        number, _, n = self.part.partition("/")
        if not (number.isdecimal() and n.isdecimal() and 1 <= int(number) <= int(n)):
            raise UserError(f"--part {self.part!r} is not I/N with 1 <= I <= N, such as 3/8")


def tokenizer_parser() -> Parser:
    """Return the options of `prepare tokenizer`."""
    return verb_parser("prepare tokenizer", TokenizerOptions)


def corpus_parser() -> Parser:
    """Return the options of `prepare corpus`."""
    return verb_parser("prepare corpus", CorpusOptions, ReadOptions)


def prepare_tokenizer(arguments: list[str]) -> None:
    """Train a tokenizer."""
    [o] = tokenizer_parser().read(arguments)
    # After parsing, so that --help and mistakes answer at once.
    from datamodules.prepare.tokenizer import train_tokenizer

    t = train_tokenizer(o.input, o.vocab_size, o.output)
    print(f"{o.output}: {t.n_pieces:,} pieces, {t.vocab_size:,} ids with control tokens ({t.fingerprint})")


def prepare_corpus(arguments: list[str]) -> None:
    """Index a corpus, or a part of its shards."""
    o, options = corpus_parser().read(arguments)
    from datamodules.prepare.index import PendingShards, prepare_part
    from datamodules.prepare.report import describe

    number, n_parts = map(int, o.part.split("/"))
    corpus = prepare_part(
        part=(number, n_parts),
        format=o.format,
        inputs=o.input,
        tokenizer=o.tokenizer,
        output=o.output,
        options=options,
        workers=o.workers,
        max_bad_share=o.max_bad_share,
    )
    print(corpus if isinstance(corpus, PendingShards) else describe(corpus))
