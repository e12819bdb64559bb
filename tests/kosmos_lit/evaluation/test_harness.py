"""lm-evaluation-harness asks a model of ours, with tasks and data on this machine."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from kosmos_lit import tasks
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation import harness
from kosmos_lit.evaluation.harness import HarnessModel, generation_config, main
from kosmos_lit.evaluation.multiple_choice import MultipleChoice
from kosmos_lit.evaluation.requests import Generate
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.inference.generate import GenerationConfig
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, Tokenizer
from kosmos_lit.weights import save_folder
from tests.kosmos_lit.tasks.language_files import DATASETS, write_lines
from tests.kosmos_lit.tiny_kosmos import tiny_model

ROOM = 211
"""Positions of the tests' model."""
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}"}
CHOICE |= {"doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}]}


@pytest.fixture(scope="module")
def model(kosmos_tower: str, kosmos_vocabulary: bytes) -> Kosmos:
    made = tiny_model(kosmos_tower, max_seq_len=ROOM)
    made.tokenizer = Tokenizer(kosmos_vocabulary)
    return made


@pytest.fixture(scope="module")
def asked(model: Kosmos) -> HarnessModel:
    return HarnessModel(model=model, device="cpu")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def put_task(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write data and a task file `made` that reads it."""
    write_lines(folder / "rows.jsonl", rows)
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {"task": "made", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
    (folder / "made.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def evaluate(model: HarnessModel, folder: Path, **settings: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=["made"], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    return found


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def alone(model: Kosmos, context: list[int], rest: list[int]) -> list[float]:
    """Return log-probabilities from one look at a whole row."""
    row = torch.tensor([BOS, *context, *rest])
    with torch.inference_mode():
        log_probs = model.logits(row)[:-1].log_softmax(-1)
    return log_probs.gather(1, row[1:, None])[len(context) :, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "n_shots"), [("Copa", 0), ("HellaSwag", 1), ("CommitmentBank", 0)])
def test_choices_and_log_probabilities_are_those_of_our_own_tasks(
    asked: HarnessModel, tmp_path: Path, name: str, n_shots: int
) -> None:
    DATASETS[name](tmp_path)
    task: MultipleChoice = getattr(tasks, name)(str(tmp_path), n_shots=n_shots, scoring="sum")
    samples, pool = task.samples(), task.pool()
    rows = []
    for sample in samples:
        [request] = task.requests(sample, task.shots(sample, pool))
        [context] = request.parts
        rows.append({"context": context, "choices": request.candidates, "label": task.question(sample).target})
    put_task(tmp_path, rows, **CHOICE)

    theirs = evaluate(asked, tmp_path)

    results = {r.key: r for some in RequestScheduler(asked.model, asked.tokenizer).run(task, samples, pool) for r in some}
    ours = [results[sample.key].outcome for sample in samples]
    logged = sorted(theirs["samples"]["made"], key=lambda one: one["doc_id"])
    assert len(logged) == len(samples)
    for one, outcome in zip(logged, ours, strict=True):
        assert outcome is not None
        values = [value for (value, _) in one["filtered_resps"]]
        assert values == pytest.approx(outcome.data["values"], abs=1e-4)
        assert values.index(max(values)) == outcome.data["choice"]
        assert one["acc"] == outcome.scores["accuracy"]
    accuracy = sum(outcome.scores["accuracy"] for outcome in ours if outcome) / len(ours)
    assert theirs["results"]["made"]["acc,none"] == pytest.approx(accuracy)


def test_candidates_of_a_context_are_read_behind_it_once(asked: HarnessModel) -> None:
    read: list[int] = []
    hook = asked.model.decoder.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[0]))

    asked.loglikelihood(requests("loglikelihood", *(("the cat sat on", f" {w}") for w in ("it", "mat", "my"))), True)

    hook.remove()
    assert read == [1, 1]  # the context, then all candidates as one tree


@pytest.mark.parametrize(
    ("context", "rest"),
    [("the cat:", " sat"), ("the cat:", "sat"), ("the cat: ", "sat"), ("the ca", "t sat"), ("the\n", "sat"), ("", "a red")],
)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level_folder", "word_folder"])
def test_tokens_are_those_of_the_joined_text(
    kosmos_tower: str, kosmos_tokenizer: Tokenizer, request: pytest.FixtureRequest, kind: str, context: str, rest: str
) -> None:
    tokenizer = kosmos_tokenizer if kind == "sentencepiece" else Tokenizer.load(request.getfixturevalue(kind))
    model = tiny_model(kosmos_tower, max_seq_len=ROOM, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer

    [(value, _)] = HarnessModel(model=model, device="cpu").loglikelihood(requests("loglikelihood", (context, rest)), True)

    joined, before = tokenizer.encode(context + rest).tolist(), tokenizer.encode(context).tolist()
    border = next((i for i, (a, b) in enumerate(zip(joined, before, strict=False)) if a != b), min(len(joined), len(before)))
    assert value == pytest.approx(sum(alone(model, joined[:border], joined[border:])), abs=1e-4)


def test_a_continuation_is_greedy_if_greedy_decoding_writes_it(asked: HarnessModel) -> None:
    context = "the cat sat"
    words = [w for w in "on the mat a red square and blue circle it my big".split() if len(asked.tokenizer.encode(w)) == 1]
    values = asked.loglikelihood(requests("loglikelihood", *((context, f" {word}") for word in words)), True)
    ids = asked.tokenizer.encode(context).tolist()
    with torch.inference_mode():
        best = int(asked.model.logits([BOS, *ids])[-1].argmax())
    text = asked.tokenizer.name(best)

    [(_, is_greedy)] = asked.loglikelihood(requests("loglikelihood", (context, text)), True)

    assert asked.tokenizer.encode(context + text).tolist() == [*ids, best]
    assert is_greedy
    assert [flag for (_, flag), word in zip(values, words, strict=True) if f" {word}" != text] == [False] * len(words)


def test_a_continuation_without_tokens_is_a_mistake(asked: HarnessModel) -> None:
    with pytest.raises(UserError, match="the continuation ' ' of 'the cat' has no tokens"):
        asked.loglikelihood(requests("loglikelihood", ("the cat", " ")), True)


def test_a_long_context_loses_its_beginning_and_says_so(asked: HarnessModel, caplog: pytest.LogCaptureFixture) -> None:
    context = "a red square and " * 40 + "the cat"
    ids, rest = asked.tokenizer.encode(context).tolist(), asked.tokenizer.encode("sat").tolist()

    with caplog.at_level(logging.WARNING):
        [(value, _)] = asked.loglikelihood(requests("loglikelihood", (context, " sat")), True)

    kept = ids[-(ROOM - 1 - len(rest)) :]
    assert value == pytest.approx(sum(alone(asked.model, kept, rest)), abs=1e-4)
    assert "1 contexts lost their beginnings: the model has 211 positions" in caplog.text


def test_a_short_text_is_one_row(asked: HarnessModel, tmp_path: Path) -> None:
    text = "the cat sat on the mat\na red square"
    put_task(
        tmp_path, [{"page": text}], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip

    found = evaluate(asked, tmp_path)

    ids = asked.tokenizer.encode(text).tolist()
    bits = -sum(alone(asked.model, [], ids)) / torch.log(torch.tensor(2.0)).item() / len(text.encode())
    assert found["results"]["made"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 7, 12])
@pytest.mark.parametrize("n", [0, 1, 12, 13, 24, 25, 40])
def test_windows_judge_each_token_of_a_text_once_behind_all_that_fits(
    kosmos_tower: str, kosmos_tokenizer: Tokenizer, n: int, stride: int | None
) -> None:
    model = tiny_model(kosmos_tower, max_seq_len=13)
    model.tokenizer = kosmos_tokenizer
    asked = HarnessModel(model=model, stride=stride, device="cpu")
    ids = list(range(100, 100 + n))

    windows = asked._windows(ids)

    assert [token for _, judged in windows for token in judged] == ids
    assert all(len(judged) <= (stride or 12) for _, judged in windows[1:])
    assert all(len(context) + len(judged) == min(12, n) for context, judged in windows)
    for context, judged in windows:
        start = judged[0] - 100
        assert context == ids[start - len(context) : start]


def test_a_long_text_is_the_sum_of_its_windows(kosmos_tower: str, kosmos_tokenizer: Tokenizer) -> None:
    model = tiny_model(kosmos_tower, max_seq_len=31)
    model.tokenizer = kosmos_tokenizer
    asked = HarnessModel(model=model, stride=11, device="cpu")
    text = "the cat sat on the mat " * 7
    ids = kosmos_tokenizer.encode(text).tolist()

    found = asked.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",), ("my cat",)), True)

    first, rest = sum(alone(model, [], ids[:30])), 0.0
    for start in range(30, len(ids), 11):
        end = min(start + 11, len(ids))
        rest += sum(alone(model, ids[end - 30 : start], ids[start:end]))
    assert found[0] == pytest.approx(first + rest, abs=1e-3)  # some 100 tokens, each to 1e-5
    assert found[1] == 0.0
    assert found[2] == pytest.approx(sum(alone(model, [], kosmos_tokenizer.encode("my cat").tolist())), abs=1e-4)


def test_generation_stops_where_the_task_says(asked: HarnessModel, tmp_path: Path) -> None:
    contexts = ["the cat", "a red square and a", "jackdaws love"]
    settings = GenerationConfig(max_new_tokens=9)
    written = [
        a.text for a in RequestScheduler(asked.model, asked.tokenizer).respond([Generate((c,), settings) for c in contexts])
    ]  # type: ignore[union-attr]
    stop = next(letter for letter in "aeiotnsr" if any(letter in text[1:] for text in written))
    put_task(
        tmp_path, [{"context": c, "answer": "x"} for c in contexts], output_type="generate_until",
        doc_to_text="{{context}}", doc_to_target="{{answer}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": [stop], "max_gen_toks": 9},
    )  # fmt: skip

    found = evaluate(asked, tmp_path)

    logged = sorted(found["samples"]["made"], key=lambda one: one["doc_id"])
    assert [one["resps"][0][0] for one in logged] == [text.partition(stop)[0] for text in written]


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, GenerationConfig(max_new_tokens=256)),
        ({"until": "\n", "max_gen_toks": 5, "temperature": 0.0}, GenerationConfig(max_new_tokens=5, stop=("\n",))),
        (
            {"until": ["a", ""], "do_sample": False, "temperature": 0.7, "top_p": 0.9},
            GenerationConfig(max_new_tokens=256, stop=("a",)),
        ),
        ({"temperature": 0.7, "top_k": 3, "max_tokens": 2}, GenerationConfig(max_new_tokens=2, temperature=0.7, top_k=3)),
        ({"do_sample": True, "seed": 5}, GenerationConfig(max_new_tokens=256, temperature=1.0, seed=5)),
        ({"num_beams": 4, "length_penalty": 0.5}, GenerationConfig(max_new_tokens=256, n_beams=4, length_penalty=0.5)),
    ],
)  # fmt: skip
def test_settings_of_tasks_become_ours(given: dict[str, Any], settings: GenerationConfig) -> None:
    assert generation_config(given) == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_p": 0.1}, "no such generation_kwargs: min_p; there are do_sample, "),
        ({"do_sample": True, "temperature": 0}, "draw"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generation_config(given)


def test_more_tokens_than_positions_are_refused(asked: HarnessModel) -> None:
    with pytest.raises(UserError, match="256 tokens behind <s> do not fit into the model's 211 positions"):
        asked.generate_until(requests("generate_until", ("the cat", {})), True)


def test_a_cache_of_the_harness_spares_the_model(asked: HarnessModel, tmp_path: Path) -> None:
    rows = [{"context": "the cat", "choices": ["sat", "is red"], "label": 0}]
    put_task(tmp_path, rows, **CHOICE)
    read: list[int] = []
    hook = asked.model.decoder.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))

    first = evaluate(asked, tmp_path, use_cache=str(tmp_path / "answers"))
    n_read = len(read)
    again = evaluate(asked, tmp_path, use_cache=str(tmp_path / "answers"))

    hook.remove()
    assert n_read == len(read) > 0
    assert first["samples"]["made"][0]["resps"] == again["samples"]["made"][0]["resps"]


@pytest.mark.slow  # the command reads all of lm_eval's own task files
def test_the_command_runs_an_exported_model(model: Kosmos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(model, tmp_path / "model")
    put_task(tmp_path / "tasks", [{"context": "the cat", "choices": ["sat", "is red"], "label": 0}], **CHOICE)
    command = ["lm_eval", "run", "--model", "kosmos_lit", "--model_args", f"path={tmp_path / 'model'}", "--tasks", "made"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)

    status = main()

    [written] = (tmp_path / "out").rglob("results_*.json")
    assert status == 0
    assert json.loads(written.read_text())["results"]["made"]["acc,none"] in (0.0, 1.0)


def test_a_mistake_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "cli_evaluate", lambda: HarnessModel(path="nowhere.ckpt"))

    assert main() == 2
    assert capsys.readouterr().err == "error: no checkpoint nowhere.ckpt\n"


def test_a_chat_template_and_a_model_without_tokenizer_are_refused(asked: HarnessModel, kosmos_tower: str) -> None:
    with pytest.raises(UserError, match="leave out --apply_chat_template"):
        asked.apply_chat_template([{"role": "user", "content": "the cat"}])
    with pytest.raises(UserError, match="without a tokenizer"):
        HarnessModel(model=tiny_model(kosmos_tower))
