"""The verbs `import` and `export`: weights of other formats to model folders, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos
    from kosmos_lit.tokenizer import Tokenizer


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
    from kosmos_lit.weights.clip import CLIP_TYPES, import_tower
    from kosmos_lit.weights.fairseq import from_fairseq
    from kosmos_lit.weights.folder import check_new, save_folder
    from kosmos_lit.weights.kosmos2 import from_transformers
    from kosmos_lit.weights.load import model_type

    if not a.input.exists():
        raise UserError(f"import: no file or folder {a.input}")
    if a.tokenizer is not None and a.format != "fairseq":
        raise UserError("import: --tokenizer is for --format fairseq; other folders have a tokenizer of their own")
    # An output that exists is refused before weights are read.
    check_new(a.output)
    is_clip = a.format == "transformers" and a.input.is_dir() and model_type(a.input) in CLIP_TYPES
    if is_clip or a.format == "open_clip":
        print(f"{a.output}: an image tower, used by\n  {import_tower(a.input, a.output)}")
        return
    is_fairseq = a.format == "fairseq"
    model, tokenizer = from_fairseq(a.input, a.tokenizer) if is_fairseq else from_transformers(a.input)
    save_folder(model, tokenizer, a.output)
    print(f"{a.output}: {_summary(model, tokenizer)}")


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
    from kosmos_lit.lora import merge_adapters, save_adapter
    from kosmos_lit.weights.folder import check_new, save_folder
    from kosmos_lit.weights.kosmos2 import export_transformers
    from kosmos_lit.weights.load import load_model

    # An output that exists is refused before weights are read.
    check_new(a.output)
    model, tokenizer = load_model(a.ckpt_path)
    if a.format == "adapter":
        save_adapter(model, a.output)
        print(f"{a.output}: an adapter; put it on its base with peft or kosmos_lit.lora.load_adapter")
        return
    # Both other formats hold plain weights.
    model = merge_adapters(model)
    (export_transformers if a.format == "transformers" else save_folder)(model, tokenizer, a.output)
    print(f"{a.output}: {_summary(model, tokenizer)}")


def _summary(model: Kosmos, tokenizer: Tokenizer | None) -> str:
    ids = "no tokenizer" if tokenizer is None else f"{tokenizer.vocab_size:,} ids"
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {ids}"
