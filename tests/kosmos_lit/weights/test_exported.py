"""Folders of transformers' Kosmos-2: what it reads of ours, and what we read of its old and new ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Kosmos2ForConditionalGeneration, Kosmos2Processor

import kosmos_lit
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import encode_prompt
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import EOS, GROUNDING, PAD, Tokenizer
from kosmos_lit.weights.kosmos2 import export_transformers, from_transformers
from tests.kosmos_lit.tiny_kosmos import shaken, tiny_model
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle
from tests.kosmos_lit.weights.reference_kosmos2 import SHAPES, Rows, noise_images, reference_logits, reference_model

SHAPE, N_LATENTS, SIDE = "wide", 5, 35
EXTRAS = {"plain": (), "grounded": GROUNDING}


def random_engine(tokenizer: Tokenizer, seed: int = 0) -> Engine:
    """A model that generates different texts: one whose embeddings outweigh the rest repeats itself."""
    model = shaken(from_transformers(reference_model(SHAPE, seed, vocab_size=tokenizer.vocab_size)).model, seed, by=0.2)
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(0.03)
    return Engine(model, tokenizer)


@pytest.fixture(scope="module", params=EXTRAS)
def exported(request, tmp_path_factory, kosmos_vocabulary) -> tuple[Engine, Path]:
    """A model, and the folder that it was exported to."""
    engine = random_engine(Tokenizer(kosmos_vocabulary, EXTRAS[request.param]))
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_transformers(engine.model, engine.tokenizer, folder)
    return engine, folder


@pytest.fixture
def folder(tmp_path, kosmos_tokenizer) -> Path:
    """An exported folder of a test's own, to change."""
    export_transformers(random_engine(kosmos_tokenizer).model, kosmos_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def drawn_image(seed: int = 0) -> Image.Image:
    """Of the size that the model reads, so that resizing has no part in a comparison."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


# ---- what transformers reads


def test_auto_classes_find_model_and_processor(exported):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(exported[1]), Kosmos2ForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(exported[1]), Kosmos2Processor)


def test_an_export_in_transformers_has_the_same_logits(exported):
    engine, folder = exported
    rows = Rows([["p", 5, "p"], [11]], "left")
    tokens, images = rows.tokens(N_LATENTS), noise_images(2, SIDE)

    actual = reference_logits(AutoModelForImageTextToText.from_pretrained(folder).eval(), tokens, images)

    expected = engine.logits(tokens, list(images))
    torch.testing.assert_close(actual[tokens != 1], expected[tokens != 1], rtol=0, atol=1e-4)


TEXTS = ("An image of a red square", "the cat sat on the mat.", "naïve café", "sat")


@pytest.mark.parametrize("text", TEXTS)
def test_the_processor_gives_the_same_ids_outside_of_the_slots(exported, text):
    engine, folder = exported
    inputs = AutoProcessor.from_pretrained(folder)(text=text, images=drawn_image(), num_image_tokens=N_LATENTS)

    expected = encode_prompt(text, 1, engine.tokenizer, N_LATENTS).tokens
    actual, in_slot = np.array(inputs["input_ids"]).ravel(), np.array(inputs["image_embeds_position_mask"]).ravel() == 1
    assert len(actual) == len(expected)
    assert in_slot.nonzero()[0].tolist() == list(range(2, 2 + N_LATENTS))
    assert actual[~in_slot].tolist() == expected[~in_slot].tolist()


GROUNDED_TEXTS = ("<grounding> An image of", "<grounding><phrase> the cat</phrase><object><patch_index_0044> sat")


@pytest.mark.parametrize("text", GROUNDED_TEXTS)
def test_grounding_tokens_are_encoded_by_name_as_in_transformers(tmp_path, kosmos_vocabulary, text):
    engine = random_engine(Tokenizer(kosmos_vocabulary, GROUNDING))
    export_transformers(engine.model, engine.tokenizer, tmp_path / "model")
    inputs = AutoProcessor.from_pretrained(tmp_path / "model")(text=text, images=drawn_image(), num_image_tokens=N_LATENTS)

    actual = encode_prompt(text, 1, engine.tokenizer, N_LATENTS).tokens[3 + N_LATENTS :]
    assert actual.tolist() == np.array(inputs["input_ids"]).ravel()[3 + N_LATENTS :].tolist()


def test_the_processor_gives_the_same_pixels(exported):
    engine, folder = exported
    inputs = AutoProcessor.from_pretrained(folder)(text="a", images=drawn_image(), return_tensors="pt")

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (engine.model.config.vision.mean, engine.model.config.vision.std))
    expected = (engine.pixels([drawn_image()]) / 255 - mean) / std
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1e-6)  # float32 of size 2: measured 2e-7


def test_the_processor_scales_both_sides_of_an_image_as_the_engine_does(exported):
    engine, folder = exported
    smooth = Image.fromarray(np.linspace(0, 255, 53 * 91 * 3).reshape(53, 91, 3).astype(np.uint8))
    inputs = AutoProcessor.from_pretrained(folder)(text="a", images=smooth, return_tensors="pt")

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (engine.model.config.vision.mean, engine.model.config.vision.std))
    actual = (inputs["pixel_values"] * std + mean) * 255
    # Two programs' bicubic filters differ by a level of 255 in places.
    torch.testing.assert_close(actual, engine.pixels([smooth]).float(), rtol=0, atol=2)


def forbidden(tokenizer: Tokenizer) -> list[int]:
    """Ids that the engine never generates; the control tokens of grounding are not among them."""
    s = tokenizer.special
    return [s.bos, s.pad, s.unk, s.mask, s.doc_end, s.image, s.image_end, s.chunk_end]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("n_beams", [1, 5])
def test_transformers_and_the_engine_generate_the_same(exported, text, n_beams):
    engine, folder = exported
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=text, images=drawn_image(), return_tensors="pt", num_image_tokens=N_LATENTS)

    actual = model.generate(
        **inputs, max_new_tokens=13, do_sample=False, num_beams=n_beams, suppress_tokens=forbidden(engine.tokenizer)
    )[0, inputs["input_ids"].shape[1] :]

    generated = generated_ids(engine, text, n_beams)
    assert actual[: len(generated)].tolist() == generated
    assert set(actual[len(generated) :].tolist()) <= {PAD, EOS}
    # transformers writes the first word's space, and a newline by the name of its token.
    expected = processor.decode(actual, skip_special_tokens=True).removeprefix(" ").replace("</line>", "\n")
    assert engine.generate(text, [drawn_image()], max_new_tokens=13, n_beams=n_beams) == expected


def generated_ids(engine: Engine, text: str, n_beams: int) -> list[int]:
    settings = GenerationConfig(max_new_tokens=13, n_beams=n_beams)
    [continuation] = engine.generate_batch([engine.encode(text, 1)], engine.pixels([drawn_image()]), settings)
    return list(continuation.tokens)


def test_the_compared_generations_differ_from_one_another(exported):
    generated = [generated_ids(exported[0], text, 1) for text in TEXTS]

    assert len(set(map(tuple, generated))) == len(TEXTS)
    assert max(len(set(ids)) for ids in generated) > 3


def test_an_export_comes_back_as_the_same_model(exported):
    engine, folder = exported

    model, tokenizer = from_transformers(folder)

    assert model.config == engine.model.config
    assert tokenizer.fingerprint == engine.tokenizer.fingerprint
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in engine.model.state_dict().items())


def test_an_exported_folder_is_loaded_like_any_other(exported):
    engine, folder = exported

    assert kosmos_lit.load(folder).generate("sat", [drawn_image()]) == engine.generate("sat", [drawn_image()])


def test_statistics_of_images_come_along(tmp_path, kosmos_tokenizer):
    model = random_engine(kosmos_tokenizer).model
    model.config = replace(model.config, vision=replace(model.config.vision, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    export_transformers(model, kosmos_tokenizer, tmp_path / "model")

    vision = from_transformers(tmp_path / "model").model.config.vision

    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def test_an_export_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="the model has no tokenizer"):
        export_transformers(*from_transformers(reference_model(SHAPE)), tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_nothing(tmp_path, kosmos_tower, kosmos_tokenizer):
    with pytest.raises(UserError, match=r"Kosmos-2 would lose decoder\.positions xpos"):
        export_transformers(tiny_model(kosmos_tower), kosmos_tokenizer, tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


# ---- what we read


def same(folder: Path, expected: Kosmos) -> bool:
    actual = from_transformers(folder).model.state_dict()
    return all(torch.equal(t, actual[name]) for name, t in expected.state_dict().items())


def test_a_folder_in_shards_is_read(folder):
    expected = from_transformers(folder).model
    reference = Kosmos2ForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="200KB")

    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same(folder, expected)


def old_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What version 4.27 to 4.30 wrote: the output matrix twice, and computed buffers."""
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.lm_head.weight"] = tensors["text_model.model.embed_tokens.weight"]
    tensors["text_model.model.embed_positions.weights"] = torch.zeros(85, 96)
    tensors["vision_model.model.embeddings.position_ids"] = torch.arange(50)[None]
    return tensors


def test_an_older_folder_with_a_pickle_is_read(folder):
    expected = from_transformers(folder).model
    torch.save(old_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    assert same(folder, expected)


def test_an_older_folder_with_a_pickle_in_shards_is_read(folder):
    expected, tensors = from_transformers(folder).model, old_tensors(folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: t for name, t in tensors.items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))

    assert same(folder, expected)


def test_an_output_matrix_beside_the_embedding_is_checked(folder):
    tensors = old_tensors(folder)
    tensors["text_model.lm_head.weight"] = tensors["text_model.lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(UserError, match=rf"{folder}: .*lm_head\.weight differs"):
        from_transformers(folder)


def test_statistics_are_found_where_older_versions_keep_them(folder):
    (folder / "processor_config.json").unlink()
    table = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(table))

    vision = from_transformers(folder).model.config.vision

    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def test_a_folder_without_image_statistics_has_clips(folder):
    expected = from_transformers(folder).model.config
    (folder / "processor_config.json").unlink()

    assert from_transformers(folder).model.config == expected


# ---- bad input


def test_a_pickle_that_would_run_code_is_refused_and_not_run(folder, tmp_path):
    torch.save({"a": MaliciousPickle(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read"):
        kosmos_lit.load(folder)

    assert not (tmp_path / "exploded").exists()


def test_weights_that_do_not_fit_are_listed_with_the_folder(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["image_to_text_projection.latent_query"]
    save_file(tensors, folder / "model.safetensors")

    lack = r"\n  missing: image_to_text_projection\.latent_query \(5, 96\)$"
    with pytest.raises(UserError, match=rf"^{folder} does not fit.*{lack}"):
        from_transformers(folder)


def changed(folder: Path, **fields: Any) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | fields))


def test_another_models_folder_is_refused(folder):
    changed(folder, model_type="llama")

    with pytest.raises(UserError, match=r"config\.json is of model_type 'llama', not 'kosmos-2'"):
        from_transformers(folder)


@pytest.mark.parametrize(
    "fields", [{"latent_query_num": "many"}, {"text_config": {"layers": "three"}}, {"vision_config": 3}], ids=str
)
def test_a_config_with_values_of_another_kind_is_refused(folder, fields):
    changed(folder, **fields)

    with pytest.raises(UserError, match=r"config\.json"):
        from_transformers(folder)


@pytest.mark.parametrize("path", ["none", "none/config.json"])
def test_a_missing_folder_is_named(tmp_path, path):
    with pytest.raises(UserError, match=f"{tmp_path}/none"):
        from_transformers(tmp_path / path)


def test_statistics_that_are_none_are_refused(folder):
    (folder / "processor_config.json").write_text(json.dumps({"image_mean": [0.1], "image_std": "wide"}))

    with pytest.raises(UserError, match=r"processor_config\.json.*image_mean"):
        from_transformers(folder)


def test_the_shape_of_these_tests_is_one_with_several_latents():
    assert SHAPES[SHAPE].n_latents == N_LATENTS
    assert SHAPES[SHAPE].vision["image_size"] == SIDE
