"""A model as a folder: `config.json`, `model.safetensors` and the tokenizer's files. What `import` and `export` write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from kosmos_lit._version import __version__
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.weights.files import SAFETENSORS, read_json, read_tensors
from kosmos_lit.weights.keys import check_shapes, shapes_of

CONFIG = "config.json"
MODEL_TYPE = "kosmos-lit"


def assemble(config: KosmosConfig, tensors: Mapping[str, Tensor], where: str, *, copy: bool = True) -> Kosmos:
    """Return the configured model with these tensors as its weights, in evaluation mode; each keeps its dtype and device.

    With copies of them, as tensors of a file are a window on it: a model must not change or crash when the file is written
    again. Without `copy`, with the tensors themselves.

    Raises: UserError listing every missing, surplus and misshapen tensor.
    """
    model = Kosmos.outline(config)
    check_shapes(shapes_of(tensors), shapes_of(model.state_dict()), where)
    if copy:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    if any(t.is_meta for t in chain(model.parameters(), model.buffers())):  # a tower with buffers that files do not hold
        model = Kosmos(replace(config, vision=replace(config.vision, pretrained=None)))
        model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_folder(kosmos: Kosmos, folder: str | Path) -> None:
    """Write a model, from which `Kosmos.load(folder)` makes the same one.

    Raises: UserError if the folder exists and is not empty, or cannot be written.
    """
    from safetensors.torch import save_file

    config = replace(kosmos.config, vision=replace(kosmos.config.vision.resolved(), pretrained=None))
    has_tokenizer = kosmos.tokenizer is not None
    about = {"model_type": MODEL_TYPE, "version": __version__, "has_tokenizer": has_tokenizer, "kosmos": asdict(config)}
    with new_folder(folder) as path:
        (path / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file({name: t.detach().cpu().contiguous() for name, t in kosmos.state_dict().items()}, path / SAFETENSORS)
        if kosmos.tokenizer is not None:
            kosmos.tokenizer.save(path)


def load_folder(folder: str | Path) -> Kosmos:
    """Read a model folder of kosmos-lit.

    Raises: UserError if it is none, or its files do not fit one another.
    """
    path = Path(folder)
    about = read_json(path / CONFIG)
    if about.get("model_type") != MODEL_TYPE or not isinstance(about.get("kosmos"), dict):
        raise UserError(
            f"{path} is no model folder of kosmos-lit: {CONFIG} with model_type {MODEL_TYPE!r}, {SAFETENSORS} and a "
            f"tokenizer were expected, but model_type is {about.get('model_type')!r}"
        )
    config = KosmosConfig.from_dict(about["kosmos"])
    kosmos = assemble(config, read_tensors(path / SAFETENSORS), str(path / SAFETENSORS))
    if about.get("has_tokenizer", True):
        give_tokenizer(kosmos, Tokenizer.load(path), str(path))
    return kosmos


def give_tokenizer(kosmos: Kosmos, tokenizer: Tokenizer, where: str) -> None:
    """Let a model know what its ids stand for.

    Raises: UserError if it has fewer embeddings than there are ids.
    """
    rows = kosmos.config.decoder.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding only {rows:,} rows")
    kosmos.tokenizer = tokenizer


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder` when all went well, and is removed otherwise.

    Raises: UserError if `folder` exists and is not empty, or cannot be written.
    """
    target = Path(folder)
    check_new(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Make sure that nothing is lost by writing a folder.

    Raises: UserError if it exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder; delete it or choose another --output")
