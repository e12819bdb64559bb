import re
from dataclasses import replace

import numpy as np
import pytest

from datamodules import quarantine
from datamodules.collate import ImageReader, collate, empty_row
from datamodules.prepare.index import prepare_corpus
from datamodules.quarantine import Ledger, read_ledger
from kosmos_lit.errors import UserError
from kosmos_lit.images import decode
from kosmos_lit.tokenizer import IGNORE, PAD
from tests.datamodules import sample_data

SIDE = 11
N_HOLLOW = 7


@pytest.fixture(scope="module")
def stream(corpora, tokenizer):
    return sample_data.stream(corpora, tokenizer.special)


@pytest.fixture(scope="module")
def hollow(tokenizer_folder, tokenizer, tmp_path_factory):
    """A stream of caption pairs of which seven images have sound headers and cannot be decoded."""
    folder = tmp_path_factory.mktemp("hollow")
    keys = [f"{i:09d}.png" for i in range(0, 2 * N_HOLLOW, 2)]
    members = [(n, sample_data.hollow_png() if n in keys else d) for n, d in sample_data.pairs(31, 0)]
    sample_data.write_tar(folder / "00000.tar", members)
    corpus = prepare_corpus(
        format="img2dataset", inputs=[str(folder / "*.tar")], tokenizer=tokenizer_folder, output=folder / "index"
    )
    return sample_data.stream({"caption": corpus}, tokenizer.special, ratio=(0, 1, 0))


def joined(decoded, tokenizer, n_latents=3):
    return collate(*decoded, tokenizer=tokenizer, n_latents=n_latents, n_step_targets=7)


def reader(stream, max_bad_share=0.5, **options):
    return ImageReader(SIDE, "crop", stream.special, dict.fromkeys(stream.by_name, max_bad_share), **options)


def corpora_of(stream):
    return {name: source.corpus for name, source in stream.by_name.items()}


def read(rows, stream):
    return reader(stream).read(rows, corpora_of(stream))


def read_all(images, stream, epochs=1):
    """The decoded rows of some epochs of caption pairs."""
    rows = (stream.row(i) for i in range(epochs * stream.by_name["caption"].plan.n_rows))
    return [decoded for row in rows for decoded in images.read([row], corpora_of(stream))[0]]


def first_with_images(stream):
    return next(row for row in map(stream.row, range(31)) if len(row.images) >= 3)


def test_a_batch_holds_its_rows_as_they_are(stream, tokenizer):
    rows = [stream.row(i) for i in range(5)]
    batch = joined(read(rows, stream), tokenizer)
    assert batch.tokens.tolist() == [row.tokens.tolist() for row in rows]
    assert batch.targets.tolist() == [row.targets.tolist() for row in rows]
    assert batch.rows == (0, 1, 2, 3, 4)
    assert batch.corpus.tolist() == [row.corpus for row in rows]
    assert batch.lengths == tuple(length for row in rows for length in row.lengths)
    assert batch.n_real == sum(row.n_real for row in rows)
    assert batch.n_step_targets == 7


def test_slots_hold_row_and_position_of_each_image(stream, tokenizer):
    rows = [stream.row(i) for i in range(11)]
    batch = joined(read(rows, stream), tokenizer)
    assert len(batch.images) == len(batch.slots) == sum(len(row.images) for row in rows) > 0
    for b, first in batch.slots.tolist():
        assert batch.tokens[b, first - 1 : first + 4].tolist() == [stream.special.image] * 4 + [stream.special.image_end]


def test_images_lie_in_the_order_of_their_slots(stream, tokenizer):
    rows = [stream.row(i) for i in range(7)]
    batch = joined(read(rows, stream), tokenizer)
    originals = [corpora_of(stream)[row.source].image_bytes(image) for row in rows for image in row.images]
    assert batch.images.tolist() == [decode(data, SIDE, "crop").tolist() for data in originals]


def test_positions_begin_anew_at_each_document(stream, tokenizer):
    rows = [stream.row(i) for i in range(5)]
    batch = joined(read(rows, stream), tokenizer)
    assert batch.positions.flatten().tolist() == [p for length in batch.lengths for p in range(length)]


def test_loss_positions_are_those_with_a_target(stream, tokenizer):
    rows = [stream.row(i) for i in range(5)]
    batch = joined(read(rows, stream), tokenizer)
    assert batch.loss_at.tolist() == np.flatnonzero(batch.targets.numpy() != IGNORE).tolist()


def test_bytes_of_a_row_are_those_of_the_text_it_predicts(stream, tokenizer):
    rows = [stream.row(i) for i in range(5)]
    batch = joined(read(rows, stream), tokenizer)
    expected = [tokenizer.count_bytes(row.tokens, row.targets).sum() for row in rows]
    assert batch.n_bytes.tolist() == expected
    assert all(n > 0 for n in expected)


def test_an_image_that_cannot_be_decoded_keeps_its_document_without_targets(stream, tokenizer):
    row = first_with_images(stream)
    [decoded], images = read([row], stream)
    batch = joined(([replace(decoded, undecodable=(row.image_segments[1],))], images), tokenizer)
    segment = row.segments[row.image_segments[1]]
    inside = np.zeros(101, dtype=bool)
    inside[segment.position : segment.position + segment.length] = True
    assert batch.tokens[0].tolist() == row.tokens.tolist()
    assert batch.targets[0].tolist() == np.where(inside, IGNORE, row.targets).tolist()
    assert batch.n_bad_images == 1


def test_images_that_cannot_be_decoded_are_counted(hollow, tokenizer):
    rows = [hollow.row(i) for i in range(hollow.by_name["caption"].plan.n_rows)]
    batch = joined(read(rows, hollow), tokenizer)
    assert len(batch.images) == 31
    black = [not image.any() for image in batch.images]
    assert batch.n_bad_images == sum(black) == N_HOLLOW
    assert batch.bad == (("caption", "image cannot be decoded"),) * N_HOLLOW


def test_too_many_bad_images_stop_the_run_and_name_source_share_reasons_and_ledger(hollow, monkeypatch, tmp_path):
    monkeypatch.setattr(quarantine, "MIN_IMAGES", 5)
    images = reader(hollow, 0.05, ledger=Ledger(tmp_path / "bad.jsonl"))
    with pytest.raises(UserError) as caught:
        read_all(images, hollow)
    message = r"caption: (\d+) of (\d+) .* max_bad_share 5\.0%: image cannot be decoded: (\d+)\. .*bad\.jsonl\."
    n_bad, n_read, n_of_reason = map(int, re.search(message, str(caught.value)).groups())
    assert re.search(r"00000\.tar, byte \d+", str(caught.value))
    assert n_bad == n_of_reason == len(list(read_ledger(tmp_path / "bad.jsonl")))
    assert n_bad > 0.05 * n_read


def test_a_few_bad_images_do_not_stop_the_run(hollow):
    images = reader(hollow, 0.0)
    decoded = read_all(images, hollow)
    budget = images.budgets["caption"]
    assert (budget.n_read, budget.n_bad) == (31, N_HOLLOW)
    assert sum(len(d.undecodable) for d in decoded) == N_HOLLOW


def test_bad_images_are_lines_of_the_ledger_with_row_key_and_place(hollow, tmp_path):
    ledger = Ledger(tmp_path / "run/bad.jsonl")
    decoded = read_all(reader(hollow, ledger=ledger), hollow)
    samples = list(read_ledger(ledger.path))
    assert {s.key for s in samples} == {f"{i:09d}" for i in range(0, 2 * N_HOLLOW, 2)}
    assert len(samples) == N_HOLLOW
    corpus = hollow.by_name["caption"].corpus
    for sample in samples:
        row = decoded[sample.row].row
        [(image, n)] = [(i, n) for i, n in zip(row.images, row.image_segments, strict=True) if i.offset == sample.offset]
        assert corpus.shard_and_name(row.segments[n].document) == (sample.shard, sample.key)
        assert corpus.image_bytes(image) == sample_data.hollow_png()
        assert (sample.source, sample.reason, sample.split) == ("caption", "image cannot be decoded", None)


def test_an_image_read_in_two_epochs_is_written_twice_and_listed_once(hollow, tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    read_all(reader(hollow, ledger=ledger), hollow, epochs=2)
    assert len(ledger.path.read_text().splitlines()) == 2 * N_HOLLOW
    assert len(list(read_ledger(ledger.path))) == N_HOLLOW


def test_a_run_without_bad_images_has_no_ledger(stream, tmp_path):
    ledger = Ledger(tmp_path / "run/bad.jsonl")
    rows = [stream.row(i) for i in range(11)]
    images = reader(stream, ledger=ledger)
    assert len(images.read(rows, corpora_of(stream))[1]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_gone_is_named(stream, tmp_path):
    row = first_with_images(stream)
    corpus = stream.by_name[row.source].corpus
    gone = replace(row, images=tuple(replace(i, shard=0) for i in row.images))

    class Moved:
        shards = (tmp_path / "gone.tar",)

        def image_bytes(self, image):
            return corpus.source.image_bytes(self.shards[image.shard], image.offset, image.length)

    with pytest.raises(UserError, match=rf"row {row.number}: an image cannot be read: .*gone\.tar"):
        reader(stream).read([gone], {row.source: Moved()})


def test_slots_that_do_not_fit_the_latents_are_refused(stream, tokenizer):
    row = first_with_images(stream)
    with pytest.raises(ValueError, match="latents"):
        joined(read([row], stream), tokenizer, n_latents=5)


def test_a_batch_without_images_has_tensors_for_none(stream, tokenizer):
    row = next(row for row in map(stream.row, range(31)) if not row.images)
    batch = joined(read([row], stream), tokenizer)
    assert tuple(batch.images.shape) == (0, 3, SIDE, SIDE)
    assert tuple(batch.slots.shape) == (0, 2)


def test_an_empty_row_is_padding_and_of_no_corpus(stream, tokenizer):
    batch = joined(read([empty_row(101)], stream), tokenizer)
    assert set(batch.tokens.flatten().tolist()) == {PAD}
    assert batch.loss_at.tolist() == []
    assert batch.corpus.tolist() == [-1]
    assert batch.lengths == (101,)
    assert batch.n_real == 0
