"""Raw shards to an indexed corpus: per shard and in parallel, whole or absent, and resumable.

Each shard becomes a part in `DIR/parts/`, written under a temporary name and renamed when complete. Parts that a former
run finished are kept. When all are there they are joined into the corpus's files; the manifest is written last. Machines
that share a folder can each make a part of the shards: the last one to finish joins them.
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
from kosmos_lit.tokenizer import Tokenizer

PARTS_VERSION = 3
"""Of the unfinished parts in an index's folder; those of another version are not gone on with."""


@dataclass(frozen=True, kw_only=True)
class PendingShards:
    """What a part of a preparation waits for when its own shards are done."""

    part: tuple[int, int]
    pass_: str
    """What the shards lack: `images` or `documents`."""
    shards: tuple[Path, ...]
    parts: tuple[int, ...]
    """Whose shards they are."""

    def __str__(self) -> str:
        """Say what is missing, and what is to be done."""
        (number, n), others = self.part, ", ".join(map(str, self.parts))
        state = f"{len(self.shards):,} shards are still to be read for {self.pass_}, {self.shards[0]} for one"
        then = (
            f"run this same command again when parts {others} have listed theirs"
            if self.pass_ == "images"
            else "the last part to finish joins the index"
        )
        return f"part {number} of {n} has done its {self.pass_}; {state} (parts {others}): {then}"


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
    """Index the shards that `inputs` match into `output`, or open the index if it is already there.

    Args:
        format: `jsonl | parquet | img2dataset | warc | instruct`.
        inputs: patterns of files.
        tokenizer: a tokenizer's folder.
        output: the index's folder.
        options: how documents are cut out of shards.
        workers: processes.
        max_bad_share: a shard with more broken records than this stops the preparation.

    Raises: UserError if the input is missing or too broken, or `output` holds an index of something else.
    """
    done = prepare_part(
        part=(1, 1), format=format, inputs=inputs, tokenizer=tokenizer, output=output, options=options, workers=workers,
        max_bad_share=max_bad_share,
    )  # fmt: skip
    assert isinstance(done, IndexedCorpus)
    return done


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
    """Do part i of n of what `prepare_corpus` does: shards i, i + n, ... of the sorted ones; the last part joins all.

    Parts may run at the same time, on machines that share the folder, or one after another. A crawl has two passes: a part
    whose first is done before the others' says so, and must be run again.

    Raises: UserError as `prepare_corpus` does, or if other parts in `output` are of something else.
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
            path=path, name=shard["path"], shard=i, format=format, tokenizer=tokenizer, options=options, folder=output,
            max_bad_share=max_bad_share,
        )
        for i, (path, shard) in enumerate(zip(files, identity["shards"], strict=True))
    ]  # fmt: skip
    own = tasks[number - 1 :: n_parts]

    def unfinished(pass_: str, folder_of: Callable[[Task], Path]) -> PendingShards | None:
        missing = [task for task in tasks if not folder_of(task).exists()]
        parts = sorted({task.shard % n_parts + 1 for task in missing})
        paths = tuple(task.path for task in missing)
        return PendingShards(part=part, pass_=pass_, shards=paths, parts=tuple(parts)) if missing else None

    with locked(output, part) as alone:
        with alone():
            if (corpus := _finished(output, identity)) is not None:  # made by the process that was waited for
                return corpus
            _check_parts(output, identity, may_drop=n_parts == 1)
            remove_leftovers(output / "parts", {path.name for task in own for path in (task.part, task.image_list)})
        if SOURCES[format].needs_image_list:
            run_all(list_shard_images, [t for t in own if not t.image_list.exists()], workers, "listing images", "images")
            with alone():
                if (waits := unfinished("images", lambda task: task.image_list)) is not None:
                    return waits
                if not images_file(output).exists():
                    join_image_lists(output, tasks)
        run_all(index_shard, [t for t in own if not t.part.exists()], workers, f"indexing {format}", "documents")
        with alone():
            if read_manifest(output) is None:
                if (waits := unfinished("documents", lambda task: task.part)) is not None:
                    return waits
                join(output, tasks, identity, token_dtype(vocabulary))
    return IndexedCorpus(output)


def _finished(output: Path, identity: dict[str, Any]) -> IndexedCorpus | None:
    """Open the index if it is there; what a process left that was killed behind its last step is removed."""
    if read_manifest(output) is None:
        return None
    corpus = IndexedCorpus(output)
    check_identity(corpus, identity)
    shutil.rmtree(output / "parts", ignore_errors=True)
    return corpus


def index_identity(
    format: str, tokenizer: Tokenizer, options: ReadOptions, files: Sequence[Path], output: Path
) -> dict[str, Any]:
    """Return what an index in `output` is made of, as its manifest keeps it."""

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
    """Make sure that an index is of the given format, tokenizer, options and (if asked) shards.

    Raises: UserError naming every difference.
    """
    assert corpus.manifest is not None
    wrong = _differences(corpus.manifest, identity, shards=shards)
    if wrong:
        raise UserError(
            f"the index in {corpus.folder} is of something else: {'; '.join(wrong)}. "
            "Choose another index folder, or delete this one to prepare it again"
        )


def _differences(there: dict[str, Any], identity: dict[str, Any], *, shards: bool = True) -> list[str]:
    # An index may be older than an option: then it was made with the option's default.
    known = there | {"options": asdict(ReadOptions()) | there["options"]}
    wrong = [
        f"{key} is {there[key]!r} there, {identity[key]!r} here"
        for key in ("format", "tokenizer", "options")
        if known[key] != identity[key]
    ]
    if shards and there["shards"] != identity["shards"]:
        old, new = ({(name, size) for name, size in shards_key(x["shards"])} for x in (there, identity))
        if old != new or shards_key(there["shards"]) != shards_key(identity["shards"]):
            added, gone = (sorted(name for name, _ in s)[:3] for s in (new - old, old - new))
            wrong.append(f"its shards differ: {len(old)} there, {len(new)} here; new {added}, gone {gone}")
    return wrong


def _check_parts(output: Path, identity: dict[str, Any], *, may_drop: bool) -> None:
    """Drop the parts of an unfinished run unless it was the same; remember what the coming parts are of.

    Raises: UserError if they are not the same, and other machines may be at work on them.
    """
    path, wanted = output / "parts" / "identity.json", {"parts": PARTS_VERSION} | identity
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found == wanted:
            return
        if not may_drop:
            wrong = _differences(found, identity) or ["the paths of its shards, or the program's version"]
            raise UserError(
                f"{output} holds unfinished parts of something else: {'; '.join(wrong)}. Give all parts the same "
                f"input and options, or delete {output / 'parts'} to begin again"
            )
    shutil.rmtree(output / "parts", ignore_errors=True)
    write_atomically(path, json.dumps(wanted).encode())
