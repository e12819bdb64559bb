"""Import of an image tower alone, from open_clip files and transformers CLIP folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kosmos_lit.config import VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.state_dicts.clip import read_tower, tower_shapes
from kosmos_lit.state_dicts.files import SAFETENSORS, read_json
from kosmos_lit.vision import VisionTower
from kosmos_lit.weights.folder import new_folder
from kosmos_lit.weights.towers import parse_config, square_side, tower_architecture, unsupported_settings

ARCHITECTURE = "architecture.json"
CLIP_TYPES = ("clip", "clip_vision_model")


def import_tower(source: Path, folder: Path) -> str:
    """Write a tower's weights, named as in open_clip, and its architecture where the source has it.

    Returns: how to use it, as lines of a config.

    Raises: UserError if the source holds no tower.
    """
    from safetensors.torch import save_file

    tower = read_tower(source)
    tensors = tower.tensors
    # A file of open_clip holds weights alone: the user has to fill these two in.
    architecture: str | dict[str, Any] = "ITS NAME IN open_clip"
    size = "ITS PIXELS"
    if not tower.is_open_clip:
        vision = _vision_config(source)
        architecture, size = tower_architecture(vision), square_side(vision.image_size)
        with torch.device("meta"):  # for the shapes alone
            model = VisionTower(VisionConfig(architecture=architecture, pretrained=None, image_size=size))
        tensors = tower.as_open_clip(tower_shapes(model.visual), str(source))
    with new_folder(folder) as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / SAFETENSORS)
        if isinstance(architecture, dict):
            (path / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n", encoding="utf-8")
            architecture = str(folder / ARCHITECTURE)  # not `path`, which is temporary
    return f"vision: {{architecture: {architecture}, image_size: {size}, pretrained: {folder}}}"


def _vision_config(folder: Path) -> Any:
    """Return the vision configuration of a transformers CLIP folder.

    Raises: UserError if it is another model's.
    """
    from transformers import CLIPVisionConfig

    table = read_json(folder / "config.json" if folder.is_dir() else folder.parent / "config.json")
    if (model_type := table.get("model_type")) not in CLIP_TYPES:
        raise UserError(f"{folder}: model_type {model_type!r} is no CLIP; expected {' or '.join(CLIP_TYPES)}")
    # A whole CLIP nests the tower's table; a tower's own file is that table.
    config = parse_config(CLIPVisionConfig, table.get("vision_config", table), folder)
    if unsupported := unsupported_settings(config):
        raise UserError(f"{folder}: no tower of open_clip is like this one: {'; '.join(unsupported)}")
    return config
