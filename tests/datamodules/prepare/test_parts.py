"""Preparation on many machines, killed at any moment, and its ledger of broken records."""

import json
import os
import random
import resource
import signal
import time
from dataclasses import asdict

import numpy as np
import pytest

from datamodules.corpus import COLUMNS, MANIFEST, IndexedCorpus, read_manifest
from datamodules.prepare import index
from datamodules.prepare.columns import ColumnWriter
from datamodules.prepare.index import PendingShards, prepare_corpus, prepare_part
from datamodules.prepare.report import describe
from datamodules.quarantine import LEDGER, BadSample
from datamodules.sources.tar import TarReader
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from tests.cli_runs import run, start
from tests.datamodules import sample_data

N_SHARDS = 5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Five tars of seven pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for n in range(N_SHARDS):
        sample_data.write_tar(folder / f"{n}.tar", sample_data.pairs(7, 7 * n))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Three crawls; the images of a page lie in another one."""
    folder = tmp_path_factory.mktemp("pages")
    records = sample_data.crawl(7, 0)
    images = [r for r in records if r[1].startswith("image")]
    for n in range(3):
        sample_data.write_warc(folder / f"{n}.warc.gz", [*images[n::3], *[r for r in records if r not in images][n::3]])
    return folder


def options(folder, tokenizer_folder, output, **changes):
    format_ = "img2dataset" if list(folder.glob("*.tar")) else "warc"
    return {"format": format_, "inputs": [str(folder / "*")], "tokenizer": tokenizer_folder, "output": output} | changes


def content(folder):
    """The bytes of everything in a folder, but for the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in files}


@pytest.fixture(scope="module")
def whole_pairs(pairs, tokenizer_folder, tmp_path_factory):
    """The index that an undisturbed run makes of `pairs`."""
    return prepare_corpus(**options(pairs, tokenizer_folder, tmp_path_factory.mktemp("whole") / "index"))


# ---- parts


def test_parts_make_the_index_that_one_run_makes(pairs, whole_pairs, tokenizer_folder, tmp_path):
    folder = options(pairs, tokenizer_folder, tmp_path / "index")
    for number in (2, 3):
        assert isinstance(prepare_part(part=(number, 3), **folder), PendingShards)
        assert read_manifest(tmp_path / "index") is None
    corpus = prepare_part(part=(1, 3), **folder)
    assert isinstance(corpus, IndexedCorpus)
    columns = [name for name in content(whole_pairs.folder) if name != MANIFEST]
    assert [content(tmp_path / "index")[name] for name in columns] == [content(whole_pairs.folder)[name] for name in columns]
    assert set(content(tmp_path / "index")) == {*columns, MANIFEST}


def test_a_part_says_what_is_missing_and_from_whom(pairs, tokenizer_folder, tmp_path):
    pending = prepare_part(part=(2, 3), **options(pairs, tokenizer_folder, tmp_path / "index"))
    assert [path.name for path in pending.shards] == ["0.tar", "2.tar", "3.tar"]
    assert pending.parts == (1, 3)
    assert "part 2 of 3 has done its documents; 3 shards are still to be read" in str(pending)
    assert "0.tar for one (parts 1, 3): the last part to finish joins the index" in str(pending)


def test_a_part_that_waits_ends_well_on_the_command_line(pairs, tokenizer_folder, tmp_path, capsys):
    arguments = ["--format", "img2dataset", "--input", str(pairs / "*"), "--tokenizer", str(tokenizer_folder)]
    output = ["--output", str(tmp_path / "index")]
    assert main(["prepare", "corpus", *arguments, *output, "--part", "1/2"]) == 0
    assert "part 1 of 2 has done its documents" in capsys.readouterr().out
    assert main(["prepare", "corpus", *arguments, *output, "--part", "2/2"]) == 0
    assert "img2dataset, 5 shards" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3"])
def test_a_part_that_there_is_not_is_refused(part, capsys):
    arguments = ["--format", "jsonl", "--input", "x", "--tokenizer", "x", "--output", "x"]
    assert main(["prepare", "corpus", *arguments, f"--part={part}"]) != 0
    assert f"{part!r} is not I/N with 1 <= I <= N, such as 3/8" in capsys.readouterr().err


def test_there_may_be_more_parts_than_shards(pairs, tokenizer_folder, tmp_path):
    folder = options(pairs, tokenizer_folder, tmp_path / "index")
    results = [prepare_part(part=(number, 7), **folder) for number in (7, 6, 5, 4, 3, 2, 1)]
    assert [isinstance(d, IndexedCorpus) for d in results] == [False] * 6 + [True]


def test_a_crawls_part_waits_for_the_images_of_the_others(pages, tokenizer_folder, tmp_path):
    folder = options(pages, tokenizer_folder, tmp_path / "index")
    first = prepare_part(part=(1, 2), **folder)
    assert (first.stage, first.parts) == ("images", (2,))
    assert "run the same command again when parts 2 have listed theirs" in str(first)
    second = prepare_part(part=(2, 2), **folder)
    assert (second.stage, second.parts) == ("documents", (1,))
    joined = prepare_part(part=(1, 2), **folder)
    expected = prepare_corpus(**folder | {"output": tmp_path / "whole"})
    assert joined.n_documents == expected.n_documents == 7
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_parts_run_side_by_side(pairs, whole_pairs, tokenizer_folder, tmp_path):
    arguments = ["--format", "img2dataset", "--input", str(pairs / "*"), "--tokenizer", str(tokenizer_folder)]
    command = ["prepare", "corpus", *arguments, "--output", str(tmp_path / "index"), "--part"]
    processes = [start([*command, f"{number}/3"]) for number in (1, 2, 3)]
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert sum("img2dataset, 5 shards" in out for out, _ in ends) >= 1
    assert content(tmp_path / "index")["tokens.npy"] == content(whole_pairs.folder)["tokens.npy"]


def test_parts_of_other_input_are_refused_and_kept(pairs, tokenizer_folder, tmp_path):
    folder = options(pairs, tokenizer_folder, tmp_path / "index")
    prepare_part(part=(1, 2), **folder)
    before = content(tmp_path / "index")
    with pytest.raises(
        UserError, match=r"unfinished index that was prepared differently: the index has 5 shards, the run 4; new \[\]"
    ):
        prepare_part(part=(2, 2), **folder | {"inputs": [str(pairs / "[0-3].tar")]})
    assert content(tmp_path / "index") == before


def test_parts_of_an_earlier_version_are_refused_and_kept(pairs, tokenizer_folder, tmp_path):
    folder = options(pairs, tokenizer_folder, tmp_path / "index")
    prepare_part(part=(1, 2), **folder)
    path = tmp_path / "index/parts/identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": 3}))
    before = content(tmp_path / "index")
    with pytest.raises(UserError, match="prepared differently: the paths of its shards, or the program's version"):
        prepare_part(part=(2, 2), **folder)
    assert content(tmp_path / "index") == before


def test_leftovers_of_a_process_killed_after_the_manifest_are_removed(pairs, tokenizer_folder, tmp_path):
    folder = options(pairs, tokenizer_folder, tmp_path / "index")
    prepare_corpus(**folder)
    (tmp_path / "index/parts/000001").mkdir(parents=True)
    assert prepare_corpus(**folder).n_documents == 35
    assert not (tmp_path / "index/parts").exists()


# ---- killed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "pages"])
def test_an_index_made_through_many_kills_is_that_of_an_undisturbed_run(kind, request, tokenizer_folder, tmp_path):
    raw = request.getfixturevalue(kind)
    folder = options(raw, tokenizer_folder, tmp_path / "whole")
    expected = prepare_corpus(**folder)
    originals = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in raw.iterdir()}
    arguments = ["--format", folder["format"], "--input", *folder["inputs"], "--tokenizer", str(tokenizer_folder)]
    command = ["prepare", "corpus", *arguments, "--output", str(tmp_path / "index")]
    draw, n_killed, started = random.Random(11), 0, time.monotonic()
    while not (tmp_path / "index" / MANIFEST).exists() and time.monotonic() - started < 300:
        process = start([*command, "--workers", str(1 + n_killed % 2)])
        process.stdout.close()
        process.stderr.close()
        wait_for_work(process, tmp_path / "index", draw.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        process.wait()
        n_killed += 1
    assert n_killed >= 3  # on a fast machine a life does more
    ended = run(command)
    assert ended.returncode == 0, ended.stderr
    assert content(tmp_path / "index") == content(expected.folder)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in raw.iterdir()} == originals


def wait_for_work(process, folder, seconds):
    """Wait until a preparation has begun to write, and so much longer."""

    def state():
        return {(p, p.stat().st_mtime_ns) for p in [folder, *folder.glob("parts"), *folder.glob("*/*")] if p.exists()}

    before = state() if folder.exists() else set()
    while process.poll() is None and (not folder.exists() or state() == before):
        time.sleep(0.002)
    time.sleep(seconds)


@pytest.mark.parametrize("kind", ["pairs", "pages"])
def test_a_run_that_dies_at_any_step_can_be_gone_on_with(kind, request, tokenizer_folder, tmp_path, monkeypatch):
    """Die at a rename, a replacement or a sync, further on each time, until one run gets through."""

    class Died(BaseException):
        pass

    folder = options(request.getfixturevalue(kind), tokenizer_folder, tmp_path / "index")
    left = {"steps": 0}

    def dying(original):
        def call(*arguments, **options):
            for act in (lambda: None, lambda: original(*arguments, **options)):
                if left["steps"] == 0:
                    raise Died
                left["steps"] -= 1
                act()

        return call

    n_died = 0
    while True:
        left["steps"] = 3 * n_died + 1
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                prepare_corpus(**folder)
                break
            except Died:
                n_died += 1
    assert n_died > 5
    expected = prepare_corpus(**folder | {"output": tmp_path / "whole"})
    assert content(tmp_path / "index") == content(expected.folder)


# ---- the ledger


def damaged(folder):
    """Three shards with every kind of damage; returns what the ledger must say, in order."""
    ill = [
        ("ill.jpg", b"<html>"),
        ("ill.txt", b"words"),
        ("lone.txt", b"words"),
        ("../../\udcff.jpg", sample_data.jpeg(3)[:-99]),
    ]
    sample_data.write_tar(
        folder / "0.tar", [*sample_data.pairs(23, 0), *ill, ("../../\udcff.txt", b"words"), *sample_data.pairs(2, 50)]
    )
    sample_data.write_tar(folder / "1.tar", sample_data.pairs(23, 100))
    sample_data.write_tar(
        folder / "2.tar", [*sample_data.pairs(23, 200), ("bad.png", sample_data.hollow_png()[:-12]), ("bad.txt", b"words")]
    )
    with TarReader(folder / "2.tar") as tar:
        last = list(tar.members())[-1]
    os.truncate(folder / "2.tar", last.offset)
    return [
        ("0.tar", "ill", "not an image"),
        ("0.tar", "lone", "no image"),
        ("0.tar", "../../\udcff", "image cannot be decoded"),
        ("2.tar", "", "shard cut off or corrupt"),
    ]


def ledger(folder):
    return [BadSample(**json.loads(line)) for line in (folder / LEDGER).read_bytes().splitlines()]


def test_every_broken_record_is_in_the_ledger_once_in_the_order_of_shards(tokenizer_folder, tmp_path):
    expected = damaged(tmp_path / "raw")
    prepare_corpus(**options(tmp_path / "raw", tokenizer_folder, tmp_path / "index", max_bad_share=0.5))
    listed = ledger(tmp_path / "index")
    assert [(b.shard.rpartition("/")[2], b.key if "cut" not in b.reason else "", b.reason) for b in listed] == expected
    assert {b.source for b in listed} == {"img2dataset"}


def test_the_ledger_has_the_shards_paths_of_the_manifest(tokenizer_folder, tmp_path):
    damaged(tmp_path / "raw")
    corpus = prepare_corpus(**options(tmp_path / "raw", tokenizer_folder, tmp_path / "index", max_bad_share=0.5))
    assert {b.shard for b in ledger(corpus.folder)} <= {shard["path"] for shard in corpus.manifest["shards"]}


def test_the_ledger_and_the_tally_count_alike(tokenizer_folder, tmp_path):
    damaged(tmp_path / "raw")
    corpus = prepare_corpus(**options(tmp_path / "raw", tokenizer_folder, tmp_path / "index", max_bad_share=0.5))
    assert sum(corpus.manifest["tally"]["broken"].values()) == len(ledger(corpus.folder))


def test_parts_and_processes_make_the_same_ledger(tokenizer_folder, tmp_path):
    damaged(tmp_path / "raw")
    folder = options(tmp_path / "raw", tokenizer_folder, tmp_path / "one", max_bad_share=0.5)
    prepare_corpus(**folder)
    for number in (2, 1):
        prepare_part(part=(number, 2), **folder | {"output": tmp_path / "two", "workers": 2})
    assert (tmp_path / "one" / LEDGER).read_bytes() == (tmp_path / "two" / LEDGER).read_bytes()


def test_a_crawls_broken_images_and_its_cut_are_in_the_ledger_once(tokenizer_folder, tmp_path):
    broken = (f"{sample_data.SITE}/x.png", "image/png", b"no image")
    sample_data.write_warc(tmp_path / "raw/a.warc.gz", [broken, *sample_data.crawl(23, 0)])
    path = tmp_path / "raw/a.warc.gz"
    path.write_bytes(path.read_bytes()[:-57])
    prepare_corpus(**options(tmp_path / "raw", tokenizer_folder, tmp_path / "index"))
    listed = ledger(tmp_path / "index")
    assert [(b.key.partition(" ")[0], b.reason) for b in listed] == [
        (f"{sample_data.SITE}/x.png", "not an image"),
        ("after", "shard cut off or corrupt"),
    ]


def test_a_sound_corpus_has_no_ledger(whole_pairs):
    assert not (whole_pairs.folder / LEDGER).exists()


def test_the_report_names_the_ledger(tokenizer_folder, tmp_path):
    damaged(tmp_path / "raw")
    corpus = prepare_corpus(**options(tmp_path / "raw", tokenizer_folder, tmp_path / "index", max_bad_share=0.5))
    assert f"each broken record is listed in {tmp_path / 'index' / LEDGER}" in describe(corpus)


# ---- size


def test_a_pair_takes_forty_bytes_and_its_tokens(whole_pairs):
    names = [f"{column}.npy" for column in COLUMNS]
    headers, starts = 128 * len(names), 2 * 8  # two columns of offsets have one value more than documents
    n_bytes = sum((whole_pairs.folder / name).stat().st_size for name in names)
    assert n_bytes - headers - starts == 40 * whole_pairs.n_documents
    tokens = (whole_pairs.folder / "tokens.npy").stat().st_size - 128
    assert tokens == 2 * (whole_pairs.manifest["tokens"] + whole_pairs.manifest["images"])


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 5], [7] * 1000])
def test_a_column_written_in_pieces_is_the_file_of_the_whole(tmp_path, lengths):
    pieces = [np.arange(n) + i for i, n in enumerate(lengths)]
    writer = ColumnWriter(tmp_path / "a.npy", "<u4")
    for piece in pieces:
        writer.append(piece)
    writer.close()
    np.save(tmp_path / "b.npy", np.concatenate([np.empty(0), *pieces]).astype("<u4"))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_no_more_files_are_open_than_a_shell_allows(tokenizer_folder, tmp_path):
    """Room for 25 files, of which joining 41 parts must not want one each."""
    for n in range(41):
        sample_data.write_jsonl(tmp_path / f"raw/{n:03d}.jsonl", [f"the cat sees {n}"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 25, hard))
    try:
        folder = options(tmp_path / "raw", tokenizer_folder, tmp_path / "index", format="jsonl")
        assert prepare_corpus(**folder).n_documents == 41
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_images_of_a_crawl_are_joined_by_ranges_of_their_urls(pages, tokenizer_folder, tmp_path, monkeypatch):
    expected = prepare_corpus(**options(pages, tokenizer_folder, tmp_path / "whole"))
    monkeypatch.setattr("datamodules.prepare.join.SLICE", 3)
    prepare_corpus(**options(pages, tokenizer_folder, tmp_path / "index"))
    assert content(tmp_path / "index") == content(expected.folder)


def test_index_shard_is_given_a_path_as_the_manifest_has_it(pairs, tokenizer_folder, tmp_path, monkeypatch):
    seen = []
    original = index.index_shard
    monkeypatch.setattr(index, "index_shard", lambda task, progress: (seen.append(task), original(task, progress)))
    corpus = prepare_corpus(**options(pairs, tokenizer_folder, tmp_path / "index"))
    assert [task.name for task in seen] == [shard["path"] for shard in corpus.manifest["shards"]]
    assert asdict(seen[0])["shard"] == 0
