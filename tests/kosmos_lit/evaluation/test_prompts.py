"""Templates, demonstrations, and tokens: a prompt with its answer is, byte for byte, the training row of the same parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from datamodules.collate import ImageReader
from datamodules.corpus import IndexedCorpus
from datamodules.prepare.index import prepare_corpus
from datamodules.stream import Row
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.prompts import encode_answers, encode_prompts, few_shot_prompt, fill_template, prompt_text
from kosmos_lit.evaluation.requests import Parts
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.images import Fit
from kosmos_lit.inference.engine import Engine
from kosmos_lit.tokenizer import EOS, IGNORE, Ids, Tokenizer
from tests.datamodules import sample_data
from tests.kosmos_lit.hugging_face_tokenizers import byte_level, write_folder
from tests.kosmos_lit.tiny_kosmos import SIDE, tiny_model

LATENTS, SEQ_LEN = 3, 397
A, B, C = Path("p/a.png"), Path("p/b.jpg"), Path("p/c.png")
EXAMPLES: list[tuple[Parts, str]] = [
    (("Question: what? Answer:",), "a red ball"),
    ((A, "An image of"), "a red ball in Jazz & quiz."),
    ((A, " his hat ", B, "the moon? Yes.\n", C, "Answer:"), "No"),
    ((A, B, "follows", " the old king", ". Who", "\n", "sees it? "), "a dog"),
    (("  \n Given the text:\nfirst line\r\n\n third line \n", A, "\n"), "his\nhat"),
    (("one horse\n",), " two boats "),
    (("our ship", "  ", " \t"), "draws"),
    ((A,), "some bread"),
    (("literal </s> and <s> </image> <grounding> are text", B, " it"), "is </line>"),
    ((C, C, "twice"), "</s>"),
]
"""Prompts with their answers: one and several images, adjacent texts, newlines, blanks in all places."""


def gap(parts: Parts) -> str:
    """Return the gap between a prompt and its answer in data that write it out: a space, unless the prompt ends in one."""
    return " " if isinstance(parts[-1], str) and not parts[-1][-1:].isspace() else ""


def test_the_examples_have_no_mark_in_a_text() -> None:
    # In instruction data on disk <image> is a mark; the test writes these prompts as such data.
    assert not any("<image>" in part for parts, answer in EXAMPLES for part in (*parts, answer) if isinstance(part, str))


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def vocabulary(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "sentencepiece":
        return tokenizer_folder
    return write_folder(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    (path / "p").mkdir()
    for number, name in enumerate((A, B, C)):
        (path / name).write_bytes(sample_data.png(number) if name.suffix == ".png" else sample_data.jpeg(number))
    records = [
        {
            "images": [str(part) for part in parts if isinstance(part, Path)],
            "prompt": prompt_text(parts),
            "completion": gap(parts) + answer,
        }
        for parts, answer in EXAMPLES
    ]
    (path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(folder: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedCorpus:
    output = tmp_path_factory.mktemp("index") / "index"
    return prepare_corpus(format="instruct", inputs=[str(folder / "*.jsonl")], tokenizer=vocabulary, output=output)


def rows_of(corpus: IndexedCorpus, name: str, tokenizer: Tokenizer) -> dict[int, tuple[Ids, Ids, Row]]:
    """Return for each document its tokens and targets, and its row."""
    ratio = [float(name == kind) for kind in ("text", "caption", "interleaved", "instruct")]
    stream = sample_data.stream({name: corpus}, tokenizer.special, ratio=ratio, seq_len=SEQ_LEN, n_latents=LATENTS)
    documents: dict[int, tuple[Ids, Ids, Row]] = {}
    for number in range(9):
        row = stream.row(number)
        for placed in row.segments:
            cut = slice(placed.position, placed.position + placed.length)
            documents[placed.document] = row.tokens[cut], row.targets[cut], row
    assert len(documents) == corpus.n_documents
    return documents


def test_a_prompt_with_its_answer_is_the_row_of_an_example(trained: IndexedCorpus, vocabulary: Path) -> None:
    tokenizer = Tokenizer.load(vocabulary)
    prompts = encode_prompts([parts for parts, _ in EXAMPLES], tokenizer, LATENTS)
    rows = rows_of(trained, "instruct", tokenizer)
    for document, (parts, answer) in enumerate(EXAMPLES):
        tokens, targets, _ = rows[document]
        [ids] = encode_answers(parts, [answer], tokenizer)
        prompt = prompts[document].tokens

        assert [*prompt.tolist(), *ids] == tokens.tolist(), parts
        assert targets[targets != IGNORE].tolist() == [*ids, EOS], parts
        assert tokens[: len(prompt)].tobytes() == prompt.tobytes()


def test_a_prompt_is_the_row_of_a_page(vocabulary: Path, tmp_path: Path) -> None:
    tokenizer, site = Tokenizer.load(vocabulary), sample_data.SITE
    names = ["1.png", "2.png", "3.png"]
    random_images = [(f"{site}/{name}", "image/png", sample_data.png(int(name[0]))) for name in names]
    texts = ["The moon finds &lt;/s&gt; it.", "two boats", "A letter in quiz.", "His hat."]
    page = sample_data.page(*texts[:2], names[0], texts[2], *names[1:], texts[3])
    sample_data.write_warc(tmp_path / "a.warc.gz", [*random_images, (f"{site}/p.html", "text/html; charset=utf-8", page)])
    inputs = [str(tmp_path / "a.warc.gz")]
    corpus = prepare_corpus(format="warc", inputs=inputs, tokenizer=vocabulary, output=tmp_path / "index")

    [prompt] = encode_prompts(
        [("The moon finds </s> it.\ntwo boats", A, "A letter in quiz.", B, C, "His hat.")], tokenizer, LATENTS
    )

    tokens, _, row = rows_of(corpus, "interleaved", tokenizer)[0]
    assert tokens.tobytes() == prompt.tokens.tobytes()
    assert (row.slots - int(np.flatnonzero(row.tokens == tokens[0])[0])).tolist() == prompt.slots.tolist()


@pytest.mark.parametrize("fit", ["square", "crop"])
def test_pixels_are_those_of_training(
    trained: IndexedCorpus, folder: Path, vocabulary: Path, kosmos_tower: str, fit: Fit
) -> None:
    tokenizer = Tokenizer.load(vocabulary)
    _, _, row = rows_of(trained, "instruct", tokenizer)[2]
    _, images = ImageReader(SIDE, fit, tokenizer.special, {"instruct": 0.0}).read([row], {"instruct": trained})
    expected = images[[n for n, owner in enumerate(row.image_segments) if row.segments[owner].document == 2]]

    scheduler = RequestScheduler(Engine(tiny_model(kosmos_tower), tokenizer), image_fit=fit)

    pixels = [scheduler._read(folder / part) for part in EXAMPLES[2][0] if isinstance(part, Path)]
    assert np.stack(pixels).tobytes() == expected.tobytes()  # type: ignore[arg-type]


def test_marks_in_a_text_are_no_images(vocabulary: Path) -> None:
    tokenizer = Tokenizer.load(vocabulary)

    [prompt] = encode_prompts([("an <image> of <s>", A, "a </image>")], tokenizer, LATENTS)

    assert len(prompt.slots) == 1
    assert (prompt.tokens == tokenizer.special.image).sum() == 1 + LATENTS


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_answer_without_a_word_has_no_ids(vocabulary: Path, answer: str) -> None:
    assert encode_answers(("Answer:",), [answer], Tokenizer.load(vocabulary)) == [[]]


# ---- templates and demonstrations


def test_demonstrations_stand_before_the_prompt_and_texts_grow_together() -> None:
    one, two = Path("1.png"), Path("2.png")

    assert few_shot_prompt([(one, "A 1"), ("B 2",)], (two, "A"), " | ") == (one, "A 1 | B 2 | ", two, "A")


def test_without_demonstrations_the_prompt_is_itself() -> None:
    assert few_shot_prompt([], (Path("1.png"), "A"), "\n") == (Path("1.png"), "A")


@pytest.mark.parametrize("template", ["{q}", "{", "{0}"])
def test_a_template_that_cannot_be_filled_in_is_named(template: str) -> None:
    with pytest.raises(UserError, match="cannot be filled in"):
        fill_template(template, question="?")


def test_braces_in_a_value_are_text() -> None:
    assert fill_template("Q: {question} {{}}", question="{x}") == "Q: {x} {}"
