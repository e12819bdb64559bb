"""Raw shards to an indexed corpus: per shard and in parallel, whole or absent, and resumable.

Each shard becomes a part in `DIR/parts/`, written under a temporary name and renamed when complete. Parts that a former
run finished are kept. When all are there they are joined into the corpus's files; the manifest is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus import COLUMNS, MANIFEST, VERSION, IndexedCorpus, place, read_manifest
from datamodules.document import Document, ImageRef, Part, Tally
from datamodules.prepare.files import expand, sync, whole_folder, write_whole
from datamodules.prepare.pool import Progress, run_all
from datamodules.prepare.report import report
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.base import SURVEY
from kosmos_lit.errors import UserError
from kosmos_lit.tokens import Ids, Tokenizer

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
MIN_RECORDS = 20
"""A shard with fewer records is not judged by its share of broken ones, unless nothing in it could be read."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one worker needs to index one shard."""

    path: Path
    shard: int
    format: str
    tokenizer: Path
    options: ReadOptions
    folder: Path
    """The corpus folder."""
    max_bad_share: float

    @property
    def part(self) -> Path:
        return self.folder / "parts" / f"{self.shard:06d}"

    @property
    def survey(self) -> Path:
        return self.folder / "parts" / f"{self.shard:06d}.pictures"


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
    if format not in SOURCES:
        raise UserError(f"unknown format {format!r}; there are {', '.join(SOURCES)}")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share must lie in [0, 1], got {max_bad_share}")
    options = options or ReadOptions()
    files = expand(inputs, f"prepare corpus ({format})")
    identity = identify(format, Tokenizer.load(tokenizer), options, files, output)
    if read_manifest(output) is not None:
        check_same(output, identity)
        return IndexedCorpus(output)
    with _locked(output):
        if read_manifest(output) is not None:  # made by the process that was waited for
            check_same(output, identity)
            return IndexedCorpus(output)
        _check_parts(output, identity)
        tasks = [
            Task(
                path=path, shard=i, format=format, tokenizer=tokenizer, options=options, folder=output,
                max_bad_share=max_bad_share,
            )
            for i, path in enumerate(files)
        ]  # fmt: skip
        pictures = Tally()
        if SOURCES[format].needs_survey:
            run_all(survey_shard, [t for t in tasks if not t.survey.exists()], workers, "listing pictures", "pictures")
            pictures = _join_surveys(output, tasks)
        run_all(index_shard, [t for t in tasks if not t.part.exists()], workers, f"indexing {format}", "documents")
        _join(output, tasks, identity, pictures)
    return IndexedCorpus(output)


def identify(
    format: str, tokenizer: Tokenizer, options: ReadOptions, files: Sequence[Path], output: Path
) -> dict[str, Any]:
    """Return what an index in `output` is made of, as its manifest keeps it."""
    return {
        "version": VERSION,
        "format": format,
        "tokenizer": tokenizer.fingerprint,
        "options": asdict(options),
        "shards": [{"path": os.path.relpath(f, output), "bytes": f.stat().st_size} for f in files],
    }


def check_same(folder: Path, identity: dict[str, Any], *, shards: bool = True) -> None:
    """Make sure that an index is of the given format, tokenizer, options and (if asked) shards.

    Raises: UserError naming every difference.
    """
    manifest = read_manifest(folder)
    assert manifest is not None
    # An index may be older than an option: then it was made with the option's default.
    known = manifest | {"options": asdict(ReadOptions()) | manifest["options"]}
    wrong = [
        f"{key} is {manifest[key]!r} there, {identity[key]!r} here"
        for key in ("format", "tokenizer", "options")
        if known[key] != identity[key]
    ]
    if shards and manifest["shards_key"] != _shards_key(identity["shards"]):
        there, here = ({(Path(s["path"]).name, s["bytes"]) for s in x["shards"]} for x in (manifest, identity))
        added, gone = (sorted(name for name, _ in s)[:3] for s in (here - there, there - here))
        wrong.append(f"its shards differ: {len(there)} there, {len(here)} here; new {added}, gone {gone}")
    if wrong:
        raise UserError(
            f"the index in {folder} is of something else: {'; '.join(wrong)}. "
            "Choose another index folder, or delete this one to prepare it again"
        )


def _shards_key(shards: Iterable[dict[str, Any]]) -> list[list[Any]]:
    return [[Path(s["path"]).name, s["bytes"]] for s in shards]


def survey_shard(task: Task, progress: Progress) -> None:
    """List one shard's pictures."""
    tally = Tally()
    rows = SOURCES[task.format].survey(task.path, task.shard, task.options, tally)
    _check_share(task, tally)
    with whole_folder(task.survey) as folder:
        np.save(folder / "pictures.npy", rows)
        _write_json(folder / "tally.json", tally.to_dict())
    progress(len(rows))


def index_shard(task: Task, progress: Progress) -> None:
    """Tokenize one shard and write its part.

    Raises: UserError if more than the allowed share of its records is broken; nothing is written then.
    """
    tokenizer, tally = _tokenizer(task.tokenizer), Tally()
    source, pictures = SOURCES[task.format], None
    if source.needs_survey:
        pictures = np.load(_pictures_file(task.folder), mmap_mode="r")
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("tokens", *COLUMNS, *source.columns)}
    documents = source.documents(task.path, task.shard, task.options, tally, pictures)
    for batch in _batches(documents):
        for document, parts in zip(batch, _encode(batch, tokenizer), strict=True):
            ids, said = np.concatenate(parts), document.supervised or ()
            markers = np.flatnonzero(ids == tokenizer.special.image)
            if len(ids) == len(markers) or any(says and not len(part) for part, says in zip(parts, said, strict=False)):
                tally.leave("no text left after normalisation", document.record)
                continue
            images = [part for part in document.parts if isinstance(part, ImageRef)]
            tally.documents += 1
            columns["tokens"].append(ids)
            columns["token_offsets"].append(np.array([len(ids)]))
            columns["image_offsets"].append(np.array([len(images)]))
            columns["records"].append(np.array([place(task.shard, document.record)], dtype=np.uint64))
            columns["image_places"].append(np.array([place(i.shard, i.offset) for i in images], dtype=np.uint64))
            columns["image_lengths"].append(np.array([i.length for i in images]))
            columns["image_positions"].append(markers)
            if source.columns:
                paths = [os.fsencode(image.path) for image in images]
                columns["supervised"].append(np.repeat(np.array(said), [len(part) for part in parts]))
                columns["image_path_offsets"].append(np.array([len(path) for path in paths]))
                columns["image_paths"].append(np.frombuffer(b"".join(paths), np.uint8))
        progress(len(batch))
    _check_share(task, tally)
    dtypes = COLUMNS | {"tokens": token_dtype(tokenizer)} | dict(source.columns)
    with whole_folder(task.part) as folder:
        for name, arrays in columns.items():
            np.save(folder / f"{name}.npy", np.concatenate([np.empty(0), *arrays]).astype(dtypes[name]))
        _write_json(folder / "tally.json", tally.to_dict())


def token_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(part) for part in document.parts if isinstance(part, str))
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[Ids]]:
    """Yield the ids of each document's parts."""
    texts = iter(tokenizer.encode_all([text for document in batch for text in _texts(document, tokenizer)]))
    marker = np.array([tokenizer.special.image], dtype=np.int64)
    for document in batch:
        yield [next(texts) if isinstance(part, str) else marker for part in document.parts]


def _texts(document: Document, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a document's texts as they are to be encoded; only instruction data have one right behind another."""
    before: Part | None = None
    for part in document.parts:
        if isinstance(part, str):
            yield tokenizer.continuation(part) if isinstance(before, str) else part
        before = part


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _check_share(task: Task, tally: Tally) -> None:
    broken = tally.broken.total()
    sound = tally.documents + tally.left_out.total()
    if broken and (not sound or (broken + sound >= MIN_RECORDS and tally.broken_share > task.max_bad_share)):
        reasons = ", ".join(f"{n} x {r} (first: {tally.examples[r]})" for r, n in tally.broken.most_common(3))
        raise UserError(
            f"{task.path}: {broken} of {broken + sound} records are broken ({tally.broken_share:.1%}, more than "
            f"max_bad_share {task.max_bad_share:.1%}): {reasons}. Finished shards are kept: mend or leave out this one, "
            "or allow more, and run the same command again"
        )


def _pictures_file(folder: Path) -> Path:
    return folder / "parts" / "pictures.npy"


def _join_surveys(output: Path, tasks: Sequence[Task]) -> Tally:
    """Write one list of all shards' pictures, sorted by URL; of equal URLs the first usable one."""
    rows = np.concatenate([np.empty(0, SURVEY), *(np.load(t.survey / "pictures.npy") for t in tasks)])
    rows = rows[np.lexsort((rows["offset"], rows["shard"], rows["verdict"], rows["url"]))]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = rows["url"][1:] != rows["url"][:-1]
    np.save(_pictures_file(output), rows[first])
    return _sum_tallies(t.survey for t in tasks)


def _join(output: Path, tasks: Sequence[Task], identity: dict[str, Any], pictures: Tally) -> None:
    """Join the parts into the corpus's files, the manifest last, and remove the parts."""
    for column in ("tokens", *COLUMNS, *SOURCES[identity["format"]].columns):
        parts = [np.load(t.part / f"{column}.npy", mmap_mode="r") for t in tasks]
        offsets = column.endswith("_offsets")
        total = sum(len(p) for p in parts) + offsets
        temporary = output / f".{column}.npy"
        if not total:
            np.save(temporary, parts[0])
        else:
            joined = np.lib.format.open_memmap(temporary, "w+", dtype=parts[0].dtype, shape=(total,))
            at = int(offsets)
            for part in parts:
                # Parts hold each document's counts; the corpus holds where each begins.
                start = joined[at - 1] if offsets else 0
                joined[at : at + len(part)] = np.cumsum(part, dtype=np.uint64) + start if offsets else part
                at += len(part)
            joined.flush()
            del joined
        sync(temporary)
        os.replace(temporary, output / f"{column}.npy")
    tally = _sum_tallies(t.part for t in tasks)
    if not tally.documents:
        raise UserError(f"{output}: no document in {len(tasks)} shards: {report(tally, pictures)}")
    counts = {c: len(np.load(output / f"{c}.npy", mmap_mode="r")) for c in ("tokens", "image_places")}
    manifest = identity | {
        "shards_key": _shards_key(identity["shards"]),
        "documents": tally.documents,
        "tokens": counts["tokens"] - counts["image_places"],
        "images": counts["image_places"],
        "tally": tally.to_dict(),
        "pictures": pictures.to_dict(),
    }
    write_whole(output / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(output / "parts", ignore_errors=True)


def _sum_tallies(parts: Iterable[Path]) -> Tally:
    total = Tally()
    for part in parts:
        total.add(Tally.from_dict(json.loads((part / "tally.json").read_text(encoding="utf-8"))))
    return total


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def _check_parts(output: Path, identity: dict[str, Any]) -> None:
    """Drop the parts of an unfinished run unless it was the same; remember what the coming parts are of."""
    path = output / "parts" / "identity.json"
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != identity:
        shutil.rmtree(output / "parts", ignore_errors=True)
        write_whole(path, json.dumps(identity).encode())


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Let one process at a time work on a corpus."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another process that prepares {output}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
