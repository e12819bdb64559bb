"""`test` with tasks: the data module that takes the place of the run's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.trainer import EvaluationData
from kosmos_lit.report.evaluation import write_report
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
        config: tasks and settings.
        kosmos: the model.
        data: the run's own data module; only its tokenizer matters, if there is one.
        run: the run's folder.
        checkpoint: a run's checkpoint, or None.
        weights: without a checkpoint, the model's initial weights (`model.init_from`), or None.

    Raises: UserError if the tokenizer of the weights is not the run's, or neither has one.
    """
    source = checkpoint or weights
    trained_with = load_tokenizer(source) if source else None
    # Any data module may be configured, also one that knows no tokenizer.
    path = getattr(getattr(data, "tokenizer_config", None), "path", None)
    configured = Tokenizer.load(path) if path is not None and has_tokenizer(path) else None
    if trained_with is not None and configured is not None and trained_with.fingerprint != configured.fingerprint:
        raise UserError(
            f"{source} was trained with tokenizer {trained_with.fingerprint}, but data.tokenizer.path, {path}, holds "
            f"{configured.fingerprint}: give the run's own configuration, or the folder of the weights' tokenizer"
        )
    # Imported weights may come without a tokenizer.
    tokenizer = trained_with or configured
    if tokenizer is None:
        raise UserError(
            f"evaluation needs a tokenizer: {source or 'an untrained model'} has none, nor has data.tokenizer.path, {path}"
        )
    model_info: dict[str, Any] = {"checkpoint": source, "step": None}
    if checkpoint is not None:
        model_info["step"] = int(load_checkpoint(checkpoint)["global_step"])
    folder = Path(config.folder) if config.folder else run / folder_name(config)
    seq_len = kosmos.decoder.max_seq_len
    return EvaluationData(config, tokenizer, seq_len, folder, model_info, write_report)


def folder_name(config: EvalConfig) -> str:
    """Return the name of the folder of a run's results: controls have folders of their own."""
    return "eval" if config.image_control == "true" else f"eval-{config.image_control}"
