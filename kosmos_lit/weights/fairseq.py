"""Import of the checkpoints that KOSMOS's authors released (Kosmos-2, Kosmos-G's stage 1), as fairseq wrote them.

Sizes come from the tensors' shapes. The number of heads comes from the training options in the file; without them, heads
are 64 wide as in every released model.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.files import read_pickle
from kosmos_lit.state_dicts.keys import FAIRSEQ, check_shapes, shapes_of
from kosmos_lit.tokenizer import GROUNDING, MODEL_FILE, Tokenizer
from kosmos_lit.weights.folder import LoadedModel, build_model
from kosmos_lit.weights.towers import vit_architecture

HEAD_DIM = 64
_DECODER, _TOWER = "gpt_model.decoder", "img_model.visual"


def from_fairseq(path: str | Path, tokenizer: str | Path | None = None) -> LoadedModel:
    """Return the model of a released checkpoint, and its tokenizer.

    Args:
        path: the file; its weights are under `model`.
        tokenizer: folder with the released `sentencepiece.bpe.model`; None: the checkpoint's own folder.

    Raises: UserError if the file holds anything but plain data, or other tensors than a Kosmos's.
    """
    file = Path(path)
    checkpoint = read_pickle(file) if file.is_file() else None
    if checkpoint is None:
        raise UserError(f"no checkpoint {path}")
    tensors = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is no released Kosmos checkpoint: it has no tensors under 'model'")
    config = _config(tensors, _options(checkpoint), str(path))
    shapes = shapes_of(Kosmos.on_meta(config).state_dict())
    check_shapes(shapes_of(tensors), FAIRSEQ.external_shapes(shapes), str(path), allowed=list(FAIRSEQ.unused))
    embedding, head = FAIRSEQ.external_names("decoder.embed_tokens.weight")[0], str(FAIRSEQ.head)
    # fairseq writes the tied matrix under both names; if they differed, one of them would be lost.
    if not torch.equal(tensors[head], tensors[embedding]):
        raise UserError(f"{path}: {head} differs from {embedding}, and a Kosmos has one matrix for both")
    model = build_model(config, FAIRSEQ.to_kosmos(tensors, shapes), str(path))
    return LoadedModel(model, _tokenizer(Path(tokenizer) if tokenizer else file.parent, config.decoder.vocab_size))


def _tokenizer(folder: Path, n_rows: int) -> Tokenizer:
    """Return the tokenizer of a folder with the control tokens that the embedding has rows for."""
    # The file of the tokenizer does not say whether its model has grounding tokens; the embedding's rows do.
    try:
        plain = Tokenizer.load(folder)
    except UserError as error:
        raise UserError(f"{error}; or give the folder of the released {MODEL_FILE} with --tokenizer") from error
    file = folder / MODEL_FILE
    grounded = Tokenizer(file.read_bytes(), GROUNDING) if file.is_file() else plain
    for candidate in (plain, grounded):
        if candidate.vocab_size == n_rows:
            return candidate
    raise UserError(
        f"the embedding has {n_rows:,} rows, but the tokenizer in {folder} has {plain.vocab_size:,} ids, or "
        f"{grounded.vocab_size:,} with Kosmos-2's grounding tokens; give the model's own with --tokenizer"
    )


def _options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training options of a checkpoint, flat; older files have them under `args`, newer under `cfg`."""
    nested = checkpoint.get("cfg") or {}  # either may be there and empty
    tables = [checkpoint.get("args"), nested.get("model") if isinstance(nested, Mapping) else None]
    flat: dict[str, Any] = {}
    for table in tables:
        flat |= vars(table) if isinstance(table, Namespace) else table if isinstance(table, Mapping) else {}
    return flat


def _config(tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str) -> KosmosConfig:
    """Return the configuration that a checkpoint's tensors and options describe."""
    sources = {
        "embedding": (2, f"{_DECODER}.embed_tokens.weight"),
        "first layer": (2, f"{_DECODER}.layers.0.ffn.fc1.weight"),
        "queries": (2, "img_connector.latent_query"),
        "patches": (4, f"{_TOWER}.conv1.weight"),
        "positions": (2, f"{_TOWER}.positional_embedding"),
        "first block": (2, f"{_TOWER}.transformer.resblocks.0.mlp.c_fc.weight"),
    }
    if missing := [name for _, name in sources.values() if name not in tensors]:
        raise UserError(f"{where} is no released Kosmos checkpoint: {', '.join(missing)} not found under 'model'")
    size = {part: tuple(tensors[name].shape) for part, (_, name) in sources.items()}
    if wrong := [f"{name} is {size[part]}" for part, (n_axes, name) in sources.items() if len(size[part]) != n_axes]:
        raise UserError(f"{where} is no released Kosmos checkpoint: {', '.join(wrong)}, which has another number of axes")
    V, D = size["embedding"]
    C, _, patch, _ = size["patches"]  # (C, 3, patch, patch)
    heads = options.get("decoder_attention_heads")
    n_heads = heads if isinstance(heads, int) else max(1, D // HEAD_DIM)

    image_size = patch * math.isqrt(size["positions"][0] - 1)  # one position is the class token's
    tower = vit_architecture(
        image_size=image_size,
        layers=_count(tensors, rf"{_TOWER}\.transformer\.resblocks\.(\d+)\."),
        width=C,
        n_heads=max(1, C // HEAD_DIM),
        ffn_dim=size["first block"][0],
        patch_size=patch,
        quick_gelu=True,  # the released code forces it for every tower
    )
    return KosmosConfig(
        vision=VisionConfig(architecture=tower, pretrained=None, image_size=image_size, trainable="all"),
        connector=ConnectorConfig(kind="resampler", n_latents=size["queries"][0], n_heads=n_heads),
        decoder=DecoderConfig(
            vocab_size=V,
            dim=D,
            n_layers=_count(tensors, rf"{_DECODER}\.layers\.(\d+)\."),
            n_heads=n_heads,
            ffn_dim=size["first layer"][0],
            norm="sub",
            positions="sinusoidal",
        ),
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that `pattern` matches in the names."""
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))  # layers count from 0
