"""The indexes of all shards joined into one, in memory that does not grow with them, and with few files open."""

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
    """Write one list of all shards' images, sorted by the hashes of their URLs; of equal URLs the first usable one."""
    lists = [task.image_list / IMAGES for task in tasks]
    total = sum(len(np.load(path, mmap_mode="r")) for path in lists)
    n_ranges = -(-total // SLICE) or 1  # hashes are spread evenly, so each range fits in memory
    bounds = [(i << 64) // n_ranges for i in range(n_ranges + 1)]
    with atomic_file(images_file(output)) as path, closing(ColumnWriter(path, LISTED_IMAGE)) as writer:
        for low, high in pairwise(bounds):
            rows = np.concatenate([np.empty(0, LISTED_IMAGE), *(_between(path, low, high) for path in lists)])
            # The last key counts first: by URL, then usable images before others, then by place.
            rows = rows[np.lexsort((rows["offset"], rows["shard"], rows["status"], rows["url"]))]
            first = np.ones(len(rows), dtype=bool)
            first[1:] = rows["url"][1:] != rows["url"][:-1]
            writer.append(rows[first])


def _between(path: Path, low: int, high: int) -> npt.NDArray[np.void]:
    """Return the rows of one sorted image list whose URL hashes lie in [low, high)."""
    rows = np.load(path, mmap_mode="r")
    start = int(np.searchsorted(rows["url"], np.uint64(low)))
    end = len(rows) if high == 1 << 64 else int(np.searchsorted(rows["url"], np.uint64(high)))
    return np.array(rows[start:end])


def join(output: Path, tasks: Sequence[Task], identity: dict[str, Any], token_dtype: str) -> None:
    """Join the shard indexes into the corpus's files, the manifest last, and remove them.

    Raises: UserError if there is no document.
    """
    source = SOURCES[identity["format"]]
    tally = _sum_tallies(task.index for task in tasks)
    images = _sum_tallies(task.image_list for task in tasks) if source.needs_image_list else Tally()
    if not tally.documents:
        raise UserError(f"{output}: no document in {len(tasks)} shards: {report(tally, images)}")
    # A join that was killed may have left as much as the whole corpus.
    remove_leftovers(output)
    lengths = {}
    for column, dtype in ({"tokens": token_dtype} | COLUMNS | dict(source.columns)).items():
        parts = (task.index / f"{column}.npy" for task in tasks)
        with atomic_file(output / f"{column}.npy") as path:
            lengths[column] = join_columns(parts, path, dtype, offsets=column.endswith("_offsets"))
    _join_ledgers(output, tasks)
    manifest = identity | {
        "documents": tally.documents,
        "tokens": lengths["tokens"] - lengths["image_places"],  # without the images' markers
        "images": lengths["image_places"],
        "tally": tally.to_dict(),
        "image_tally": images.to_dict(),
    }
    # Last: a folder without a manifest is an unfinished index.
    write_atomically(output / MANIFEST, json.dumps(manifest).encode())
    shutil.rmtree(output / "parts", ignore_errors=True)


def _join_ledgers(output: Path, tasks: Sequence[Task]) -> None:
    """Write the broken records of all shards into one ledger, in the order of the shards; no file if there are none."""
    ledgers = [folder / LEDGER for task in tasks for folder in (task.image_list, task.index)]
    ledgers = [path for path in ledgers if path.exists() and path.stat().st_size]
    if not ledgers:
        (output / LEDGER).unlink(missing_ok=True)
        return
    with atomic_file(output / LEDGER) as path, path.open("wb") as joined:
        for ledger in ledgers:
            with ledger.open("rb") as file:
                shutil.copyfileobj(file, joined)


def _sum_tallies(folders: Iterable[Path]) -> Tally:
    total = Tally()
    for folder in folders:
        total.add(read_tally(folder))
    return total
