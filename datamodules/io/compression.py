"""Files that may be compressed, read piece by piece: memory stays bounded however much a file expands to."""

from __future__ import annotations

import gzip
import sys
import zlib
from pathlib import Path
from typing import BinaryIO, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ_ERRORS = (OSError, EOFError, zlib.error, zstd.ZstdError)
"""What a file that is cut off, damaged or of another kind raises."""
MAX_RECORD = 64 << 20
"""Bytes of one record of a corpus, decompressed; a larger one is left out."""


def open_compressed(path: Path) -> BinaryIO:
    """Open a file to read its content, decompressed by the ending of its name: .gz, .zst, .zstd.

    Reading raises one of READ_ERRORS where the file breaks off.
    """
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix in (".zst", ".zstd"):
        # Corpora packed with `zstd --long=31` need the largest window.
        return cast(BinaryIO, zstd.open(path, options={zstd.DecompressionParameter.window_log_max: 31}))
    return path.open("rb")


def compress_zstd(data: bytes) -> bytes:
    """Return data as one frame."""
    return zstd.compress(data)
