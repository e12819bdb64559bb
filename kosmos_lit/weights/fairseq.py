"""The checkpoints that KOSMOS's authors released (Kosmos-2, Kosmos-G's stage 1), as fairseq wrote them.

Sizes are read off the tensors; what tensors do not tell (heads) comes from the training options in the file, and where
those lack it, from the 64-wide heads of every released model.
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
from kosmos_lit.tokenizer import GROUNDING, MODEL_FILE, Tokenizer
from kosmos_lit.weights.files import read_pickle
from kosmos_lit.weights.folder import assemble
from kosmos_lit.weights.keys import FAIRSEQ, check_shapes, shapes_of
from kosmos_lit.weights.towers import vit

HEAD_DIM = 64
_DECODER, _TOWER = "gpt_model.decoder", "img_model.visual"


def from_fairseq(path: str | Path, tokenizer: str | Path | None = None) -> Kosmos:
    """Return a Kosmos with the weights of a released checkpoint.

    Args:
        path: the file; its weights are under `model`.
        tokenizer: folder with the released `sentencepiece.bpe.model`; None: the checkpoint's own folder.

    Raises: UserError if the file holds anything but plain data, or other tensors than a Kosmos's.
    """
    file = Path(path)
    found = read_pickle(file) if file.is_file() else None
    if found is None:
        raise UserError(f"no checkpoint {path}")
    tensors = found.get("model") if isinstance(found, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is no released Kosmos checkpoint: it has no tensors under 'model'")
    config = _config(tensors, _options(found), str(path))
    with torch.device("meta"):
        shapes = shapes_of(Kosmos(config).state_dict())
    wanted = FAIRSEQ.wanted(shapes)
    check_shapes(shapes_of(tensors), wanted, str(path), allowed=list(FAIRSEQ.dead))
    embedding, head = FAIRSEQ.theirs("decoder.embed_tokens.weight")[0], str(FAIRSEQ.head)
    if not torch.equal(tensors[head], tensors[embedding]):
        raise UserError(f"{path}: {head} differs from {embedding}, and a Kosmos has one matrix for both")
    kosmos = assemble(config, FAIRSEQ.to_ours(tensors, shapes), str(path))
    kosmos.tokenizer = _tokenizer(Path(tokenizer) if tokenizer else file.parent, config.decoder.vocab_size)
    return kosmos


def _tokenizer(folder: Path, n_rows: int) -> Tokenizer:
    """Return the tokenizer of a folder with the control tokens that the embedding has rows for."""
    try:
        plain = Tokenizer.load(folder)
    except UserError as error:
        raise UserError(f"{error}; or give the folder of the released {MODEL_FILE} with --tokenizer") from error
    file = folder / MODEL_FILE
    grounded = Tokenizer(file.read_bytes(), GROUNDING) if file.is_file() else plain
    for found in (plain, grounded):
        if found.vocab_size == n_rows:
            return found
    raise UserError(
        f"the embedding has {n_rows:,} rows, but the tokenizer in {folder} has {plain.vocab_size:,} ids, or "
        f"{grounded.vocab_size:,} with Kosmos-2's grounding tokens; give the model's own with --tokenizer"
    )


def _options(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training options of a checkpoint, flat; older files have them under `args`, newer under `cfg`."""
    nested = found.get("cfg") or {}
    tables = [found.get("args"), nested.get("model") if isinstance(nested, Mapping) else None]
    flat: dict[str, Any] = {}
    for table in tables:
        flat |= vars(table) if isinstance(table, Namespace) else table if isinstance(table, Mapping) else {}
    return flat


def _config(tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str) -> KosmosConfig:
    """Return the configuration that a checkpoint's tensors and options describe."""
    needed = {
        "embedding": (2, f"{_DECODER}.embed_tokens.weight"), "first layer": (2, f"{_DECODER}.layers.0.ffn.fc1.weight"),
        "queries": (2, "img_connector.latent_query"), "patches": (4, f"{_TOWER}.conv1.weight"),
        "places": (2, f"{_TOWER}.positional_embedding"),
        "first block": (2, f"{_TOWER}.transformer.resblocks.0.mlp.c_fc.weight"),
    }  # fmt: skip
    if lack := [name for _, name in needed.values() if name not in tensors]:
        raise UserError(f"{where} is no released Kosmos checkpoint: {', '.join(lack)} not found under 'model'")
    size = {what: tuple(tensors[name].shape) for what, (_, name) in needed.items()}
    if odd := [f"{name} is {size[what]}" for what, (n_axes, name) in needed.items() if len(size[what]) != n_axes]:
        raise UserError(f"{where} is no released Kosmos checkpoint: {', '.join(odd)}, which has another number of axes")
    V, D = size["embedding"]
    C, _, patch, _ = size["patches"]
    heads = options.get("decoder_attention_heads")
    n_heads = heads if isinstance(heads, int) else max(1, D // HEAD_DIM)

    image_size = patch * math.isqrt(size["places"][0] - 1)
    tower = vit(
        image_size=image_size, layers=_count(tensors, rf"{_TOWER}\.transformer\.resblocks\.(\d+)\."), width=C,
        n_heads=max(1, C // HEAD_DIM), ffn_dim=size["first block"][0], patch_size=patch,
        quick_gelu=True,  # forced by their code, whatever the tower is called
    )  # fmt: skip
    return KosmosConfig(
        vision=VisionConfig(architecture=tower, pretrained=None, image_size=image_size, trainable="all"),
        connector=ConnectorConfig(kind="resampler", n_latents=size["queries"][0], n_heads=n_heads),
        decoder=DecoderConfig(
            vocab_size=V, dim=D, n_layers=_count(tensors, rf"{_DECODER}\.layers\.(\d+)\."), n_heads=n_heads,
            ffn_dim=size["first layer"][0], norm="sub", positions="sinusoidal",
        ),
    )  # fmt: skip


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that `pattern` finds in the names."""
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))
