"""The verbs `import` and `export`: weights of other formats to model folders, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Weights of another project."""

    format: Literal["transformers", "fairseq", "open_clip"]
    """Format of the weights."""
    input: Path
    """File or folder of the weights."""
    output: Path
    """Folder to write."""
    tokenizer: Path | None = None
    """fairseq: folder of the released tokenizer."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """A trained model."""

    ckpt_path: Path
    """Checkpoint or model folder."""
    format: Literal["transformers", "safetensors", "adapter"]
    """adapter: LoRA's matrices alone, in peft's format; the other formats merge them into the weights."""
    output: Path
    """Folder to write."""


def import_parser() -> Parser:
    """Return the options of `import`."""
    return verb_parser("import", ImportOptions)


def import_weights(arguments: list[str]) -> None:
    """Convert weights of other projects to a model folder, or an image tower's to a tower folder."""
    [a] = import_parser().read(arguments)
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
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{a.output}: {_summary(n_parameters, None if tokenizer is None else tokenizer.vocab_size)}")


def export_parser() -> Parser:
    """Return the options of `export`."""
    return verb_parser("export", ExportOptions)


def export_weights(arguments: list[str]) -> None:
    """Write a trained model in another format."""
    [a] = export_parser().read(arguments)
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
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{a.output}: {_summary(n_parameters, None if tokenizer is None else tokenizer.vocab_size)}")


def _summary(n_parameters: int, vocab_size: int | None) -> str:
    ids = "no tokenizer" if vocab_size is None else f"{vocab_size:,} ids"
    return f"{n_parameters:,} parameters, {ids}"
