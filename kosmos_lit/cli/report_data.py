"""The verb `report data`: what indexes hold, and what was left out of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.terminal import table


@dataclass(frozen=True, kw_only=True)
class DataReportOptions:
    """Which indexes."""

    folders: tuple[Path, ...]


def data_parser() -> Parser:
    """Return the options of `report data`."""
    return verb_parser(
        "report data",
        DataReportOptions,
        positionals={"folders": ("+", "folder of an index, as `prepare corpus` writes it, or of several")},
        description="Print a table of indexes, then for each what was broken, skipped or noticed while it was made.",
    )


def report_data(arguments: list[str]) -> None:
    """Print what indexes hold."""
    [o] = data_parser().read(arguments)
    from datamodules.corpus import IndexedCorpus
    from datamodules.prepare.report import describe

    # A folder of indexes stands for all of them.
    folders = [index for folder in o.folders for index in _indexes(folder)]
    corpora, rows = [IndexedCorpus(folder) for folder in folders], list[list[object]]()
    for corpus in corpora:
        manifest = corpus.manifest
        assert manifest is not None  # an index without one is refused above
        documents, tokens, images = (int(manifest[key]) for key in ("documents", "tokens", "images"))
        means = [f"{n / documents:,.1f}" if documents else None for n in (tokens, images)]
        rows.append([str(corpus.folder), manifest["format"], len(manifest["shards"]), documents, tokens, images, *means])
    headers = ["index", "format", "shards", "documents", "tokens", "images", "tokens a document", "images a document"]
    print("\n\n".join([table(headers, rows, align="llr"), *map(describe, corpora)]))


def _indexes(folder: Path) -> list[Path]:
    """Return the folders below one that hold an index, or itself, if it does or nothing below it does."""
    from datamodules.corpus import MANIFEST

    below = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return [folder] if (folder / MANIFEST).exists() or not below else below
