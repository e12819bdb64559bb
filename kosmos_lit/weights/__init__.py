"""State dicts from elsewhere and to elsewhere. Nothing here runs code that a weight file brings along."""

from __future__ import annotations

from pathlib import Path

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.weights.clip import CLIP_TYPES, import_tower, load_tower
from kosmos_lit.weights.fairseq import from_fairseq
from kosmos_lit.weights.files import read_json
from kosmos_lit.weights.folder import CONFIG, MODEL_TYPE, assemble, check_new, load_folder, save_folder
from kosmos_lit.weights.kosmos2 import MODEL_TYPE as KOSMOS2
from kosmos_lit.weights.kosmos2 import export_transformers, from_transformers, to_transformers

__all__ = [
    "CLIP_TYPES", "KOSMOS2", "check_new", "export_transformers", "from_fairseq", "from_transformers", "import_tower",
    "load_folder", "load_model", "load_tokenizer", "load_tower", "model_type", "save_folder", "to_transformers",
]  # fmt: skip


def load_model(path: str | Path) -> Kosmos:
    """Return a trained model with its tokenizer, in evaluation mode.

    Args:
        path: a checkpoint of a run, a folder that `export` or `import` wrote, or a folder of transformers' Kosmos-2.

    Raises: UserError if it is none of these, or if its tensors do not fit.
    """
    folder = Path(path)
    if folder.is_dir():
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
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    kosmos = assemble(KosmosConfig.from_dict(checkpoint["hyper_parameters"]["kosmos"]), weights, str(path))
    kosmos.tokenizer = Tokenizer.from_bytes(checkpoint["tokenizer"].numpy().tobytes())
    return kosmos


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """Return the tokenizer of a trained model without reading its weights, None for a folder that has none.

    Args:
        path: as `load_model` takes it.

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
    """Return which kind of model a folder holds, by its `config.json`.

    Raises: UserError if there is none.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is no model folder: it has no {CONFIG}. A folder written by `export` or `import`, one of "
            "transformers' Kosmos-2, or the path of a checkpoint (.ckpt) was expected"
        )
    found = read_json(folder / CONFIG).get("model_type")
    return found if isinstance(found, str) else None
