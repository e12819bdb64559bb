"""Image towers from open_clip and from transformers: the features that the released systems read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from kosmos_lit.config import CLIP_MEAN, CLIP_STD, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.vision import VisionTower
from kosmos_lit.weights.clip import import_tower
from tests.kosmos_lit.tiny_kosmos import shaken
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle
from tests.kosmos_lit.weights.reference_kosmos2 import noise_images

SIDE = 28
SIZES = {
    "hidden_size": 22,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 11,
    "image_size": SIDE,
    "patch_size": 7,
}
TABLE = {
    "embed_dim": 13,
    "vision_cfg": {"image_size": SIDE, "patch_size": 7, "width": 22, "layers": 3, "head_width": 2, "mlp_ratio": 53.1 / 22},
    "text_cfg": {"context_length": 3, "vocab_size": 7, "width": 8, "heads": 1, "layers": 1},
}
ATOL = 1e-5
"""Components of vectors of length 1; measured 2e-7."""
ACTIVATIONS = ["quick_gelu", "gelu"]


def normalised(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def our_features(pretrained: Path, **fields: Any) -> Tensor:
    """(3, 1 + P, C) of our tower with the weights of a file or folder."""
    settings: dict[str, Any] = {"architecture": TABLE, "image_size": SIDE, "pretrained": str(pretrained)}
    with torch.inference_mode():
        return VisionTower(VisionConfig(**(settings | fields))).eval()(noise_images(3, SIDE))


# ---- open_clip


def open_clip_pair(activation: str) -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return shaken(open_clip.CLIP(**TABLE, quick_gelu=activation == "quick_gelu", output_dict=False), by=0.1).eval()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_are_those_of_open_clip_for_the_same_weights(tmp_path, activation):
    """What its last block gives, which a hook takes out of its own forward, after its last norm."""
    reference = open_clip_pair(activation)
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    seen: list[Tensor] = []
    reference.visual.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))

    with torch.inference_mode():
        reference.encode_image(normalised(noise_images(3, SIDE)))
        expected = F.normalize(reference.visual.ln_post(seen[0]), dim=-1)

    actual = our_features(tmp_path / "clip.pt", architecture=TABLE | {"quick_gelu": activation == "quick_gelu"})
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def test_the_activation_is_seen_in_the_features(tmp_path):
    """Or the test above would not notice the wrong one."""
    torch.save(open_clip_pair("gelu").state_dict(), tmp_path / "clip.pt")

    quick, exact = (our_features(tmp_path / "clip.pt", architecture=TABLE | {"quick_gelu": q}) for q in (True, False))

    assert (quick - exact).abs().max() > 100 * ATOL


def test_a_checkpoint_of_open_clips_training_is_read(tmp_path):
    """Its names begin with `module.` when several GPUs trained it."""
    state = open_clip_pair("gelu").state_dict()
    torch.save(state, tmp_path / "clip.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "epoch_3.pt")

    assert torch.equal(our_features(tmp_path / "epoch_3.pt"), our_features(tmp_path / "clip.pt"))


def test_a_safetensors_file_is_read(tmp_path):
    state = open_clip_pair("gelu").state_dict()
    torch.save(state, tmp_path / "clip.pt")
    save_file(state, tmp_path / "clip.safetensors")

    assert torch.equal(our_features(tmp_path / "clip.safetensors"), our_features(tmp_path / "clip.pt"))


def test_the_released_tower_has_quick_gelu_14_pixel_patches_and_features_of_length_1():
    config = VisionConfig(pretrained=None)
    with torch.device("meta"):
        tower = VisionTower(config)

    assert config.architecture == "ViT-L-14-quickgelu"
    blocks = tower.visual.transformer.resblocks
    assert {type(block.mlp.gelu).__name__ for block in blocks} == {"QuickGELU"}
    assert (len(blocks), blocks[0].attn.num_heads, tower.width, tower.visual.patch_size) == (24, 16, 1024, (14, 14))
    assert (config.image_size, config.feature_length) == (224, 1.0)


# ---- transformers


def reference_tower(activation: str) -> CLIPVisionModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return shaken(CLIPVisionModel(CLIPVisionConfig(hidden_act=activation, **SIZES)), by=0.1).eval()


def their_features(model: CLIPVisionModel) -> Tensor:
    """What Kosmos-2 reads: the last hidden state of all tokens after the last norm, scaled to length 1."""
    with torch.inference_mode():
        hidden = model(normalised(noise_images(3, SIDE))).last_hidden_state
        return F.normalize(model.post_layernorm(hidden), dim=-1)


def of_version_4(model: CLIPVisionModel) -> dict[str, Tensor]:
    """The tensors as earlier versions name them, and a buffer that these wrote to file."""
    tensors = {f"vision_model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}


def architecture(activation: str) -> dict[str, Any]:
    return TABLE | {"quick_gelu": activation == "quick_gelu"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_are_those_of_a_transformers_folder(tmp_path, activation):
    reference = reference_tower(activation)
    reference.save_pretrained(tmp_path)

    actual = our_features(tmp_path, architecture=architecture(activation))

    torch.testing.assert_close(actual, their_features(reference), rtol=0, atol=ATOL)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_features_are_those_of_a_transformers_folder_of_version_4(tmp_path, file):
    reference = reference_tower("gelu")
    reference.config.save_pretrained(tmp_path)
    write = save_file if file == "model.safetensors" else torch.save
    write(of_version_4(reference), tmp_path / file)

    torch.testing.assert_close(our_features(tmp_path), their_features(reference), rtol=0, atol=ATOL)


def whole_clip(folder: Path) -> CLIPModel:
    text = {"hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 7}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = CLIPModel(CLIPConfig(vision_config=SIZES | {"hidden_act": "gelu"}, text_config=text, projection_dim=13))
    shaken(model, by=0.1).eval().save_pretrained(folder)
    return model


def test_the_tower_of_a_whole_clip_is_taken_out(tmp_path):
    model = whole_clip(tmp_path)
    with torch.inference_mode():
        tower = model.vision_model
        hidden = tower(normalised(noise_images(3, SIDE))).last_hidden_state
        expected = F.normalize(tower.post_layernorm(hidden), dim=-1)

    torch.testing.assert_close(our_features(tmp_path), expected, rtol=0, atol=ATOL)


# ---- import: a tower as a folder


def lines(text: str) -> dict[str, Any]:
    """The config that the verb prints, as a run reads it."""
    return yaml.safe_load(text)["vision"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("version", [4, 5])
def test_an_imported_tower_gives_the_features_of_the_folder_it_came_from(tmp_path, activation, version):
    reference, source = reference_tower(activation), tmp_path / "clip"
    reference.save_pretrained(source)
    if version == 4:
        save_file(of_version_4(reference), source / "model.safetensors")

    fields = lines(import_tower(source, tmp_path / "tower"))

    assert fields["pretrained"] == str(tmp_path / "tower")
    torch.testing.assert_close(our_features(**fields), their_features(reference), rtol=0, atol=ATOL)
    assert torch.equal(our_features(**fields), our_features(source, architecture=architecture(activation)))


def test_an_imported_tower_of_a_whole_clip_holds_the_tower_alone(tmp_path):
    whole_clip(tmp_path / "clip")

    fields = lines(import_tower(tmp_path / "clip", tmp_path / "tower"))

    assert torch.equal(our_features(**fields), our_features(tmp_path / "clip"))
    assert {name.split(".")[0] for name in load_file(tmp_path / "tower" / "model.safetensors")} == {"visual"}


def test_an_imported_tower_of_open_clip_gives_the_same_features(tmp_path):
    torch.save(open_clip_pair("gelu").state_dict(), tmp_path / "clip.pt")

    text = import_tower(tmp_path / "clip.pt", tmp_path / "tower")

    assert "ITS NAME IN open_clip" in text
    assert torch.equal(our_features(tmp_path / "tower"), our_features(tmp_path / "clip.pt"))


def test_the_released_towers_name_is_found_again():
    from kosmos_lit.weights.towers import tower_architecture

    released = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=14
    )
    assert tower_architecture(released) == "ViT-L-14-quickgelu"


# ---- bad input


def test_all_mismatches_are_listed_at_once(tmp_path):
    reference = reference_tower("gelu")
    tensors = reference.state_dict()
    del tensors["encoder.layers.1.self_attn.k_proj.bias"]
    tensors["pre_layrnorm.weight"] = torch.ones(7)
    tensors["encoder.layers.3.layer_norm1.weight"] = torch.ones(22)
    reference.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")

    for use in (lambda: our_features(tmp_path), lambda: import_tower(tmp_path, tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            use()
        assert str(caught.value).splitlines()[1:] == [
            "  missing: vision_model.encoder.layers.1.self_attn.k_proj.bias (22,)",
            "  surplus: vision_model.encoder.layers.3.layer_norm1.weight (22,)",
            "  misshapen: vision_model.pre_layrnorm.weight is (7,) in the file, (22,) in the model",
        ]
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_tower_is_refused_with_the_expected_names(tmp_path):
    save_file({"decoder.weight": torch.ones(3)}, tmp_path / "model.safetensors")

    with pytest.raises(UserError, match=r"holds no image tower: names below `visual\.`.*`vision_model\.`.*decoder\.weight"):
        import_tower(tmp_path / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip' is no CLIP"),
        ({"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ({"layer_norm_eps": 1e-6}, "vision_config.layer_norm_eps is 1e-06"),
        ({"image_size": [28, 35]}, r"vision_config.image_size is \[28, 35\]"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_a_tower_with_unsupported_settings_is_refused(tmp_path, settings, reason):
    reference_tower("gelu").save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | settings))

    with pytest.raises(UserError, match=reason):
        import_tower(tmp_path, tmp_path / "out")


def test_weights_of_transformers_without_a_config_are_refused(tmp_path):
    save_file(of_version_4(reference_tower("gelu")), tmp_path / "model.safetensors")

    with pytest.raises(UserError, match=r"no file .*config\.json"):
        import_tower(tmp_path / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("use", [our_features, lambda path: import_tower(path, path.parent / "out")])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, use):
    torch.save({"visual.conv1.weight": MaliciousPickle(tmp_path / "exploded")}, tmp_path / "clip.pt")

    with pytest.raises(UserError, match=r"clip\.pt is not read: it refers to"):
        use(tmp_path / "clip.pt")

    assert not (tmp_path / "exploded").exists()
