"""What a checkpoint keeps of its data, and what may be different when a run goes on.

The rows to come follow from three things. The *rules* (seed, row length, tokenizer ...) and each source's *contents* must be
those of the checkpoint's run. The *shares* may change if the run says so (`data.accept_changes`): rows that were read stay
as they were, each source goes on behind its last row that was read, and new ones begin at their first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.corpus import IndexedCorpus
from datamodules.io.hashing import hash_key
from datamodules.mixture.shares import NamedSource, Phase, describe_shares, go_on
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
        """Return the kind of each source, in the one order that all runs deal rows out in."""
        return {name: CORPORA.index(self.sources[name]["kind"]) for name in sorted(self.sources)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        sources = {name: dict(source) for name, source in self.sources.items()}
        return {"rules": dict(self.rules), "sources": sources, "phases": [leg.to_dict() for leg in self.phases]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        return cls(data["rules"], data["sources"], [Phase.from_dict(leg) for leg in data["phases"]])

    def go_on(self, wanted: History, row: int, *, accept: bool) -> tuple[History, list[str]]:
        """Return the history of a run that goes on as `wanted` from `row`, and what changes there, for a person.

        Raises: UserError naming what must not change, or, unless `accept`, what changes.
        """
        if wrong := _differences(self.rules, wanted.rules):
            raise UserError(f"the checkpoint's data stream was another one: {'; '.join(wrong)}; resume with that run's data")
        for name in sorted(self.sources.keys() & wanted.sources.keys()):
            if wrong := _differences(self.sources[name], wanted.sources[name]):
                raise UserError(
                    f"the checkpoint's source {name} held other documents: {'; '.join(wrong)}. Put its files and index "
                    "back; to go on with the new ones, give them another name under data.sources and set data.accept_changes"
                )
        phases = go_on(self.phases, wanted.phases[-1], row)
        merged = History(wanted.rules, {**self.sources, **wanted.sources}, phases)
        changes = self._changes(wanted, row)
        if changes and not accept:
            raise UserError(
                f"from row {row} on the data would be mixed otherwise than the checkpoint's run would have: "
                f"{'; '.join(changes)}. Set data.accept_changes to go on so, or resume with that run's shares"
            )
        return merged, changes

    def _changes(self, wanted: History, row: int) -> list[str]:
        before, now = (h.phases[-1].seen_from(row) for h in (self, wanted))
        there, here = ({name for stage in leg.stages for name in stage.weights} for leg in (before, now))
        found = [f"source {name} is read no more" for name in sorted(there - here)]
        found += [f"source {name} is new" for name in sorted(here - there)]
        if before != now:
            told = [
                " then ".join(f"from row {s.first_row}: {describe_shares(s, h.kinds)}" for s in leg.stages)
                for h, leg in ((self, before), (wanted, now))
            ]
            found.append(f"shares of rows were {told[0]}; they are {told[1]}")
        return found


def contents(source: NamedSource, corpus: IndexedCorpus, held_out: Sequence[Any]) -> dict[str, Any]:
    """Return what identifies a source's training documents; `held_out` is what the split is a function of."""
    manifest = corpus.manifest
    assert manifest is not None
    found: dict[str, Any] = {"kind": CORPORA[source.kind]}
    found |= {key: manifest[key] for key in ("format", "options", "documents", "tokens", "images")}
    found["shards"] = f"{hash_key(json.dumps(corpus.shards_key)):016x}"
    found["held_out"] = f"{hash_key(json.dumps(held_out)):016x}"
    return found


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    keys = [*here, *(k for k in there if k not in here)]
    return [f"{k} was {there.get(k)!r}, is {here.get(k)!r}" for k in keys if there.get(k) != here.get(k)]
