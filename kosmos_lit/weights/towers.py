"""Sizes of a CLIP vision transformer, in the configurations of open_clip and of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kosmos_lit.config import VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.vision import describe

RELEASED_TOWER = "ViT-L-14-quickgelu"


def vit_architecture(
    *, image_size: int, layers: int, width: int, n_heads: int, ffn_dim: int, patch_size: int, quick_gelu: bool
) -> str | dict[str, Any]:
    """Return the open_clip architecture of a plain ViT of these sizes: a table, or the released tower's name."""
    ratio = ffn_dim / width
    if int(width * ratio) != ffn_dim:  # open_clip rounds width * ratio down
        ratio = math.nextafter(ratio, math.inf)
    # open_clip derives the number of heads from their width, and the FFN's width from a ratio.
    table = {
        "image_size": image_size,
        "layers": layers,
        "width": width,
        "head_width": width // n_heads,
        "mlp_ratio": ratio,
        "patch_size": patch_size,
    }
    released = {"image_size": 224, "layers": 24, "width": 1024, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 14}
    if quick_gelu and table == released:
        return RELEASED_TOWER
    # embed_dim is the width of CLIP's projection, which no Kosmos has.
    return {"embed_dim": width, "vision_cfg": table, "quick_gelu": quick_gelu}


def tower_architecture(vision: Any) -> str | dict[str, Any]:
    """Return the open_clip architecture of a transformers CLIP vision config."""
    return vit_architecture(
        image_size=square_side(vision.image_size),
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        n_heads=vision.num_attention_heads,
        ffn_dim=vision.intermediate_size,
        patch_size=square_side(vision.patch_size),
        quick_gelu=vision.hidden_act == "quick_gelu",
    )


def tower_sizes(vision: VisionConfig) -> dict[str, Any] | None:
    """Return a tower's sizes as a Kosmos2VisionConfig has them, or None if it is no plain ViT."""
    table = describe(vision)
    sizes = dict(table["vision_cfg"])
    # Defaults are open_clip's.
    width, layers = sizes.pop("width", 768), sizes.pop("layers", 12)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // sizes.pop("head_width", 64),
        "intermediate_size": int(width * sizes.pop("mlp_ratio", 4.0)),
        "patch_size": sizes.pop("patch_size", 16),
        "hidden_act": "quick_gelu" if table.get("quick_gelu", False) else "gelu",
    }
    sizes.pop("image_size", None)
    # Any size that is left makes it another kind of tower; a list of layers is a ResNet's.
    return None if sizes or not isinstance(layers, int) else fields


def unsupported_settings(vision: Any) -> list[str]:
    """Return a phrase for each setting of a transformers CLIP vision config that open_clip's plain tower cannot have."""
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("quick_gelu", "gelu"),
        "layer_norm_eps": (1e-5,),
        "num_channels": (3,),
        "attention_dropout": (0,),
    }
    unsupported = [
        f"vision_config.{name} is {getattr(vision, name)!r}, only {' and '.join(map(repr, values))} supported"
        for name, values in supported.items()
        if getattr(vision, name) not in values
    ]
    for name in ("image_size", "patch_size"):
        if square_side(getattr(vision, name)) is None:
            unsupported.append(f"vision_config.{name} is {getattr(vision, name)}, only squares are supported")
    return unsupported


def square_side(size: int | Sequence[int]) -> Any:
    """Return the side of a square from one side or both; None if the two differ."""
    if isinstance(size, int):
        return size
    return size[0] if len(size) == 2 and size[0] == size[1] else None


def parse_config(config_class: Any, table: dict[str, Any], folder: Path) -> Any:
    """Return a transformers configuration made of a folder's config.json.

    Raises: UserError if a value is of the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError  # transformers' configs are such dataclasses

    try:
        return config_class.from_dict(table)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        # Such an error has several lines, which are made one.
        raise UserError(f"{folder}/config.json is no {config_class.__name__}: {' '.join(str(error).split())}") from error
