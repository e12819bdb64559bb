"""Readers for weight files of any origin, which take tensors and plain data only: no file can run code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kosmos_lit.errors import UserError

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
"""Errors of torch's reader on a file that is cut off or garbled, depending on where."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file, or of a folder as transformers writes it (whole or in shards).

    Raises: UserError if there is no such file, or it is damaged or holds anything but tensors.
    """
    if path.is_dir():
        for name in (SAFETENSORS, PICKLE):  # whole files before shards, safetensors before pickles
            if (path / name).is_file():
                return read_tensors(path / name)
        for name in (INDEX, PICKLE_INDEX):
            if (path / name).is_file():
                tensors: dict[str, Tensor] = {}
                for shard in _shards(path / name):
                    tensors |= read_tensors(path / shard)
                return tensors
        raise UserError(f"{path} holds no weights: one of {SAFETENSORS}, {INDEX}, {PICKLE}, {PICKLE_INDEX} was expected")
    if not path.is_file():
        raise UserError(f"no weight file {path}")
    if path.suffix == ".safetensors":  # every other suffix is read as a file of torch.save
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}") from error
    content = read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # as open_clip's training writes it, beside epoch and optimizer
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} is no table of tensors by name")
    return content


def _shards(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # A name with a folder in it could lead anywhere on the disk.
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UserError(f"{index}: its weight_map should say for each tensor which file of this folder holds it")
    return sorted(set(names))


# Pickles of numpy's numbers call this private function; no import of a private module is needed.
_numpy_scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
PLAIN: list[Any] = [
    argparse.Namespace,  # training scripts leave their options as a bag of attributes
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # and counters as numpy's numbers
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # its name since numpy 2
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},  # booleans, signed and unsigned integers, floats
]
"""Types and functions that a file may refer to beside tensors and Python's own data; none can run code."""


def read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save` if it is tensors and plain data; its code is never run.

    Raises: UserError naming the first other thing in it.
    """
    try:
        is_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and cannot be mapped
        if is_zip and _is_program(path):
            raise UserError(
                f"{path} is a TorchScript program (as OpenAI's own CLIP files are), which is code; take the state dict that "
                "open_clip or transformers has of it"
            )
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which are read or refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise  # a ValueError, as some of DAMAGED are
    except pickle.UnpicklingError as error:
        # Matches the name in torch's message, as in `Unsupported global: GLOBAL posix.system was not`.
        culprit = re.search(r"(?:GLOBAL|Unsupported global:?)\s+(?:GLOBAL\s+)?(\S+)", str(error))
        reason = f"it refers to {culprit[1]}" if culprit else "it is no plain data"
        raise UserError(
            f"{path} is not read: {reason}, and only tensors and plain data are taken, as anything else could run code; "
            "save its state dict alone, best as safetensors, where you trust it"
        ) from error
    except DAMAGED as error:
        raise UserError(f"{path} is no whole file of torch.save: {error}") from error


def _is_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())  # in TorchScript's archives only


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises: UserError if the file is missing or holds something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no file {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no JSON object")
    return table
