"""Samples that are sound when the corpus is prepared, and turn out to be broken when they are read."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from datamodules.loader import BatchLayout, Loader, MicroBatches, RenderOptions
from datamodules.prepare.index import prepare_corpus
from datamodules.quarantine import MIN_IMAGES, Ledger, read_ledger
from kosmos_lit.errors import UserError
from tests.datamodules import sample_data

SEQ_LEN = 29
"""So short that few rows hold two pairs."""


def stream_of(images, folder, tokenizer_folder, tokenizer, per_shard=10_007):
    """A stream of caption pairs with these images; their keys are their numbers."""
    captions = sample_data.sentences(1009)
    for shard, first in enumerate(range(0, len(images), per_shard)):
        members = []
        for i, data in enumerate(images[first : first + per_shard], start=first):
            members += [(f"{i:09d}.png", data), (f"{i:09d}.txt", captions[i % 1009].encode())]
        sample_data.write_tar(folder / f"{shard:05d}.tar", members)
    corpus = prepare_corpus(
        format="img2dataset", inputs=[str(folder / "*.tar")], tokenizer=tokenizer_folder, output=folder / "index"
    )
    assert corpus.n_documents == len(images)  # only decoding finds that an image is broken
    return sample_data.stream({"caption": corpus}, tokenizer.special, ratio=(0, 1, 0), seq_len=SEQ_LEN, n_latents=1)


def batches(stream, tokenizer, ledger, max_bad_share, m, workers=0):
    options = RenderOptions(
        tokenizer=tokenizer, image_size=5, fit="crop", n_latents=1, max_bad_share={"caption": max_bad_share}, ledger=ledger
    )
    layout = BatchLayout(first_row=0, global_batch_rows=m, micro_batch_rows=m)
    return iter(Loader(MicroBatches(stream, layout, options), workers))


def keys(numbers):
    return {f"{n:09d}" for n in numbers}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_whose_samples_are_all_bad_stops_early_with_the_reasons(tmp_path, tokenizer_folder, tokenizer, workers):
    stream = stream_of([sample_data.broken_within(i) for i in range(211)], tmp_path, tokenizer_folder, tokenizer)
    ledger = Ledger(tmp_path / "run/quarantine.jsonl")
    endless = batches(stream, tokenizer, ledger, 0.9, 7, workers)
    with pytest.raises(UserError) as caught:
        list(islice(endless, 1000))
    message = f"caption: {MIN_IMAGES} of {MIN_IMAGES} images cannot be used (100.0%)"
    assert message in str(caught.value)
    assert f"image cannot be decoded: {MIN_IMAGES}. All are listed in {ledger.path}" in str(caught.value)
    n_met = len(ledger.path.read_bytes().splitlines())
    assert MIN_IMAGES <= n_met <= max(1, workers) * MIN_IMAGES


def test_workers_and_the_process_itself_write_the_same_ledger(tmp_path, tokenizer_folder, tokenizer):
    bad = set(Random(3).sample(range(307), 31))
    images = [sample_data.broken_within(i) if i in bad else sample_data.png(i, 19, 17) for i in range(307)]
    stream = stream_of(images, tmp_path, tokenizer_folder, tokenizer)
    n_batches = -(-stream.by_name["caption"].plan.n_rows // 5)
    for workers in (0, 2):
        ledger = Ledger(tmp_path / f"{workers}.jsonl")
        read = list(islice(batches(stream, tokenizer, ledger, 0.5, 5, workers), n_batches))
        assert {s.key for s in read_ledger(ledger.path)} == keys(bad)
        reasons = Counter(pair for batch in read for pair in batch.bad)
        assert reasons.total() == sum(batch.n_bad_images for batch in read) >= len(bad)
    alone, together = (
        {(s.shard, s.key, s.offset, s.reason) for s in read_ledger(tmp_path / f"{workers}.jsonl")} for workers in (0, 2)
    )
    assert alone == together


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_hundred_thousand_rows_with_broken_images_need_no_more_memory_and_list_each(tmp_path, tokenizer_folder, tokenizer):
    n, m = 100_003, 50
    bad = set(Random(7).sample(range(n), n // 20))
    sound = [sample_data.encoded(sample_data.drawn_image(i, 19, 17), ("PNG", "JPEG", "WEBP")[i % 3]) for i in range(101)]
    broken = [sample_data.broken_within(kind) for kind in range(4)]
    images = [broken[i % 4] if i in bad else sound[i % 101] for i in range(n)]
    stream = stream_of(images, tmp_path, tokenizer_folder, tokenizer)
    n_rows = max(100_000, stream.by_name["caption"].plan.n_rows)
    ledger = Ledger(tmp_path / "run/quarantine.jsonl")
    reader = batches(stream, tokenizer, ledger, 0.1, m)
    n_bad = n_read = 0
    after_a_fifth = 0
    for k in range(n_rows // m + 1):
        batch = next(reader)
        n_bad, n_read = n_bad + batch.n_bad_images, n_read + len(batch.rows)
        if k == n_rows // m // 5:
            after_a_fifth = resident_bytes()
    grown = resident_bytes() - after_a_fifth
    samples = list(read_ledger(ledger.path))
    assert n_read >= 100_000
    assert sorted(s.key for s in samples) == sorted(keys(bad))  # each once, and no other
    assert {s.reason for s in samples} == {"image cannot be decoded"}
    assert len(ledger.path.read_bytes().splitlines()) == n_bad >= len(bad)
    assert grown < 16 << 20  # pages of the mapped index among it; one kept image a row would be 80,000 kB more
    print(f"resident memory grew by {grown / 1e6:.1f} MB over the last four fifths of {n_read:,} rows")
