"""Published results, read from `published.yaml` beside this file: of KOSMOS-1 and of the models that it is compared with.

A task names its entry by `Task.published`; the file's first lines say which setting each entry is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

OURS = "KOSMOS-1"
"""The row to compare a reproduction with."""
PAPER = "kosmos1"
"""The source of rows that name no other, and of all numbers of tables."""
MOST_POINTS = {"cider": 200.0}
"""The largest value that a metric takes in practice, in points; 100 for all others, which are shares."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where results are from."""

    name: str
    """As a report says it."""
    title: str
    address: str
    tables: Mapping[int, str]
    """What each of its tables holds, by number; empty if no entry refers to one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's results."""

    model: str
    metrics: Mapping[str, Mapping[int, float]]
    """Points by metric and number of shots."""
    source: str = PAPER
    """Key in `Published.sources`."""
    note: str = ""
    """How the evaluation differed, or where the values are from."""

    def __post_init__(self) -> None:
        """Check that all values are points of a metric."""
        for metric, by_shots in self.metrics.items():
            for shots, points in by_shots.items():
                where, most = f"{self.model}: {metric} at {shots!r} shots", MOST_POINTS.get(metric, 100.0)
                # A bool is an int, which no number of shots is.
                if type(shots) is not int or shots < 0:
                    raise ValueError(f"{where}: the number of shots must be a whole number")
                if type(points) is not float or not 0 <= points <= most:
                    raise ValueError(f"{where} is {points!r}, expected points with a decimal, 0 to {most:g}")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Published results of one benchmark under one setting."""

    title: str
    tables: tuple[int, ...]
    """Their numbers in the KOSMOS-1 paper."""
    split: str
    """The evaluated samples."""
    rows: tuple[Row, ...]
    n_samples: int | None = None
    """Samples of that split; None: not stated."""
    notes: tuple[str, ...] = ()
    """What to know before comparing."""

    def __post_init__(self) -> None:
        """Check that each model has one row, and KOSMOS-1 is among them."""
        models = [row.model for row in self.rows]
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise ValueError(f"{self.title}: several rows of {', '.join(twice)}")
        if OURS not in models:
            raise ValueError(f"{self.title}: no row of {OURS}; the rows are of {', '.join(models) or 'nothing'}")

    @property
    def source(self) -> str:
        """Where its values are from, for people."""
        *first, last = map(str, self.tables)
        numbers = f"tables {', '.join(first)} and {last}" if first else f"table {last}"
        return f"KOSMOS-1 paper, {numbers}"


@dataclass(frozen=True, kw_only=True)
class Published:
    """All published results."""

    sources: Mapping[str, Source]
    benchmarks: Mapping[str, Benchmark]
    """By the key that tasks name, in the order of the paper."""
    language: tuple[str, ...]
    """Keys of the tasks whose mean is the last row of table 13."""
    language_mean: Benchmark

    def __post_init__(self) -> None:
        """Check that what entries refer to is there."""
        entries = {**self.benchmarks, "language_mean": self.language_mean}
        for key, benchmark in entries.items():
            if missing := [n for n in benchmark.tables if n not in self.sources[PAPER].tables]:
                raise ValueError(f"{key}: sources.{PAPER}.tables does not say what table {missing[0]} holds")
            if unknown := [row.source for row in benchmark.rows if row.source not in self.sources]:
                raise ValueError(f"{key}: no source {unknown[0]!r}; there are {', '.join(self.sources)}")
        if absent := [key for key in self.language if key not in self.benchmarks]:
            raise ValueError(f"language_mean: no benchmark {absent[0]!r}")


@cache
def published_results() -> Published:
    """Return the published results that come with the package."""
    # A wheel is unpacked where it is installed, so that the file has a path.
    return read_published(Path(str(files("kosmos_lit.report"))) / "published.yaml")


def published(key: str | None) -> Benchmark | None:
    """Return the published results of a task; None if there are none."""
    return published_results().benchmarks.get(key) if key is not None else None


def read_published(path: Path) -> Published:
    """Read a file of published results.

    Raises: ValueError naming the entry if a key is unknown or missing, or a value is not what it should be; YAML's own error
        if a key is there twice.
    """
    # OmegaConf refuses a key that is there twice; PyYAML takes the last one.
    data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
    mean = data["language_mean"]
    return Published(
        sources={key: Source(**{"tables": {}, **entry}) for key, entry in data["sources"].items()},
        benchmarks={key: _benchmark(key, entry) for key, entry in data["benchmarks"].items()},
        language=tuple(mean.pop("of")),
        language_mean=_benchmark("language_mean", mean),
    )


def _benchmark(key: str, entry: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of an entry of the file."""
    try:
        rows = tuple(Row(**row) for row in entry["rows"])
        return Benchmark(**{**entry, "rows": rows, "tables": tuple(entry["tables"]), "notes": tuple(entry["notes"])})
    except KeyError as error:
        raise ValueError(f"{key}: no key {error}") from error
    except (TypeError, ValueError) as error:  # a TypeError names an unknown key or a missing one
        raise ValueError(f"{key}: {error}") from error
