"""Weights of an image tower alone: from open_clip files and from transformers CLIP folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kosmos_lit.config import VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.vision import VisionTower
from kosmos_lit.weights.files import SAFETENSORS, read_json, read_tensors
from kosmos_lit.weights.folder import new_folder
from kosmos_lit.weights.keys import CLIP, check_shapes, shapes_of
from kosmos_lit.weights.towers import parse_config, side, strange_settings, tower_architecture

ARCHITECTURE = "architecture.json"
CLIP_TYPES = ("clip", "clip_vision_model")
_PREFIX = "visual."
_INDEX_BUFFER = "vision_model.embeddings.position_ids"
"""Written to file by earlier versions of transformers."""


def load_tower(visual: nn.Module, path: Path) -> None:
    """Fill an open_clip tower from a file or folder of a whole CLIP or its tower, as open_clip or transformers names it.

    The text tower and CLIP's projections are left aside.

    Raises: UserError listing every missing, surplus and misshapen tensor of the tower.
    """
    state = {f"{_PREFIX}{name}": tensor for name, tensor in visual.state_dict().items()}
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
    if any(name.startswith(_PREFIX) for name in tensors):
        found = {n: t for n, t in tensors.items() if n.startswith(_PREFIX) and n != f"{_PREFIX}proj"}
        check_shapes(shapes_of(found), shapes_of(state), str(path))
    else:
        theirs = _of_transformers(tensors, path)
        check_shapes(shapes_of(theirs), CLIP.wanted(shapes_of(state)), str(path))
        found = CLIP.to_ours(theirs, state)
    visual.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in found.items()})


def import_tower(source: Path, folder: Path) -> str:
    """Write a tower's weights alone, as open_clip names them, and its architecture where the source tells it.

    Returns: how to use it, as lines of a config.

    Raises: UserError if the source holds no tower.
    """
    from safetensors.torch import save_file

    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(source).items()}
    architecture: str | dict[str, Any] = "ITS NAME IN open_clip"
    size = "ITS PIXELS"
    if any(name.startswith(_PREFIX) for name in tensors):
        found = {n: t for n, t in tensors.items() if n.startswith(_PREFIX) and n != f"{_PREFIX}proj"}
    else:
        theirs = _of_transformers(tensors, source)
        about = _vision_config(source)
        architecture, size = tower_architecture(about), side(about.image_size)
        with torch.device("meta"):
            tower = VisionTower(VisionConfig(architecture=architecture, pretrained=None, image_size=size))
        shapes = {f"{_PREFIX}{name}": tuple(t.shape) for name, t in tower.visual.state_dict().items()}
        check_shapes(shapes_of(theirs), CLIP.wanted(shapes), str(source))
        found = CLIP.to_ours(theirs, shapes)
    with new_folder(folder) as path:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path / SAFETENSORS)
        if isinstance(architecture, dict):
            (path / ARCHITECTURE).write_text(json.dumps(architecture, indent=2) + "\n", encoding="utf-8")
            architecture = str(folder / ARCHITECTURE)
    return f"vision: {{architecture: {architecture}, image_size: {size}, pretrained: {folder}}}"


def _of_transformers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tower's tensors as a CLIPModel names them; a CLIPVisionModel of version 5 leaves the prefix out."""
    prefix = "vision_model."
    whole = {n: t for n, t in tensors.items() if n.startswith(prefix)}
    bare = {prefix + n: t for n, t in tensors.items() if n.startswith(("embeddings.", "encoder.", "pre_lay", "post_lay"))}
    found = whole or bare
    found.pop(_INDEX_BUFFER, None)
    if not found:
        names = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path} holds no image tower: names below `{_PREFIX}` (open_clip) or `{prefix}` (transformers) were expected, "
            f"it has {names} ..."
        )
    return found


def _vision_config(folder: Path) -> Any:
    """Return the vision configuration of a transformers CLIP folder.

    Raises: UserError if it is another model's.
    """
    from transformers import CLIPVisionConfig

    about = read_json(folder / "config.json" if folder.is_dir() else folder.parent / "config.json")
    if about.get("model_type") not in CLIP_TYPES:
        kind = about.get("model_type")
        raise UserError(f"{folder}: model_type {kind!r} is not taken here, only {' and '.join(CLIP_TYPES)}")
    found = parse_config(CLIPVisionConfig, about.get("vision_config", about), folder)
    if strange := strange_settings(found):
        raise UserError(f"{folder}: no tower of open_clip is like this one: {'; '.join(strange)}")
    return found
