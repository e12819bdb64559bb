"""Columns of an index on disk, written incrementally: memory does not grow with a shard or a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SLICE = 1 << 20
"""Values that are held in memory at a time when columns are copied."""
BUFFER = 1 << 20


class ColumnWriter:
    """A one-dimensional .npy file that grows; `close` makes it equal to what `np.save` writes of the whole array."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file = path.open("wb", BUFFER)
        self._header_end = self._write_header()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def append(self, values: npt.ArrayLike) -> None:
        """Write more values, which must fit the column's dtype."""
        array = np.ascontiguousarray(np.asarray(values).astype(self.dtype, copy=False))
        self._file.write(array.data)
        self.length += len(array)

    def close(self) -> None:
        """Write the header again with the final length, and close the file."""
        self._file.seek(0)
        end = self._write_header()  # as long as the first one: numpy pads headers so that any length fits
        assert end == self._header_end, (end, self._header_end)
        self._file.close()


@contextmanager
def column_writers(folder: Path, dtypes: Mapping[str, npt.DTypeLike]) -> Iterator[dict[str, ColumnWriter]]:
    """Give a writer for each column in a folder; all are closed at the end."""
    with ExitStack() as stack:
        writers = {}
        for name, dtype in dtypes.items():
            writers[name] = ColumnWriter(folder / f"{name}.npy", dtype)
            stack.callback(writers[name].close)
        yield writers


def slices(path: Path) -> Iterator[npt.NDArray[Any]]:
    """Yield a column's values, `SLICE` at a time."""
    values = np.load(path, mmap_mode="r")
    for start in range(0, len(values), SLICE):
        yield np.array(values[start : start + SLICE])


def join_columns(parts: Iterable[Path], target: Path, dtype: npt.DTypeLike, *, offsets: bool) -> int:
    """Write the values of all parts one after another into one column; return their number.

    Args:
        parts: .npy files, opened one at a time.
        target: the file to write.
        dtype: its dtype.
        offsets: the parts hold counts, and the column gets their running sum, from 0.
    """
    writer = ColumnWriter(target, dtype)
    try:
        total = np.uint64(0)
        if offsets:
            writer.append([total])
        for path in parts:
            for values in slices(path):
                if offsets:
                    values = np.cumsum(values, dtype=np.uint64) + total
                    total = values[-1]
                writer.append(values)
    finally:
        writer.close()
    return writer.length
