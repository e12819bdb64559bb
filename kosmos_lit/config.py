"""Configuration tables of model and optimizer: every size and switch, with the paper's default. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from kosmos_lit.errors import UserError
from kosmos_lit.shipped import find_file

# OpenAI's normalisation of CLIP's input, in RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Trainable = Literal["none", "last_block", "all"]
Norm = Literal["sub", "pre", "post", "deepnorm"]
Positions = Literal["xpos", "rotary", "sinusoidal", "learned", "none"]
Init = Literal["torchscale", "magneto", "gpt2"]
DocumentAttention = Literal["own", "row"]
ConnectorKind = Literal["resampler", "perceiver", "linear", "mlp", "pool"]
Recompute = Literal["none", "selective", "full"]
Kernel = Literal["auto", "xformers", "cudnn", "flex", "sdpa", "reference"]
Fp8 = Literal["none", "tensorwise", "rowwise"]


# None outside of `collect_errors`, where the first error raises.
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """Collect the errors of all tables that are built in the context, instead of raising the first one."""
    errors: list[str] = []
    token = _collected.set(errors)
    try:
        yield errors
    finally:
        _collected.reset(token)


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Base of the tables below: construction from plain data, and checks that name the field.

    A dataclass itself, as jsonargparse merges nested dataclasses only where every base class is one.
    """

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Self) -> Self:
        """Build from nested plain data, as a checkpoint holds it.

        Raises: UserError naming keys that the table does not have.
        """
        if isinstance(data, cls):
            return data
        assert isinstance(data, Mapping)
        # Not `__annotations__`, which holds strings under `from __future__ import annotations`.
        hints = get_type_hints(cls)
        if unknown := sorted(set(data) - set(hints)):
            raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
        values = {}
        for key, value in data.items():
            if not _fits(value, hints[key]):
                # A generic such as `tuple[float, float]` is no class; its own text says more than its name.
                expected = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else hints[key]
                raise UserError(f"{cls.__name__}: {key} must be {expected}, got {value!r}")
            # The field's own table, or the one of `LoraConfig | None`.
            table = next((t for t in (hints[key], *get_args(hints[key])) if is_dataclass(t)), None)
            values[key] = table.from_dict(value) if table and isinstance(value, Mapping) else value  # type: ignore[union-attr]
            # JSON and YAML know no tuples.
            if isinstance(value, list):
                values[key] = tuple(value)
        return cls(**values)

    def _check(self, ok: bool, message: str) -> None:
        if ok:
            return
        message = f"{type(self).__name__}: {message}"
        if (errors := _collected.get()) is None:
            raise UserError(message)
        errors.append(message)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            self._check(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            # The type itself, or a part of `Fp8 | bool`.
            if literal := next((t for t in (hint, *get_args(hint)) if get_origin(t) is Literal), None):
                value, choices = getattr(self, name), get_args(literal)
                self._check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")

    def _check_rates(self) -> None:
        # Dropout rates, by the names of their fields.
        for name in (f.name for f in fields(self) if f.name.endswith("_rate")):
            value = getattr(self, name)
            self._check(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether plain data is valid for a field of a type."""
    if is_dataclass(hint):
        return isinstance(value, Mapping) or (isinstance(hint, type) and isinstance(value, hint))
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or origin is Literal:  # `_check_choices` checks choices, with the other fields
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        # Every tuple field has elements of one type.
        return isinstance(value, list | tuple) and all(_fits(v, args[0]) for v in value)
    # bool is a subclass of int, and would pass for a number.
    if isinstance(value, bool):
        return hint is bool
    # YAML may write 1 for 1.0; `dict[str, Any]` is checked as dict.
    return isinstance(value, int | float if hint is float else origin or hint)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(BaseConfig):
    """The image tower: any open_clip vision tower. The default is the paper's, OpenAI's CLIP ViT-L/14."""

    architecture: str | dict[str, Any] = "ViT-L-14-quickgelu"
    """Name of an open_clip architecture, path of a JSON file in open_clip's model-config format, or such a table itself."""
    pretrained: str | None = "openai"
    """Tag of released weights, path of a local weight file, or None to start from random weights."""
    image_size: int = 224
    """Side of the square input in pixels; must be the architecture's own."""
    trainable: Trainable = "last_block"
    """What of the tower trains; `last_block` is the paper's rule: the last transformer block and the final LayerNorm."""
    feature_length: float | None = 1.0
    """Length to which each feature vector is scaled before the connector: 1 in the released models; None: as it comes."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Per-channel mean of the input, pixels in [0, 1]."""
    std: tuple[float, float, float] = CLIP_STD
    """Per-channel standard deviation of the input, pixels in [0, 1]."""
    chunk: int = 64
    """Images that go through the tower at a time."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_positive("image_size", "chunk")
        length = self.feature_length
        self._check(length is None or length > 0, f"feature_length must be positive or null, got {length}")

    def resolved(self) -> Self:
        """Return the table with a JSON file's content in place of its path, as checkpoints store it.

        Raises: UserError if the file is missing or no model config.
        """
        path = self.architecture
        # A name that open_clip knows, or a table already.
        if not isinstance(path, str) or not path.endswith(".json"):
            return self
        file = find_file(path, "vision.architecture", ".json")
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # not readable, no JSON, or no UTF-8
            raise UserError(f"vision.architecture: {path} is no open_clip model config: {error}") from error
        return replace(self, architecture=table)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(BaseConfig):
    """The connector from tower features to decoder embeddings."""

    kind: ConnectorKind = "resampler"
    """`resampler`: learned queries with one cross-attention (KOSMOS-1); `perceiver`: Flamingo's, `n_layers` of
    cross-attention and feed-forward network at the tower's width; `linear`: the mean of neighbouring features, then one
    matrix; `mlp`: the same mean, then two matrices with a GELU between (LLaVA-1.5); `pool`: each latent a mean of all
    features with weights of its own, learned, then one matrix."""
    n_latents: int = 64
    """L: embeddings per image, and so slots per image in a row."""
    n_heads: int = 32
    """Heads of the resampler's and the perceiver's cross-attention: divides the decoder's width, or the tower's."""
    n_layers: int = 6
    """Layers of the perceiver, 6 in Flamingo; the other kinds have none."""
    attention_dropout_rate: float = 0.1
    """Dropout on the resampler's and the perceiver's attention weights."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_positive("n_latents", "n_heads", "n_layers")
        self._check_rates()


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(BaseConfig):
    """The language model: the paper's 1.3B decoder by default (Table 17)."""

    vocab_size: int = 64_007  # 64,000 SentencePiece pieces less their 3 control tokens, and 10 control tokens of the model
    """V: rows of the embedding, which is also the output matrix; at least the tokenizer's."""
    dim: int = 2048
    """D: width of the residual stream."""
    n_layers: int = 24
    n_heads: int = 32
    ffn_dim: int = 8192
    """F: hidden width of the feed-forward network."""
    max_seq_len: int = 2048
    """Longest row in positions; xPos decay is centred on its middle."""
    norm: Norm = "sub"
    """`sub`: a LayerNorm before each residual branch and a second one inside it (Magneto); `pre`: the first one only;
    `post`: one after each residual sum, none at the end; `deepnorm`: as `post`, with a scaled residual (DeepNet)."""
    positions: Positions = "xpos"
    """`xpos`: queries and keys turned by their position, with decay (the paper's Table 17); `rotary`: turned, without decay;
    `sinusoidal`: added to the embeddings, as the released weights have it; `learned`: the same from a table that trains."""
    init: Init = "torchscale"
    """`torchscale`: PyTorch's uniform Linear default, times the norm's gain on fc1, fc2, v and out, as the code KOSMOS-1 was
    built on; `magneto`: Xavier normal with the same gain, as the Magneto and DeepNet papers write it; `gpt2`: N(0, 0.02),
    out and fc2 divided by sqrt(2L)."""
    branch_gain: float | None = None
    """Gain of fc1, fc2, v and out in `torchscale` and `magneto`; None: the norm's own, sqrt(ln 2L) for `sub`, (8L)^(-1/4)
    for `deepnorm`, 1 for `pre` and `post`."""
    document_attention: DocumentAttention = "own"
    """`own`: a document sees itself only; `row`: every earlier position of the row, as the paper packs text."""
    dropout_rate: float = 0.1
    """Dropout on the embeddings and on what each sub-layer adds to the residual stream."""
    attention_dropout_rate: float = 0.1
    """Dropout on attention weights."""
    attention_kernel: Kernel = "auto"
    """`auto`: on CUDA the one that a table of figures puts first (docs/measurements.md), xformers unless it says otherwise,
    else `sdpa`; `xformers`: FlashAttention-2 or CUTLASS; `cudnn`: cuDNN on Hopper and Blackwell, without dropout; `flex`:
    FlexAttention, without dropout; `sdpa`: scaled_dot_product_attention document by document; `reference`: the formula as
    it stands, for comparison."""
    compile: bool | None = None
    """Whether torch.compile fuses what layers do around the attention kernel, and the tower's too; None: on CUDA."""
    recompute: Recompute = "none"
    """What of a layer is computed again in the backward pass instead of being kept: `selective`: all but attention and
    products of matrices, for some memory and next to no time; `full`: everything but its input, for most of the memory and
    a third more arithmetic."""
    fp8: Fp8 | bool = "none"
    """How the layers' matrices, not the output matrix, train in 8 bits: `none`: they do not; `tensorwise`: e4m3 forward,
    e5m2 for gradients, each tensor scaled by its largest element; `rowwise`: e4m3 throughout, each row or column that is
    summed over scaled by its own, which rounds less and works more. Needs CUDA capability 8.9 and bf16-mixed. The values
    false and true of earlier versions are `none` and `tensorwise`."""
    loss_chunk: int | None = 8192
    """Supervised positions whose logits, and these logits' gradients, exist at a time; None: all at once."""

    def __post_init__(self) -> None:
        if isinstance(self.fp8, bool):  # of an earlier version; equal meanings must be equal tables
            object.__setattr__(self, "fp8", "tensorwise" if self.fp8 else "none")
        self._check_choices()
        self._check_positive("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim", "max_seq_len")
        self._check_rates()
        self._check(self.dim % self.n_heads == 0, f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        in_pairs = self.positions not in ("xpos", "rotary") or self.head_dim % 2 == 0  # rotations turn pairs of elements
        self._check(in_pairs, f"dim / n_heads must be even for {self.positions} positions, got {self.head_dim}")
        gain = self.branch_gain
        self._check(gain is None or gain > 0, f"branch_gain must be positive or null, got {gain}")
        clash = gain is not None and self.init == "gpt2"
        self._check(not clash, f"branch_gain {gain} has no place in init gpt2, which has no gain; leave it null")
        self._check(self.loss_chunk is None or self.loss_chunk > 0, f"loss_chunk must be positive, got {self.loss_chunk}")

    @property
    def head_dim(self) -> int:
        """K: width of one attention head."""
        return self.dim // self.n_heads

    @property
    def normalises_sums(self) -> bool:
        """Whether LayerNorm stands after each residual sum, and so none at the end, instead of before each branch."""
        return self.norm in ("post", "deepnorm")

    @property
    def residual_scale(self) -> float:
        """alpha: what the residual stream is multiplied by before a branch is added (DeepNet, decoder-only)."""
        return math.pow(2 * self.n_layers, 0.25) if self.norm == "deepnorm" else 1.0


@dataclass(frozen=True, kw_only=True)
class KosmosConfig(BaseConfig):
    """A whole model. Two models with equal `architecture()` can exchange weights."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    lora: LoraConfig | None = None
    """Low-rank adapters, which alone train then; None: none."""

    def __post_init__(self) -> None:
        dim, heads = self.decoder.dim, self.connector.n_heads
        # A perceiver works at the tower's width, which is not known before the tower is built.
        divides = self.connector.kind != "resampler" or dim % heads == 0
        self._check(divides, f"decoder.dim {dim} is not a multiple of connector.n_heads {heads}")

    def architecture(self) -> dict[str, Any]:
        """Return the fields that determine the tensors and what they compute, flat, by dotted name.

        Left out: where initial weights come from, what trains, dropout, initialisation, and how fast things run.
        """
        tables = {"vision": self.vision.resolved(), "connector": self.connector, "decoder": self.decoder}
        skip = {"vision.pretrained", "vision.trainable", "vision.chunk", "decoder.init", "decoder.branch_gain"}
        skip |= {f"decoder.{name}" for name in ("attention_kernel", "loss_chunk", "compile", "recompute", "fp8")}
        # Other positions are computed for any length, and the centre of xPos cancels in q'k.
        if self.decoder.positions != "learned":
            skip.add("decoder.max_seq_len")
        if self.connector.kind != "perceiver":
            skip.add("connector.n_layers")
        # The other kinds have no heads, or one.
        if self.connector.kind not in ("resampler", "perceiver"):
            skip.add("connector.n_heads")
        values = {f"{name}.{f.name}": getattr(table, f.name) for name, table in tables.items() for f in fields(table)}
        # `_rate`: dropout.
        included = {name: value for name, value in values.items() if name not in skip and not name.endswith("_rate")}
        # Without the dropout rate, and with targets as a set: their order changes nothing.
        lora = self.lora and (self.lora.rank, self.lora.alpha, tuple(sorted(set(self.lora.targets))))
        return included | {"lora": lora}


@dataclass(frozen=True, kw_only=True)
class LossWeights(BaseConfig):
    """Weight of a supervised token of each corpus in the training loss; logged losses are not weighted.

    The step's loss is sum of weight times loss of a token / number of supervised tokens: the denominator counts every
    token as one, so that a weight scales its own corpus and no other. AdamW makes nothing of a factor on all of them.
    """

    text: float = 1.0
    caption: float = 1.0
    interleaved: float = 1.0
    instruct: float = 1.0

    def __post_init__(self) -> None:
        weights = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, weight in weights.items():
            # NaN fails every comparison, so it is refused too.
            self._check(0 <= weight < float("inf"), f"{name} must be finite and not negative, got {weight}")
        self._check(any(weights.values()), "at least one weight must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(BaseConfig):
    """AdamW as in the paper (section 3.2), eps from the released training script."""

    lr: float = 2e-4
    """Peak learning rate, per optimizer step."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    """Decoupled decay on every trained parameter, biases and LayerNorms included, as the released code does."""
    warmup_steps: int = 375
    """Optimizer steps of linear warm-up from 0."""
    total_steps: int | None = None
    """Step at which the linear decay reaches 0; None: the trainer's max_steps."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a step whose gradient holds a NaN or an infinity, and which changes nothing: the end, or the next one."""
    max_skipped: int = 10
    """With `skip`, such steps within `skip_window` that do not end the run."""
    skip_window: int = 1000
    """Optimizer steps."""

    def __post_init__(self) -> None:
        self._check_positive("lr", "eps", "max_skipped", "skip_window")
        self._check(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        self._check(all(0 <= b < 1 for b in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        self._check(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(BaseConfig):
    """Low-rank adapters beside frozen matrices (arXiv 2106.09685): W x + alpha / rank B A x, B zero at first."""

    rank: int = 16
    alpha: float = 32.0
    dropout_rate: float = 0.05
    """Dropout on what an adapter reads."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    """Endings of the names of the matrices, in decoder and connector; `x_attn.q_proj` is the resampler's alone."""

    def __post_init__(self) -> None:
        self._check_positive("rank", "alpha")
        self._check_rates()
        self._check(len(self.targets) > 0, "targets must name at least one matrix")
