"""The verbs beside Lightning's: prepare, rows, verify-resume, generate, import, export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos
    from kosmos_lit.tokenizer import Tokenizer


def prepare_parser() -> argparse.ArgumentParser:
    """Return the options of `prepare tokenizer` and `prepare corpus`."""
    from datamodules.sources import SOURCES, ReadOptions

    parser = Parser(prog="main.py prepare")
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    tokenizer = what.add_parser("tokenizer", help="train a SentencePiece Unigram tokenizer")
    tokenizer.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="files of any format below")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="pieces; the model's vocabulary is 7 larger")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="DIR")
    corpus = what.add_parser("corpus", help="index raw files")
    corpus.add_argument("--format", choices=list(SOURCES), required=True)
    corpus.add_argument("--input", nargs="+", required=True, metavar="GLOB")
    corpus.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    corpus.add_argument("--output", type=Path, required=True, metavar="DIR")
    corpus.add_argument("--workers", type=int, default=1, help="processes")
    corpus.add_argument(
        "--part", type=_part, default="1/1", metavar="I/N",
        help="only shards I, I + N, ...: machines that share DIR do one part each, and the last one joins them",
    )  # fmt: skip
    corpus.add_argument("--max-bad-share", type=float, default=0.1, help="a shard with more broken records stops it")
    o = ReadOptions()
    corpus.add_argument("--text-field", default=o.text_field, help="jsonl, parquet: field of the text")
    corpus.add_argument("--min-image-side", type=int, default=o.min_image_side, help="warc: smaller images are left out")
    corpus.add_argument("--max-images", type=int, default=o.max_images, help="warc: most images of a document")
    corpus.add_argument(
        "--keep-single-image", type=float, default=o.keep_single_image, help="warc: share of one-image pages kept"
    )
    corpus.add_argument("--turn-template", default=o.turn_template, help="instruct: one turn of a conversation")
    corpus.add_argument("--seed", type=int, default=o.seed, help="warc: seed of the draw among one-image pages")
    return parser


def prepare(arguments: list[str]) -> None:
    """Make a tokenizer or an indexed corpus."""
    a = prepare_parser().parse_args(arguments)
    from datamodules.prepare.index import PendingShards, prepare_part
    from datamodules.prepare.report import describe
    from datamodules.prepare.tokenizer import train_tokenizer
    from datamodules.sources import ReadOptions

    if a.what == "tokenizer":
        made = train_tokenizer(a.input, a.vocab_size, a.output)
        print(f"{a.output}: {made.n_pieces:,} pieces, {made.vocab_size:,} ids with control tokens ({made.fingerprint})")
        return
    options = ReadOptions(
        text_field=a.text_field, min_image_side=a.min_image_side, max_images=a.max_images,
        keep_single_image=a.keep_single_image, seed=a.seed, turn_template=a.turn_template,
    )  # fmt: skip
    done = prepare_part(
        part=a.part, format=a.format, inputs=a.input, tokenizer=a.tokenizer, output=a.output, options=options,
        workers=a.workers, max_bad_share=a.max_bad_share,
    )  # fmt: skip
    print(done if isinstance(done, PendingShards) else describe(done))


def _part(text: str) -> tuple[int, int]:
    """Read I/N."""
    number, _, n = text.partition("/")
    if not (number.isdecimal() and n.isdecimal() and 1 <= int(number) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 3/8")
    return int(number), int(n)


def rows_parser() -> argparse.ArgumentParser:
    """Return the options of `rows`; those of `fit` come beside them."""
    parser = Parser(prog="main.py rows", epilog="All other arguments are those of fit: -c CONFIG, overrides.")
    parser.add_argument("--start", type=int, default=None, help="first row; by default 0")
    parser.add_argument("--count", type=int, default=None, help="number of rows; by default 1")
    parser.add_argument("--step", type=int, default=None, help="the rows of this optimizer step, the first being 1")
    parser.add_argument("--ckpt_path", type=Path, default=None, help="a run whose shares changed on the way: its checkpoint")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def rows(arguments: list[str]) -> None:
    """Print rows of a run's stream."""
    a, rest = rows_parser().parse_known_args(arguments)
    if a.step is not None and (a.split != "train" or a.start is not None or a.count is not None):
        raise UserError("rows: --step names all rows of a training step; leave out --start, --count and --split")
    start, count = a.start or 0, 1 if a.count is None else a.count
    if start < 0 or count < 0:
        raise UserError(f"rows: --start {start} and --count {count} must not be negative")
    if a.step is not None and a.step < 1:
        raise UserError(f"rows: --step {a.step} must be at least 1, the first step")
    from datamodules.module import MixtureData
    from datamodules.row_display import describe_row, readable_row
    from kosmos_lit.cli.trainer import DataCLI, mistakes_in

    with mistakes_in(rest):
        data = DataCLI(rest).datamodule
    if not isinstance(data, MixtureData):
        raise UserError(f"rows: {type(data).__name__} has no rows")
    data.prepare_data()
    data.open()
    if a.ckpt_path is not None:
        from kosmos_lit.checkpoint import load_checkpoint

        data.restore_history(load_checkpoint(a.ckpt_path)[type(data).__qualname__])
    stream = data.stream(a.split)
    numbers = range(start, start + count) if a.step is None else data.steps.rows(a.step)
    if a.split == "val":
        n_rows = data.n_val_rows()
        if start >= n_rows:
            raise UserError(f"rows: --start {start}, but there are {n_rows} held-out rows, from 0")
        numbers = numbers[: n_rows - start]
    for number in numbers:
        row, blocked = data.apply_blocklist(stream.row(number))
        if a.json:
            print(json.dumps(describe_row(row, stream, blocked)))
        else:
            print(readable_row(row, stream, data.tokenizer, blocked))


def verify_parser() -> argparse.ArgumentParser:
    """Return the options of `verify-resume`."""
    parser = Parser(
        prog="main.py verify-resume",
        description="Compare two runs at every step of which both have a checkpoint: the digest of all rows that they have "
        "trained on, their weights and their optimizer's state. Exit code 0: all are the same; 1: some are not.",
        epilog="A run that was killed and resumed must be the same as one that was not, bit by bit; on another number of "
        "ranks, or with other micro-batches, the rows are the same, all else is up to rounding. Only checkpoints that are "
        "still there can be compared: see `keep` of kosmos_lit.callbacks.Checkpoints.",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="by how much weights, optimizer state and logged losses may differ"
    )
    return parser


def verify_resume(arguments: list[str]) -> int:
    """Compare two runs' rows and weights; return 0 if they are the same, else 1."""
    a = verify_parser().parse_args(arguments)
    if not a.tolerance >= 0:
        raise UserError(f"verify-resume: --tolerance must not be negative, got {a.tolerance}")
    from kosmos_lit.cli.verify_resume import compare, first_difference

    one, other = a.runs
    found = compare(one, other)
    for comparison in found:
        print(comparison.describe())
    if difference := first_difference(one, other, a.tolerance):
        print(difference)
    same = [comparison.same(a.tolerance) for comparison in found]
    if different := [comparison.step for comparison in found if not comparison.same(a.tolerance)]:
        print(f"the first checkpoints that differ are those of step {different[0]:,}")
    print(f"{sum(same)} of {len(same)} common checkpoints are the same")
    return 0 if all(same) else 1


def generate_parser() -> argparse.ArgumentParser:
    """Return the options of `generate`."""
    from kosmos_lit.inference.config import BEAM_STOPS, GenerationConfig

    parser, c = Parser(prog="main.py generate"), GenerationConfig()
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--prompt", default="An image of", help="<image> marks where the next image stands")
    parser.add_argument("--image", type=Path, nargs="+", action="extend", default=[], help="one or several")
    parser.add_argument("--max-new-tokens", type=int, default=c.max_new_tokens)
    parser.add_argument("--beams", type=int, default=c.n_beams, help="1: greedy")
    parser.add_argument("--length-penalty", type=float, default=c.length_penalty, help="beams score / length ** penalty")
    parser.add_argument("--beam-stop", choices=BEAM_STOPS, default=c.beam_stop, help="when the search ends")
    parser.add_argument("--temperature", type=float, default=c.temperature, help="above 0: draw tokens")
    parser.add_argument("--top-k", type=int, default=c.top_k, help="draw among so many tokens")
    parser.add_argument("--top-p", type=float, default=c.top_p, help="draw among the likeliest of this probability together")
    parser.add_argument("--seed", type=int, default=c.seed, help="of the draws")
    parser.add_argument("--repetition-penalty", type=float, default=c.repetition_penalty, help="1: none")
    parser.add_argument("--no-repeat-ngram", type=int, default=c.no_repeat_ngram_size, help="no run of so many tokens twice")
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="ends before any of these")
    parser.add_argument("--choices", nargs="+", action="extend", default=[], metavar="TEXT", help="writes one of these")
    parser.add_argument(
        "--score", nargs="+", action="extend", default=[], metavar="TEXT",
        help="write nothing; print how likely each of these is after the prompt, one JSON object a line",
    )  # fmt: skip
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    return parser


def generate(arguments: list[str]) -> None:
    """Print a model's continuation of a prompt, or how likely given ones are."""
    a = generate_parser().parse_args(arguments)
    from kosmos_lit.inference.config import GenerationConfig
    from kosmos_lit.inference.engine import load

    settings = {
        "max_new_tokens": a.max_new_tokens, "n_beams": a.beams, "length_penalty": a.length_penalty, "beam_stop": a.beam_stop,
        "temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "repetition_penalty": a.repetition_penalty,
        "no_repeat_ngram_size": a.no_repeat_ngram, "stop": a.stop, "choices": a.choices, "seed": a.seed,
    }  # fmt: skip
    GenerationConfig.from_dict(settings)  # a mistake shows before the model is loaded
    engine = load(a.ckpt_path).to(_device(a.device))
    if not a.score:
        print(engine.generate(a.prompt, a.image, **settings))
        return
    for s in engine.score(a.prompt, a.score, a.image):
        row = {"text": s.text, "log_prob": s.total, "n_tokens": s.n_tokens, "mean": s.mean}
        print(json.dumps(row, ensure_ascii=False))


def import_parser() -> argparse.ArgumentParser:
    """Return the options of `import`."""
    parser = Parser(prog="main.py import")
    parser.add_argument("--format", choices=("transformers", "fairseq", "open_clip"), required=True, help="their origin")
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="file or folder of the weights")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tokenizer", type=Path, default=None, metavar="DIR", help="fairseq: the released tokenizer's")
    return parser


def import_(arguments: list[str]) -> None:
    """Turn weights from elsewhere into a model folder, or those of an image tower into a tower folder."""
    a = import_parser().parse_args(arguments)
    from kosmos_lit.weights.clip import CLIP_TYPES, import_tower
    from kosmos_lit.weights.fairseq import from_fairseq
    from kosmos_lit.weights.folder import check_new, save_folder
    from kosmos_lit.weights.kosmos2 import from_transformers
    from kosmos_lit.weights.load import model_type

    if not a.input.exists():
        raise UserError(f"import: no file or folder {a.input}")
    if a.tokenizer is not None and a.format != "fairseq":
        raise UserError("import: --tokenizer is for --format fairseq; other folders bring theirs")
    check_new(a.output)
    is_clip = a.format == "transformers" and a.input.is_dir() and model_type(a.input) in CLIP_TYPES
    if is_clip or a.format == "open_clip":
        print(f"{a.output}: an image tower, used by\n  {import_tower(a.input, a.output)}")
        return
    fairseq = a.format == "fairseq"
    model, tokenizer = from_fairseq(a.input, a.tokenizer) if fairseq else from_transformers(a.input)
    save_folder(model, tokenizer, a.output)
    print(f"{a.output}: {_summary(model, tokenizer)}")


def export_parser() -> argparse.ArgumentParser:
    """Return the options of `export`."""
    parser = Parser(prog="main.py export")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint or model folder")
    parser.add_argument(
        "--format", choices=("transformers", "safetensors", "adapter"), required=True,
        help="adapter: LoRA's matrices alone, in peft's format; the others write them merged",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    return parser


def export(arguments: list[str]) -> None:
    """Write a trained model for use elsewhere."""
    a = export_parser().parse_args(arguments)
    from kosmos_lit.lora import merge_adapters, save_adapter
    from kosmos_lit.weights.folder import check_new, save_folder
    from kosmos_lit.weights.kosmos2 import export_transformers
    from kosmos_lit.weights.load import load_model

    check_new(a.output)
    model, tokenizer = load_model(a.ckpt_path)
    if a.format == "adapter":
        save_adapter(model, a.output)
        print(f"{a.output}: an adapter; put it on its base with peft or kosmos_lit.lora.load_adapter")
        return
    model = merge_adapters(model)
    (export_transformers if a.format == "transformers" else save_folder)(model, tokenizer, a.output)
    print(f"{a.output}: {_summary(model, tokenizer)}")


def _summary(model: Kosmos, tokenizer: Tokenizer | None) -> str:
    ids = "no tokenizer" if tokenizer is None else f"{tokenizer.vocab_size:,} ids"
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {ids}"


def _device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
