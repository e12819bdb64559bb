"""Any trained model by its path: a checkpoint, or a model folder of kosmos-lit or of transformers."""

from __future__ import annotations

from pathlib import Path

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.state_dicts.files import read_json
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.weights.folder import (
    CONFIG,
    MODEL_TYPE,
    LoadedModel,
    build_model,
    check_own,
    load_folder,
    read_folder_config,
)
from kosmos_lit.weights.kosmos2 import MODEL_TYPE as KOSMOS2
from kosmos_lit.weights.kosmos2 import from_transformers, read_kosmos2_config


def load_model(path: str | Path) -> LoadedModel:
    """Return a trained model, in evaluation mode, and its tokenizer.

    Args:
        path: a run's checkpoint, a folder that `export` or `import` wrote, or a folder of transformers' Kosmos-2.

    Raises: UserError if it is none of these, or its tensors do not fit.
    """
    folder = Path(path)
    if folder.is_dir():
        # Literals, as `case MODEL_TYPE` would bind the name instead of comparing with it.
        match model_type(folder):
            case "kosmos-lit":
                return load_folder(folder)
            case "kosmos-2":
                return from_transformers(folder)
            case other:
                raise UserError(
                    f"{folder} is of model_type {other!r}: a folder of kosmos-lit ({MODEL_TYPE!r}) or of transformers' "
                    f"Kosmos-2 ({KOSMOS2!r}) was expected"
                )
    checkpoint = load_checkpoint(path)
    # The rest of the state dict is the LightningModule's own, such as metrics.
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    config = KosmosConfig.from_dict(checkpoint["hyper_parameters"]["kosmos"])
    check_own(config, len(weights), str(path))
    model = build_model(config, weights, str(path))
    # A checkpoint is tensors and plain data: the tokenizer's files are a tensor of their bytes.
    return LoadedModel(model, Tokenizer.from_bytes(checkpoint["tokenizer"].numpy().tobytes()))


def load_config(path: str | Path) -> KosmosConfig:
    """Return the configuration of a trained model without reading its weights.

    Args:
        path: as in `load_model`.

    Raises: UserError if it is no model.
    """
    folder = Path(path)
    if not folder.is_dir():
        return KosmosConfig.from_dict(load_checkpoint(path)["hyper_parameters"]["kosmos"])
    return read_kosmos2_config(folder) if model_type(folder) == KOSMOS2 else read_folder_config(folder)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """Return the tokenizer of a trained model without reading its weights, None for a folder without one.

    Args:
        path: as in `load_model`.

    Raises: UserError if it is no model.
    """
    folder = Path(path)
    if not folder.is_dir():
        return Tokenizer.from_bytes(load_checkpoint(path)["tokenizer"].numpy().tobytes())
    match model_type(folder):
        case "kosmos-2":
            return Tokenizer.from_transformers(folder)
        case _:
            return Tokenizer.load(folder) if read_json(folder / CONFIG).get("has_tokenizer", True) else None


def model_type(folder: Path) -> str | None:
    """Return the `model_type` in a model folder's `config.json`, None if that has none.

    Raises: UserError if there is no `config.json`.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is no model folder: it has no {CONFIG}. A folder written by `export` or `import`, one of "
            "transformers' Kosmos-2, or the path of a checkpoint (.ckpt) was expected"
        )
    value = read_json(folder / CONFIG).get("model_type")
    return value if isinstance(value, str) else None
