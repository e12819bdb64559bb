"""The image tower of a CLIP, from files of open_clip and of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from kosmos_lit.errors import UserError
from kosmos_lit.state_dicts.files import read_tensors
from kosmos_lit.state_dicts.keys import CLIP, Shapes, check_shapes, shapes_of

PREFIX = "visual."
_TRANSFORMERS_PREFIX = "vision_model."
_INDEX_BUFFER = f"{_TRANSFORMERS_PREFIX}embeddings.position_ids"
"""Written to file by earlier versions of transformers."""


class TowerTensors(NamedTuple):
    """The tensors of a tower by the names of their file, without CLIP's projection."""

    tensors: Mapping[str, Tensor]
    is_open_clip: bool
    """Names begin with `visual.`, as open_clip has them; else with `vision_model.`, as in a CLIPModel of transformers."""

    def as_open_clip(self, shapes: Shapes, where: str) -> Mapping[str, Tensor]:
        """Return the tensors by open_clip's names, for a tower of these shapes.

        Raises: UserError listing every missing, surplus and misshapen tensor.
        """
        if self.is_open_clip:
            check_shapes(shapes_of(self.tensors), shapes, where)
            return self.tensors
        check_shapes(shapes_of(self.tensors), CLIP.external_shapes(shapes), where)
        return CLIP.to_kosmos(self.tensors, shapes)


def load_tower(visual: nn.Module, path: Path) -> None:
    """Fill an open_clip tower from a file or folder of a whole CLIP or its tower.

    Raises: UserError listing every missing, surplus and misshapen tensor of the tower.
    """
    shapes = tower_shapes(visual)
    tensors = read_tower(path).as_open_clip(shapes, str(path))
    visual.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def tower_shapes(visual: nn.Module) -> Shapes:
    """Return the shapes of an open_clip tower's tensors, by their names in a whole CLIP."""
    return {f"{PREFIX}{name}": tuple(tensor.shape) for name, tensor in visual.state_dict().items()}


def read_tower(path: Path) -> TowerTensors:
    """Return the tower's tensors in a file or folder of a whole CLIP or its tower, as open_clip or transformers names them.

    Raises: UserError if it holds no tower.
    """
    # DistributedDataParallel, with which some towers were trained, puts `module.` in front.
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
    if any(name.startswith(PREFIX) for name in tensors):
        # Without CLIP's projection: KOSMOS reads the features before it.
        tower = {n: t for n, t in tensors.items() if n.startswith(PREFIX) and n != f"{PREFIX}proj"}
        return TowerTensors(tower, is_open_clip=True)
    # A CLIPVisionModel of transformers 5 leaves the prefix out.
    bare = ("embeddings.", "encoder.", "pre_lay", "post_lay")  # the layernorms, of which one is misspelled
    tower = {n: t for n, t in tensors.items() if n.startswith(_TRANSFORMERS_PREFIX)} or {
        _TRANSFORMERS_PREFIX + n: t for n, t in tensors.items() if n.startswith(bare)
    }
    tower.pop(_INDEX_BUFFER, None)
    if not tower:
        names = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path} holds no image tower: names below `{PREFIX}` (open_clip) or `{_TRANSFORMERS_PREFIX}` (transformers) "
            f"were expected, it has {names} ..."
        )
    return TowerTensors(tower, is_open_clip=False)
