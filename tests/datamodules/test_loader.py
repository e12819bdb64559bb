import multiprocessing
import os
import signal
import subprocess
import time
from itertools import islice

import pytest

from datamodules.loader import BatchLayout, FiniteLoader, Loader, MicroBatches, RenderOptions, n_micro_batches
from datamodules.stream import SequentialSchedule, Stream
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import IGNORE
from tests.datamodules import sample_data

G = 12


@pytest.fixture(scope="module")
def stream(corpora, tokenizer):
    return sample_data.stream(corpora, tokenizer.special)


@pytest.fixture(scope="module")
def held_out(stream):
    """A finite stream: every row of each plan once."""
    sources = list(stream.by_name.values())
    schedule = SequentialSchedule([source.plan.n_rows for source in sources])
    return Stream(sources, schedule, stream.special, 101), schedule.n_rows


@pytest.fixture(scope="module")
def options(tokenizer):
    return RenderOptions(
        tokenizer=tokenizer, image_size=5, fit="crop", n_latents=3, max_bad_share=dict.fromkeys(CORPORA, 0.1)
    )


def layout(rank, world, m, first_row=0):
    return BatchLayout(first_row=first_row, global_batch_rows=G, micro_batch_rows=m, rank=rank, world_size=world)


def rows_by_number(batches):
    """Everything that the model sees of each row, by the row's number."""
    rows = {}
    for batch in batches:
        for b, number in enumerate(batch.rows):
            of_row = batch.slots[:, 0] == b
            assert number not in rows
            rows[number] = (
                batch.tokens[b].tolist(),
                batch.targets[b].tolist(),
                batch.positions[b].tolist(),
                batch.slots[of_row, 1].tolist(),
                batch.images[of_row].tolist(),
                batch.n_step_targets,
            )
    return rows


def two_steps(stream, options, world, m, first_row=0, workers=0):
    batches = []
    for rank in range(world):
        loader = Loader(MicroBatches(stream, layout(rank, world, m, first_row), options), workers)
        batches += list(islice(loader, 2 * G // (world * m)))
    return rows_by_number(batches)


@pytest.fixture(scope="module")
def plain(stream, options):
    """The first two steps on one rank, row by row."""
    return two_steps(stream, options, 1, 1)


@pytest.mark.parametrize(("world", "m"), [(1, 3), (1, 12), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_two_steps_are_the_same_rows_on_any_number_of_ranks(stream, options, plain, world, m):
    assert two_steps(stream, options, world, m) == plain


@pytest.mark.parametrize(("world", "m"), [(2, 3), (4, 1)])
def test_each_step_is_the_same_rows_on_any_number_of_ranks(world, m):
    for step in (0, 1, 2):
        micro = range(step * G // (world * m), (step + 1) * G // (world * m))
        rows = [row for k in micro for rank in range(world) for row in layout(rank, world, m, 7).rows(k)]
        assert rows == list(range(7 + step * G, 7 + (step + 1) * G))
        assert {layout(0, world, m, 7).step_rows(k) for k in micro} == {range(rows[0], rows[-1] + 1)}


def test_workers_change_neither_rows_nor_their_order(stream, options):
    def batches_of(workers):
        batches = islice(Loader(MicroBatches(stream, layout(0, 1, 3), options), workers), 7)
        return [(b.rows, b.tokens.tolist(), b.targets.tolist(), b.images.tolist(), b.n_step_targets) for b in batches]

    assert batches_of(2) == batches_of(0)


@pytest.mark.parametrize("first_row", [12, 5])
def test_a_loader_that_begins_later_continues_as_the_one_from_the_start(stream, options, first_row, plain):
    continued = {n: row[:-1] for n, row in two_steps(stream, options, 1, 1, first_row).items()}
    assert min(continued) == first_row
    assert all(continued[n] == plain[n][:-1] for n in range(first_row, 2 * G))


def test_the_losss_denominator_is_the_supervised_tokens_of_the_whole_step(stream, plain):
    for step in (0, 1):
        rows = range(step * G, (step + 1) * G)
        supervised = sum(int((stream.row(n).targets != IGNORE).sum()) for n in rows)
        assert {plain[n][-1] for n in rows} == {supervised}


@pytest.mark.parametrize(("world", "m"), [(1, 1), (1, 5), (2, 3), (4, 1), (4, 2)])
def test_validation_reads_each_row_once_and_equally_many_batches_on_each_rank(held_out, options, world, m):
    stream, n_rows = held_out
    loaders = [FiniteLoader(MicroBatches(stream, layout(rank, world, m), options, n_rows), 0) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    rows = [row for rank in batches for batch in rank for row in batch.rows if row >= 0]
    assert sorted(rows) == list(range(n_rows))


def test_a_worker_obeys_signals_of_the_training_process_alone(stream, options):
    batches = iter(Loader(MicroBatches(stream, layout(0, 1, 3), options), 1))
    next(batches)
    [worker] = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a scheduler does, to all processes of a run
    os.kill(worker.pid, signal.SIGINT)
    assert next(batches).rows == (3, 4, 5)
    time.sleep(0.2)
    assert worker.is_alive()
    batches.close()
    assert not worker.is_alive()


def test_a_worker_can_be_terminated_by_the_training_process(stream, options):
    batches = iter(Loader(MicroBatches(stream, layout(0, 1, 3), options), 1))
    next(batches)
    [worker] = multiprocessing.active_children()
    pytorchs = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # raises where a worker ends before its loader
    worker.terminate()  # as multiprocessing does at exit, before it waits
    worker.join(timeout=20)
    signal.signal(signal.SIGCHLD, pytorchs)
    assert not worker.is_alive()
    batches.close()


def test_validation_is_in_the_same_order_with_workers(held_out, options):
    stream, n_rows = held_out
    orders = [
        [batch.rows for batch in FiniteLoader(MicroBatches(stream, layout(0, 1, 3), options, n_rows), workers)]
        for workers in (0, 2)
    ]
    assert orders[0] == orders[1]


def test_a_rank_without_rows_gets_rows_that_no_corpus_counts(held_out, options):
    stream, _ = held_out
    [batch] = FiniteLoader(MicroBatches(stream, layout(1, 2, 3), options, 3), 0)
    assert batch.rows == (-1, -1, -1)
    assert batch.corpus.tolist() == [-1, -1, -1]
    assert batch.loss_at.tolist() == []


def test_a_loader_measures_how_long_it_is_waited_for(stream, options):
    loader = Loader(MicroBatches(stream, layout(0, 1, 1), options), 0)
    next(iter(loader))
    assert loader.waited_seconds > 0


@pytest.mark.parametrize(
    ("rows", "micro", "ranks", "advice"),
    [
        (576, 1, 7, "use a multiple of 7 rows, or 6 or 8 ranks"),
        (576, 4, 64, "micro_batch_rows could be 1, 3, 9, or 48 or 72 ranks"),
        (6, 1, 8, "use a multiple of 8 rows, or 6 ranks"),
        (15, 2, 1, "micro_batch_rows could be 1, 3, 5, 15"),
    ],
)
def test_a_step_that_ranks_cannot_divide_is_refused_with_advice(rows: int, micro: int, ranks: int, advice: str) -> None:
    with pytest.raises(UserError, match=rf"is not divisible by {ranks} ranks x {micro} micro_batch_rows; {advice}$"):
        n_micro_batches(rows, micro, ranks)
