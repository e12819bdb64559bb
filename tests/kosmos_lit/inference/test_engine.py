"""An engine in a notebook: the same results as the command line, and images in any form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kosmos_lit
from kosmos_lit import Engine
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, PAD
from tests.kosmos_lit.tiny_kosmos import LATENTS, SIDE, SPECIAL, tiny_model, words

LAST = Path("checkpoints") / "step=00000006.ckpt"


@pytest.fixture(scope="module")
def engine(kosmos_tower, kosmos_tokenizer) -> Engine:
    return Engine(tiny_model(kosmos_tower), kosmos_tokenizer)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---- images


@pytest.mark.parametrize("size", [(SIDE, SIDE), (31, 53)], ids=str)
def test_an_image_gives_the_same_pixels_in_any_form(engine, tmp_path, size):
    image = photograph(*size)
    (tmp_path / "a.png").write_bytes(png(image))
    array = np.asarray(image).transpose(2, 0, 1)
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        png(image),
        image,
        array,
        np.ascontiguousarray(array),
        torch.from_numpy(array.copy()),
    ]

    pixels = engine.pixels(forms)

    assert pixels.shape == (len(forms), 3, SIDE, SIDE)
    assert pixels.dtype == torch.uint8
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


def test_an_image_of_the_models_size_is_taken_as_it_is(engine):
    image = photograph(SIDE, SIDE)

    assert engine.pixels([image])[0].tolist() == np.asarray(image).transpose(2, 0, 1).tolist()


def test_both_sides_of_an_image_are_scaled(engine):
    """As `generate` on the command line does: nothing is cut off."""
    image = photograph(31, 53)
    expected = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    assert engine.pixels([image])[0].tolist() == expected.tolist()


def test_a_file_and_an_opened_file_are_turned_upright_alike(engine, tmp_path):
    image = photograph(31, 53)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        from_file, from_opened = engine.pixels([tmp_path / "a.png", opened])

    assert torch.equal(from_file, from_opened)
    assert not torch.equal(from_file, engine.pixels([image])[0])


def test_a_transparent_image_is_laid_over_white(engine):
    assert (engine.pixels([Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0))]) == 255).all()


def test_no_images_are_none(engine):
    assert engine.pixels([]).shape == (0, 3, SIDE, SIDE)


WRONG = {
    "path": ("no/such.png", r"no such image: no/such\.png"),
    "folder": (".", "no such image"),
    "empty bytes": (b"", "empty image"),
    "bytes of text": (b"red square", "not an image"),
    "last axis of colours": (np.zeros((14, 14, 3), dtype=np.uint8), r"expected, got \(14, 14, 3\) uint8"),
    "numbers of another kind": (np.zeros((3, 14, 14)), r"\(3, H, W\) uint8 was expected, got \(3, 14, 14\) float64"),
    "one colour": (torch.zeros(1, 14, 14, dtype=torch.uint8), r"got \(1, 14, 14\) uint8 of Tensor"),
    "a batch": (torch.zeros(2, 3, 14, 14, dtype=torch.uint8), r"got \(2, 3, 14, 14\) uint8 of Tensor"),
    "no pixels": (np.zeros((3, 0, 14), dtype=np.uint8), "empty image"),
    "a number": (7, r"\(3, H, W\) uint8 was expected, got \(\)"),
    "nothing": (None, r"\(3, H, W\) uint8 was expected"),
    "uneven lists": ([[1], [2, 3]], r"\(3, H, W\) uint8 was expected"),
    "a strip": (np.zeros((3, 1, 500), dtype=np.uint8), "too elongated"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", ["pixels", "generate", "logits", "score"])
def test_an_invalid_image_is_named_by_its_index(engine, name, method):
    image, reason = WRONG[name]
    images = [photograph(SIDE, SIDE), image]
    calls = {
        "pixels": lambda: engine.pixels(images),
        "generate": lambda: engine.generate("a", images),
        "logits": lambda: engine.logits([BOS], images),
        "score": lambda: engine.score("a", ["b"], images),
    }

    with pytest.raises(UserError, match=rf"^image 1: .*{reason}"):
        calls[method]()


def test_a_truncated_file_is_named_by_its_index(engine, tmp_path):
    data = png(photograph(31, 53))
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])

    with Image.open(tmp_path / "a.png") as opened, pytest.raises(UserError, match="image 0: image cannot be decoded"):
        engine.pixels([opened])


# ---- logits


def row(*parts: int | str) -> list[int]:
    """Ids of one document: "p" for an image, a number for so many words."""
    ids = [BOS]
    for seed, part in enumerate(parts):
        ids += [SPECIAL.image] * (LATENTS + 1) + [SPECIAL.image_end] if part == "p" else words(int(part), seed)
    return ids


def test_logits_of_one_row_have_two_axes(engine):
    logits = engine.logits(row(5, "p"), [photograph(SIDE, SIDE)])

    assert logits.shape == (1 + 5 + LATENTS + 2, engine.model.config.decoder.vocab_size)


def test_logits_of_a_batch_have_three(engine):
    assert engine.logits(torch.tensor([row(5), row(5)])).shape == (2, 6, engine.model.config.decoder.vocab_size)


def test_a_list_an_array_and_a_tensor_of_ids_are_the_same(engine):
    ids = row(5)
    expected = engine.logits(torch.tensor(ids))

    assert torch.equal(engine.logits(ids), expected)
    assert torch.equal(engine.logits(np.array(ids)), expected)
    assert torch.equal(engine.logits(torch.tensor([ids]))[0], expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_of_padded_rows_are_those_of_each_row_alone(engine, padding):
    rows = [row("p", 2, "p", 3), row(7), row(1, "p")]
    images = [photograph(SIDE, SIDE, seed) for seed in range(3)]
    T = max(map(len, rows))
    fill = [[PAD] * (T - len(ids)) for ids in rows]
    batch = [f + ids if padding == "left" else ids + f for f, ids in zip(fill, rows, strict=True)]

    logits = engine.logits(torch.tensor(batch), images)

    for b, (ids, own) in enumerate(zip(rows, (images[:2], [], images[2:]), strict=True)):
        at = slice(T - len(ids), T) if padding == "left" else slice(0, len(ids))
        # float32 sums of 20 in another order: measured 2e-6
        torch.testing.assert_close(logits[b, at], engine.logits(ids, own), rtol=0, atol=2e-5)


def test_generate_takes_the_token_of_the_highest_logit(engine):
    image = photograph(SIDE, SIDE)
    ids = [BOS, *[SPECIAL.image] * (LATENTS + 1), SPECIAL.image_end, *engine.tokenizer.encode("the cat").tolist()]
    logits = engine.logits(ids, [image])[-1]
    control = [BOS, PAD, 3, *range(SPECIAL.mask, SPECIAL.line_end), *range(engine.tokenizer.vocab_size, len(logits))]
    logits[control] = float("-inf")

    text = engine.generate("the cat", [image], max_new_tokens=1)

    assert text == engine.tokenizer.decode([int(logits.argmax())])


@pytest.mark.parametrize(
    ("ids", "n_images", "reason"),
    [
        (row("p"), 0, "1 places for 0 images"),
        (row(5), 1, "0 places for 1 images"),
        (row("p", "p"), 1, "2 places for 1 images"),
        ([BOS, *[SPECIAL.image] * LATENTS, SPECIAL.image_end], 1, f"row 0: {LATENTS - 1} slots .* has {LATENTS} latents"),
        ([BOS, *[SPECIAL.image] * (LATENTS + 1), 5], 1, "</image> must follow"),
        ([[BOS, 5], [BOS, SPECIAL.image]], 1, "row 1: 0 slots"),
    ],
)
def test_tokens_that_do_not_fit_the_images_are_the_users_error(engine, ids, n_images, reason):
    with pytest.raises(UserError, match=reason):
        engine.logits(torch.tensor(ids), [photograph(SIDE, SIDE)] * n_images)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], r"at least one of them; got \(0,\)"),
        ([BOS, 73], "lie in 0 to 73, but the model has 73 embeddings"),
        ([BOS, -1], "lie in -1 to 0,"),
        (torch.zeros(2, 3, 5, dtype=torch.int64), r"got \(2, 3, 5\) int64"),
        ([BOS] * 62, "62 tokens exceed the model's 61 positions"),
        (torch.tensor([0.5, 1.5]), r"got \(2,\) float32"),
        ([[BOS, 5], [BOS]], "rows of one length"),
        ("the cat", r"must be \(T,\) or \(B, T\) ids"),
    ],
)
def test_ids_that_are_none_of_the_models_are_the_users_error(engine, ids, reason):
    with pytest.raises(UserError, match=reason):
        engine.logits(ids)


@pytest.mark.parametrize("method", ["generate", "logits", "score"])
def test_an_engine_without_tokenizer_needs_one(kosmos_tower, method):
    bare = Engine(tiny_model(kosmos_tower), None)
    calls = {
        "generate": lambda: bare.generate("a"),
        "logits": lambda: bare.logits([BOS], [photograph(11, 13)]),
        "score": lambda: bare.score("a", ["b"]),
    }

    with pytest.raises(UserError, match="this model has no tokenizer; give one to Engine, or load the model from a folder"):
        calls[method]()


def test_logits_of_ids_alone_need_no_tokenizer(kosmos_tower, engine):
    assert torch.equal(Engine(tiny_model(kosmos_tower), None).logits([BOS, 7]), engine.logits([BOS, 7]))


def test_a_single_image_is_a_list_of_one(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(png(photograph(31, 53)))
    array = np.asarray(photograph(31, 53)).transpose(2, 0, 1)

    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), png(photograph(31, 53)), photograph(31, 53), array):
        assert torch.equal(engine.pixels(image), engine.pixels([image]))


def test_a_single_text_is_refused_as_candidates(engine):
    with pytest.raises(UserError, match="candidates must be a list of texts, got one text, 'red'"):
        engine.score("a", "red")


@pytest.mark.parametrize("part", ["vision", "connector", "decoder"])
def test_a_part_of_lower_precision_runs_beside_the_others(kosmos_tower, kosmos_tokenizer, part):
    model = tiny_model(kosmos_tower)
    getattr(model, part).to(torch.bfloat16)

    assert Engine(model, kosmos_tokenizer).generate("a cat", [photograph(17, 19)], max_new_tokens=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": "0.5"}, "temperature must be float, got '0.5'"),
        ({"max_new_tokens": 3.5}, "max_new_tokens must be int, got 3.5"),
        ({"n_beams": 2.0}, "n_beams must be int, got 2.0"),
        ({"top_k": True}, "top_k must be .*, got True"),
        ({"stop": [3]}, "stop must be .*, got"),
    ],
)
def test_a_setting_of_another_type_is_named(engine, setting, message):
    with pytest.raises(UserError, match=message):
        engine.generate("a", **setting)


def test_an_unknown_setting_is_named(engine):
    with pytest.raises(UserError, match="beams"):
        engine.generate("a", beams=5)


def test_gradients_are_not_kept(engine):
    assert not engine.logits(row(5)).requires_grad


# ---- the same as the command line


@pytest.mark.parametrize(("options", "settings"), [((), {}), (("--n_beams", "3"), {"n_beams": 3})])
def test_a_notebook_generates_what_the_command_line_prints(trained, tmp_path, capsys, options, settings):
    for name, seed in (("a.png", 1), ("b.png", 2)):
        (tmp_path / name).write_bytes(png(photograph(31, 53, seed)))
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    prompt = "Here <image> and there <image> we see"
    arguments = ["--image", *map(str, images), "--prompt", prompt, "--max_new_tokens", "11", "--device", "cpu", *options]
    assert main(["generate", "--ckpt_path", str(trained / LAST), *arguments]) == 0

    text = kosmos_lit.load(trained / LAST).generate(prompt, images, max_new_tokens=11, **settings)

    assert capsys.readouterr().out == f"{text}\n"


def test_a_notebook_scores_what_the_command_line_prints(trained, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(photograph(31, 53)))
    candidates = ["a red square", "two blue circles"]
    arguments = ["--image", str(tmp_path / "a.png"), "--prompt", "An image of", "--score", *candidates, "--device", "cpu"]
    assert main(["generate", "--ckpt_path", str(trained / LAST), *arguments]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    scored = kosmos_lit.load(trained / LAST).score("An image of", candidates, [tmp_path / "a.png"])

    assert [(line["text"], line["log_prob"]) for line in printed] == [(s.text, s.total) for s in scored]
