"""The parts of all shards to one index. Nothing here holds a whole column, or more than one part's file open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus import COLUMNS, MANIFEST
from datamodules.document import Tally
from datamodules.prepare.columns import SLICE, ColumnWriter, join_columns
from datamodules.prepare.report import report
from datamodules.prepare.shard import IMAGES, Task, images_file, read_tally
from datamodules.quarantine import LEDGER
from datamodules.sources import SOURCES
from datamodules.sources.base import LISTED_IMAGE
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_file, remove_leftovers, write_atomically


def join_image_lists(output: Path, tasks: Sequence[Task]) -> None:
    """Write one list of all shards' images, sorted by URL; of equal URLs the first usable one.

    It is made by ranges of the URLs' hashes, each small enough for memory.
    """
    surveys = [task.image_list / IMAGES for task in tasks]
    total = sum(len(np.load(path, mmap_mode="r")) for path in surveys)
    n_ranges = -(-total // SLICE) or 1
    bounds = [(i << 64) // n_ranges for i in range(n_ranges + 1)]
    with atomic_file(images_file(output)) as path, closing(ColumnWriter(path, LISTED_IMAGE)) as writer:
        for low, high in pairwise(bounds):
            rows = np.concatenate([np.empty(0, LISTED_IMAGE), *(_between(path, low, high) for path in surveys)])
            rows = rows[np.lexsort((rows["offset"], rows["shard"], rows["verdict"], rows["url"]))]
            first = np.ones(len(rows), dtype=bool)
            first[1:] = rows["url"][1:] != rows["url"][:-1]
            writer.append(rows[first])


def _between(path: Path, low: int, high: int) -> npt.NDArray[np.void]:
    """Return the rows of one sorted survey whose URL hashes lie in [low, high)."""
    rows = np.load(path, mmap_mode="r")
    start = int(np.searchsorted(rows["url"], np.uint64(low)))
    end = len(rows) if high == 1 << 64 else int(np.searchsorted(rows["url"], np.uint64(high)))
    return np.array(rows[start:end])


def join(output: Path, tasks: Sequence[Task], identity: dict[str, Any], token_dtype: str) -> None:
    """Join the parts into the corpus's files, the manifest last, and remove the parts.

    Raises: UserError if there is no document.
    """
    source = SOURCES[identity["format"]]
    tally = _sum_tallies(task.part for task in tasks)
    images = _sum_tallies(task.image_list for task in tasks) if source.needs_image_list else Tally()
    if not tally.documents:
        raise UserError(f"{output}: no document in {len(tasks)} shards: {report(tally, images)}")
    remove_leftovers(output)
    lengths = {}
    for column, dtype in ({"tokens": token_dtype} | COLUMNS | dict(source.columns)).items():
        parts = (task.part / f"{column}.npy" for task in tasks)
        with atomic_file(output / f"{column}.npy") as path:
            lengths[column] = join_columns(parts, path, dtype, offsets=column.endswith("_offsets"))
    _join_ledgers(output, tasks)
    manifest = identity | {
        "documents": tally.documents,
        "tokens": lengths["tokens"] - lengths["image_places"],
        "images": lengths["image_places"],
        "tally": tally.to_dict(),
        "image_tally": images.to_dict(),
    }
    write_atomically(output / MANIFEST, json.dumps(manifest).encode())
    shutil.rmtree(output / "parts", ignore_errors=True)


def _join_ledgers(output: Path, tasks: Sequence[Task]) -> None:
    """Write the broken records of all shards into one file, in their order; none if there are none."""
    ledgers = [folder / LEDGER for task in tasks for folder in (task.image_list, task.part)]
    ledgers = [path for path in ledgers if path.exists() and path.stat().st_size]
    if not ledgers:
        (output / LEDGER).unlink(missing_ok=True)
        return
    with atomic_file(output / LEDGER) as path, path.open("wb") as joined:
        for ledger in ledgers:
            with ledger.open("rb") as file:
                shutil.copyfileobj(file, joined)


def _sum_tallies(parts: Iterable[Path]) -> Tally:
    total = Tally()
    for part in parts:
        total.add(read_tally(part))
    return total
