"""What to do with a model's adapters: merge them into the weights, or keep them as a folder of their own."""

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
from kosmos_lit.layers.lora import ADAPTER, adapted, peft_config
from kosmos_lit.model import Kosmos
from kosmos_lit.weights.folder import assemble

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of the names in peft's files."""
READ = {"peft_type", "r", "lora_alpha", "target_modules"}
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",  # about the file
    "lora_dropout",  # in training only
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of ways to start, see `init_lora_weights`
    "megatron_core", "qalora_group_size",  # without `megatron_config` and `use_qalora` nothing reads them
}  # fmt: skip
"""Fields of peft's table that say nothing about what a trained adapter computes."""
NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; others (pissa, olora, corda, loftq, lora_ga) change it too."""


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


def without_lora(model: Kosmos, weights: Mapping[str, Tensor]) -> Kosmos:
    """Return a model without adapters that has copies of `weights`, in evaluation mode; each keeps its dtype and device."""
    return _plain(model, {name: tensor.clone() for name, tensor in weights.items()})


def _plain(model: Kosmos, weights: Mapping[str, Tensor]) -> Kosmos:
    plain = assemble(replace(model.config, lora=None), weights, "the model", copy=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):  # those of a tower, which no file need hold
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, buffer.clone())
    plain.tokenizer = model.tokenizer
    return plain


def merged(model: Kosmos) -> Kosmos:
    """Return a model without adapters that computes the same: W + alpha / rank B A; one that has none as it is.

    The sum is taken in float32 at least; every weight keeps its dtype and device.
    """
    if model.config.lora is None:
        return model
    layers = {f"{name}.weight": layer for name, layer in adapted(model)}
    weights = {}
    for name, weight in base_weights(model).items():
        weights[name] = _with_adapter(weight, layers[name]) if name in layers else weight.clone()
    return _plain(model, weights)


def _with_adapter(weight: Tensor, layer: Any) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (part[ADAPTER].weight.detach().to(wide) for part in (layer.lora_A, layer.lora_B))
    found: Tensor = weight.to(wide) + (b @ a) * layer.scaling[ADAPTER]
    return found.to(weight.dtype)


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
    peft_config(replace(lora, dropout_rate=0.0), (name for name, _ in adapted(model))).save_pretrained(str(folder))
    weights = {
        key: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if (key := _key(name)) is not None
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(base: Kosmos, folder: str | Path) -> Kosmos:
    """Return a model with the weights of `base` and the adapters of a folder, in evaluation mode.

    The base's weights keep their dtype and device; the adapters come as the file has them, to that device.

    Raises: UserError if the folder holds no LoRA adapter of such a model, or one that computes something else.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if base.config.lora is not None:
        raise UserError(f"{folder}: the model has an adapter already; merge it first")
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        targets = tuple(sorted(table["target_modules"]))
        lora = LoraConfig(rank=table["r"], alpha=table["lora_alpha"], dropout_rate=0.0, targets=targets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no LoRA adapter: {error}; it needs {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    _check_plain(table, folder / CONFIG_FILE)
    model = without_lora(base, base.state_dict())
    with torch.random.fork_rng():  # what is drawn here is replaced below
        model.adapt(lora)
    own = {name: (key, tensor.device) for name, tensor in model.state_dict().items() if (key := _key(name)) is not None}
    if wrong := sorted({key for key, _ in own.values()} ^ set(weights)):
        raise UserError(f"{folder}: the adapter is of another model; {len(wrong)} weights differ by name: {wrong[:3]}")
    try:
        given = {name: weights[key].to(device) for name, (key, device) in own.items()}
        model.load_state_dict(given, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: the adapter is of another model: {error}") from error
    return model.eval()


def _key(name: str) -> str | None:
    """Return what peft's files call one of an adapter's weights; None for any other weight."""
    is_adapter = ".lora_A." in name or ".lora_B." in name
    return PREFIX + name.replace(f".{ADAPTER}.", ".") if is_adapter else None


def _check_plain(table: Mapping[str, Any], path: Path) -> None:
    """Make sure that W + alpha / rank B A is all that an adapter computes.

    Raises: UserError naming each field that asks for something else, with its value.
    """
    wrong = {} if table.get("peft_type") == "LORA" else {"peft_type": table.get("peft_type")}
    if isinstance(table["target_modules"], str):
        wrong["target_modules"] = table["target_modules"]
    for name, value in table.items():
        if name == "init_lora_weights":
            plain = value in NEUTRAL_STARTS
        elif name == "bias":
            plain = value == "none"
        else:
            plain = name in READ | HARMLESS or not value  # null, false, [] and {}: peft's ways to say that it is not used
        if not plain:
            wrong[name] = value
    if wrong:
        raise UserError(
            f"{path}: {', '.join(f'{name} is {value!r}' for name, value in wrong.items())}, but only plain LoRA on a list "
            "of layers is read; merge the adapter with peft (merge_and_unload), or train it without"
        )
