"""One file per format on disk: bytes to Documents, with the place of every failure."""

from __future__ import annotations

from datamodules.sources.base import Identifiers, ReadOptions, Source
from datamodules.sources.img2dataset import Img2Dataset
from datamodules.sources.instruct import Instruct
from datamodules.sources.jsonl import Jsonl
from datamodules.sources.parquet import Parquet
from datamodules.sources.warc import Warc

SOURCES: dict[str, Source] = {s.format: s for s in (Jsonl(), Parquet(), Img2Dataset(), Warc(), Instruct())}
"""The formats that `prepare` and the configs name."""

__all__ = ["SOURCES", "Identifiers", "ReadOptions", "Source"]
