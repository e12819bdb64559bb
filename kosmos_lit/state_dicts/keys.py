"""Key maps: the names that other programs give to a Kosmos's tensors, one table per program, used in both directions.

The decoder's and the connector's parameters have the released names already, so they differ by a prefix. The tower is
open_clip's, whose attention keeps q, k and v in one matrix where the others have three; no tensor is transposed or
reshaped.

| kosmos-lit          | transformers Kosmos-2         | released (fairseq)           | transformers CLIP |
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
class KeyMap:
    """How another program names the tensors of a Kosmos."""

    name: str
    prefixes: tuple[tuple[str, str], ...]
    """Of our names and the external ones."""
    parts: tuple[tuple[str, str], ...] = ()
    """Parts of names below the tower's prefix, ours and the external ones, replaced one after another."""
    head: str | None = None
    """External name of the output matrix, which is the embedding again."""
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Buffers in the files that no model reads, with their shapes."""

    def external_names(self, name: str) -> tuple[str, ...]:
        """Return the external names of our tensor `name`: one, or three whose rows follow one another (q, k, v)."""
        for prefix, external in self.prefixes:
            if name.startswith(prefix + "."):
                # Names differ behind the prefix in the tower only.
                inside, is_tower = name.removeprefix(prefix), "visual" in prefix
                for part, other in self.parts if is_tower else ():
                    inside = inside.replace(part, other)
                for kind in ("weight", "bias") if is_tower else ():
                    if inside.endswith(f".in_proj_{kind}"):
                        stem = external + inside.removesuffix(f"in_proj_{kind}")
                        return tuple(f"{stem}{p}_proj.{kind}" for p in "qkv")
                return (external + inside,)
        raise UserError(f"{self.name} files have no place for {name}")

    def external_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return name -> shape in an external file, for our tensors' `shapes`; without the unused buffers."""
        external: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            names = self.external_names(name)
            external |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))  # q, k and v share the rows
            if self.head and name == "decoder.embed_tokens.weight":
                external[self.head] = shape
        return external

    def to_kosmos(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return our tensors `names`, made of external ones."""
        kosmos = {}
        for name in names:
            parts = [tensors[n] for n in self.external_names(name)]
            kosmos[name] = parts[0] if len(parts) == 1 else torch.cat(parts)  # q, k, v by rows
        return kosmos

    def to_external(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return external tensors, made of ours; without the unused buffers."""
        external: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            names = self.external_names(name)
            external |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))
            if self.head and name == "decoder.embed_tokens.weight":
                external[self.head] = tensor  # tied: the same tensor under both names
        return external


TRANSFORMERS = KeyMap(
    "transformers Kosmos-2",
    (
        ("decoder", "text_model.model"),
        ("connector", "image_to_text_projection"),
        ("vision.visual", "vision_model.model"),
    ),
    _TOWER_OF_TRANSFORMERS,
    head="text_model.lm_head.weight",
)
FAIRSEQ = KeyMap(
    "released Kosmos",
    (("decoder", "gpt_model.decoder"), ("connector", "img_connector"), ("vision.visual", "img_model.visual")),
    ((".attn.", ".ts_attn."),),
    head="gpt_model.decoder.output_projection.weight",
    unused={
        "gpt_model.decoder.embed_positions._float_tensor": (1,),  # tells fairseq which device it is on
        "gpt_model.decoder.self_attn_sope.scale": (32,),  # of xPos, which their forward does not call
    },
)
CLIP = KeyMap("transformers CLIP", (("visual", "vision_model"),), _TOWER_OF_TRANSFORMERS)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(actual: Shapes, expected: Shapes, where: str, *, allowed: Sequence[str] = ()) -> None:
    """Make sure that a file holds the tensors of a model, and no others.

    Args:
        actual: name -> shape in the file.
        expected: name -> shape in the model.
        where: the file, for the message.
        allowed: names that the file may hold besides.

    Raises: UserError listing every missing, surplus and misshapen tensor.
    """
    permitted = {*expected, *allowed}
    lines = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in actual]
    lines += [f"  surplus: {name} {shape}" for name, shape in actual.items() if name not in permitted]
    lines += [
        f"  misshapen: {name} is {actual[name]} in the file, {shape} in the model"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    if lines:
        raise UserError("\n".join([f"{where} does not fit the model in {len(lines)} of {len(expected)} tensors:", *lines]))
