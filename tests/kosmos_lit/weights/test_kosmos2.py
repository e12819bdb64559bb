"""Kosmos-2 of transformers: the same numbers, the same tensors both ways, and what has no counterpart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from kosmos_lit.config import KosmosConfig, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.keys import TRANSFORMERS, shapes_of
from kosmos_lit.tokenizer import PAD
from kosmos_lit.weights.kosmos2 import from_transformers, kosmos_config, to_transformers, transformers_config
from kosmos_lit.weights.towers import RELEASED_TOWER, tower_architecture
from tests.kosmos_lit.tiny_kosmos import shaken
from tests.kosmos_lit.weights.their_kosmos import (
    SHAPES,
    Rows,
    Shape,
    our_logits,
    photographs,
    their_logits,
    their_model,
)

ATOL = 1e-4
"""Logits of standard deviation about 1; measured 3e-6 at most over all shapes and rows."""

ROWS = {
    "no image": Rows([[11]]),
    "an image in front": Rows([["p", 7]]),
    "an image in the middle": Rows([[5, "p", 3]]),
    "an image at the end": Rows([[7, "p"]]),
    "an image and no word": Rows([["p"]]),
    "two images side by side": Rows([["p", "p", 3]]),
    "images in front, in the middle and at the end": Rows([["p", 2, "p", 3, "p"]]),
    "rows of different length without images, padded on the right": Rows([[7], [2], [11]]),
    "rows of different length without images, padded on the left": Rows([[7], [2], [11]], "left"),
    "rows with no, one and three images, padded on the right": Rows([[13], ["p", 5], [1, "p", 2, "p", "p"]]),
    "rows with no, one and three images, padded on the left": Rows([[13], ["p", 5], [1, "p", 2, "p", "p"]], "left"),
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request) -> tuple[Shape, Kosmos2ForConditionalGeneration, Kosmos]:
    """Their model and ours with its weights, of one shape."""
    theirs = their_model(request.param)
    return SHAPES[request.param], theirs, from_transformers(theirs).model


# ---- the same numbers


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_logits_are_those_of_transformers(pair, rows):
    shape, theirs, ours = pair
    tokens = rows.tokens(shape.n_latents)
    random_images = photographs(rows.n_images, shape.vision["image_size"])

    expected, found = their_logits(theirs, tokens, random_images), our_logits(ours, tokens, random_images)

    torch.testing.assert_close(found[tokens != PAD], expected[tokens != PAD], rtol=0, atol=ATOL)


def test_logits_depend_on_each_image(pair):
    """Or the tests above would pass for a model that does not look."""
    shape, _, ours = pair
    rows = Rows([["p", 2, "p", 3]])
    tokens, random_images = rows.tokens(shape.n_latents), photographs(2, shape.vision["image_size"])
    expected = our_logits(ours, tokens, random_images)[0, -1]

    for number in range(2):
        others = random_images.clone()
        others[number] = 255 - others[number]
        assert (our_logits(ours, tokens, others)[0, -1] - expected).abs().max() > 100 * ATOL


def test_a_model_of_ours_has_the_same_logits_in_transformers():
    config = kosmos_config(SHAPES["three_layers_gelu"].config())
    ours = shaken(Kosmos.create(config, seed=3), seed=3).eval()
    rows = Rows([[3, "p", 5], ["p", 1]], "left")
    tokens, random_images = rows.tokens(3), photographs(2, 42)

    found = their_logits(to_transformers(ours), tokens, random_images)

    expected = our_logits(ours, tokens, random_images)
    torch.testing.assert_close(found[tokens != PAD], expected[tokens != PAD], rtol=0, atol=ATOL)


@pytest.mark.parametrize("intermediate", [1, 15, 30, 49, 53, 89])
def test_any_width_of_the_towers_hidden_layer_is_kept(intermediate):
    """open_clip takes a ratio of widths and rounds down: 22 * (15 / 22) is 14 there."""
    gelu = SHAPES["three_layers_gelu"]
    shape = replace(gelu, vision=gelu.vision | {"intermediate_size": intermediate})

    config = kosmos_config(shape.config())

    assert transformers_config(config).vision_config.intermediate_size == intermediate
    with torch.device("meta"):
        assert Kosmos(config).vision.visual.transformer.resblocks[0].mlp.c_fc.weight.shape == (intermediate, 22)


# ---- the same tensors


def test_theirs_to_ours_to_theirs_gives_back_every_tensor(pair):
    _, theirs, ours = pair
    expected, found = theirs.state_dict(), to_transformers(ours).state_dict()

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_to_theirs_to_ours_gives_back_every_tensor(shape):
    ours = shaken(Kosmos.create(kosmos_config(SHAPES[shape].config()), seed=5), seed=5)

    found = from_transformers(to_transformers(ours)).model.state_dict()

    expected = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is_both_ways(dtype):
    theirs = their_model("wide").to(dtype)

    back = to_transformers(from_transformers(theirs).model).state_dict()

    assert all(back[name].dtype == dtype and torch.equal(back[name], t) for name, t in theirs.state_dict().items())


def test_parts_of_different_precision_stay_so_both_ways():
    ours = from_transformers(their_model("wide")).model
    ours.decoder.to(torch.bfloat16)

    back = from_transformers(to_transformers(ours)).model.state_dict()

    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in ours.state_dict().items())


def test_an_import_shares_no_memory_with_its_source():
    theirs = their_model("wide")
    ours = from_transformers(theirs).model
    before = {name: t.clone() for name, t in theirs.state_dict().items()}

    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()

    assert all(torch.equal(t, before[name]) for name, t in theirs.state_dict().items())


def test_an_export_shares_no_memory_with_its_source():
    ours = from_transformers(their_model("wide")).model
    theirs = to_transformers(ours)
    before = {name: t.clone() for name, t in ours.state_dict().items()}

    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()

    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_the_exported_output_matrix_is_the_embedding():
    theirs = to_transformers(from_transformers(their_model("wide")).model)

    assert theirs.text_model.lm_head.weight is theirs.text_model.model.embed_tokens.weight


def test_an_import_is_in_evaluation_mode_and_can_be_trained():
    ours = from_transformers(their_model("wide")).model

    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())


def test_an_output_matrix_of_its_own_is_refused():
    theirs = their_model("wide")
    theirs.text_model.lm_head.weight = torch.nn.Parameter(theirs.text_model.lm_head.weight + 1)

    with pytest.raises(UserError, match=r"lm_head\.weight differs from .*embed_tokens\.weight.*one matrix for both"):
        from_transformers(theirs)


def test_tensors_that_do_not_fit_are_listed_all_at_once():
    theirs = their_model("wide")
    layer = theirs.text_model.model.layers[1]
    del layer.self_attn.inner_attn_ln
    layer.ffn.fc1.weight = torch.nn.Parameter(torch.zeros(7, 11))
    theirs.image_to_text_projection.extra = torch.nn.Linear(3, 5)

    with pytest.raises(UserError) as caught:
        from_transformers(theirs)

    assert str(caught.value).splitlines()[1:] == [
        "  missing: text_model.model.layers.1.self_attn.inner_attn_ln.weight (96,)",
        "  missing: text_model.model.layers.1.self_attn.inner_attn_ln.bias (96,)",
        "  surplus: image_to_text_projection.extra.weight (5, 3)",
        "  surplus: image_to_text_projection.extra.bias (5,)",
        "  misshapen: text_model.model.layers.1.ffn.fc1.weight is (7, 11) in the file, (101, 96) in the model",
    ]


# ---- full size


def test_every_tensor_of_the_released_size_has_its_place():
    with torch.device("meta"):
        theirs = Kosmos2ForConditionalGeneration(Kosmos2Config())
        ours = Kosmos(kosmos_config(Kosmos2Config()))

    assert TRANSFORMERS.external_shapes(shapes_of(ours.state_dict())) == shapes_of(theirs.state_dict())


def test_the_released_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        ours = Kosmos(kosmos_config(Kosmos2Config()))

    count = {name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()}
    assert count == {"vision": 303_179_776, "connector": 19_015_680, "decoder": 1_342_289_920}


def test_the_released_size_comes_back_as_the_same_configuration():
    expected = Kosmos2Config()

    found = transformers_config(kosmos_config(expected))

    assert found.to_dict() == expected.to_dict()


def test_the_released_tower_is_named_and_is_what_open_clip_means_by_the_name():
    assert tower_architecture(Kosmos2Config().vision_config) == RELEASED_TOWER
    theirs = open_clip.get_model_config(RELEASED_TOWER)
    assert theirs["quick_gelu"]
    sizes = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
    assert theirs["vision_cfg"] == sizes, "and head_width 64, mlp_ratio 4 by default"


# ---- what has no counterpart here


STRANGE = {
    "text_config.activation_function": "relu",
    "text_config.layer_norm_eps": 1e-6,
    "text_config.scale_embedding": False,
    "text_config.activation_dropout": 0.1,
    "text_config.layerdrop": 0.2,
    "text_config.add_cross_attention": True,
    "text_config.pad_token_id": 0,
    "text_config.bos_token_id": 1,
    "text_config.eos_token_id": 3,
    "vision_config.layer_norm_eps": 1e-6,
    "vision_config.num_channels": 1,
    "vision_config.attention_dropout": 0.1,
    "vision_config.hidden_act": "relu",
}


def changed(settings: dict[str, Any]) -> Kosmos2Config:
    config = SHAPES["wide"].config()
    for name, value in settings.items():
        table, field = name.split(".")
        setattr(getattr(config, table), field, value)
    return config


@pytest.mark.parametrize("name", STRANGE)
def test_a_setting_that_no_kosmos_has_is_named(name):
    with pytest.raises(UserError, match=rf"{name} is {STRANGE[name]!r}"):
        kosmos_config(changed({name: STRANGE[name]}))


def test_settings_that_no_kosmos_has_are_named_all_at_once():
    with pytest.raises(UserError) as caught:
        kosmos_config(changed(STRANGE))

    assert [name for name in STRANGE if name not in str(caught.value)] == []


@pytest.mark.parametrize("sides", [[35, 35], (35, 35)])
def test_a_square_given_by_both_sides_is_a_square(sides):
    config = changed({"vision_config.image_size": sides, "vision_config.patch_size": [5, 5]})

    assert kosmos_config(config) == kosmos_config(SHAPES["wide"].config())


def test_images_that_are_no_squares_are_named():
    with pytest.raises(UserError, match=r"vision_config\.image_size is \[35, 70\].*vision_config\.patch_size is \[5, 7\]"):
        kosmos_config(changed({"vision_config.image_size": [35, 70], "vision_config.patch_size": [5, 7]}))


# ---- what has no counterpart there


def ours_with(table: str, **fields: Any) -> KosmosConfig:
    config = kosmos_config(SHAPES["wide"].config())
    return replace(config, **{table: replace(getattr(config, table), **fields)})


LOST = {
    "decoder.positions xpos: Kosmos-2 adds sinusoids": ("decoder", {"positions": "xpos"}),
    "decoder.positions learned: Kosmos-2 adds sinusoids": ("decoder", {"positions": "learned"}),
    "decoder.positions rotary: Kosmos-2 adds sinusoids": ("decoder", {"positions": "rotary"}),
    "decoder.norm pre: Kosmos-2 has sub-LayerNorm": ("decoder", {"norm": "pre"}),
    "decoder.norm deepnorm: Kosmos-2 has sub-LayerNorm": ("decoder", {"norm": "deepnorm"}),
    "connector.kind perceiver: Kosmos-2 has a resampler": ("connector", {"kind": "perceiver"}),
    "connector.kind linear: Kosmos-2 has a resampler": ("connector", {"kind": "linear"}),
    "connector.n_heads 4: Kosmos-2 takes the decoder's 2": ("connector", {"n_heads": 4}),
    "vision.feature_length 10.0: Kosmos-2 scales features to length 1": ("vision", {"feature_length": 10.0}),
    "vision.feature_length None: Kosmos-2 scales features to length 1": ("vision", {"feature_length": None}),
    "vision.architecture ViT-B-16-SigLIP: Kosmos-2 has a plain CLIP ViT": ("vision", {"architecture": "ViT-B-16-SigLIP"}),
    "vision.architecture RN50: Kosmos-2 has a plain CLIP ViT": ("vision", {"architecture": "RN50"}),
    "vision.architecture coca_ViT-B-32: Kosmos-2 has a plain CLIP ViT": ("vision", {"architecture": "coca_ViT-B-32"}),
}


@pytest.mark.parametrize("reason", LOST)
def test_a_part_that_kosmos_2_has_not_is_named(reason):
    table, fields = LOST[reason]

    with pytest.raises(UserError, match=f"transformers has no counterpart.*{reason}.*--format safetensors"):
        transformers_config(ours_with(table, **fields))


def test_all_that_would_be_lost_is_named_at_once():
    config = replace(
        ours_with("decoder", positions="xpos", norm="pre"),
        connector=replace(ours_with("connector").connector, kind="linear"),
        vision=VisionConfig(architecture="RN50", feature_length=None),
    )

    with pytest.raises(UserError) as caught:
        transformers_config(config)

    for part in ("decoder.positions", "decoder.norm", "connector.kind", "vision.feature_length", "vision.architecture"):
        assert part in str(caught.value)


def test_the_papers_model_has_no_counterpart():
    with pytest.raises(UserError, match=r"decoder\.positions xpos"):
        transformers_config(KosmosConfig())


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-bigG-14"])
def test_plain_towers_of_open_clip_have_a_counterpart(name):
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    config = replace(ours_with("vision"), vision=VisionConfig(architecture=name, pretrained=None, image_size=size))

    with torch.device("meta"):
        theirs = Kosmos2ForConditionalGeneration(transformers_config(config))
        ours = Kosmos(config)

    assert TRANSFORMERS.external_shapes(shapes_of(ours.state_dict())) == shapes_of(theirs.state_dict())
    heads = theirs.vision_model.model.encoder.layers[0].self_attn.num_heads
    assert heads == ours.vision.visual.transformer.resblocks[0].attn.num_heads
