"""Caption metrics: a value worked out by hand, and the messages about missing programs."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation import caption_metrics
from kosmos_lit.evaluation.caption_metrics import caption_scores, check_caption_metrics, plain_words

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture(autouse=True)
def _package() -> None:
    pytest.importorskip("pycocoevalcap", reason="needs the extra eval")


def test_cider_is_what_its_formula_gives(capsys: pytest.CaptureFixture[str]) -> None:
    # Two images, so every n-gram that one of them has weighs log 2, which cancels in cosines. The first caption is its
    # reference: cosines of 1, 1, 0, 0 for n = 1 ... 4. The second has one of two words: 1 / sqrt(2) for n = 1, else 0, and
    # the reference has one bigram more: exp(-1 / (2 * 6**2)). CIDEr is 10 times the mean over n.
    scores = caption_scores(["A b.", "c"], [["a b"], ["c d"]], ["cider"], "plain")["cider"][1]

    # rtol: the package computes in float64.
    assert scores == pytest.approx([10 * 2 / 4, 10 * math.exp(-1 / 72) / math.sqrt(2) / 4], rel=1e-12)
    assert capsys.readouterr().out == ""


def test_references_are_averaged() -> None:
    scores = caption_scores(["a b", "c"], [["a b", "x"], ["c"]], ["cider"], "plain")["cider"][1]

    # Against "x" nothing: half of the value against "a b" alone.
    assert scores[0] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [("A dog's tail, wet.", "a dog's tail wet"), ("t-shirt - 'red'!", "t-shirt red"), ("", ""), ("3 (three)", "3 three")],
)
def test_plain_words_are_lower_case_without_punctuation(text: str, words: str) -> None:
    assert plain_words(text) == words


def test_without_java_the_message_names_the_option_that_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(UserError, match="COCO: its metrics lack Java for tokens: ptb, meteor") as raised:
        check_caption_metrics("COCO", ["cider", "meteor"], "ptb")

    assert all(part in str(raised.value) for part in ("default-jre-headless", "`metrics: [cider]` with `tokens: plain`"))
    check_caption_metrics("COCO", ["cider"], "plain")  # nothing is missing


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)

    with pytest.raises(UserError, match=r"pip install 'kosmos-lit\[eval\]'"):
        check_caption_metrics("COCO", ["cider"], "plain")


@needs_java
def test_without_corenlp_spice_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(caption_metrics, "_jars", lambda: tmp_path)
    (tmp_path / caption_metrics.CORENLP[0]).touch()

    with pytest.raises(UserError, match=r"lack stanford-corenlp-3\.6\.0-models\.jar for SPICE") as raised:
        check_caption_metrics("COCO", ["cider", "spice"], "ptb")

    assert "get_stanford_models" in str(raised.value)
    assert "`metrics: [cider, meteor]`" in str(raised.value)


def test_a_failing_java_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    with pytest.raises(UserError, match="pycocoevalcap failed at cider with tokens: ptb"):
        caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]], ["cider"], "ptb")


@pytest.mark.slow
@needs_java
def test_the_official_words_and_meteor_come_from_java() -> None:
    predictions = ["A man's dog, running.", "a cat", ""]
    references = [["a man 's dog running"], ["A cat."], ["a bird"]]

    scores = {name: each for name, (_, each) in caption_scores(predictions, references, ["cider", "meteor"], "ptb").items()}

    # "a" is of all three images and weighs nothing: of "a cat" n = 1 is "cat", n = 2 the whole.
    assert scores["cider"][:2] == pytest.approx([10.0, 5.0])  # 5 words: all four n; 2 words: two of them
    assert scores["meteor"][0] == pytest.approx(1.0)
    assert scores["cider"][2] == scores["meteor"][2] == 0
