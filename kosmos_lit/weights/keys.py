"""What a tensor is called elsewhere: one table per layout, read in both directions.

The decoder's and the connector's parameters have the released names already, so they differ by a prefix. The tower is
open_clip's, whose attention keeps q, k and v in one matrix where the others have three; nothing is transposed or reshaped.

| ours                | transformers Kosmos-2         | released (fairseq)           | transformers CLIP |
|---------------------|-------------------------------|------------------------------|-------------------|
| decoder             | text_model.model              | gpt_model.decoder            | -                 |
| decoder.embed_tokens, as the output matrix | text_model.lm_head | gpt_model.decoder.output_projection | -     |
| connector           | image_to_text_projection      | img_connector                | -                 |
| vision.visual       | vision_model.model            | img_model.visual             | vision_model      |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kosmos_lit.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

_TOWER_OF_TRANSFORMERS = (
    (".class_embedding", ".embeddings.class_embedding"),
    (".positional_embedding", ".embeddings.position_embedding.weight"),
    (".conv1.", ".embeddings.patch_embedding."),
    (".ln_pre.", ".pre_layrnorm."),  # spelled so there
    (".ln_post.", ".post_layernorm."),
    (".transformer.resblocks.", ".encoder.layers."),
    (".attn.", ".self_attn."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
)


@dataclass(frozen=True)
class Layout:
    """How another program names what a Kosmos holds."""

    name: str
    prefixes: tuple[tuple[str, str], ...]
    """Of our names and theirs."""
    parts: tuple[tuple[str, str], ...] = ()
    """Parts of names below the tower's prefix, ours and theirs, applied one after another."""
    head: str | None = None
    """Their name of the output matrix, which is the embedding again."""
    dead: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Buffers that their files hold and nothing reads, with their shapes."""

    def theirs(self, name: str) -> tuple[str, ...]:
        """Return their names of our tensor `name`: one, or three whose rows follow one another (q, k, v)."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours + "."):
                inside, is_tower = name.removeprefix(ours), "visual" in ours
                for part, other in self.parts if is_tower else ():
                    inside = inside.replace(part, other)
                for kind in ("weight", "bias") if is_tower else ():
                    if inside.endswith(f".in_proj_{kind}"):
                        stem = theirs + inside.removesuffix(f"in_proj_{kind}")
                        return tuple(f"{stem}{p}_proj.{kind}" for p in "qkv")
                return (theirs + inside,)
        raise UserError(f"{self.name} files have no place for {name}")

    def wanted(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return what their file must hold, by their names, for our tensors' `shapes`; the dead ones left out."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            names = self.theirs(name)
            found |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
            if self.head and name == "decoder.embed_tokens.weight":
                found[self.head] = shape
        return found

    def to_ours(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return our tensors `names` out of theirs."""
        ours = {}
        for name in names:
            parts = [tensors[n] for n in self.theirs(name)]
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return ours

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return their tensors out of ours, without the dead ones."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            names = self.theirs(name)
            found |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))
            if self.head and name == "decoder.embed_tokens.weight":
                found[self.head] = tensor
        return found


TRANSFORMERS = Layout(
    "transformers Kosmos-2",
    (
        ("decoder", "text_model.model"),
        ("connector", "image_to_text_projection"),
        ("vision.visual", "vision_model.model"),
    ),
    _TOWER_OF_TRANSFORMERS,
    head="text_model.lm_head.weight",
)
FAIRSEQ = Layout(
    "released Kosmos",
    (("decoder", "gpt_model.decoder"), ("connector", "img_connector"), ("vision.visual", "img_model.visual")),
    ((".attn.", ".ts_attn."),),
    head="gpt_model.decoder.output_projection.weight",
    dead={
        "gpt_model.decoder.embed_positions._float_tensor": (1,),  # tells fairseq which device it is on
        "gpt_model.decoder.self_attn_sope.scale": (32,),  # of xPos, which their forward does not call
    },
)
CLIP = Layout("transformers CLIP", (("visual", "vision_model"),), _TOWER_OF_TRANSFORMERS)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(found: Shapes, wanted: Shapes, where: str, *, allowed: Sequence[str] = ()) -> None:
    """Make sure that a file holds the tensors that a model wants, and no others.

    Args:
        found: name -> shape in the file.
        wanted: name -> shape in the model.
        where: the file, for the message.
        allowed: names that may be there besides.

    Raises: UserError listing every missing, surplus and misshapen tensor.
    """
    known = {*wanted, *allowed}
    lines = [f"  missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    lines += [f"  surplus: {name} {shape}" for name, shape in found.items() if name not in known]
    lines += [
        f"  misshapen: {name} is {found[name]} in the file, {shape} in the model"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if lines:
        raise UserError("\n".join([f"{where} does not fit the model in {len(lines)} of {len(wanted)} tensors:", *lines]))
