import json
import multiprocessing
import pickle
from dataclasses import replace

import pytest

from datamodules import quarantine
from datamodules.quarantine import BadSample, Budget, Ledger, read_ledger
from kosmos_lit.errors import UserError

SAMPLE = BadSample(source="caption", shard="pairs/00000.tar", key="000000017", reason="not an image")
N_PROCESSES, N_LINES = 5, 211


def write_many(ledger, process):
    """Lines of many lengths, some longer than a page and than a pipe's atomic write."""
    for i in range(N_LINES):
        ledger.write(replace(SAMPLE, key=f"{process}-{i}-" + "x" * (37 * i), row=i))


def test_a_line_leaves_out_what_is_not_known():
    assert json.loads(SAMPLE.to_line()) == {
        "source": "caption",
        "shard": "pairs/00000.tar",
        "key": "000000017",
        "reason": "not an image",
        "detail": "",
    }
    placed = json.loads(replace(SAMPLE, row=0, offset=512).to_line())
    assert (placed["row"], placed["offset"]) == (0, 512)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_append_at_once_do_not_mix_up_lines(tmp_path, method):
    ledger = Ledger(tmp_path / "run/bad.jsonl")
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=write_many, args=(ledger, p)) for p in range(N_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * N_PROCESSES
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert sorted(x["key"] for x in lines) == sorted(
        f"{p}-{i}-" + "x" * (37 * i) for p in range(N_PROCESSES) for i in range(N_LINES)
    )


def test_a_line_keeps_the_beginning_of_a_long_message(tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    ledger.write(replace(SAMPLE, detail="ä" * 499 + "bcd"))
    assert [sample.detail for sample in read_ledger(ledger.path)] == ["ä" * 499 + "b"]


def test_what_is_written_is_read_back(tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    strange = replace(SAMPLE, key="ein Schlüssel\nmit \udce4 und \u2028", detail='"{', row=3, split="val", offset=1 << 40)
    for sample in (SAMPLE, strange):
        ledger.write(sample)
    assert list(read_ledger(ledger.path)) == [SAMPLE, strange]


def test_a_sample_of_several_rows_is_read_once_and_another_place_is_another_sample(tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    others = [replace(SAMPLE, offset=7), replace(SAMPLE, shard="b.tar"), replace(SAMPLE, reason="blocked")]
    for sample in (SAMPLE, replace(SAMPLE, row=5), replace(SAMPLE, row=7, detail="said otherwise"), *others):
        ledger.write(sample)
    assert list(read_ledger(ledger.path)) == [SAMPLE, *others]


@pytest.mark.parametrize("n_bytes", [1, 7, 12, 13, 60, -2])
def test_a_last_line_that_broke_off_is_passed_over_and_what_is_appended_to_it_is_not(tmp_path, n_bytes):
    ledger, other = Ledger(tmp_path / "bad.jsonl"), replace(SAMPLE, key="ä", detail='{"source": "')
    ledger.write(SAMPLE)
    ledger.path.write_bytes(ledger.path.read_bytes() + other.to_line()[:n_bytes])
    assert list(read_ledger(ledger.path)) == [SAMPLE]
    ledger.write(replace(SAMPLE, key="next"))
    assert [s.key for s in read_ledger(ledger.path)] == [SAMPLE.key, "next"]


def test_a_last_line_that_lacks_its_end_alone_is_read_also_with_another_appended(tmp_path):
    ledger, other = Ledger(tmp_path / "bad.jsonl"), replace(SAMPLE, key="next")
    ledger.path.write_bytes(SAMPLE.to_line()[:-1])
    assert list(read_ledger(ledger.path)) == [SAMPLE]
    ledger.write(other)
    assert list(read_ledger(ledger.path)) == [SAMPLE, other]


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(SAMPLE.to_line() + b'{"text": "no"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: no bad sample"):
        list(read_ledger(tmp_path / "a.jsonl"))


def test_a_ledger_travels_to_another_process_as_its_path_alone(tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    ledger.write(SAMPLE)
    assert pickle.loads(pickle.dumps(ledger)).__dict__ == {"path": ledger.path}


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ledger of bad samples .*file/bad\.jsonl cannot be written"):
        Ledger(tmp_path / "file/bad.jsonl").write(SAMPLE)


def test_a_budget_judges_the_share_after_enough_images(monkeypatch):
    monkeypatch.setattr(quarantine, "MIN_IMAGES", 11)
    budget = Budget("coco", 0.3)
    for _ in range(7):
        budget.count_good()
    for _ in range(3):
        budget.count_bad("not an image", "a.tar, byte 7")
    with pytest.raises(UserError, match=r"coco: 4 of 11 images .* \(36\.4%\), more than max_bad_share 30\.0%"):
        budget.count_bad("empty image", "a.tar, byte 9")


def test_a_budget_counts_reasons_and_names_the_commonest_first(monkeypatch, tmp_path):
    monkeypatch.setattr(quarantine, "MIN_IMAGES", 5)
    budget = Budget("coco", 0.9, Ledger(tmp_path / "bad.jsonl"))
    for reason in ("empty image", "not an image", "not an image", "image too large"):
        budget.count_bad(reason, "a.tar, byte 7")
    with pytest.raises(UserError) as caught:
        budget.count_bad("not an image", "a.tar, byte 9")
    assert "not an image: 3, empty image: 1, image too large: 1. All are listed in" in str(caught.value)
    assert str(tmp_path / "bad.jsonl") in str(caught.value)
    assert "The last one: a.tar, byte 9" in str(caught.value)


def test_bad_images_in_a_row_stop_a_run_whose_share_is_small(monkeypatch):
    monkeypatch.setattr(quarantine, "MAX_IN_A_ROW", 7)
    budget = Budget("coco", 0.5)
    for _ in range(1009):
        budget.count_good()
    for _ in range(6):
        budget.count_bad("not an image", "a.tar, byte 7")
    budget.count_good()
    for _ in range(6):
        budget.count_bad("not an image", "a.tar, byte 7")
    with pytest.raises(UserError, match=r"coco: 13 of 1,023 images .*, the last 7 of them one after another"):
        budget.count_bad("not an image", "a.tar, byte 7")
