"""`test` with tasks: what takes the place of the run's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.trainer import EvaluationData
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.tokenizer.files import has_tokenizer
from kosmos_lit.weights.load import load_tokenizer


def evaluation_data(
    config: EvalConfig,
    kosmos: KosmosConfig,
    data: L.LightningDataModule,
    run: Path,
    checkpoint: str | None,
    weights: str | None,
) -> EvaluationData:
    """Return the tasks as data of a trainer, with the tokenizer that the weights were trained with.

    Args:
        config: tasks, and how to ask.
        kosmos: the model.
        data: the run's own data, of which the tokenizer is looked at if it is there.
        run: the run's folder.
        checkpoint: a run's checkpoint, or None.
        weights: without one, what the model starts from (`model.init_from`), or None.

    Raises: UserError if the tokenizer of the weights is not the run's, or there is none.
    """
    source = checkpoint or weights
    own = load_tokenizer(source) if source else None
    path = getattr(getattr(data, "tokenizer_config", None), "path", None)
    there = Tokenizer.load(path) if path is not None and has_tokenizer(path) else None
    if own is not None and there is not None and own.fingerprint != there.fingerprint:
        raise UserError(
            f"{source} was trained with tokenizer {own.fingerprint}, but data.tokenizer.path, {path}, holds "
            f"{there.fingerprint}: give the run's own configuration, or the folder of the weights' tokenizer"
        )
    tokenizer = own or there
    if tokenizer is None:
        raise UserError(
            f"there is no tokenizer to ask with: {source or 'an untrained model'} has none, nor is one in "
            f"data.tokenizer.path, {path}"
        )
    about: dict[str, Any] = {"checkpoint": source, "step": None}
    if checkpoint is not None:
        about["step"] = int(load_checkpoint(checkpoint)["global_step"])
    folder = Path(config.folder) if config.folder else run / folder_name(config)
    return EvaluationData(config, tokenizer, kosmos.decoder.max_seq_len, folder, about)


def folder_name(config: EvalConfig) -> str:
    """Return where a run's results are kept: controls have folders of their own."""
    return "eval" if config.image_control == "true" else f"eval-{config.image_control}"
