"""Low-rank adapters on linear layers, through peft (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from kosmos_lit.config import LoraConfig
from kosmos_lit.errors import UserError

ADAPTER = "default"
"""The adapter's name in peft, which stands in the names of its weights."""


def inject_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside the matrices that `config.targets` names, and freeze everything else.

    A starts Kaiming uniform and B at zero (peft's default), so that a new adapter changes nothing.
    The image tower gets none: its attention reads its matrices directly, past any layer put in their place.

    Raises: UserError if a target is the end of no layer's name.
    """
    from peft import inject_adapter_in_model

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("vision.")]
    # Whole parts of a dotted name: `fc1` is not the end of `xfc1`.
    matches = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in config.targets}
    if missing := [target for target, layers in matches.items() if not layers]:
        raise UserError(f"lora.targets: no matrix of decoder or connector ends with {', '.join(missing)}")
    names = {name for layers in matches.values() for name in layers}
    inject_adapter_in_model(peft_config(config, names), model, ADAPTER)


def peft_config(config: LoraConfig, names: Iterable[str]) -> Any:
    """Return peft's own configuration for adapters on the layers of these full names."""
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=config.dropout_rate,
        target_modules=sorted(names),  # peft matches endings: short names would match the tower's layers too
    )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and peft's layers that stand in place of adapted matrices."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
