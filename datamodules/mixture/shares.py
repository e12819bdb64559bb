"""The share of the stream that each source has: ratios of the kinds by step, and weights of a kind's sources.

Rows are equally long, so a share in tokens is a share in rows. In another unit, a source whose rows hold more of it gets
fewer rows: shares in rows are shares in the unit times rows per unit, which the row plans know exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from datamodules.config import CorpusConfig, RatioConfig, RatioStage, Unit
from datamodules.mixture.weights import check_weights, exact
from datamodules.packing.row_plan import Totals
from datamodules.sources import SOURCES
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError

_KINDS = range(len(CORPORA))
_NONE = Fraction()


@dataclass(frozen=True)
class NamedSource:
    """One source of a run."""

    name: str
    kind: int
    """Index into CORPORA."""
    config: CorpusConfig


def name_sources(
    kinds: Mapping[str, CorpusConfig | None], sources: Mapping[str, CorpusConfig | None] | None
) -> dict[str, NamedSource]:
    """Return all sources by name: those configured under the name of their kind, and those of `data.sources`.

    Raises: UserError if two have the same name or index.
    """
    named = {k: NamedSource(k, CORPORA.index(k), c) for k, c in kinds.items() if c is not None}
    for name, config in (sources or {}).items():
        if config is None:  # null: a later config file removes the source
            continue
        if name in CORPORA:
            raise UserError(f"data.sources.{name}: that name belongs to data.{name}; choose another")
        named[name] = NamedSource(name, CORPORA.index(SOURCES[config.format].kind), config)
    by_index: dict[str, str] = {}
    for name, source in named.items():
        # setdefault returns the first source of the index.
        if (other := by_index.setdefault(source.config.index, name)) != name:
            raise UserError(f"the sources {other} and {name} have the same index {source.config.index}; give each its own")
    return named


def ratios_by_step(
    ratio: RatioConfig, stages: Sequence[RatioStage] | None, defaults: Sequence[float], sources: Iterable[NamedSource]
) -> list[tuple[int, tuple[float, ...]]]:
    """Return (optimizer steps before it, weight per kind) of each stage.

    Raises: UserError if a kind with a share has no source with a weight, or there is no share at all.
    """
    all_sources = list(sources)
    has_source = [any(s.kind == k for s in all_sources) for k in _KINDS]
    has_weight = [any(s.kind == k and s.config.weight for s in all_sources) for k in _KINDS]
    ratios = [(0, ratio.weights(defaults, has_source))]
    for stage in stages or ():
        if stage.from_step <= ratios[-1][0]:
            raise UserError(f"data.ratio_stages: from_step must rise, got {stage.from_step} behind {ratios[-1][0]}")
        # None: as in the stage before, whether the corpus is configured or not.
        ratios.append((stage.from_step, stage.ratio.weights(ratios[-1][1], [True] * len(CORPORA))))
    configured = ", ".join(name for name, has in zip(CORPORA, has_source, strict=True) if has) or "no corpus"
    for step, weights in ratios:
        where = "data.ratio" if not step else f"data.ratio_stages from step {step}"
        check_weights(where, weights, f", and {configured} given; give a corpus and its share")
        for kind, weight in enumerate(weights):
            name = CORPORA[kind]
            if weight and not has_source[kind]:
                raise UserError(f"{where}.{name} is {weight:g}, but data.{name} is not given; give it, or set 0")
            if weight and not has_weight[kind]:
                raise UserError(f"{where}.{name} is {weight:g}, but all {name} sources have weight 0")
    return ratios


@dataclass(frozen=True)
class Shares:
    """Shares in rows that hold from a row of the stream on."""

    first_row: int
    ratio: tuple[Fraction, ...]
    """Per kind; they sum to 1."""
    weights: Mapping[str, Fraction]
    """Per source that has one, of its kind; they sum to 1 in each kind with a share."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        weights = {name: str(w) for name, w in self.weights.items()}  # exact as text, as "5/12"
        return {"first_row": self.first_row, "ratio": [str(r) for r in self.ratio], "weights": weights}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Shares:
        """Undo `to_dict`."""
        weights = {name: Fraction(w) for name, w in data["weights"].items()}
        return cls(data["first_row"], tuple(Fraction(r) for r in data["ratio"]), weights)

    def describe(self, kinds: Mapping[str, int]) -> str:
        """Return the share of each source as text; `kinds` has the kind of each."""
        return ", ".join(f"{n} {float(w * self.ratio[kinds[n]]):.1%}" for n, w in self.weights.items())


def amount(totals: Totals, unit: Unit) -> int:
    """Return how much of a unit an epoch of a source has."""
    # Rows, not positions: they are equally long, padding included.
    return {"tokens": totals.rows, "loss_tokens": totals.targets, "documents": totals.begun}[unit]


def row_shares(
    first_row: int, ratio: Sequence[float], sources: Sequence[NamedSource], totals: Mapping[str, Totals], unit: Unit
) -> Shares:
    """Return shares in rows from a ratio and weights that count `unit`."""
    # Exact fractions throughout, as apportioning takes whole numbers.
    counted = [s for s in sources if ratio[s.kind] and s.config.weight]
    weight_of_kind = {k: sum(exact(s.config.weight) for s in counted if s.kind == k) for k in _KINDS}
    rows = {}
    for s in counted:
        in_unit = exact(ratio[s.kind]) * exact(s.config.weight) / weight_of_kind[s.kind]
        # max: a source may have none of the unit, as captions without a supervised token.
        rows[s.name] = in_unit * Fraction(totals[s.name].rows, max(1, amount(totals[s.name], unit)))
    of_kind = [sum((rows[s.name] for s in counted if s.kind == k), _NONE) for k in _KINDS]
    # Per kind, as `SourceMixture` takes them.
    weights = {s.name: rows[s.name] / of_kind[s.kind] for s in counted}
    return Shares(first_row, tuple(r / sum(of_kind) for r in of_kind), weights)
