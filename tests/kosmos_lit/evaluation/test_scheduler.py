"""Many samples side by side get the responses that each alone would, and failures name their reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kosmos_lit.evaluation.requests import Generate, LogLikelihood, Request
from kosmos_lit.evaluation.results import Failure, Result
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from tests.kosmos_lit.evaluation.toy_tasks import TwoRounds, draw_images
from tests.kosmos_lit.tiny_kosmos import tiny_model


@pytest.fixture
def model(kosmos_tower: str) -> Kosmos:
    return tiny_model(kosmos_tower)


@pytest.fixture
def task(tmp_path: Path) -> TwoRounds:
    draw_images(tmp_path / "images", 5)
    return TwoRounds(str(tmp_path / "images"), n=11)


def results_of(scheduler: RequestScheduler, task: TwoRounds) -> dict[str, Result]:
    results = [result for some in scheduler.run(task, task.samples(), task.pool()) for result in some]
    assert len(results) == len({result.key for result in results})
    return {result.key: result for result in results}


def log_probs(result: Result) -> list[float]:
    return [p for request in result.requests for row in request.get("log_probs", []) for p in row]


@pytest.mark.parametrize("n_shots", [0, 2])
def test_outcomes_do_not_depend_on_batches(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, n_shots: int
) -> None:
    task.n_shots = n_shots

    alone = results_of(RequestScheduler(Engine(model, kosmos_tokenizer), batch_tokens=1), task)
    merged = results_of(RequestScheduler(Engine(model, kosmos_tokenizer), batch_tokens=100_000), task)

    assert alone.keys() == merged.keys()
    for key, one in alone.items():
        assert one.outcome is not None
        assert merged[key].outcome is not None
        assert (one.outcome.prediction, one.outcome.scores) == (merged[key].outcome.prediction, merged[key].outcome.scores)
        assert one.outcome.data.get("written") == merged[key].outcome.data.get("written")
        assert log_probs(one) == pytest.approx(log_probs(merged[key]), abs=1e-5)


def test_a_batch_has_at_most_batch_tokens_positions(model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds) -> None:
    read: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))

    results_of(RequestScheduler(Engine(model, kosmos_tokenizer), batch_tokens=90), task)

    assert max(read) <= 90


def test_an_image_of_several_samples_is_encoded_once_a_batch(
    model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    [one, other] = draw_images(tmp_path, 2)
    seen: list[Tensor] = []
    model.vision.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    requests = [LogLikelihood((one, other, one, text), ("a cat",)) for text in ("the", "a red square", "my")]

    merged = RequestScheduler(Engine(model, kosmos_tokenizer)).respond(requests)

    assert [len(images) for images in seen] == [2]
    alone = [RequestScheduler(Engine(model, kosmos_tokenizer)).respond([request])[0] for request in requests]
    for answer, other_answer in zip(merged, alone, strict=True):
        assert answer[0].log_probs == pytest.approx(other_answer[0].log_probs, abs=1e-5)  # type: ignore[index]


def matrix(paths: list[Path]) -> list[LogLikelihood]:
    """Return requests as Raven's test has them: three images, and then one of four, of which one is in both."""
    before = tuple(part for path in paths[:3] for part in (path, "the cat"))
    return [LogLikelihood((*before, "on the mat", end, "is it", " a cat? "), ("yes", "a mat")) for end in paths[2:]]


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_prompts_that_begin_alike_share_a_prefill_with_the_same_scores(
    model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path, batch_tokens: int
) -> None:
    requests: list[Request] = [*matrix(draw_images(tmp_path, 6)), LogLikelihood(("my",), ("cat",))]
    requests.insert(2, Generate(("the",), GenerationConfig(max_new_tokens=3)))
    read: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    schedulers = [
        RequestScheduler(Engine(model, kosmos_tokenizer), batch_tokens=batch_tokens, share_prefixes=share)
        for share in (False, True)
    ]

    plain = schedulers[0].respond(requests)
    n_plain = sum(read)
    shared = schedulers[1].respond(requests[:2] + requests[2:5])
    n_shared = sum(read) - n_plain

    assert n_shared < 0.7 * n_plain
    for one, other in zip(plain[:5], shared, strict=True):
        if isinstance(one, tuple) and isinstance(other, tuple):
            assert [s.text for s in one] == [s.text for s in other]
            for scored, again in zip(one, other, strict=True):
                assert scored.log_probs == pytest.approx(again.log_probs, abs=1e-5)
        else:
            assert one == other


def test_draws_follow_from_the_images_shown(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = draw_images(tmp_path, 3)
    settings = GenerationConfig(max_new_tokens=7, temperature=1.0)
    requests = [Generate((paths[i], paths[0], "a"), settings) for i in (0, 1, 2)]

    merged = RequestScheduler(Engine(model, kosmos_tokenizer)).respond(requests)

    assert merged == [RequestScheduler(Engine(model, kosmos_tokenizer)).respond([request])[0] for request in requests]


def test_a_failed_request_has_a_reason_and_fails_no_other(
    model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    [good] = draw_images(tmp_path, 1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    settings = GenerationConfig(max_new_tokens=3)
    requests = [
        LogLikelihood((good, "the cat"), ("a", "the")),
        LogLikelihood((tmp_path / "gone.png", "the cat"), ("a", "the")),
        Generate((good, broken, "a"), settings),
        Generate(("the cat sat " * 20,), settings),
        LogLikelihood(("the",), ("a", " \n")),
        LogLikelihood(("the",), ()),
        Generate(("the",), GenerationConfig(choices=["a", " a"])),
        Generate((good, "the"), settings),
    ]

    responses = RequestScheduler(Engine(model, kosmos_tokenizer)).respond(requests)

    reasons: list[Any] = [response.reason if isinstance(response, Failure) else None for response in responses]
    assert reasons == [
        None,
        "unreadable image",
        "unreadable image",
        "prompt too long",
        "candidate without tokens",
        "no candidates",
        "invalid choices",
        None,
    ]
    assert "gone.png" in str(responses[1])
    assert "broken.png" in str(responses[2])
    assert "61" in str(responses[3])


def test_a_failed_sample_has_its_reason_and_no_outcome(model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds) -> None:
    (task.path / "1.png").write_bytes(b"no image")

    results = results_of(RequestScheduler(Engine(model, kosmos_tokenizer)), task)

    failed = {key for key, result in results.items() if result.failure}
    assert failed == {s.key for s in task.samples() if any(path.name == "1.png" for path in s.images)}
    assert all((result.outcome is None) == (key in failed) for key, result in results.items())
    assert results["s1"].to_dict()["error"].startswith("unreadable image: ")


def test_results_are_the_same_after_their_way_to_disk(model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds) -> None:
    (task.path / "1.png").write_bytes(b"no image")

    for result in results_of(RequestScheduler(Engine(model, kosmos_tokenizer)), task).values():
        assert Result.from_dict(result.to_dict()) == result


@pytest.mark.parametrize("image_control", ["blank", "none"])
def test_images_make_no_difference_under_a_control_without_them(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, image_control: Any
) -> None:
    before = results_of(RequestScheduler(Engine(model, kosmos_tokenizer), image_control=image_control), task)
    for path, image in zip(draw_images(task.path / "others", 9)[4:], task.path.glob("*.png"), strict=True):
        image.write_bytes(path.read_bytes())

    after = results_of(RequestScheduler(Engine(model, kosmos_tokenizer), image_control=image_control), task)

    assert {k: r.to_dict() for k, r in before.items()} == {k: r.to_dict() for k, r in after.items()}
    true = results_of(RequestScheduler(Engine(model, kosmos_tokenizer)), task)
    assert all(log_probs(true[s.key]) != log_probs(after[s.key]) for s in task.samples() if s.images)


def test_a_model_without_finite_numbers_fails_its_samples(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds
) -> None:
    with torch.no_grad():
        model.decoder.embed_tokens.weight.fill_(torch.nan)

    failures = [result.failure for result in results_of(RequestScheduler(Engine(model, kosmos_tokenizer)), task).values()]

    assert {failure and failure.reason for failure in failures} == {"model error"}


def test_scores_are_those_of_the_model(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    [image] = draw_images(tmp_path, 1)

    [answer] = RequestScheduler(Engine(model, kosmos_tokenizer)).respond(
        [LogLikelihood((image, "the cat "), ("sat", "on the mat"))]
    )

    expected = Engine(model, kosmos_tokenizer).score("the cat", ["sat", "on the mat"], [image])
    assert [scored.text for scored in answer] == ["sat", "on the mat"]  # type: ignore[union-attr]
    for scored, other in zip(answer, expected, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(scored.log_probs, other.log_probs)  # type: ignore[union-attr]
