"""What to do with a model's adapters: merge them into the weights, or keep them as a folder of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kosmos_lit.config import LoraConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers.lora import ADAPTER, adapted, peft_config
from kosmos_lit.model import Kosmos

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of the names in peft's files."""


def base_weights(model: Kosmos) -> dict[str, Tensor]:
    """Return the weights below the adapters by the names of a model without any."""
    names = [name for name, _ in adapted(model)]
    found = {}
    for name, tensor in model.state_dict().items():
        owner = next((n for n in names if name.startswith(f"{n}.")), None)
        if owner is None:
            found[name] = tensor
        elif name.startswith(f"{owner}.base_layer."):
            found[name.replace(".base_layer.", ".")] = tensor
    return found


def without_lora(model: Kosmos, weights: dict[str, Tensor]) -> Kosmos:
    """Return a model without adapters that has `weights`, on the CPU, in evaluation mode."""
    vision = replace(model.config.vision, pretrained=None)
    plain = Kosmos(replace(model.config, vision=vision, lora=None))
    plain.load_state_dict(weights)
    plain.tokenizer = model.tokenizer
    return plain.eval()


def merged(model: Kosmos) -> Kosmos:
    """Return a model without adapters that computes the same: W + alpha / rank B A; one that has none as it is."""
    if model.config.lora is None:
        return model
    weights = base_weights(model)
    for name, layer in adapted(model):
        weight = weights[f"{name}.weight"]
        delta = layer.get_delta_weight(ADAPTER).detach()
        weights[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return without_lora(model, weights)


def save_adapter(model: Kosmos, folder: str | Path) -> None:
    """Write the adapters in peft's format; `load_adapter` or `peft.PeftModel.from_pretrained` put them on the base again.

    Raises: UserError if the model has none.
    """
    from safetensors.torch import save_file

    lora = model.config.lora
    if lora is None:
        raise UserError("save_adapter: the model has no adapter; it was not trained with model.kosmos.lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = without_lora(model, base_weights(model))
    peft_config(base, replace(lora, dropout_rate=0.0)).save_pretrained(str(folder))
    weights = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(base: Kosmos, folder: str | Path) -> Kosmos:
    """Return a model with the weights of `base` and the adapters of a folder, in evaluation mode.

    Raises: UserError if the folder holds no LoRA adapter of such a model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if base.config.lora is not None:
        raise UserError(f"{folder}: the model has an adapter already; merge it first")
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        targets = table["target_modules"]
        lora = LoraConfig(rank=table["r"], alpha=table["lora_alpha"], dropout_rate=0.0, targets=tuple(sorted(targets)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no LoRA adapter: {error}; it needs {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    vision = replace(base.config.vision, pretrained=None)
    model = Kosmos(replace(base.config, vision=vision, lora=lora))
    model.tokenizer = base.tokenizer
    give_base(model, base.state_dict())
    own = {
        name: name.replace(f".{ADAPTER}.", ".")
        for name in model.state_dict()
        if ".lora_A." in name or ".lora_B." in name
    }
    there = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    if wrong := sorted(set(own.values()) ^ set(there)):
        raise UserError(f"{folder}: the adapter is of another model; {len(wrong)} weights differ by name: {wrong[:3]}")
    try:
        model.load_state_dict({name: there[key] for name, key in own.items()}, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter is of another model: {error}") from error
    return model.eval()


def give_base(model: Kosmos, weights: dict[str, Tensor]) -> None:
    """Copy the weights of a model without adapters below a model's adapters, if it has any."""
    names = {name for name, _ in adapted(model)}
    renamed = {}
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".")
        renamed[f"{owner}.base_layer.{last}" if owner in names else name] = tensor
    wrong = model.load_state_dict(renamed, strict=False)
    left = [name for name in wrong.missing_keys if ".lora_" not in name]
    assert not left, left
    assert not wrong.unexpected_keys, wrong.unexpected_keys
