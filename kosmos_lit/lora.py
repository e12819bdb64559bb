"""A trained model's LoRA adapters: merged into the weights, or in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.config import LoraConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers.init import drawn_on_cpu
from kosmos_lit.layers.lora import ADAPTER, adapted_layers, peft_config
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.files import read_tensors
from kosmos_lit.weights.folder import build_model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before each name in peft's files."""
READ = {"peft_type", "r", "lora_alpha", "target_modules"}
HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",  # about the file
    "lora_dropout",  # in training only
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",  # of ways to start, see `init_lora_weights`
    "megatron_core",
    "qalora_group_size",  # without `megatron_config` and `use_qalora` nothing reads them
}
"""Fields of peft's table that do not change what a trained adapter computes."""
NEUTRAL_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone; others (pissa, olora, corda, loftq, lora_ga) do not."""


def base_weights(model: Kosmos) -> dict[str, Tensor]:
    """Return the weights without the adapters, by their names in a model without any."""
    names = [name for name, _ in adapted_layers(model)]
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = next((n for n in names if name.startswith(f"{n}.")), None)
        if layer is None:
            weights[name] = tensor
        elif name.startswith(f"{layer}.base_layer."):
            # peft's layer keeps the matrix that it stands in place of as `base_layer`.
            weights[name.replace(".base_layer.", ".")] = tensor
    return weights


def without_lora(model: Kosmos, weights: Mapping[str, Tensor]) -> Kosmos:
    """Return a model without adapters, with copies of `weights`, in evaluation mode; each keeps its dtype and device."""
    return _without_adapters(model, {name: tensor.clone() for name, tensor in weights.items()})


def _without_adapters(model: Kosmos, weights: Mapping[str, Tensor]) -> Kosmos:
    # Not copied again: the callers' tensors are copies already.
    base = build_model(replace(model.config, lora=None), weights, "the model", copy=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):  # a tower's, which may be in no state dict
        owner, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(owner), attribute, buffer.clone())
    return base


def merge_adapters(model: Kosmos) -> Kosmos:
    """Return a model without adapters that computes the same, W + alpha / rank B A; one without adapters is returned as is.

    The sum is taken in float32 at least; every weight keeps its dtype and device.
    """
    if model.config.lora is None:
        return model
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(model)}
    weights = {}
    for name, weight in base_weights(model).items():
        weights[name] = _merge(weight, layers[name]) if name in layers else weight.clone()
    return _without_adapters(model, weights)


def _merge(weight: Tensor, layer: Any) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (part[ADAPTER].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
    merged: Tensor = weight.to(dtype) + (b @ a) * layer.scaling[ADAPTER]  # b @ a: (out, r) (r, in)
    return merged.to(weight.dtype)


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
    names = (name for name, _ in adapted_layers(model))
    peft_config(replace(lora, dropout_rate=0.0), names).save_pretrained(str(folder))
    weights = {
        key: tensor.detach().cpu().contiguous()  # safetensors takes no strided views
        for name, tensor in model.state_dict().items()
        if (key := _key(name)) is not None
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(base: Kosmos, folder: str | Path) -> Kosmos:
    """Return a model with the weights of `base` and the adapters of a folder, in evaluation mode.

    The base's weights keep their dtype and device; the adapters come as the file has them, to that device.

    Raises: UserError if the folder holds no LoRA adapter of such a model, or one that computes something else.
    """
    folder = Path(folder)
    if base.config.lora is not None:
        raise UserError(f"{folder}: the model has an adapter already; merge it first")
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = read_tensors(folder / WEIGHTS_FILE)
        # peft keeps the targets as a set, so that their order in the file is arbitrary.
        targets = tuple(sorted(table["target_modules"]))
        lora = LoraConfig(rank=table["r"], alpha=table["lora_alpha"], dropout_rate=0.0, targets=targets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no LoRA adapter: {error}; it needs {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    _check_plain(table, folder / CONFIG_FILE)
    model = without_lora(base, base.state_dict())
    with drawn_on_cpu(0):  # these draws are replaced below, and must not move the caller's
        model.add_lora(lora)
    own = {name: (key, tensor.device) for name, tensor in model.state_dict().items() if (key := _key(name)) is not None}
    # `^`: weights that the file lacks, and those that it has besides.
    if wrong := sorted({key for key, _ in own.values()} ^ set(weights)):
        raise UserError(f"{folder}: the adapter is of another model; {len(wrong)} weights differ by name: {wrong[:3]}")
    try:
        adapters = {name: weights[key].to(device) for name, (key, device) in own.items()}
        # Not strict: the file has the adapters alone. Assigned, so that they keep the file's dtype.
        model.load_state_dict(adapters, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter is of another model: {error}") from error
    return model.eval()


def _key(name: str) -> str | None:
    """Return the name of an adapter's weight in peft's files; None for any other weight."""
    is_adapter = ".lora_A." in name or ".lora_B." in name
    # peft leaves the adapter's name out of its files.
    return PREFIX + name.replace(f".{ADAPTER}.", ".") if is_adapter else None


def _check_plain(table: Mapping[str, Any], path: Path) -> None:
    """Make sure that an adapter computes W + alpha / rank B A and nothing else.

    Raises: UserError naming each field that changes more, with its value.
    """
    wrong = {} if table.get("peft_type") == "LORA" else {"peft_type": table.get("peft_type")}
    if isinstance(table["target_modules"], str):
        wrong["target_modules"] = table["target_modules"]  # a regular expression, or `all-linear`
    for name, value in table.items():
        if name == "init_lora_weights":
            is_plain = value in NEUTRAL_INITS
        elif name == "bias":
            is_plain = value == "none"
        else:
            # Null, false, [] and {} are peft's ways to leave a feature off. An unknown field with a value is refused.
            is_plain = name in READ | HARMLESS or not value
        if not is_plain:
            wrong[name] = value
    if wrong:
        raise UserError(
            f"{path}: {', '.join(f'{name} is {value!r}' for name, value in wrong.items())}, but only plain LoRA on a list "
            "of layers is read; merge the adapter with peft (merge_and_unload), or train it without"
        )
