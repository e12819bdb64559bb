"""The data of a run as its checkpoints hold them, and what may differ when a run goes on.

Three things decide the rows to come. The *rules* (seed, row length, tokenizer ...) and each source's *contents* must be
those of the checkpoint's run. The *shares* may change if the run accepts it (`data.accept_changes`): rows that were read
stay as they were, each source goes on behind its last row that was read, and new ones begin at their first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.corpus import IndexedCorpus
from datamodules.io.hashing import hash_key
from datamodules.mixture.schedule import Phase, extend_phases
from datamodules.mixture.shares import NamedSource
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError


@dataclass(frozen=True)
class History:
    """A stream's rules, sources and shares."""

    rules: Mapping[str, Any]
    """What every row depends on, as plain data."""
    sources: Mapping[str, Mapping[str, Any]]
    """By name: its kind, and what identifies its documents, as plain data."""
    phases: Sequence[Phase]

    @property
    def kinds(self) -> dict[str, int]:
        """Return the kind of each source, by name in the order of the schedule's options."""
        # Sorted, so that the order does not depend on the config: ties between deadlines go to the lower option.
        return {name: CORPORA.index(self.sources[name]["kind"]) for name in sorted(self.sources)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        sources = {name: dict(source) for name, source in self.sources.items()}
        return {"rules": dict(self.rules), "sources": sources, "phases": [phase.to_dict() for phase in self.phases]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """Undo `to_dict`."""
        return cls(data["rules"], data["sources"], [Phase.from_dict(phase) for phase in data["phases"]])

    def resume(self, configured: History, row: int, *, accept: bool) -> tuple[History, list[str]]:
        """Return the history of a run that goes on as `configured` from `row`, and a description of each change.

        Raises: UserError naming what must not change, or, unless `accept`, what changes.
        """
        if differences := _differences(self.rules, configured.rules):
            raise UserError(
                f"the checkpoint's data stream was another one: {'; '.join(differences)}; resume with that run's data"
            )
        # A source of one side only is a change of shares, which may be accepted.
        for name in sorted(self.sources.keys() & configured.sources.keys()):
            if differences := _differences(self.sources[name], configured.sources[name]):
                raise UserError(
                    f"the checkpoint's source {name} held other documents: {'; '.join(differences)}. Put its files and "
                    "index back; to go on with the new ones, give them another name under data.sources and set "
                    "data.accept_changes"
                )
        phases = extend_phases(self.phases, configured.phases[-1], row)
        # Sources that are no longer configured stay in the history: their rows must be counted, and they may come back.
        merged = History(configured.rules, {**self.sources, **configured.sources}, phases)
        changes = self._changes(configured, row)
        if changes and not accept:
            raise UserError(
                f"from row {row} on the mixture would differ from that of the checkpoint's run: {'; '.join(changes)}. "
                "Set data.accept_changes to go on with the new one, or resume with that run's shares"
            )
        return merged, changes

    def _changes(self, configured: History, row: int) -> list[str]:
        # Shares of rows that are read already do not count.
        before, after = (h.phases[-1].starting_at(row) for h in (self, configured))
        old_names, new_names = ({name for stage in phase.stages for name in stage.weights} for phase in (before, after))
        changes = [f"source {name} is no longer read" for name in sorted(old_names - new_names)]
        changes += [f"source {name} is new" for name in sorted(new_names - old_names)]
        if before != after:
            old, new = (
                " then ".join(f"from row {s.first_row}: {s.describe(h.kinds)}" for s in phase.stages)
                for h, phase in ((self, before), (configured, after))
            )
            changes.append(f"shares of rows were {old}; they are {new}")
        return changes


def contents(source: NamedSource, corpus: IndexedCorpus, held_out: Sequence[Any]) -> dict[str, Any]:
    """Return what identifies a source's training documents; the split is a function of `held_out`."""
    manifest = corpus.manifest
    assert manifest is not None
    identity: dict[str, Any] = {"kind": CORPORA[source.kind]}
    identity |= {key: manifest[key] for key in ("format", "options", "documents", "tokens", "images")}
    identity["shards"] = f"{hash_key(json.dumps(corpus.shards_key)):016x}"  # hashed: there may be 200,000
    identity["held_out"] = f"{hash_key(json.dumps(held_out)):016x}"
    return identity


def _differences(checkpoint: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    # Keys of either side: one that the other lacks is a difference.
    keys = [*run, *(k for k in checkpoint if k not in run)]
    return [f"{k} was {checkpoint.get(k)!r}, is {run.get(k)!r}" for k in keys if checkpoint.get(k) != run.get(k)]
