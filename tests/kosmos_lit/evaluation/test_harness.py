"""lm-evaluation-harness with a model of this project, on tasks and data that the tests write."""

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
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, Tokenizer
from kosmos_lit.weights.folder import save_folder
from tests.kosmos_lit.tasks.language_datasets import DATASETS, write_lines
from tests.kosmos_lit.tiny_kosmos import tiny_model

ROOM = 211
"""Positions of the tests' model."""
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}"}
CHOICE |= {"doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}]}


@pytest.fixture(scope="module")
def engine(kosmos_tower: str, kosmos_vocabulary: bytes) -> Engine:
    return Engine(tiny_model(kosmos_tower, max_seq_len=ROOM), Tokenizer(kosmos_vocabulary))


@pytest.fixture(scope="module")
def harness_model(engine: Engine) -> HarnessModel:
    return HarnessModel(engine=engine, device="cpu")


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
    results: dict[str, Any] = simple_evaluate(
        model=model, tasks=["made"], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    return results


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def log_probs_of(model: Kosmos, context: list[int], rest: list[int]) -> list[float]:
    """Return the log-probabilities of `rest` from one forward pass over the full row."""
    row = torch.tensor([BOS, *context, *rest])
    with torch.inference_mode():
        log_probs = Engine(model, None).logits(row)[:-1].log_softmax(-1)
    return log_probs.gather(1, row[1:, None])[len(context) :, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "n_shots"), [("Copa", 0), ("HellaSwag", 1), ("CommitmentBank", 0)])
def test_choices_and_log_probabilities_are_those_of_our_own_tasks(
    harness_model: HarnessModel, tmp_path: Path, name: str, n_shots: int
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

    by_harness = evaluate(harness_model, tmp_path)

    results = {r.key: r for some in RequestScheduler(harness_model.engine).run(task, samples, pool) for r in some}
    outcomes = [results[sample.key].outcome for sample in samples]
    logged = sorted(by_harness["samples"]["made"], key=lambda one: one["doc_id"])
    assert len(logged) == len(samples)
    for one, outcome in zip(logged, outcomes, strict=True):
        assert outcome is not None
        values = [value for (value, _) in one["filtered_resps"]]
        assert values == pytest.approx(outcome.data["values"], abs=1e-4)
        assert values.index(max(values)) == outcome.data["choice"]
        assert one["acc"] == outcome.scores["accuracy"]
    accuracy = sum(outcome.scores["accuracy"] for outcome in outcomes if outcome) / len(outcomes)
    assert by_harness["results"]["made"]["acc,none"] == pytest.approx(accuracy)


def test_candidates_of_a_context_share_its_prefill(harness_model: HarnessModel) -> None:
    read: list[int] = []
    hook = harness_model.engine.model.decoder.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[0]))

    harness_model.loglikelihood(requests("loglikelihood", *(("the cat sat on", f" {w}") for w in ("it", "mat", "my"))), True)

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
    harness_model = HarnessModel(engine=Engine(model, tokenizer), device="cpu")

    [(value, _)] = harness_model.loglikelihood(requests("loglikelihood", (context, rest)), True)

    joined, before = tokenizer.encode(context + rest).tolist(), tokenizer.encode(context).tolist()
    border = next((i for i, (a, b) in enumerate(zip(joined, before, strict=False)) if a != b), min(len(joined), len(before)))
    assert value == pytest.approx(sum(log_probs_of(model, joined[:border], joined[border:])), abs=1e-4)


def test_a_continuation_is_greedy_if_greedy_decoding_writes_it(harness_model: HarnessModel) -> None:
    context = "the cat sat"
    words = [
        w for w in "on the mat a red square and blue circle it my big".split() if len(harness_model.tokenizer.encode(w)) == 1
    ]
    values = harness_model.loglikelihood(requests("loglikelihood", *((context, f" {word}") for word in words)), True)
    ids = harness_model.tokenizer.encode(context).tolist()
    with torch.inference_mode():
        best = int(harness_model.engine.logits([BOS, *ids])[-1].argmax())
    text = harness_model.tokenizer.name(best)

    [(_, is_greedy)] = harness_model.loglikelihood(requests("loglikelihood", (context, text)), True)

    assert harness_model.tokenizer.encode(context + text).tolist() == [*ids, best]
    assert is_greedy
    assert [flag for (_, flag), word in zip(values, words, strict=True) if f" {word}" != text] == [False] * len(words)


def test_a_continuation_without_tokens_is_an_error(harness_model: HarnessModel) -> None:
    with pytest.raises(UserError, match="the continuation ' ' of 'the cat' has no tokens"):
        harness_model.loglikelihood(requests("loglikelihood", ("the cat", " ")), True)


def test_a_long_context_loses_its_beginning_and_says_so(
    harness_model: HarnessModel, caplog: pytest.LogCaptureFixture
) -> None:
    context = "a red square and " * 40 + "the cat"
    ids, rest = harness_model.tokenizer.encode(context).tolist(), harness_model.tokenizer.encode("sat").tolist()

    with caplog.at_level(logging.WARNING):
        [(value, _)] = harness_model.loglikelihood(requests("loglikelihood", (context, " sat")), True)

    fitting = ids[-(ROOM - 1 - len(rest)) :]
    assert value == pytest.approx(sum(log_probs_of(harness_model.engine.model, fitting, rest)), abs=1e-4)
    assert "1 contexts lost their beginnings: the model has 211 positions" in caplog.text


def test_a_short_text_is_one_row(harness_model: HarnessModel, tmp_path: Path) -> None:
    text = "the cat sat on the mat\na red square"
    put_task(
        tmp_path,
        [{"page": text}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )

    results = evaluate(harness_model, tmp_path)

    ids = harness_model.tokenizer.encode(text).tolist()
    bits = -sum(log_probs_of(harness_model.engine.model, [], ids)) / torch.log(torch.tensor(2.0)).item() / len(text.encode())
    assert results["results"]["made"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 7, 12])
@pytest.mark.parametrize("n", [0, 1, 12, 13, 24, 25, 40])
def test_windows_score_each_token_of_a_text_once_after_all_context_that_fits(
    kosmos_tower: str, kosmos_tokenizer: Tokenizer, n: int, stride: int | None
) -> None:
    model = tiny_model(kosmos_tower, max_seq_len=13)
    harness_model = HarnessModel(engine=Engine(model, kosmos_tokenizer), stride=stride, device="cpu")
    ids = list(range(100, 100 + n))

    windows = harness_model._windows(ids)

    assert [token for _, scored in windows for token in scored] == ids
    assert all(len(scored) <= (stride or 12) for _, scored in windows[1:])
    assert all(len(context) + len(scored) == min(12, n) for context, scored in windows)
    for context, scored in windows:
        start = scored[0] - 100
        assert context == ids[start - len(context) : start]


def test_a_long_text_is_the_sum_of_its_windows(kosmos_tower: str, kosmos_tokenizer: Tokenizer) -> None:
    model = tiny_model(kosmos_tower, max_seq_len=31)
    harness_model = HarnessModel(engine=Engine(model, kosmos_tokenizer), stride=11, device="cpu")
    text = "the cat sat on the mat " * 7
    ids = kosmos_tokenizer.encode(text).tolist()

    totals = harness_model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",), ("my cat",)), True)

    first, rest = sum(log_probs_of(model, [], ids[:30])), 0.0
    for start in range(30, len(ids), 11):
        end = min(start + 11, len(ids))
        rest += sum(log_probs_of(model, ids[end - 30 : start], ids[start:end]))
    assert totals[0] == pytest.approx(first + rest, abs=1e-3)  # some 100 tokens, each to 1e-5
    assert totals[1] == 0.0
    assert totals[2] == pytest.approx(sum(log_probs_of(model, [], kosmos_tokenizer.encode("my cat").tolist())), abs=1e-4)


def test_generation_ends_at_the_tasks_stop_strings(harness_model: HarnessModel, tmp_path: Path) -> None:
    contexts = ["the cat", "a red square and a", "jackdaws love"]
    settings = GenerationConfig(max_new_tokens=9)
    texts = [a.text for a in RequestScheduler(harness_model.engine).respond([Generate((c,), settings) for c in contexts])]  # type: ignore[union-attr]
    stop = next(letter for letter in "aeiotnsr" if any(letter in text[1:] for text in texts))
    put_task(
        tmp_path,
        [{"context": c, "answer": "x"} for c in contexts],
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": [stop], "max_gen_toks": 9},
    )

    results = evaluate(harness_model, tmp_path)

    logged = sorted(results["samples"]["made"], key=lambda one: one["doc_id"])
    assert [one["resps"][0][0] for one in logged] == [text.partition(stop)[0] for text in texts]


@pytest.mark.parametrize(
    ("kwargs", "settings"),
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
)
def test_settings_of_tasks_become_a_generation_config(kwargs: dict[str, Any], settings: GenerationConfig) -> None:
    assert generation_config(kwargs) == settings


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_p": 0.1}, "unsupported generation_kwargs: min_p; supported are do_sample, "),
        ({"do_sample": True, "temperature": 0}, "leave do_sample out"),
    ],
)
def test_unsupported_settings_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generation_config(kwargs)


def test_more_tokens_than_positions_are_refused(harness_model: HarnessModel) -> None:
    with pytest.raises(UserError, match="256 tokens after <s> do not fit into the model's 211 positions"):
        harness_model.generate_until(requests("generate_until", ("the cat", {})), True)


def test_the_harness_cache_replaces_the_model(harness_model: HarnessModel, tmp_path: Path) -> None:
    rows = [{"context": "the cat", "choices": ["sat", "is red"], "label": 0}]
    put_task(tmp_path, rows, **CHOICE)
    read: list[int] = []
    hook = harness_model.engine.model.decoder.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))

    first = evaluate(harness_model, tmp_path, use_cache=str(tmp_path / "answers"))
    n_read = len(read)
    again = evaluate(harness_model, tmp_path, use_cache=str(tmp_path / "answers"))

    hook.remove()
    assert n_read == len(read) > 0
    assert first["samples"]["made"][0]["resps"] == again["samples"]["made"][0]["resps"]


@pytest.mark.slow  # the command reads all of lm_eval's own task files
def test_the_command_runs_an_exported_model(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(engine.model, engine.tokenizer, tmp_path / "model")
    put_task(tmp_path / "tasks", [{"context": "the cat", "choices": ["sat", "is red"], "label": 0}], **CHOICE)
    command = ["lm_eval", "run", "--model", "kosmos_lit", "--model_args", f"path={tmp_path / 'model'}", "--tasks", "made"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)

    status = main()

    [path] = (tmp_path / "out").rglob("results_*.json")
    assert status == 0
    assert json.loads(path.read_text())["results"]["made"]["acc,none"] in (0.0, 1.0)


def test_an_error_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "cli_evaluate", lambda: HarnessModel(path="nowhere.ckpt"))

    assert main() == 2
    assert capsys.readouterr().err == "error: no checkpoint nowhere.ckpt\n"


def test_a_chat_template_and_a_model_without_tokenizer_are_refused(harness_model: HarnessModel, kosmos_tower: str) -> None:
    with pytest.raises(UserError, match="leave out --apply_chat_template"):
        harness_model.apply_chat_template([{"role": "user", "content": "the cat"}])
    with pytest.raises(UserError, match="without a tokenizer"):
        HarnessModel(engine=Engine(tiny_model(kosmos_tower), None))
