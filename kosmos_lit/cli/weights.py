"""The verbs `import` and `export`: weights of other formats to model folders, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos


def import_parser() -> argparse.ArgumentParser:
    """Return the options of `import`."""
    parser = Parser(prog="main.py import")
    parser.add_argument("--format", choices=("transformers", "fairseq", "open_clip"), required=True, help="of the weights")
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="file or folder of the weights")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, default=None, metavar="DIR", help="fairseq: folder of the released tokenizer"
    )
    return parser


def import_weights(arguments: list[str]) -> None:
    """Convert weights of other projects to a model folder, or an image tower's to a tower folder."""
    a = import_parser().parse_args(arguments)
    from kosmos_lit import weights as w

    if not a.input.exists():
        raise UserError(f"import: no file or folder {a.input}")
    if a.tokenizer is not None and a.format != "fairseq":
        raise UserError("import: --tokenizer is for --format fairseq; other folders have a tokenizer of their own")
    w.check_new(a.output)
    is_clip = a.format == "transformers" and a.input.is_dir() and w.model_type(a.input) in w.CLIP_TYPES
    if is_clip or a.format == "open_clip":
        print(f"{a.output}: an image tower, used by\n  {w.import_tower(a.input, a.output)}")
        return
    kosmos = w.from_fairseq(a.input, a.tokenizer) if a.format == "fairseq" else w.from_transformers(a.input)
    w.save_folder(kosmos, a.output)
    print(_summary(a.output, kosmos))


def export_parser() -> argparse.ArgumentParser:
    """Return the options of `export`."""
    parser = Parser(prog="main.py export")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint or model folder")
    parser.add_argument(
        "--format", choices=("transformers", "safetensors", "adapter"), required=True,
        help="adapter: LoRA's matrices alone, in peft's format; the other formats merge them into the weights",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    return parser


def export_weights(arguments: list[str]) -> None:
    """Write a trained model in another format."""
    a = export_parser().parse_args(arguments)
    from kosmos_lit.lora import merged, save_adapter
    from kosmos_lit.weights import check_new, export_transformers, load_model, save_folder

    check_new(a.output)
    kosmos = load_model(a.ckpt_path)
    if a.format == "adapter":
        save_adapter(kosmos, a.output)
        print(f"{a.output}: an adapter; put it on its base with peft or kosmos_lit.lora.load_adapter")
        return
    kosmos = merged(kosmos)
    (export_transformers if a.format == "transformers" else save_folder)(kosmos, a.output)
    print(_summary(a.output, kosmos))


def _summary(folder: Path, kosmos: Kosmos) -> str:
    tokenizer = "no tokenizer" if kosmos.tokenizer is None else f"{kosmos.tokenizer.vocab_size:,} ids"
    return f"{folder}: {sum(p.numel() for p in kosmos.parameters()):,} parameters, {tokenizer}"
