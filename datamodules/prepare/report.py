"""What `prepare` says when it is done: what became of every record, and what the index holds."""

from __future__ import annotations

from datamodules.corpus import IndexedCorpus
from datamodules.document import Tally
from datamodules.quarantine import LEDGER


def report(tally: Tally, images: Tally) -> str:
    """Return what became of every record, as lines of text."""
    lines = []
    for title, counter, examples in (
        ("broken", tally.broken, tally.examples),
        ("left out", tally.skipped, tally.examples),
        ("noticed", tally.notes, tally.examples),
        ("images broken", images.broken, images.examples),
        ("images left out", images.skipped, images.examples),
    ):
        lines += [f"  {title:<18}{n:>12,}  {r} (first: {examples[r]})" for r, n in sorted(counter.items())]
    return "\n".join(lines)


def describe(corpus: IndexedCorpus) -> str:
    """Return the final report on a prepared corpus."""
    manifest = corpus.manifest
    assert manifest is not None
    head = [f"{corpus.folder}: {manifest['format']}, {len(manifest['shards'])} shards"]
    head += [f"  {key:<18}{manifest[key]:>12,}" for key in ("documents", "tokens", "images")]
    skipped = report(Tally.from_dict(manifest["tally"]), Tally.from_dict(manifest["image_tally"]))
    ledger = corpus.folder / LEDGER
    listed = [f"  each broken record is listed in {ledger}"] if ledger.is_file() else []
    return "\n".join([*head, *([skipped] if skipped else []), *listed])
