"""Where fine-tuning starts: from given weights, with parts of them frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig, KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers.init import embedding_std
from kosmos_lit.lora import merged
from kosmos_lit.model import Kosmos
from kosmos_lit.weights.folder import assemble

ROWS = "decoder.embed_tokens.weight"


def initialise_from(path: str, config: KosmosConfig, seed: int = 0) -> Kosmos:
    """Return a model of `config` with the weights and the tokenizer of a checkpoint or an imported folder.

    The weights are float32, whatever they are there. The vocabulary may have more rows than there (`seed` draws the others)
    or fewer, down to the tokenizer's ids; rows may be longer where positions are not learnt. Adapters that are there go on
    if `config` asks for the same, else they are merged; new ones start at nothing.

    Raises: UserError if there is no such model, or it is of another architecture, naming every field that differs.
    """
    given = Kosmos.load(path)
    there, here = given.config.architecture(), config.architecture()
    free = {"lora", "decoder.vocab_size"}
    wrong = [f"{k} is {there.get(k)!r} there, {v!r} here" for k, v in here.items() if k not in free and there.get(k) != v]
    if wrong:
        raise UserError(f"{path} holds a model of another architecture: {'; '.join(wrong)}")
    n_rows, needed = config.decoder.vocab_size, given.tokenizer.vocab_size if given.tokenizer else 0
    if n_rows < needed:
        raise UserError(f"the tokenizer of {path} has {needed} ids, but model.kosmos.decoder.vocab_size is {n_rows}")
    goes_on = there["lora"] == here["lora"]
    source = given if goes_on else merged(given)
    weights = {k: tensor.float() if tensor.is_floating_point() else tensor for k, tensor in source.state_dict().items()}
    weights[ROWS] = _resized(weights[ROWS], config.decoder, seed)
    model = assemble(config if goes_on else replace(config, lora=None), weights, path, copy=False)
    model.tokenizer = given.tokenizer
    if config.lora is not None and not goes_on:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.adapt(config.lora)
    return model.train()


def _resized(rows: Tensor, config: DecoderConfig, seed: int) -> Tensor:
    """Return the first V rows of an embedding, those that are missing drawn as in a new model."""
    n_new = config.vocab_size - len(rows)
    if n_new <= 0:
        return rows if n_new == 0 else rows[:n_new].clone()  # a slice would keep, and save, what was cut off
    new = torch.randn(n_new, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([rows, embedding_std(config) * new])


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters no longer train whose names match a pattern, or lie below one.

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
    """Whether a parameter of that name is one that a pattern of `freeze` names."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
