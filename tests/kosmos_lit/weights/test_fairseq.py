"""Checkpoints as the released systems have them.

None can be had here, so they are made: a transformers model's tensors under the released names. The renaming below is
written out by hand from the authors' conversion script, and does not use the table that it tests.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import GROUNDING, MODEL_FILE, Tokenizer
from kosmos_lit.weights.fairseq import from_fairseq
from kosmos_lit.weights.folder import load_folder, save_folder
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle
from tests.kosmos_lit.weights.reference_kosmos2 import (
    Rows,
    Shape,
    kosmos_logits,
    noise_images,
    reference_logits,
    reference_model,
)

N_PLAIN = 68
"""Ids of the tests' tokenizer: as Kosmos-G's stage 1, whose 64,007 have no grounding tokens."""
N_GROUNDED = N_PLAIN + 6 + 1024
"""As Kosmos-2."""

SHAPE = Shape(
    {"embed_dim": 64, "layers": 2, "attention_heads": 4, "ffn_dim": 59, "vocab_size": N_GROUNDED},
    # The released towers' heads are 64 wide, which nothing in the file tells.
    {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 37,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
    },
    3,
)
DEAD = {
    "gpt_model.decoder.embed_positions._float_tensor": torch.zeros(1),
    "gpt_model.decoder.self_attn_sope.scale": torch.linspace(0.3, 1, 8),
}
BLOCK, THEIR_BLOCK = r"vision_model\.model\.encoder\.layers\.(\d+)\.", r"img_model.visual.transformer.resblocks.\1."
RENAMES = (
    (r"text_model\.lm_head\.weight", "gpt_model.decoder.output_projection.weight"),
    (r"text_model\.model\.(.*)", r"gpt_model.decoder.\1"),
    (r"image_to_text_projection\.(.*)", r"img_connector.\1"),
    (r"vision_model\.model\.embeddings\.class_embedding", "img_model.visual.class_embedding"),
    (r"vision_model\.model\.embeddings\.position_embedding\.weight", "img_model.visual.positional_embedding"),
    (r"vision_model\.model\.embeddings\.patch_embedding\.weight", "img_model.visual.conv1.weight"),
    (r"vision_model\.model\.pre_layrnorm\.(.*)", r"img_model.visual.ln_pre.\1"),
    (r"vision_model\.model\.post_layernorm\.(.*)", r"img_model.visual.ln_post.\1"),
    (BLOCK + r"self_attn\.(.*)", THEIR_BLOCK + r"ts_attn.\2"),
    (BLOCK + r"layer_norm([12])\.(.*)", THEIR_BLOCK + r"ln_\2.\3"),
    (BLOCK + r"mlp\.fc1\.(.*)", THEIR_BLOCK + r"mlp.c_fc.\2"),
    (BLOCK + r"mlp\.fc2\.(.*)", THEIR_BLOCK + r"mlp.c_proj.\2"),
)


def released_name(name: str) -> str:
    [actual] = [re.sub(pattern, new, name) for pattern, new in RENAMES if re.fullmatch(pattern, name)]
    return actual


def released_tensors(**text: Any) -> dict[str, Tensor]:
    reference = reference_model(SHAPE, seed=7, **text).state_dict()
    return {released_name(name): tensor for name, tensor in reference.items()} | DEAD


ARGS = {
    "args": Namespace(arch="unigptmodel_xl", decoder_attention_heads=4, dropout=0.1, no_scale_embedding=False),
    "cfg": None,
}
CFG = {"args": None, "cfg": {"model": {"_name": "unigptmodel_xl", "decoder_attention_heads": 4}, "task": {"tokens": 2048}}}
CFG_OF_NAMESPACES = {"args": None, "cfg": {"model": Namespace(decoder_attention_heads=4)}}


def save(folder: Path, tensors: dict[str, Tensor], **more: Any) -> Path:
    """Write a checkpoint with all that fairseq's trainer keeps in one."""
    checkpoint = {
        **(more or ARGS),
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "UniLoss", "optimizer_name": "FP16Optimizer", "num_updates": 300}],
        "task_state": {},
        "extra_state": {
            "metrics": [(0, "loss", {"val": 2.5, "sum": torch.tensor(7.5), "count": 3})],
            "previous_training_time": np.float64(11.5),
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 300, "shuffle": True},
        },
        "last_optimizer_state": None,
    }
    path = folder / "kosmos-2.pt"
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def released(tmp_path, kosmos_vocabulary) -> Path:
    """A folder with the released tokenizer's file."""
    (tmp_path / MODEL_FILE).write_bytes(kosmos_vocabulary)
    return tmp_path


# ---- the same numbers


@pytest.mark.parametrize("options", [ARGS, CFG, CFG_OF_NAMESPACES], ids=["args", "cfg", "cfg of namespaces"])
def test_a_released_checkpoint_gives_the_logits_of_the_same_weights_in_transformers(released, options):
    reference = reference_model(SHAPE, seed=7)
    rows = Rows([["p", 5], [3, "p", "p", 2], [7]], "left")
    tokens, images = rows.tokens(SHAPE.n_latents), noise_images(3, 28)

    kosmos = from_fairseq(save(released, released_tensors(), **options)).model

    expected, actual = reference_logits(reference, tokens, images), kosmos_logits(kosmos, tokens, images)
    # Measured 2e-6.
    torch.testing.assert_close(actual[tokens != 1], expected[tokens != 1], rtol=0, atol=1e-4)


def test_a_checkpoint_holds_the_two_dead_buffers_under_the_released_names():
    """So the tests of this file are about checkpoints that have them."""
    assert set(DEAD) < set(released_tensors())


def test_a_checkpoint_without_the_dead_buffers_is_read_too(released):
    tensors = released_tensors()
    expected = from_fairseq(save(released, tensors)).model.state_dict()

    actual = from_fairseq(save(released, {n: t for n, t in tensors.items() if n not in DEAD})).model.state_dict()

    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{"args": None, "cfg": None}, {"cfg": {"model": None}}, {"args": {"dropout": 0.1}}])
def test_heads_without_an_option_are_64_wide(released, options):
    kosmos = from_fairseq(save(released, released_tensors(), **options)).model

    assert kosmos.config.decoder.n_heads == kosmos.config.connector.n_heads == 1


def test_the_tower_always_has_quick_gelu(released):
    kosmos = from_fairseq(save(released, released_tensors())).model

    assert type(kosmos.vision.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_half_precision_stays_half(released):
    tensors = {name: tensor.half() for name, tensor in released_tensors().items()}

    assert {p.dtype for p in from_fairseq(save(released, tensors)).model.parameters()} == {torch.float16}


# ---- the tokenizer


def test_kosmos_2_gets_its_grounding_tokens(released):
    assert from_fairseq(save(released, released_tensors())).tokenizer.extra == GROUNDING


def test_a_vocabulary_without_grounding_is_read_as_kosmos_gs_first_stage(released, kosmos_vocabulary):
    model, tokenizer = from_fairseq(save(released, released_tensors(vocab_size=N_PLAIN)))

    assert model.config.decoder.vocab_size == N_PLAIN
    assert tokenizer.fingerprint == Tokenizer(kosmos_vocabulary).fingerprint


def test_the_tokenizer_may_lie_elsewhere(tmp_path, kosmos_vocabulary):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MODEL_FILE).write_bytes(kosmos_vocabulary)

    kosmos = from_fairseq(save(tmp_path, released_tensors()), tmp_path / "data")

    assert kosmos.tokenizer.vocab_size == N_GROUNDED


def test_the_error_for_a_missing_tokenizer_names_the_option(tmp_path):
    with pytest.raises(UserError, match=rf"no tokenizer in {tmp_path}: {MODEL_FILE} is missing.*--tokenizer"):
        from_fairseq(save(tmp_path, released_tensors()))


def test_a_tokenizer_of_another_size_is_named_with_all_three_numbers(released):
    with pytest.raises(UserError, match=r"embedding has 71 rows.*has 68 ids, or 1,098 with .*grounding.*--tokenizer"):
        from_fairseq(save(released, released_tensors(vocab_size=71)))


def dictionary(tokenizer: Tokenizer) -> list[str]:
    return [f"{tokenizer.name(id_).replace(' ', '▁')} {1000 - id_}" for id_ in range(4, tokenizer.special.mask)]


def test_fairseqs_dictionary_beside_the_tokenizer_is_taken_if_it_lists_the_same_pieces(released, kosmos_tokenizer):
    (released / "dict.txt").write_text("\n".join(dictionary(kosmos_tokenizer)) + "\n", encoding="utf-8")

    assert from_fairseq(save(released, released_tensors())).tokenizer.vocab_size == N_GROUNDED


def test_a_dictionary_of_another_tokenizer_is_refused(released, kosmos_tokenizer):
    lines = dictionary(kosmos_tokenizer)
    lines[3], lines[5] = lines[5], lines[3]
    (released / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    with pytest.raises(UserError, match=r"dict\.txt: line 4 is .*two models"):
        from_fairseq(save(released, released_tensors()))


# ---- bad input


def test_all_mismatches_are_listed_at_once(released):
    tensors = released_tensors()
    del tensors["gpt_model.decoder.layers.1.self_attn.inner_attn_ln.bias"]
    tensors["gpt_model.decoder.layers.1.ffn.fc2.bias"] = torch.zeros(5)
    tensors["img_model.visual.proj"] = torch.zeros(128, 7)

    with pytest.raises(UserError) as caught:
        from_fairseq(save(released, tensors))

    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{released}/kosmos-2.pt does not fit the model in 3 of ")
    assert rest == [
        "  missing: gpt_model.decoder.layers.1.self_attn.inner_attn_ln.bias (64,)",
        "  surplus: img_model.visual.proj (128, 7)",
        "  misshapen: gpt_model.decoder.layers.1.ffn.fc2.bias is (5,) in the file, (64,) in the model",
    ]


def test_an_output_matrix_of_its_own_is_refused(released):
    tensors = released_tensors()
    tensors["gpt_model.decoder.output_projection.weight"] = tensors["gpt_model.decoder.output_projection.weight"] + 1

    with pytest.raises(UserError, match=r"output_projection\.weight differs from .*embed_tokens\.weight"):
        from_fairseq(save(released, tensors))


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"weights": {}}, {"model": None}, {"model": {"a": 3}}, {"model": {}}, {"model": {"a": torch.ones(3)}}],
    ids=str,
)
def test_another_file_is_refused_as_no_released_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "kosmos-2.pt")

    with pytest.raises(UserError, match=r"kosmos-2\.pt is no released Kosmos checkpoint"):
        from_fairseq(tmp_path / "kosmos-2.pt")


@pytest.mark.parametrize(("name", "shape"), [("embed_tokens.weight", (7,)), ("layers.0.ffn.fc1.weight", ())])
def test_tensors_with_another_number_of_axes_are_the_users_error(released, name, shape):
    tensors = released_tensors() | {f"gpt_model.decoder.{name}": torch.zeros(shape)}

    with pytest.raises(UserError, match=rf"{name} is \({', '.join(map(str, shape))}"):
        from_fairseq(save(released, tensors))


@pytest.mark.parametrize("options", [{"args": "decoder"}, {"cfg": [1]}, {"cfg": {"model": 3}}])
def test_options_of_another_kind_are_ignored(released, options):
    assert from_fairseq(save(released, released_tensors(), **options)).model.config.decoder.dim == 64


def test_a_number_of_heads_that_cannot_be_is_the_users_error(released):
    with pytest.raises(UserError, match="dim 64 is not a multiple of n_heads 5"):
        from_fairseq(save(released, released_tensors(), args={"decoder_attention_heads": 5}))


@pytest.mark.parametrize("place", ["args", "cfg", "model", "extra"])
def test_a_checkpoint_that_holds_more_than_plain_data_is_refused_and_not_run(released, place):
    malicious = MaliciousPickle(released / "exploded")
    tensors = released_tensors()
    options: dict[str, Any] = {"args": None} | ({place: malicious} if place != "model" else {})
    if place == "model":
        tensors |= {"gpt_model.decoder.bomb": malicious}

    with pytest.raises(UserError, match=r"kosmos-2\.pt is not read: it refers to .*code"):
        from_fairseq(save(released, tensors, **options))

    assert not (released / "exploded").exists()


def test_a_model_does_not_change_with_its_file(released):
    path = save(released, released_tensors())
    kosmos = from_fairseq(path).model
    before = {name: tensor.clone() for name, tensor in kosmos.state_dict().items()}

    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))

    assert all(torch.equal(tensor, before[name]) for name, tensor in kosmos.state_dict().items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint {tmp_path}/none.pt"):
        from_fairseq(tmp_path / "none.pt")


def test_an_import_saved_as_a_folder_is_the_same_model(released):
    model, tokenizer = from_fairseq(save(released, released_tensors()))

    save_folder(model, tokenizer, released / "model")

    loaded = load_folder(released / "model")
    assert loaded.model.config == model.config
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.model.state_dict().items())
