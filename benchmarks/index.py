"""The speed of indexing corpora on one core, and the costs of opening a large index.

    pip install -e '.[bench]'    # datatrove, for the row that compares with it
    python benchmarks/index.py [--pairs 'data/caption/*.tar'] [--text 'data/text/*.jsonl.zst'] [--tokenizer DIR] [--json F]

Three tables:

- Caption pairs a second of `prepare corpus --format img2dataset`.
- Text a second of `--format jsonl`, from compressed files to an index on disk. For comparison: SentencePiece alone on the
  same texts in memory (line by line, as we encode them; and whole texts, which loses the lines), and datatrove's
  DocumentTokenizer on the same files with a byte-level BPE tokenizer of the same size, trained on the same text (training a
  Unigram one there takes many minutes). The runs alternate, pinned to one core; figures are medians of CPU time, as a
  machine may have other work to do.
- Opening a sparse index of many documents in a fresh process, extrapolated to 2 x 10^9; and opening a run's whole source on
  it, as every rank does at its start: shards' names, split, and stored row counts, without the shards. The goal is less than
  2 s and 200 MB.

Without --pairs and --text, images and sentences are generated: a minute and a half in all.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.config import CorpusConfig
from datamodules.corpus import COLUMNS, MANIFEST, VERSION, IndexedCorpus
from datamodules.document import Tally
from datamodules.mixture.shares import NamedSource
from datamodules.packing.row_plan import COUNTS, Blocks, RowLayout
from datamodules.packing.split import Part, Split
from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.tokenizer import train_tokenizer
from datamodules.sources import SOURCES, ReadOptions
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import Tokenizer, clean

N_PAIRS, N_TEXTS, SIDE = 20_000, 4_000, 256
VOCAB_SIZE = 8_000
BATCH_TEXTS = 256
VAL_SHARE = 0.01
RESIDENT = """
import json, re, sys, time
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""
PROBE = (
    RESIDENT
    + """
from datamodules.corpus import IndexedCorpus
before, start = resident(), time.perf_counter()
corpus = IndexedCorpus(sys.argv[1])
seconds, opened = time.perf_counter() - start, resident() - before
for document in range(0, corpus.n_documents, corpus.n_documents // 1000):
    corpus.document_tokens(document), corpus.document_images(document), corpus.shards[document % len(corpus.shards)]
print(json.dumps({"seconds": seconds, "MB opened": opened, "MB after 1000 documents": resident() - before}))
"""
)
START = (
    RESIDENT
    + """
from benchmarks.index import LAYOUT, sparse_source
from datamodules.prepared_source import PreparedSource
from kosmos_lit.tokenizer import Tokenizer
source, tokenizer = sparse_source(sys.argv[1], float(sys.argv[3])), Tokenizer.load(sys.argv[2])
before, start = resident(), time.perf_counter()
opened = PreparedSource(source, tokenizer, LAYOUT, 1)
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024 - before
print(json.dumps({"s": seconds, "MB": resident() - before, "peak MB": peak, "rows": opened.train.plan.n_rows}))
"""
)
LAYOUT = RowLayout(seq_len=2048, n_latents=64, seed=0)


# ---- inputs


def make_pairs(folder: Path) -> None:
    """Write tars of JPEGs of 256 pixels with captions."""
    draw = np.random.default_rng(7)
    y, x = np.mgrid[:SIDE, :SIDE]
    images = []
    for i in range(61):
        waves = np.stack([np.sin(x / (5 + i) + c) + np.cos(y / (3 + c * i)) for c in range(3)], axis=2)
        noise = draw.normal(0, 0.15, waves.shape)
        data = io.BytesIO()
        Image.fromarray(np.clip(127 + 60 * (waves + noise), 0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
        images.append(data.getvalue())
    words = draw_words(random.Random(5))
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard, N_PAIRS, 2):
                caption = " ".join(random.Random(i).choices(words, k=11))
                members = (("jpg", images[i % 61]), ("txt", caption.encode()), ("json", json.dumps({"key": i}).encode()))
                for ending, data in members:
                    member = tarfile.TarInfo(f"{i:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def make_text(folder: Path) -> None:
    """Write documents with lines of random words, some more frequent than others."""
    draw = random.Random(3)
    words = draw_words(draw)
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(N_TEXTS):
            lines = [" ".join(draw.choices(words, weights, k=draw.randrange(5, 90))) for _ in range(draw.randrange(1, 30))]
            file.write(json.dumps({"text": "\n".join(lines)}) + "\n")


def draw_words(draw: random.Random) -> list[str]:
    """Draw 20,000 random words."""
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]


def sparse_index(folder: Path, n_documents: int, n_shards: int, tokenizer: str = "none") -> None:
    """Write an index of caption pairs with sparse files as columns: it takes no disk space, and opens like a real one."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {"token_offsets": n_documents + 1, "image_offsets": n_documents + 1, "tokens": 17 * n_documents}
    for name, dtype in ({"tokens": "<u2"} | COLUMNS).items():
        length = lengths.get(name, n_documents)
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (length,)})
            file.truncate(file.tell() + length * np.dtype(dtype).itemsize)
    shards = [{"path": f"../../laion/part-{i // 1000:04d}/{i:06d}.tar", "bytes": 300_000_000 + i} for i in range(n_shards)]
    manifest = {
        "version": VERSION,
        "format": "img2dataset",
        "tokenizer": tokenizer,
        "options": {},
        "shards": shards,
        "documents": n_documents,
        "tokens": 16 * n_documents,
        "images": n_documents,
        "tally": Tally().to_dict(),
        "image_tally": Tally().to_dict(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


# ---- measuring


def medians(functions: dict[str, Callable[[int], object]], n_runs: int) -> dict[str, float]:
    """Return each function's median CPU seconds over alternating runs; it gets the number of the run."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(n_runs):
        for name, function in functions.items():
            start = time.process_time()
            function(run)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def datatrove_run(texts: Sequence[str], vocab_size: int, folder: Path) -> tuple[Callable[[int], object] | None, str]:
    """Return a function that runs datatrove's tokenizing pipeline on `folder`/text, or None and the reason."""
    try:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer
        from datatrove.utils.logging import logger
    except ImportError as error:
        return None, f"not compared: {error}; pip install -e '.[bench]'"
    from importlib.metadata import version

    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    logger.remove()
    model = HuggingFace(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))

    def run(number: int) -> None:
        pipeline = [
            JsonlReader(str(folder / "text"), glob_pattern="*.jsonl*"),
            DocumentTokenizer(
                str(folder / f"tokens-{number}"),
                str(folder / "tokenizer.json"),
                shuffle_documents=False,
                save_final_metadata=False,
            ),
        ]
        with redirect_stderr(io.StringIO()):  # a page of log
            LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(folder / f"logs-{number}")).run()

    return run, f"datatrove {version('datatrove')}, byte-level BPE of {model.get_vocab_size():,} pieces"


def measure_pairs(patterns: list[str], tokenizer: Path, folder: Path, n_runs: int) -> dict[str, Any]:
    """Return the rate of caption pairs."""
    counts = []

    def run(number: int) -> None:
        output = folder / f"pairs-{number}"
        counts.append(prepare_corpus(format="img2dataset", inputs=patterns, tokenizer=tokenizer, output=output).n_documents)

    seconds = medians({"ours": run}, n_runs)["ours"]
    n_bytes = sum(os.path.getsize(path) for pattern in patterns for path in glob.glob(pattern))
    columns = [(folder / "pairs-0" / f"{name}.npy").stat().st_size for name in COLUMNS]
    return {
        "pairs": counts[0],
        "kB a pair": n_bytes / counts[0] / 1000,
        "pairs/s": counts[0] / seconds,
        "bytes a pair beside tokens": sum(columns) / counts[0],
    }


def measure_text(files: list[str], tokenizer: Path, folder: Path, n_runs: int) -> dict[str, Any]:
    """Return the rates of all programs in MB of UTF-8 a second, and ours in tokens a second."""
    vocabulary = Tokenizer.load(tokenizer)
    texts = [t for f in files for t in SOURCES["jsonl"].texts(Path(f), ReadOptions(), Tally())]
    (folder / "text").mkdir()
    for file in files:
        (folder / "text" / Path(file).name).symlink_to(os.path.abspath(file))
    pieces = vocabulary._pieces._pieces  # type: ignore[attr-defined]  # SentencePiece itself
    batches = [texts[at : at + BATCH_TEXTS] for at in range(0, len(texts), BATCH_TEXTS)]
    lines = [[line for text in batch for line in clean(text).split("\n")] for batch in batches]
    corpora = []

    def ours(number: int) -> None:
        output = folder / f"text-{number}"
        corpora.append(prepare_corpus(format="jsonl", inputs=files, tokenizer=tokenizer, output=output))

    runs: dict[str, Callable[[int], object]] = {
        "ours, files to index": ours,
        "SentencePiece alone, the lines in memory": lambda _: [pieces.encode(batch, num_threads=1) for batch in lines],
        "SentencePiece alone, whole texts in memory": lambda _: [pieces.encode(batch, num_threads=1) for batch in batches],
    }
    datatrove, note = datatrove_run(texts, vocabulary.n_pieces, folder)
    if datatrove is not None:
        runs["datatrove, files to tokens"] = datatrove
    seconds = medians(runs, n_runs)
    megabytes = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    rates = {name: megabytes / time for name, time in seconds.items()}
    first = rates["ours, files to index"]
    assert corpora[0].manifest is not None
    n_tokens = corpora[0].manifest["tokens"]
    return {
        "MB": megabytes,
        "tokens": n_tokens,
        "tokens/s": n_tokens / seconds["ours, files to index"],
        "MB/s": rates,
        "ours over": {name: first / rate for name, rate in rates.items()},
        "datatrove": note,
    }


def sparse_source(folder: str, val_share: float) -> NamedSource:
    """Return the configured source of a sparse index, whose shards do not exist."""
    raw = [f"{folder}/../../laion/*/*.tar"]
    config = CorpusConfig(format="img2dataset", input=raw, index=folder, val_share=val_share)
    return NamedSource("caption", CORPORA.index("caption"), config)


def write_counts(folder: Path, val_share: float) -> None:
    """Write invented row counts of a sparse index's blocks, where a run's first start stores them."""
    corpus = IndexedCorpus(folder)
    parts: tuple[Part, ...] = ("train", "val")
    for part in parts:
        blocks = Blocks(corpus, Split(corpus, val_share, None), part, LAYOUT)
        counts = np.zeros(blocks.n_blocks, COUNTS)
        counts["rows"], counts["documents"] = 5_000, corpus.n_documents // blocks.n_blocks
        counts["first_dropped"] = -1
        (folder / "plans").mkdir(exist_ok=True)
        np.savez(folder / "plans" / f"{blocks.key}.npz", counts=counts)


def measure_opening(folder: Path, n_documents: int, n_shards: int, tokenizer: Path) -> dict[str, Any]:
    """Return seconds and megabytes of opening a sparse index in a fresh process, and the sizes of its columns."""
    sparse_index(folder, n_documents, n_shards, Tokenizer.load(tokenizer).fingerprint)
    per_document = {name: np.dtype(dtype).itemsize for name, dtype in COLUMNS.items()}
    megabytes = (folder / MANIFEST).stat().st_size / 1e6
    results = json.loads(_run_fresh(PROBE, folder))
    results |= {"documents": n_documents, "shards": n_shards, "manifest MB": megabytes, "bytes a pair": per_document}
    for val_share in (0.0, VAL_SHARE):
        write_counts(folder, val_share)
        results[f"start, val_share {val_share}"] = json.loads(_run_fresh(START, folder, tokenizer, val_share))
    return results


def _run_fresh(program: str, *arguments: object) -> str:
    """Return the last line that a program prints in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return process.stdout.splitlines()[-1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", help="img2dataset tars; default: 20,000 generated pairs of 256 pixels")
    parser.add_argument("--text", nargs="+", help="JSON lines; default: 4,000 generated documents")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece tokenizer's folder; default: trained on the text")
    parser.add_argument("--runs", type=int, default=3, help="of each program")
    parser.add_argument("--documents", type=int, default=10**8, help="of the sparse index")
    parser.add_argument("--shards", type=int, default=200_000, help="in its manifest")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    a = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs, text = a.pairs or [str(folder / "*.tar")], a.text or [str(folder / "text.jsonl")]
        if not a.pairs:
            make_pairs(folder)
        if not a.text:
            make_text(folder)
        files = sorted(path for pattern in text for path in glob.glob(pattern))
        tokenizer = a.tokenizer or folder / "tokenizer"
        if not a.tokenizer:
            train_tokenizer(files, VOCAB_SIZE, tokenizer)
        results = {
            "pairs": measure_pairs(pairs, tokenizer, folder, a.runs),
            "text": measure_text(files, tokenizer, folder, a.runs),
            "opening": measure_opening(folder / "index" / "sparse", a.documents, a.shards, tokenizer),
        }
    show(results, a.runs)
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any], n_runs: int) -> None:
    """Print the tables."""
    pairs, text, opening = results["pairs"], results["text"], results["opening"]
    print(f"one core, CPU seconds, median of {n_runs} alternating runs")
    print(f"\ncaptions: {pairs['pairs']:,} pairs of {pairs['kB a pair']:.1f} kB in tars")
    print(f"  {pairs['pairs/s']:,.0f} pairs/s; {pairs['bytes a pair beside tokens']:.1f} bytes a pair beside its tokens")
    print(f"\ntext: {text['MB']:.1f} MB, {text['tokens']:,} tokens; ours {text['tokens/s']:,.0f} tokens/s")
    for name, rate in text["MB/s"].items():
        print(f"  {name:<44}{rate:8.2f} MB/s{text['ours over'][name]:12.2f} = ours over it")
    print(f"  {text['datatrove']}")
    print(f"\nopening: {opening['documents']:,} pairs in {opening['shards']:,} shards, a fresh process")
    print(
        f"  {opening['seconds']:.2f} s, {opening['MB opened']:.0f} MB resident, "
        f"{opening['MB after 1000 documents']:.0f} MB after 1000 documents drawn from all of it "
        "(mapped pages of the files, which the kernel takes back, among them)"
    )
    for name, o in ((name, start) for name, start in opening.items() if name.startswith("start")):
        print(f"  a run's {name}: {o['s']:.2f} s, {o['MB']:.0f} MB resident, {o['peak MB']:.0f} MB at most")
    total = sum(opening["bytes a pair"].values())
    sizes = ", ".join(f"{name} {size}" for name, size in opening["bytes a pair"].items())
    print(f"  bytes a pair, all of them mapped and none read: {sizes}; {total} together")
    print(
        f"  2 x 10^9 pairs: {2e9 * total / 1e9:.0f} GB of columns mapped, {2e9 * 2 * 17 / 1e9:.0f} GB of tokens at 17 a "
        f"pair; resident is the manifest alone, {opening['manifest MB']:.1f} MB of JSON for {opening['shards']:,} "
        "shards, whatever the number of documents"
    )


if __name__ == "__main__":
    main()
