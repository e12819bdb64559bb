"""The verb `prepare`: raw files to a tokenizer or an indexed corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

from kosmos_lit.cli.parsing import Parser


def prepare_parser() -> argparse.ArgumentParser:
    """Return the options of `prepare tokenizer` and `prepare corpus`."""
    from datamodules.sources import SOURCES, ReadOptions

    parser = Parser(prog="main.py prepare")
    targets = parser.add_subparsers(dest="target", required=True, parser_class=Parser)
    tokenizer = targets.add_parser("tokenizer", help="train a SentencePiece Unigram tokenizer")
    tokenizer.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="files of any format below")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="pieces; the model's vocabulary is 7 larger")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="DIR")
    corpus = targets.add_parser("corpus", help="index raw files")
    corpus.add_argument("--format", choices=list(SOURCES), required=True)
    corpus.add_argument("--input", nargs="+", required=True, metavar="GLOB")
    corpus.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    corpus.add_argument("--output", type=Path, required=True, metavar="DIR")
    corpus.add_argument("--workers", type=int, default=1, help="processes")
    corpus.add_argument(
        "--part", type=_part, default="1/1", metavar="I/N",
        help="only shards I, I + N, ...: machines that share DIR take one part each, and the last to end joins them",
    )  # fmt: skip
    corpus.add_argument(
        "--max-bad-share", type=float, default=0.1, help="largest share of broken records in a shard; more is an error"
    )
    o = ReadOptions()
    corpus.add_argument("--text-field", default=o.text_field, help="jsonl, parquet: field that holds the text")
    corpus.add_argument("--min-image-side", type=int, default=o.min_image_side, help="warc: smaller images are left out")
    corpus.add_argument("--max-images", type=int, default=o.max_images, help="warc: largest number of images in a document")
    corpus.add_argument(
        "--keep-single-image", type=float, default=o.keep_single_image, help="warc: share of one-image pages kept"
    )
    corpus.add_argument("--turn-template", default=o.turn_template, help="instruct: text of one turn of a conversation")
    corpus.add_argument("--seed", type=int, default=o.seed, help="warc: seed of the draw among one-image pages")
    return parser


def prepare(arguments: list[str]) -> None:
    """Make a tokenizer or an indexed corpus."""
    a = prepare_parser().parse_args(arguments)
    # After parsing, so that --help and mistakes answer at once.
    from datamodules.prepare.index import PendingShards, prepare_part
    from datamodules.prepare.report import describe
    from datamodules.prepare.tokenizer import train_tokenizer
    from datamodules.sources import ReadOptions

    if a.target == "tokenizer":
        t = train_tokenizer(a.input, a.vocab_size, a.output)
        print(f"{a.output}: {t.n_pieces:,} pieces, {t.vocab_size:,} ids with control tokens ({t.fingerprint})")
        return
    options = ReadOptions(
        text_field=a.text_field, min_image_side=a.min_image_side, max_images=a.max_images,
        keep_single_image=a.keep_single_image, seed=a.seed, turn_template=a.turn_template,
    )  # fmt: skip
    corpus = prepare_part(
        part=a.part, format=a.format, inputs=a.input, tokenizer=a.tokenizer, output=a.output, options=options,
        workers=a.workers, max_bad_share=a.max_bad_share,
    )  # fmt: skip
    print(corpus if isinstance(corpus, PendingShards) else describe(corpus))


def _part(text: str) -> tuple[int, int]:
    """Return I and N of I/N."""
    number, _, n = text.partition("/")
    if not (number.isdecimal() and n.isdecimal() and 1 <= int(number) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 3/8")
    return int(number), int(n)
