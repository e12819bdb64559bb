"""Raw shards to an indexed corpus: in parallel by shard, atomically, and resumably.

Each shard becomes a shard index in `DIR/parts/`; those that an earlier run finished are kept. When all exist, they are
joined into the corpus's files, the manifest last. Machines that share a folder can prepare a part of the shards each; the
last one to finish joins them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datamodules.corpus import VERSION, IndexedCorpus, read_manifest, shards_key
from datamodules.io.locks import locked
from datamodules.io.paths import expand
from datamodules.io.pool import run_all
from datamodules.prepare.join import join, join_image_lists
from datamodules.prepare.shard import Task, images_file, index_shard, list_shard_images, token_dtype
from datamodules.sources import SOURCES, ReadOptions
from kosmos_lit.errors import UserError
from kosmos_lit.files import remove_leftovers, write_atomically
from kosmos_lit.terminal import write_line
from kosmos_lit.tokenizer import Tokenizer

PARTS_VERSION = 4
"""Version of the shard indexes in an unfinished index's folder; those of another version are made again."""


@dataclass(frozen=True, kw_only=True)
class PendingShards:
    """The shards of other parts that a preparation waits for."""

    part: tuple[int, int]
    """The part that waits: i of n."""
    stage: str
    """What the shards are still to be read for: `images` or `documents`."""
    shards: tuple[Path, ...]
    parts: tuple[int, ...]
    """The parts that these shards belong to."""

    def __str__(self) -> str:
        """Return a message: what is missing, and what to do."""
        (number, n), others = self.part, ", ".join(map(str, self.parts))
        state = f"{len(self.shards):,} shards are still to be read for {self.stage}, {self.shards[0]} for one"
        then = (
            f"run the same command again when parts {others} have listed theirs"
            if self.stage == "images"
            else "the last part to finish joins the index"
        )
        return f"part {number} of {n} has done its {self.stage}; {state} (parts {others}): {then}"


def prepare_corpus(
    *,
    format: str,
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ReadOptions | None = None,
    workers: int = 1,
    max_bad_share: float = 0.1,
) -> IndexedCorpus:
    """Index the shards that `inputs` match into `output`, or open the index that exists there.

    Args:
        format: `jsonl | parquet | img2dataset | warc | instruct`.
        inputs: patterns of files.
        tokenizer: a tokenizer's folder.
        output: the index's folder.
        options: how documents are read from shards.
        workers: processes.
        max_bad_share: a shard with more broken records than this stops the preparation.

    Raises: UserError if the input is missing or too broken, or `output` holds an index of something else.
    """
    corpus = prepare_part(
        part=(1, 1),
        format=format,
        inputs=inputs,
        tokenizer=tokenizer,
        output=output,
        options=options,
        workers=workers,
        max_bad_share=max_bad_share,
    )
    assert isinstance(corpus, IndexedCorpus)
    return corpus


def prepare_part(
    *,
    part: tuple[int, int],
    format: str,
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ReadOptions | None = None,
    workers: int = 1,
    max_bad_share: float = 0.1,
) -> IndexedCorpus | PendingShards:
    """Do part i of n of the work of `prepare_corpus`: shards i, i + n, ... in sorted order; the last part joins all.

    Parts may run at the same time, on machines that share the folder, or one after another. A crawl is read twice: a part
    that has listed its images before the others returns `PendingShards`, and must be run again.

    Raises: UserError as `prepare_corpus` does, or if `output` holds parts of another preparation.
    """
    number, n_parts = part
    if format not in SOURCES:
        raise UserError(f"unknown format {format!r}; there are {', '.join(SOURCES)}")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share must lie in [0, 1], got {max_bad_share}")
    if not 1 <= number <= n_parts:
        raise UserError(f"part {number} of {n_parts}: parts are counted from 1")
    options = options or ReadOptions()
    files = expand(inputs, f"prepare corpus ({format})")
    vocabulary = Tokenizer.load(tokenizer)
    identity = index_identity(format, vocabulary, options, files, output)
    if (corpus := _finished(output, identity)) is not None:
        return corpus
    tasks = [
        Task(
            path=path,
            name=shard["path"],
            shard=i,
            format=format,
            tokenizer=tokenizer,
            options=options,
            folder=output,
            max_bad_share=max_bad_share,
        )
        for i, (path, shard) in enumerate(zip(files, identity["shards"], strict=True))
    ]
    own = tasks[number - 1 :: n_parts]

    def pending(stage: str, folder_of: Callable[[Task], Path]) -> PendingShards | None:
        missing = [task for task in tasks if not folder_of(task).exists()]
        parts = sorted({task.shard % n_parts + 1 for task in missing})
        paths = tuple(task.path for task in missing)
        return PendingShards(part=part, stage=stage, shards=paths, parts=tuple(parts)) if missing else None

    with locked(output, part) as exclusive:
        with exclusive():
            if (corpus := _finished(output, identity)) is not None:  # while this process waited for the lock
                return corpus
            _check_parts(output, identity, may_drop=n_parts == 1)
            remove_leftovers(output / "parts", {path.name for task in own for path in (task.index, task.image_list)})
        if SOURCES[format].needs_image_list:
            run_all(list_shard_images, [t for t in own if not t.image_list.exists()], workers, "listing images", "images")
            with exclusive():
                if (shards := pending("images", lambda task: task.image_list)) is not None:
                    return shards
                if not images_file(output).exists():
                    join_image_lists(output, tasks)
        run_all(index_shard, [t for t in own if not t.index.exists()], workers, f"indexing {format}", "documents")
        with exclusive():
            if read_manifest(output) is None:
                if (shards := pending("documents", lambda task: task.index)) is not None:
                    return shards
                write_line(f"joining {len(tasks):,} shards", keep=True)
                join(output, tasks, identity, token_dtype(vocabulary))
    return IndexedCorpus(output)


def _finished(output: Path, identity: dict[str, Any]) -> IndexedCorpus | None:
    """Return the finished index, or None; a process killed after its last step may have left `parts`, which are removed."""
    if read_manifest(output) is None:
        return None
    corpus = IndexedCorpus(output)
    check_identity(corpus, identity)
    shutil.rmtree(output / "parts", ignore_errors=True)
    return corpus


def index_identity(
    format: str, tokenizer: Tokenizer, options: ReadOptions, files: Sequence[Path], output: Path
) -> dict[str, Any]:
    """Return the identity of an index in `output`, as its manifest stores it: format, tokenizer, options and shards."""

    @cache  # there may be 200,000 files
    def relative(folder: str) -> str:
        return os.path.relpath(folder or ".", output)

    def path(file: Path) -> str:
        folder, name = os.path.split(file)
        return name if relative(folder) == "." else f"{relative(folder)}/{name}"

    return {
        "version": VERSION,
        "format": format,
        "tokenizer": tokenizer.fingerprint,
        "options": asdict(options),
        "shards": [{"path": path(file), "bytes": os.stat(file).st_size} for file in files],
    }


def check_identity(corpus: IndexedCorpus, identity: dict[str, Any], *, shards: bool = True) -> None:
    """Check that an index has the format, tokenizer, options and, with `shards`, the shards of an identity.

    Raises: UserError naming every difference.
    """
    assert corpus.manifest is not None
    wrong = _differences(corpus.manifest, identity, shards=shards)
    if wrong:
        raise UserError(
            f"the index in {corpus.folder} was prepared differently: {'; '.join(wrong)}. "
            "Choose another index folder, or delete this one to prepare it again"
        )


def _differences(existing: dict[str, Any], identity: dict[str, Any], *, shards: bool = True) -> list[str]:
    """Return a phrase for each difference between the identity of an existing index and the requested one."""
    # An index may be older than an option: then it was made with the option's default.
    completed = existing | {"options": asdict(ReadOptions()) | existing["options"]}
    wrong = [
        f"{key} is {existing[key]!r} in the index, {identity[key]!r} in the run"
        for key in ("format", "tokenizer", "options")
        if completed[key] != identity[key]
    ]
    if shards and existing["shards"] != identity["shards"]:
        old, new = ({(name, size) for name, size in shards_key(x["shards"])} for x in (existing, identity))
        if old != new or shards_key(existing["shards"]) != shards_key(identity["shards"]):
            added, gone = (sorted(name for name, _ in s)[:3] for s in (new - old, old - new))
            wrong.append(f"the index has {len(old)} shards, the run {len(new)}; new {added}, gone {gone}")
    return wrong


def _check_parts(output: Path, identity: dict[str, Any], *, may_drop: bool) -> None:
    """Make `output/parts` hold shard indexes of this identity only: an unfinished preparation of another is removed.

    Raises: UserError if it may not be removed, as other machines may be working on it.
    """
    path, expected = output / "parts" / "identity.json", {"parts": PARTS_VERSION} | identity
    if path.exists():
        existing = json.loads(path.read_text(encoding="utf-8"))
        if existing == expected:
            return
        if not may_drop:
            wrong = _differences(existing, identity) or ["the paths of its shards, or the program's version"]
            raise UserError(
                f"{output} holds an unfinished index that was prepared differently: {'; '.join(wrong)}. Give all parts the "
                f"same input and options, or delete {output / 'parts'} to begin again"
            )
    shutil.rmtree(output / "parts", ignore_errors=True)
    write_atomically(path, json.dumps(expected).encode())
