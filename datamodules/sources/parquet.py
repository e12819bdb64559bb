"""Text as a column of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.document import Document, Tally
from datamodules.sources.base import CUT_OFF, ReadOptions, Source

BATCH_ROWS = 1024


class Parquet(Source):
    """A document per row; its record is the row's number, from 0."""

    format = "parquet"
    kind = "text"
    packing = "split"

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        row = 0
        try:
            with pq.ParquetFile(path) as file:
                if options.text_field not in file.schema_arrow.names:
                    tally.count_broken(f'no column "{options.text_field}"', "", file=path.name)
                    return
                for batch in file.iter_batches(BATCH_ROWS, columns=[options.text_field]):
                    for value in batch.column(0).to_pylist():
                        if not isinstance(value, str):
                            tally.count_broken(f'no text under "{options.text_field}"', f"row {row}", file=path.name)
                        elif not value.strip():
                            tally.count_skipped("empty text", f"{path.name}, row {row}")
                        else:
                            yield Document(row, (value.strip("\n"),))
                        row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            tally.count_broken(CUT_OFF, f"after row {row}", str(error), file=path.name)

    def record_name(self, path: Path, record: int) -> str:
        return f"row {record}"
