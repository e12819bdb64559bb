"""The image tower: pixels to one feature vector per patch, through open_clip. The only importer of open_clip.

Features are the last block's output *after* the final LayerNorm, on the class token and all patches, without CLIP's
projection, each vector scaled to length 1 (released Kosmos-2 `clip.py`; the paper only says "1,024 feature dimensions").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmos_lit.config import VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.ops.graphs import Compiler, Graphs
from kosmos_lit.state_dicts.clip import load_tower

BLOCK = re.compile(r"(?:.*\.)?(?:resblocks|blocks)\.\d+")
"""Name of a transformer block, in open_clip's own towers and in timm's."""
PARTS = 4
"""Compiled blocks take the images beyond whole chunks in chunks of a fourth of the size, the last one padded."""


class VisionTower(nn.Module):
    """An open_clip tower, its parameters named as open_clip names them below `visual`."""

    def __init__(self, config: VisionConfig) -> None:
        """Raises: UserError if open_clip does not know the architecture, or weights or image size do not fit it."""
        super().__init__()
        self.config = config
        self.visual = _build(config)
        trunk = getattr(self.visual, "trunk", self.visual)
        # Of open_clip's ViT and of timm's; a convolutional tower has neither.
        self._has_tokens = hasattr(trunk, "class_embedding") or hasattr(trunk, "num_prefix_tokens")
        self.width = self._find_width()
        # What open_clip holds fixed, such as sinusoidal positions, stays so under every rule.
        for parameter, trains in _trainable(self.visual, config.trainable):
            parameter.requires_grad_(trains and parameter.requires_grad)
        self._is_compiled = False
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.originals: dict[str, Tensor] = {}
        """Frozen matrices before `round_frozen`, by name, in host memory; empty if they are not rounded."""
        self.register_state_dict_post_hook(_with_originals)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_without_rounding)  # type: ignore[no-untyped-call]

    def frozen_matrices(self) -> dict[str, nn.Parameter]:
        """Return the frozen weights of matrix products and convolutions by name, which autocast casts at each use."""
        names = {nn.Linear: "weight", nn.modules.conv._ConvNd: "weight", nn.MultiheadAttention: "in_proj_weight"}
        matrices: dict[str, nn.Parameter] = {}
        for prefix, module in self.named_modules():
            for kind, name in names.items():
                parameter = getattr(module, name, None) if isinstance(module, kind) else None
                if parameter is not None and not parameter.requires_grad:
                    matrices[f"{prefix}.{name}"] = parameter
        return matrices

    def round_frozen(self, dtype: torch.dtype) -> None:
        """Keep the frozen matrices in autocast's `dtype`, and their originals in host memory.

        Features under autocast stay the same bit by bit, as it would cast these weights at each use, and what is frozen is
        not in its cache. State dicts still hold the originals. (One exception: in evaluation on a CPU, PyTorch's fused
        attention passed over autocast and was float32; with rounded weights it is not used.)
        """
        for name, parameter in self.frozen_matrices().items():
            self.originals.setdefault(name, parameter.data.cpu())
            parameter.data = parameter.data.to(dtype)

    def restore_frozen(self) -> None:
        """Undo `round_frozen`."""
        matrices = self.frozen_matrices()
        for name, original in self.originals.items():
            matrices[name].data = original.to(matrices[name].device)
        self.originals.clear()

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Have the originals of the frozen matrices in a block: outside autocast it is they that must be multiplied."""
        dtypes = {self.frozen_matrices()[name].dtype for name in self.originals}
        self.restore_frozen()
        try:
            yield
        finally:
            for dtype in dtypes:  # one, or none
                self.round_frozen(dtype)

    def init(self) -> None:
        """Give a tower without pretrained weights positions of unit scale; the rest is as open_clip leaves it.

        open_clip draws them from N(0, 1/C). A LayerNorm follows, so what counts is their size beside the patches'
        (about 1): at 1 a small tower tells places apart many times sooner.
        """
        position = getattr(self.visual, "positional_embedding", None)
        if self.config.pretrained is None and position is not None and position.requires_grad:
            nn.init.normal_(position)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) uint8 to features (N, 1 + P, C); towers without a class token give (N, P, C)."""
        # `[:n]` drops the padding of the last chunk.
        return torch.cat([self._features(chunk)[:n] for chunk, n in self._chunks(images)])

    def compile_blocks(self, compiler: Compiler | None = None) -> None:
        """Run each transformer block through torch.compile in training, where chunks then have one of two sizes.

        Args:
            compiler: of the whole model; None: graphs of the tower's own.
        """
        compiler = compiler or Graphs()
        for block in self._blocks():
            block.forward = partial(_forward, block, compiler)  # no module around it: parameters keep their names
        self._is_compiled = True

    def _chunks(self, images: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield chunks, and how many of their images are real; padding gives compiled blocks the same shapes every time."""
        N, size, static = len(images), self.config.chunk, self._is_compiled and torch.is_grad_enabled()
        n_full = N // size * size
        part = max(1, size // PARTS) if static else size
        for first in (*range(0, n_full, size), *range(n_full, max(N, 1), part)):  # no image is one empty chunk
            chunk = images[first : first + (size if first < n_full else part)]
            missing = part - len(chunk) if static else 0  # negative for whole chunks
            if missing > 0:
                yield torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]), len(chunk)
            else:
                yield chunk, len(chunk)

    def _blocks(self) -> list[nn.Module]:
        """Return the transformer blocks; a convolutional tower has none."""
        # `fullmatch`: a block, and not the modules inside it.
        return [module for name, module in self.visual.named_modules() if BLOCK.fullmatch(name)]

    def _features(self, images: Tensor) -> Tensor:
        mean, std = self._mean_std(images.device)
        # In float32, then rounded once to the dtype of the weights.
        pixels = (images.float() - mean) / std
        features = self._last_layer(pixels.to(next(self.visual.parameters()).dtype))
        length = self.config.feature_length
        return features if length is None else length * F.normalize(features, dim=-1)

    def _last_layer(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, H, W) to the last layer's output, after its norm if it has one, as (N, tokens, C)."""
        layout: dict[str, Any] = {"output_fmt": "NCHW"}
        if self._has_tokens:
            layout = {"output_fmt": "NLC", "output_extra_tokens": True}
        # `indices` counts from the end: 1 is the last block alone.
        outputs: dict[str, Any] = self.visual.forward_intermediates(  # type: ignore[operator]
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True, **layout
        )
        features: Tensor = outputs["image_intermediates"][-1]
        if not self._has_tokens:  # a convolutional tower: the positions of its feature map are the patches
            return features.flatten(2).transpose(1, 2)  # (N, P, C)
        if prefix := outputs.get("image_intermediates_prefix"):
            features = torch.cat([prefix[-1], features], dim=1)  # (N, 1 + P, C): the class token comes first
        return features

    def _find_width(self) -> int:
        """Return C: the width of the last LayerNorm, or for a tower without any, of its output."""
        norms = [m for m in self.visual.modules() if isinstance(m, nn.LayerNorm)]
        if norms:
            return norms[-1].normalized_shape[0]
        weight, size = next(self.visual.parameters()), self.config.image_size
        with torch.no_grad():
            return self._last_layer(weight.new_zeros(1, 3, size, size)).shape[-1]

    def _mean_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of pixels in [0, 255], (1, 3, 1, 1) float32 each."""
        if device not in self._statistics:  # no buffers: those follow the weights' dtype
            both = torch.tensor([self.config.mean, self.config.std], dtype=torch.float32) * 255  # (2, 3)
            mean, std = both.to(device).view(2, 1, 3, 1, 1)
            self._statistics[device] = mean, std
        return self._statistics[device]


def _with_originals(tower: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(tower, VisionTower)
    state.update({prefix + name: original for name, original in tower.originals.items()})


def _without_rounding(tower: nn.Module, *_: Any) -> None:
    assert isinstance(tower, VisionTower)
    tower.restore_frozen()  # the loaded weights may be others, and must not be rounded on the way in


def _forward(block: nn.Module, compiler: Compiler, *args: Any, **kwargs: Any) -> Any:
    """Run a block, compiled in training; in evaluation numbers of images vary, and each would be compiled anew."""
    run = compiler(_eager) if torch.is_grad_enabled() else _eager
    return run(block, *args, **kwargs)


def _eager(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # The class's own `forward`: the instance's one is `_forward`, which calls this function.
    return type(block).forward(block, *args, **kwargs)


def _build(config: VisionConfig) -> nn.Module:
    import open_clip

    table = describe(config)
    size = table["vision_cfg"].get("image_size", 224)  # open_clip's default
    if size != config.image_size:
        raise UserError(f"vision.image_size is {config.image_size}, but {config.architecture} reads {size} pixels")
    local = Path(config.pretrained) if config.pretrained is not None and Path(config.pretrained).exists() else None
    try:
        if config.pretrained is None or local:
            # open_clip builds towers in pairs: this text tower is as small as can be, and dropped.
            text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
            pair = open_clip.CLIP(table["embed_dim"], table["vision_cfg"], text, quick_gelu=table.get("quick_gelu", False))
        elif isinstance(config.architecture, str) and not config.architecture.endswith(".json"):
            # Without `require_pretrained` an unknown tag would leave random weights behind a warning.
            pair = open_clip.create_model(config.architecture, pretrained=config.pretrained, require_pretrained=True)
        else:
            # A UserError is a ValueError: the clause below completes the message.
            raise UserError("only names of open_clip have released weights, and there is no such file")
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"vision: cannot build {config.architecture!r} with pretrained={config.pretrained!r}: {error}; "
            "give a local weight file or folder, a tag that `open_clip.list_pretrained()` knows, or null for random weights"
        ) from error
    visual: nn.Module = pair.visual
    visual.proj = None  # type: ignore[assignment]  # KOSMOS reads features before CLIP's projection
    if local:
        load_tower(visual, local)
    return visual


def describe(config: VisionConfig) -> dict[str, Any]:
    """Return an architecture as open_clip's model configs describe it.

    Raises: UserError if open_clip does not know its name, or its table lacks something.
    """
    import open_clip

    table = config.resolved().architecture
    if isinstance(table, str):
        table = open_clip.get_model_config(table)
        if table is None:
            raise UserError(
                f"vision.architecture: open_clip has no {config.architecture!r}; `open_clip.list_models()` names what it "
                "has, and a path ending in .json is read as a model config"
            )
    if missing := [key for key in ("embed_dim", "vision_cfg") if not isinstance(table, dict) or key not in table]:
        raise UserError(
            f"vision.architecture: {config.architecture} is no open_clip model config: {', '.join(missing)} missing"
        )
    return table


def outside_source(architecture: str | dict[str, Any]) -> str | None:
    """Return the host or file that building an architecture would read, None if none: what a stranger's file may name."""
    import open_clip

    if isinstance(architecture, str):
        return None if architecture in open_clip.list_models() else repr(architecture)
    tower = architecture.get("vision_cfg")
    # What is no table cannot be built, which says so in its own words.
    tower = tower if isinstance(tower, dict) else {}
    # timm downloads weights, and takes names with a prefix for other hosts and folders.
    name = str(tower.get("timm_model_name") or "")
    if tower.get("timm_model_pretrained"):
        return f"the released weights of {name!r}"
    return repr(name) if ":" in name or "/" in name else None


def _trainable(visual: nn.Module, rule: str) -> list[tuple[nn.Parameter, bool]]:
    """Return each parameter, and whether `rule` trains it.

    `last_block` is the released flag `--no-freeze-layer resblocks.23,ln_post`, for any number of blocks.
    """
    named = list(visual.named_parameters())
    if rule == "last_block":
        # With the dot behind the number, so that block 1 is no beginning of block 11's names.
        blocks = [match[0] for name, _ in named if (match := re.match(f"{BLOCK.pattern}\\.", name))]
        if not blocks:
            raise UserError("vision.trainable: last_block, but the tower has no numbered blocks; use none or all")
        # The norm after the last block, as open_clip's ViT, timm's ViT and ConvNeXt name it.
        last = (blocks[-1], "ln_post.", "trunk.norm.", "trunk.head.norm.")
        return [(parameter, name.startswith(last)) for name, parameter in named]
    return [(parameter, rule == "all") for _, parameter in named]


def imagenet_names() -> list[str]:
    """Return the names of ImageNet's 1,000 classes that CLIP is evaluated with, in the order of synsets; two occur twice."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)
