"""What share of the stream each source is asked to have: ratios of the kinds by step, and weights of a kind's sources.

Rows are equally long, so a share in tokens is a share in rows. In another unit, a source whose rows hold more of it gets
fewer rows: shares in rows are shares in the unit times rows per unit, which the plans know exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from datamodules.config import CorpusConfig, RatioConfig, RatioStage, Unit
from datamodules.mixture.mixture import MixtureSchedule, SourceMixture, SourceMixtureStage, check_weights, exact
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
    """Return all sources by name: those that are given as the one of their kind, and the named ones.

    Raises: UserError if two have the same name or index.
    """
    found = {k: NamedSource(k, CORPORA.index(k), c) for k, c in kinds.items() if c is not None}
    for name, config in (sources or {}).items():
        if config is None:
            continue
        if name in CORPORA:
            raise UserError(f"data.sources.{name}: that name belongs to data.{name}; choose another")
        found[name] = NamedSource(name, CORPORA.index(SOURCES[config.format].kind), config)
    by_index: dict[str, str] = {}
    for name, source in found.items():
        if (other := by_index.setdefault(source.config.index, name)) != name:
            raise UserError(f"the sources {other} and {name} have the same index {source.config.index}; give each its own")
    return found


def ratios_by_step(
    ratio: RatioConfig, stages: Sequence[RatioStage] | None, defaults: Sequence[float], sources: Iterable[NamedSource]
) -> list[tuple[int, tuple[float, ...]]]:
    """Return (optimizer steps before it, weight per kind) of each stage.

    Raises: UserError if a kind with a share has no source with a weight, or there is no share at all.
    """
    all_sources = list(sources)
    there = [any(s.kind == k for s in all_sources) for k in range(len(CORPORA))]
    weighted = [any(s.kind == k and s.config.weight for s in all_sources) for k in range(len(CORPORA))]
    found = [(0, ratio.weights(defaults, there))]
    for stage in stages or ():
        if stage.from_step <= found[-1][0]:
            raise UserError(f"data.ratio_stages: from_step must rise, got {stage.from_step} behind {found[-1][0]}")
        found.append((stage.from_step, stage.ratio.weights(found[-1][1], [True] * len(CORPORA))))
    given = ", ".join(name for name, g in zip(CORPORA, there, strict=True) if g) or "no corpus"
    for step, weights in found:
        where = "data.ratio" if not step else f"data.ratio_stages from step {step}"
        check_weights(where, weights, f", and {given} given; give a corpus and its share")
        for kind, weight in enumerate(weights):
            name = CORPORA[kind]
            if weight and not there[kind]:
                raise UserError(f"{where}.{name} is {weight:g}, but data.{name} is not given; give it, or set 0")
            if weight and not weighted[kind]:
                raise UserError(f"{where}.{name} is {weight:g}, but all {name} sources have weight 0")
    return found


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
        weights = {name: str(w) for name, w in self.weights.items()}
        return {"first_row": self.first_row, "ratio": [str(r) for r in self.ratio], "weights": weights}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Shares:
        weights = {name: Fraction(w) for name, w in data["weights"].items()}
        return cls(data["first_row"], tuple(Fraction(r) for r in data["ratio"]), weights)


def amount(totals: Totals, unit: Unit) -> int:
    """Return how much of a unit an epoch of a source has."""
    return {"tokens": totals.rows, "loss_tokens": totals.targets, "documents": totals.begun}[unit]


def shares(
    first_row: int, ratio: Sequence[float], sources: Sequence[NamedSource], totals: Mapping[str, Totals], unit: Unit
) -> Shares:
    """Turn a ratio and weights that count `unit` into shares in rows."""
    counted = [s for s in sources if ratio[s.kind] and s.config.weight]
    weight_of_kind = {k: sum(exact(s.config.weight) for s in counted if s.kind == k) for k in _KINDS}
    rows = {}
    for s in counted:
        in_unit = exact(ratio[s.kind]) * exact(s.config.weight) / weight_of_kind[s.kind]
        rows[s.name] = in_unit * Fraction(totals[s.name].rows, max(1, amount(totals[s.name], unit)))
    of_kind = [sum((rows[s.name] for s in counted if s.kind == k), _NONE) for k in _KINDS]
    weights = {s.name: rows[s.name] / of_kind[s.kind] for s in counted}
    return Shares(first_row, tuple(r / sum(of_kind) for r in of_kind), weights)


@dataclass(frozen=True)
class Phase:
    """Shares that were all known from a row on; what changes on the way begins another leg."""

    first_row: int
    stages: tuple[Shares, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"first_row": self.first_row, "stages": [s.to_dict() for s in self.stages]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        return cls(data["first_row"], tuple(Shares.from_dict(s) for s in data["stages"]))

    def seen_from(self, row: int) -> Phase:
        """Return what holds from a later row on, as if it began there."""
        past = [s for s in self.stages if s.first_row <= row]
        return Phase(row, (replace(past[-1], first_row=row), *(s for s in self.stages if s.first_row > row)))


def go_on(phases: Sequence[Phase], wanted: Phase, row: int) -> list[Phase]:
    """Return the legs of a run that went up to `row` by `legs`, and goes on as `wanted` from there."""
    now = wanted.seen_from(row)
    if now == phases[-1].seen_from(row):
        return list(phases)
    return [*(leg for leg in phases if leg.first_row < row), now]


def build_schedule(phases: Sequence[Phase], kinds: Mapping[str, int]) -> MixtureSchedule:
    """Return the schedule of all sources, in the order of `kinds`, which gives each one's kind."""

    def blend(leg: Phase) -> SourceMixture:
        stages = [
            SourceMixtureStage(s.first_row - leg.first_row, s.ratio, tuple(s.weights.get(name, _NONE) for name in kinds))
            for s in leg.stages
        ]
        return SourceMixture(list(kinds.values()), stages, len(CORPORA))

    return MixtureSchedule([(leg.first_row, blend(leg)) for leg in phases])


def describe_shares(stage: Shares, kinds: Mapping[str, int]) -> str:
    """Return the share of each source, for a person."""
    return ", ".join(f"{n} {float(w * stage.ratio[kinds[n]]):.1%}" for n, w in stage.weights.items())
