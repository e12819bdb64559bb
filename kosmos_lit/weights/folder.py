"""Model folders: `config.json`, `model.safetensors` and the tokenizer's files, as `import` and `export` write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kosmos_lit._version import __version__
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_folder
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.files import SAFETENSORS, read_json, read_tensors
from kosmos_lit.state_dicts.keys import check_shapes, shapes_of
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.vision import outside_source

CONFIG = "config.json"
MODEL_TYPE = "kosmos-lit"


class LoadedModel(NamedTuple):
    """A model, in evaluation mode, and its tokenizer; None where the file has none."""

    model: Kosmos
    tokenizer: Tokenizer | None


def build_model(config: KosmosConfig, tensors: Mapping[str, Tensor], where: str, *, copy: bool = True) -> Kosmos:
    """Return the configured model with these tensors as its weights, in evaluation mode; each keeps its dtype and device.

    With `copy`, the weights are copies of them. Tensors of a file are memory-mapped: without a copy, a model changes or
    crashes when the file is written again.

    Raises: UserError listing every missing, surplus and misshapen tensor.
    """
    model = Kosmos.on_meta(config)
    check_shapes(shapes_of(tensors), shapes_of(model.state_dict()), where)
    if copy:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # Assigned: a model on the meta device has no memory to copy into.
    model.load_state_dict(tensors, assign=True)
    if any(t.is_meta for t in chain(model.parameters(), model.buffers())):
        # A tower with buffers that are in no file: only a real construction computes them.
        model = Kosmos(replace(config, vision=replace(config.vision, pretrained=None)))
        model.load_state_dict(tensors, assign=True)
    return model.eval()


def check_own(config: KosmosConfig, n_tensors: int, where: str) -> None:
    """Check that a model can be built from its file alone: the configuration comes from the file, so from anybody.

    Args:
        config: as the file has it.
        n_tensors: in the file.
        where: the file, for the message.

    Raises: UserError if building would download something, read other files, or make layers without end.
    """
    if source := outside_source(config.vision.architecture):
        raise UserError(
            f"{where}: its vision.architecture names {source}; a file's model is built from the file alone: an architecture "
            "is one of `open_clip.list_models()`, or a table as open_clip's model configs are, timm_model_pretrained: false"
        )
    table = config.vision.architecture
    tower = table.get("vision_cfg") if isinstance(table, dict) else None
    layers = tower.get("layers") if isinstance(tower, dict) else None
    counts = {
        "decoder.n_layers": config.decoder.n_layers,
        "connector.n_layers": config.connector.n_layers if config.connector.kind == "perceiver" else 0,
        "vision.architecture.vision_cfg.layers": sum(layers) if isinstance(layers, list | tuple) else layers,
    }
    for key, count in counts.items():
        if isinstance(count, int) and count > n_tensors:  # each layer has tensors of its own
            raise UserError(f"{where}: {key} is {count}, but it holds no more than {n_tensors} tensors")


def save_folder(model: Kosmos, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write a folder from which `load_folder` reads the same model and tokenizer.

    Raises: UserError if the folder exists and is not empty, or cannot be written.
    """
    from safetensors.torch import save_file

    # Names of local files, for the tower's architecture or weights, mean nothing on another machine.
    config = replace(model.config, vision=replace(model.config.vision.resolved(), pretrained=None))
    has_tokenizer = tokenizer is not None
    table = {"model_type": MODEL_TYPE, "version": __version__, "has_tokenizer": has_tokenizer, "kosmos": asdict(config)}
    with new_folder(folder) as path:
        (path / CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        # safetensors takes no strided views.
        save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, path / SAFETENSORS)
        if tokenizer is not None:
            tokenizer.save(path)


def load_folder(folder: str | Path) -> LoadedModel:
    """Return the model and the tokenizer of a folder of kosmos-lit.

    Raises: UserError if it is none, or its files do not fit one another.
    """
    path = Path(folder)
    config, table = read_folder_config(path), read_json(path / CONFIG)
    tensors, where = read_tensors(path / SAFETENSORS), str(path / SAFETENSORS)
    check_own(config, len(tensors), where)
    model = build_model(config, tensors, where)
    tokenizer = Tokenizer.load(path) if table.get("has_tokenizer", True) else None  # older folders lack the key
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, str(path))
    return LoadedModel(model, tokenizer)


def read_folder_config(path: Path) -> KosmosConfig:
    """Return the configuration of a folder of kosmos-lit. Raises: UserError if it is none."""
    table = read_json(path / CONFIG)
    if table.get("model_type") != MODEL_TYPE or not isinstance(table.get("kosmos"), dict):
        raise UserError(
            f"{path} is no model folder of kosmos-lit: {CONFIG} with model_type {MODEL_TYPE!r}, {SAFETENSORS} and a "
            f"tokenizer were expected, but model_type is {table.get('model_type')!r}"
        )
    return KosmosConfig.from_dict(table["kosmos"])


def check_tokenizer(tokenizer: Tokenizer, config: KosmosConfig, where: str) -> None:
    """Make sure that a model has an embedding for each of the tokenizer's ids.

    Raises: UserError with both counts if it has fewer.
    """
    rows = config.decoder.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding only {rows:,} rows")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end, or is removed after an error.

    Raises: UserError if `folder` exists and is not empty, or cannot be written.
    """
    target = Path(folder)
    check_new(target)  # before the work, and again after it
    try:
        with atomic_folder(target) as temporary:
            yield temporary
            check_new(target)  # another program may have filled it meanwhile
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error


def check_new(folder: Path) -> None:
    """Make sure that writing a folder overwrites nothing.

    Raises: UserError if it exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder; delete it or choose another --output")
