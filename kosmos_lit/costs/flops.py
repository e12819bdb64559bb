"""Floating-point operations of a model, counted from its config alone, without building it.

    matrix      2 in out a row forward; as much again for each gradient that is needed, the input's and the weight's
    attention   2 D a pair of positions for the scores, 2 D for the weighted sum; each twice that again backward
    vision      a plain ViT by the same rules; any other tower counted by torch on the meta device

These are the operations that the model asks for, whatever a program does: real positions without padding, n^2 / 2 pairs of
positions a document (the causal half; `Flops.full` has both halves), vocabulary rows of supervised positions only. What is
recomputed in the backward pass counts once; elementwise work, norms, softmax and look-ups count nothing. Gradients count
only where something that trains needs them: a frozen matrix has none for its weight, a frozen tower no backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from kosmos_lit.config import KosmosConfig, VisionConfig
from kosmos_lit.init_from import matches

if TYPE_CHECKING:
    from kosmos_lit.batch import KosmosBatch

Part = Literal["blocks", "attention", "head", "connector", "vision"]
Trains = Callable[[str], bool]
"""Whether the parameter of that name trains."""
PLAIN_VIT = {
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "no_ln_pre",
    "act_kwargs",
    "norm_kwargs",
}
"""Fields of open_clip's vision tables with which a ViT has plain blocks."""


@dataclass(frozen=True)
class Work:
    """Sizes of a batch, or of any other set of documents."""

    n_tokens: int = 0
    """Positions that are not padding, image slots included."""
    n_pairs: int = 0
    """Pairs of positions of one document, in both orders: the sum of squared lengths."""
    n_targets: int = 0
    """Supervised positions."""
    n_images: int = 0

    @classmethod
    def of_documents(cls, lengths: Iterable[int], n_targets: int, n_images: int) -> Work:
        """Return the work of documents with `lengths` positions, none of them padding."""
        lengths = tuple(lengths)
        return cls(sum(lengths), sum(n * n for n in lengths), n_targets, n_images)

    @classmethod
    def of_batch(cls, batch: KosmosBatch, document_attention: str = "own") -> Work:
        """Return the work of a micro-batch from sizes on the host: a GPU's tensors need no synchronisation."""
        B, T = batch.tokens.shape
        assert sum(batch.padding) == B * T - batch.n_real, f"padding {batch.padding}, but {batch.n_real} real positions"
        if document_attention == "row":
            filled = [T - n for n in batch.padding or (0,) * B]
            return cls.of_documents(filled, len(batch.loss_at), len(batch.images))
        # Among the lengths, a row's padding is a document of its own.
        pairs = sum(n * n for n in batch.lengths) - sum(n * n for n in batch.padding)
        return cls(batch.n_real, pairs, len(batch.loss_at), len(batch.images))

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part; an addition and a multiplication count as two."""

    blocks: float = 0.0
    """The decoder's matrices."""
    attention: float = 0.0
    """Of the decoder, causal half."""
    head: float = 0.0
    """The vocabulary projection."""
    connector: float = 0.0
    vision: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum, with attention's causal half."""
        return float(sum(astuple(self)))

    @property
    def full(self) -> float:
        """Return the sum as some publish it: attention counted as if it saw the future too."""
        return self.total + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class ModelFlops:
    """Counts a model's operations in forward passes and training steps."""

    def __init__(self, config: KosmosConfig, freeze: Sequence[str] = ()) -> None:
        """Take a model's config, and the patterns of `model.freeze`."""
        self.config, self.freeze = config, tuple(freeze)

    def forward(self, work: Work) -> Flops:
        """Return the operations of a forward pass."""
        return _scale(self._traces[True].forward, work)

    def training(self, work: Work) -> Flops:
        """Return the operations of a forward and a backward pass over a micro-batch.

        With a frozen decoder, pass micro-batches one by one: one without images has no backward pass.
        """
        trace = self._traces[work.n_images > 0]
        return _scale(trace.forward, work) + _scale(trace.backward, work)

    def _trains(self, name: str) -> bool:
        """Whether the parameter of that name trains; towers must be plain ViTs."""
        if any(matches(name, pattern) for pattern in self.freeze):
            return False
        if self.config.lora is not None:
            return ".lora_A." in name or ".lora_B." in name
        rule = self.config.vision.trainable
        if name.startswith("vision.") and rule == "last_block":
            last = f"vision.visual.transformer.resblocks.{self._tower['layers'] - 1}."
            return name.startswith((last, "vision.visual.ln_post."))
        return not name.startswith("vision.") or rule == "all"

    @cached_property
    def _tower(self) -> dict[str, Any]:
        from kosmos_lit.vision import describe

        table: dict[str, Any] = describe(self.config.vision)["vision_cfg"]
        return {"layers": 12, "width": 768, "mlp_ratio": 4.0, "patch_size": 16} | table  # open_clip's defaults

    @cached_property
    def _traces(self) -> dict[bool, _Trace]:
        """The operations of one position, pair, target and image, without and with images in the batch."""
        traces = {}
        for has_images in (False, True):
            trace = traces[has_images] = _Trace(self.config, self._trains)
            latents = has_images and self._trace_images(trace)
            trace.decoder(latents)
        return traces

    def _trace_images(self, trace: _Trace) -> bool:
        """Trace tower and connector; return whether the latents need a gradient."""
        table = self._tower
        if set(table) <= PLAIN_VIT and isinstance(table["layers"], int) and isinstance(table["patch_size"], int):
            return trace.connector(*trace.plain_tower(table, self.config.vision.image_size))
        counted = self._counted_tower
        trace.forward["vision"] += counted.forward
        trace.backward["vision"] += counted.backward
        return trace.connector(counted.n_features, counted.width, counted.needs_gradient)

    @cached_property
    def _counted_tower(self) -> _CountedTower:
        frozen = self.config.lora is not None  # adapters alone train, and the tower has none
        return _count_tower(replace(self.config.vision, trainable="none") if frozen else self.config.vision, self.freeze)


def _scale(unit: dict[Part, float], work: Work) -> Flops:
    """Return the operations of `work` from those of a position, a pair, a target and an image."""
    return Flops(
        blocks=unit["blocks"] * work.n_tokens,
        attention=unit["attention"] * work.n_pairs / 2,
        head=unit["head"] * work.n_targets,
        connector=unit["connector"] * work.n_images,
        vision=unit["vision"] * work.n_images,
    )


class _Trace:
    """Follows a forward pass as autograd does, with booleans in place of tensors: whether a value needs a gradient."""

    def __init__(self, config: KosmosConfig, trains: Trains) -> None:
        self.config, self.trains = config, trains
        parts: tuple[Part, ...] = ("blocks", "attention", "head", "connector", "vision")
        self.forward, self.backward = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)

    # ---- operations

    def matmul(self, part: Part, cost: float, a: bool, b: bool) -> bool:
        """Count a product; the gradient of each factor costs what the product does."""
        self.forward[part] += cost
        self.backward[part] += cost * (a + b)
        return a or b

    def linear(self, part: Part, name: str, n_in: int, n_out: int, x: bool, rows: int = 1, *, bias: bool = True) -> bool:
        """Count a linear layer, with its adapter if it has one."""
        lora = self.config.lora
        # With a dot before both, a target is whole parts of the name's end; the tower has no adapters.
        adapted = lora is not None and part != "vision" and any(f".{name}".endswith(f".{end}") for end in lora.targets)
        base = f"{name}.base_layer" if adapted else name
        out = self.matmul(part, 2 * rows * n_in * n_out, x, self.trains(f"{base}.weight"))
        out = out or (bias and self.trains(f"{base}.bias"))  # a bias costs nothing, but its gradient needs the output's
        if adapted and lora is not None:
            inner = self.matmul(part, 2 * rows * n_in * lora.rank, x, self.trains(f"{name}.lora_A.default.weight"))
            outer = self.trains(f"{name}.lora_B.default.weight")
            out = self.matmul(part, 2 * rows * lora.rank * n_out, inner, outer) or out
        return out

    def norm(self, name: str, x: bool) -> bool:
        return x or self.trains(f"{name}.weight") or self.trains(f"{name}.bias")

    def attention(self, part: Part, pairs: int, dim: int, q: bool, k: bool, v: bool) -> bool:
        weights = self.matmul(part, 2 * pairs * dim, q, k)
        return self.matmul(part, 2 * pairs * dim, weights, v)

    # ---- parts

    def decoder(self, latents: bool) -> None:
        c = self.config.decoder
        D, F, head = c.dim, c.ffn_dim, "decoder.embed_tokens.weight"
        x = latents or self.trains(head) or (c.positions == "learned" and self.trains("decoder.embed_positions.weight"))
        for i in range(c.n_layers):
            layer = f"decoder.layers.{i}"
            first, last = f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"
            h = x if c.normalises_sums else self.norm(first, x)
            q, k, v = (self.linear("blocks", f"{layer}.self_attn.{p}_proj", D, D, h) for p in "qkv")
            h = self.attention("attention", 1, D, q, k, v)  # one pair of positions: a unit of `_scale`
            h = self.norm(f"{layer}.self_attn.inner_attn_ln", h) if c.norm == "sub" else h
            x = self.linear("blocks", f"{layer}.self_attn.out_proj", D, D, h) or x  # `or x`: beside the residual
            x = self.norm(first, x) if c.normalises_sums else x
            h = self.linear("blocks", f"{layer}.ffn.fc1", D, F, x if c.normalises_sums else self.norm(last, x))
            h = self.norm(f"{layer}.ffn.ffn_layernorm", h) if c.norm == "sub" else h
            x = self.linear("blocks", f"{layer}.ffn.fc2", F, D, h) or x
            x = self.norm(last, x) if c.normalises_sums else x
        x = x if c.normalises_sums else self.norm("decoder.layer_norm", x)
        self.matmul("head", 2 * D * c.vocab_size, x, self.trains(head))

    def connector(self, n_features: int, width: int, features: bool) -> bool:
        """Count the connector on P features of an image; return whether its latents need a gradient."""
        c, D, P, C = self.config.connector, self.config.decoder.dim, n_features, width
        L, query = c.n_latents, self.trains("connector.latent_query")
        match c.kind:
            case "resampler":
                x = self.linear("connector", "connector.dense", C, D, features, P)
                # Latents attend to P features and L latents.
                return self._cross("connector.x_attn", D, L, P + L, query, x or query)
            case "perceiver":
                x = query
                for i in range(c.n_layers):
                    layer = f"connector.layers.{i}"
                    latents = self.norm(f"{layer}.latents_layer_norm", x)
                    seen = self.norm(f"{layer}.features_layer_norm", features) or latents
                    x = self._cross(f"{layer}.x_attn", C, L, P + L, latents, seen, bias=False) or x
                    h = self.norm(f"{layer}.final_layer_norm", x)
                    h = self.linear("connector", f"{layer}.fc1", C, 4 * C, h, L, bias=False)
                    x = self.linear("connector", f"{layer}.fc2", 4 * C, C, h, L, bias=False) or x
                return self.linear("connector", "connector.dense", C, D, self.norm("connector.layer_norm", x), L)
            case "pool":
                # Without projections: the features themselves are keys and values.
                x = self.attention("connector", L * P, C, query, features, features)
                return self.linear("connector", "connector.dense", C, D, x, L)
            case "linear":
                return self.linear("connector", "connector.dense", C, D, features, L)  # after the mean, which is no product
            case "mlp":
                x = self.linear("connector", "connector.dense", C, D, features, L)
                return self.linear("connector", "connector.predict", D, D, x, L)

    def _cross(
        self, name: str, dim: int, n_queries: int, n_keys: int, queries: bool, keys: bool, *, bias: bool = True
    ) -> bool:
        k = self.linear("connector", f"{name}.k_proj", dim, dim, keys, n_keys, bias=bias)
        v = self.linear("connector", f"{name}.v_proj", dim, dim, keys, n_keys, bias=bias)
        q = self.linear("connector", f"{name}.q_proj", dim, dim, queries, n_queries, bias=bias)
        x = self.attention("connector", n_queries * n_keys, dim, q, k, v)
        return self.linear("connector", f"{name}.out_proj", dim, dim, x, n_queries, bias=bias)

    def plain_tower(self, table: dict[str, Any], side: int) -> tuple[int, int, bool]:
        """Count open_clip's ViT on an image; return P, C and whether the features need a gradient."""
        C, patch, visual = table["width"], table["patch_size"], "vision.visual"
        hidden = int(C * table["mlp_ratio"])
        n_patches = (side // patch) ** 2
        P = n_patches + 1  # with the class token
        # Pixels need no gradient.
        x = self.matmul("vision", 2 * n_patches * 3 * patch**2 * C, False, self.trains(f"{visual}.conv1.weight"))
        x = x or self.trains(f"{visual}.class_embedding") or self.trains(f"{visual}.positional_embedding")
        x = x if table.get("no_ln_pre") else self.norm(f"{visual}.ln_pre", x)
        for i in range(table["layers"]):
            block = f"{visual}.transformer.resblocks.{i}"
            h = self.norm(f"{block}.ln_1", x)
            weight, bias = self.trains(f"{block}.attn.in_proj_weight"), self.trains(f"{block}.attn.in_proj_bias")
            h = self.matmul("vision", 2 * P * C * 3 * C, h, weight) or bias  # q, k and v in one
            h = self.attention("vision", P * P, C, h, h, h)
            x = self.linear("vision", f"{block}.attn.out_proj", C, C, h, P) or x
            h = self.linear("vision", f"{block}.mlp.c_fc", C, hidden, self.norm(f"{block}.ln_2", x), P)
            x = self.linear("vision", f"{block}.mlp.c_proj", hidden, C, h, P) or x
        return P, C, self.norm(f"{visual}.ln_post", x)


@dataclass(frozen=True)
class _CountedTower:
    """Operations for one image as torch counts them, and the features' sizes."""

    forward: int
    backward: int
    n_features: int
    width: int
    needs_gradient: bool


def _count_tower(config: VisionConfig, freeze: Sequence[str]) -> _CountedTower:
    """Return what torch's counter gives for a tower without weights, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kosmos_lit.vision import VisionTower

    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # a run's own random numbers must not change
        tower = VisionTower(replace(config, pretrained=None))
    for name, parameter in tower.named_parameters():
        if any(matches(f"vision.{name}", pattern) for pattern in freeze):
            parameter.requires_grad_(False)
    side = config.image_size
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        features = tower(torch.zeros(1, 3, side, side, dtype=torch.uint8, device="meta"))
        forward = counter.get_total_flops()
        if features.requires_grad:  # a frozen tower has no backward pass
            features.sum().backward()
    backward = counter.get_total_flops() - forward
    return _CountedTower(forward, backward, features.shape[1], features.shape[2], features.requires_grad)


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any = None
) -> int:
    """Return the forward pass's operations for each gradient in the output mask."""
    # torch's own formula ignores groups, and counts a depthwise convolution 100 times.
    *_, transposed, _, _, output_mask = rest
    positions = (x if transposed else grad)[2:]
    n_gradients: int = sum(output_mask[:2])  # of input and weight; the bias's is no product
    return 2 * x[0] * math.prod(positions) * math.prod(weight) * n_gradients
