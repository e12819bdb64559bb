"""The start of fine-tuning: pretrained weights, and which of them are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from kosmos_lit.checkpoint import check_architecture
from kosmos_lit.config import DecoderConfig, KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers.init import drawn_on_cpu, embedding_std
from kosmos_lit.lora import merge_adapters
from kosmos_lit.terminal import program
from kosmos_lit.weights.folder import LoadedModel, build_model
from kosmos_lit.weights.load import load_config, load_model

ROWS = "decoder.embed_tokens.weight"
FREE = frozenset({"lora", "decoder.vocab_size"})
"""Fields of the architecture in which a model may differ from the weights that it starts from."""


def check_pretrained(path: str, config: KosmosConfig) -> None:
    """Make sure that a model can start from the weights of a checkpoint or model folder, without reading them.

    Raises: UserError if there is no such model, or it is of another architecture, naming every field that differs.
    """
    if not Path(path).exists():
        raise UserError(
            f"model.init_from: there is no {path}; public weights become one by "
            f"`{program()} import --format transformers --input FOLDER --output {path}`"
        )
    check_architecture(load_config(path), config, path, ignored=FREE)


def from_pretrained(path: str, config: KosmosConfig, seed: int = 0) -> LoadedModel:
    """Return a model of `config`, in training mode, with the weights of a checkpoint or model folder; and its tokenizer.

    The weights become float32. The vocabulary may have more rows than the file (`seed` draws the others) or fewer, down to
    the tokenizer's ids; rows of tokens may be longer where positions are not learnt. Adapters are kept if `config` has the
    same, else they are merged; new ones start at zero.

    Raises: UserError if there is no such model, or it is of another architecture, naming every field that differs.
    """
    pretrained, tokenizer = load_model(path)
    check_architecture(pretrained.config, config, path, ignored=FREE)
    n_rows, n_ids = config.decoder.vocab_size, tokenizer.vocab_size if tokenizer else 0
    if n_rows < n_ids:
        raise UserError(f"the tokenizer of {path} has {n_ids} ids, but model.kosmos.decoder.vocab_size is {n_rows}")
    # Compared as in `architecture`: without the dropout rate, and targets in any order.
    keeps_adapters = pretrained.config.architecture()["lora"] == config.architecture()["lora"]
    source = pretrained if keeps_adapters else merge_adapters(pretrained)
    weights = {k: tensor.float() if tensor.is_floating_point() else tensor for k, tensor in source.state_dict().items()}
    weights[ROWS] = _resized(weights[ROWS], config.decoder, seed)
    # `copy=False`: `load_model` has made copies of the file's tensors already.
    model = build_model(config if keeps_adapters else replace(config, lora=None), weights, path, copy=False)
    if config.lora is not None and not keeps_adapters:
        with drawn_on_cpu(seed):
            model.add_lora(config.lora)
    return LoadedModel(model.train(), tokenizer)


def _resized(rows: Tensor, config: DecoderConfig, seed: int) -> Tensor:
    """Return the first V rows of an embedding; missing rows are drawn as in a new model."""
    n_new = config.vocab_size - len(rows)
    if n_new <= 0:
        return rows if n_new == 0 else rows[:n_new].clone()  # a slice would keep, and save, the whole storage
    with drawn_on_cpu(seed):
        new = torch.randn(n_new, rows.shape[1])
    return torch.cat([rows, embedding_std(config) * new])


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern, or lie below one.

    `decoder.embed_tokens`, `decoder.layers.[0-9].*` and `*.bias` are patterns; see `fnmatch`.

    Raises: UserError naming a pattern that matches nothing, or if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
            raise UserError(f"model.freeze: no parameter is named {pattern!r}; there are {parts}")
    for name, parameter in model.named_parameters():
        if any(matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze: {', '.join(patterns)} leave nothing to train")


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern of `freeze` covers a parameter's name."""
    # `fnmatch` itself ignores case on some systems.
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
