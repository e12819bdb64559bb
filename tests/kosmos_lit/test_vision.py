import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kosmos_lit.config import CLIP_MEAN, CLIP_STD, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.vision import VisionTower
from tests.kosmos_lit.tiny_kosmos import SIDE, TOWER, normal, random_images, shaken, tiny_config

N, P, C = 2, 4, 12


@pytest.fixture
def build(kosmos_tower):
    def build(**fields) -> VisionTower:
        torch.manual_seed(0)
        return shaken(VisionTower(tiny_config(kosmos_tower, vision=fields).vision)).eval()

    return build


def normalised(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def written_out(images: Tensor, tower: VisionTower) -> Tensor:
    """CLIP's image encoder up to its final LayerNorm, on all tokens."""
    visual, pixels = tower.visual, normalised(images)
    patches = [
        torch.einsum("nchw,dchw->nd", pixels[:, :, y : y + 7, x : x + 7], visual.conv1.weight)
        for y in (0, 7)
        for x in (0, 7)
    ]
    x = torch.stack([visual.class_embedding.expand(len(images), -1), *patches], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        h = block.ln_1(x)
        x = x + block.attn(h, h, h, need_weights=False)[0]
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(F.gelu(h))
    return visual.ln_post(x)


# ---- features


def test_features_are_class_token_and_patches_after_the_last_norm_without_projection(build):
    tower = build(feature_length=None)
    actual = tower(random_images(N))
    assert actual.shape == (N, 1 + P, C)
    torch.testing.assert_close(actual, written_out(random_images(N), tower), rtol=1e-4, atol=1e-5)  # fp32, 3 layers


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_chunks_change_no_feature(build, chunk):
    whole, images = build(trainable="last_block"), random_images(7)
    chunked = build(trainable="last_block", chunk=chunk)
    torch.testing.assert_close(chunked(images), whole(images), rtol=1e-5, atol=1e-6)  # fp32, other matrix sizes


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [2]), (8, [8]), (11, [8, 2, 2]), (23, [8, 8, 2, 2, 2, 2]), (24, [8, 8, 8]), (15, [8, 2, 2, 2, 2])]
)
def test_fused_blocks_see_two_sizes_of_chunk(build, n, sizes):
    tower = build(chunk=8)
    tower._is_compiled = True
    chunks = list(tower._chunks(random_images(n)))
    assert [len(some) for some, _ in chunks] == sizes
    assert torch.equal(torch.cat([some[:real] for some, real in chunks]), random_images(n))


def test_without_gradient_nothing_is_padded(build):
    tower = build(chunk=8)
    tower._is_compiled = True
    with torch.no_grad():
        assert [len(some) for some, _ in tower._chunks(random_images(11))] == [8, 3]


def test_frozen_blocks_keep_nothing_for_the_backward_pass(kosmos_tower):
    bytes_kept: list[int] = []
    for layers in (2, 5):
        table = json.loads(json.dumps(TOWER)) | {"vision_cfg": TOWER["vision_cfg"] | {"layers": layers}}
        fields = {"architecture": table, "trainable": "last_block"}
        tower = VisionTower(tiny_config(kosmos_tower, vision=fields).vision).train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            tower(random_images(N))
        bytes_kept.append(sum(sizes))
    assert bytes_kept[0] == bytes_kept[1] > 0


@pytest.mark.parametrize("length", [1.0, 90.0])
def test_features_get_the_length_asked_for_and_keep_their_direction(build, length):
    actual, plain = build(feature_length=length)(random_images(N)), build(feature_length=None)(random_images(N))
    torch.testing.assert_close(actual.norm(dim=-1), torch.full((N, 1 + P), length), rtol=1e-6, atol=0)  # fp32
    torch.testing.assert_close(F.cosine_similarity(actual, plain, dim=-1), torch.ones(N, 1 + P), rtol=0, atol=1e-6)


def test_mean_and_deviation_of_the_input_are_those_of_the_config(build):
    gray = torch.full((1, 3, SIDE, SIDE), 51, dtype=torch.uint8)
    tower = build(mean=(0.2, 0.2, 0.2), std=(0.5, 0.25, 0.125))
    seen = []
    tower.visual.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(gray)
    tower(gray + 17)
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, SIDE, SIDE), rtol=0, atol=1e-6)  # fp32, 51 / 255 = 0.2
    torch.testing.assert_close(seen[1][0, :, 3, 5], torch.tensor([2.0, 4.0, 8.0]) / 15, rtol=1e-5, atol=1e-6)


def test_pixels_are_normalised_in_float32_whatever_the_weights_are(build):
    tower, seen = build().bfloat16(), []
    tower.visual.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(random_images(N))
    assert seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(seen[0].float(), normalised(random_images(N)), rtol=2**-8, atol=1e-4)  # rounded to bf16 once


def test_the_width_is_that_of_the_features(build):
    assert build().width == C


def test_input_statistics_are_not_stored(build):
    assert {name.split(".")[0] for name in build().state_dict()} == {"visual"}


# ---- what trains


def trained(tower: VisionTower) -> set[str]:
    """Names of the parameters that get a gradient."""
    features = tower(random_images(N))
    if features.requires_grad:
        (features * normal(*features.shape, seed=3)).sum().backward()
    return {name for name, p in tower.visual.named_parameters() if p.grad is not None}


def test_last_block_trains_the_last_block_and_the_last_norm(build):
    tower = build(trainable="last_block")
    names = {name for name, _ in tower.visual.named_parameters()}
    expected = {name for name in names if name.startswith(("transformer.resblocks.2.", "ln_post."))}
    assert trained(tower) == expected
    assert len(expected) == 12 + 2  # two norms, attention in and out, two linear layers: weight and bias each


def test_none_trains_nothing(build):
    assert trained(build(trainable="none")) == set()


def test_all_trains_everything(build):
    tower = build(trainable="all")
    assert trained(tower) == {name for name, _ in tower.visual.named_parameters()}


def test_an_optimizer_step_leaves_frozen_weights_as_they_were(build):
    tower = build(trainable="last_block")
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1, weight_decay=0.1)
    trained(tower)
    optimizer.step()
    changed = {name for name, p in tower.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in tower.named_parameters() if p.requires_grad}


# ---- frozen matrices in bfloat16


def autocast_features_and_gradients(tower: VisionTower) -> list[Tensor]:
    tower.zero_grad()
    side = tower.config.image_size
    images = torch.randint(0, 256, (N, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)  # timm's towers drop paths
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(images)
    features.float().square().sum().backward()
    return [features.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["tiny", "ViT-S-32-alt", "convnext_tiny"])
def test_rounded_frozen_matrices_change_no_bit_under_autocast(build, name):
    torch.manual_seed(0)
    config = VisionConfig(architecture=name, pretrained=None)
    tower = (build(trainable="last_block") if name == "tiny" else VisionTower(config)).train()
    expected = autocast_features_and_gradients(tower)

    tower.round_frozen(torch.bfloat16)

    actual = autocast_features_and_gradients(tower)
    assert len(actual) == len(expected) > 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert {p.dtype for p in tower.frozen_matrices().values()} == {torch.bfloat16}
    assert {p.dtype for p in tower.parameters() if p.requires_grad or p.ndim < 2} == {torch.float32}


def test_frozen_matrices_are_most_of_a_frozen_tower(build):
    tower = build(trainable="none")
    rounded = {f"visual.transformer.resblocks.{i}.{name}" for i in range(3) for name in BLOCK_MATRICES}
    assert tower.frozen_matrices().keys() == {"visual.conv1.weight", *rounded}


BLOCK_MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def test_a_state_dict_holds_the_frozen_matrices_before_they_were_rounded(build):
    tower = build(trainable="last_block")
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}

    tower.round_frozen(torch.bfloat16)

    actual = tower.state_dict()
    assert list(actual) == list(before)
    assert all(torch.equal(actual[name], before[name]) for name in before)


def test_frozen_matrices_come_back_for_a_block_and_for_good(build):
    tower = build(trainable="last_block")
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}

    def is_exact() -> bool:
        return all(torch.equal(p, before[name]) for name, p in tower.named_parameters())

    tower.round_frozen(torch.bfloat16)
    assert not is_exact()
    with tower.unrounded():
        assert is_exact()
    assert {p.dtype for p in tower.frozen_matrices().values()} == {torch.bfloat16}
    tower.restore_frozen()
    assert is_exact()
    with tower.unrounded():
        assert is_exact()
    assert is_exact()


def test_weights_loaded_into_a_rounded_tower_are_not_rounded(build):
    tower, other = build(trainable="last_block"), shaken(build(trainable="last_block"), seed=7)
    tower.round_frozen(torch.bfloat16)

    tower.load_state_dict(other.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), other.state_dict().values(), strict=True))


def test_positions_of_a_new_tower_that_trains_have_unit_scale(kosmos_tower):
    torch.manual_seed(0)
    tower = VisionTower(tiny_config(kosmos_tower).vision)
    small = float(tower.visual.positional_embedding.detach().std())
    tower.init()
    assert small < 0.4  # open_clip: 12^-0.5 = 0.29
    std = float(tower.visual.positional_embedding.detach().std())
    assert std == pytest.approx(1, abs=0.3)  # 60 draws: three standard errors


def test_a_frozen_tower_stays_as_open_clip_makes_it(kosmos_tower):
    tower = VisionTower(tiny_config(kosmos_tower, vision={"trainable": "last_block"}).vision)
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    tower.init()
    assert all(torch.equal(p, before[name]) for name, p in tower.named_parameters())


# ---- weights


@pytest.fixture
def open_clip_pair(kosmos_tower, build, tmp_path):
    """A random open_clip model and the file that holds its weights."""
    build()  # makes the architecture known to open_clip
    torch.manual_seed(5)
    open_clip.add_model_config(kosmos_tower)
    pair = shaken(open_clip.create_model("tiny_kosmos_tower")).eval()
    path = tmp_path / "weights.pt"
    torch.save(pair.state_dict(), path)
    return pair, str(path)


def test_a_local_weight_file_gives_the_features_of_the_model_it_came_from(build, kosmos_tower, open_clip_pair):
    pair, path = open_clip_pair
    tower = VisionTower(tiny_config(kosmos_tower, vision={"pretrained": path, "feature_length": None}).vision).eval()
    other = build(feature_length=None)
    other.visual.load_state_dict(pair.visual.state_dict(), strict=False)
    assert torch.equal(tower(random_images(N)), other(random_images(N)))


def test_the_class_tokens_feature_is_what_open_clip_projects(kosmos_tower, open_clip_pair):
    pair, path = open_clip_pair
    tower = VisionTower(tiny_config(kosmos_tower, vision={"pretrained": path, "feature_length": None}).vision).eval()
    actual, expected = tower(random_images(N))[:, 0] @ pair.visual.proj, pair.encode_image(normalised(random_images(N)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # fp32, 3 layers


def test_initialisation_leaves_loaded_weights_alone(kosmos_tower, open_clip_pair):
    pair, path = open_clip_pair
    tower = VisionTower(tiny_config(kosmos_tower, vision={"pretrained": path}).vision)
    tower.init()
    expected = {name: value for name, value in pair.visual.state_dict().items() if name != "proj"}
    assert tower.visual.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tower.visual.state_dict().items())


def test_weights_of_another_shape_are_the_users_error(kosmos_tower, open_clip_pair, tmp_path):
    weights = open_clip_pair[0].state_dict()
    weights["visual.ln_post.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "other.pt")
    listed = r"other.pt does not fit .*\n  misshapen: visual.ln_post.weight is \(7,\) in the file, \(12,\)"
    with pytest.raises(UserError, match=listed):
        VisionTower(tiny_config(kosmos_tower, vision={"pretrained": str(tmp_path / "other.pt")}).vision)


@pytest.mark.parametrize("pretrained", ["no/such/file.pt", "nosuchtag"])
def test_weights_that_do_not_exist_are_the_users_error(kosmos_tower, pretrained):
    with pytest.raises(UserError, match=f"cannot build .* with pretrained='{pretrained}'.*or null for random weights"):
        VisionTower(tiny_config(kosmos_tower, vision={"pretrained": pretrained}).vision)


# ---- architectures


def test_an_unknown_architecture_is_the_users_error():
    with pytest.raises(UserError, match=r"open_clip has no 'ViT-XXS-3'; `open_clip.list_models\(\)` names"):
        VisionTower(tiny_config("ViT-XXS-3").vision)


def test_an_architecture_file_that_does_not_exist_is_the_users_error():
    with pytest.raises(UserError, match=r"vision.architecture: no file missing.json"):
        VisionTower(tiny_config("missing.json").vision)


@pytest.mark.parametrize("text", ['{"embed_dim": 5}', "[]", "no json", "7"])
def test_a_file_that_is_no_architecture_is_the_users_error(tmp_path, text):
    path = tmp_path / "broken_tower.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken_tower\.json"):
        VisionTower(tiny_config(str(path)).vision)


def test_an_image_size_that_is_not_the_architectures_is_the_users_error(kosmos_tower):
    with pytest.raises(UserError, match=r"vision.image_size is 21, but .*tiny_kosmos_tower.json reads 14 pixels"):
        VisionTower(tiny_config(kosmos_tower, vision={"image_size": 21}).vision)


@pytest.mark.parametrize("change", [{"width": 13}, {"depth": 3}])  # 2 heads do not divide 13; no such key
def test_a_tower_that_cannot_be_built_is_the_users_error(tmp_path, change):
    path = tmp_path / "odd_tower.json"
    path.write_text(json.dumps(TOWER | {"vision_cfg": TOWER["vision_cfg"] | change}))
    with pytest.raises(UserError, match=r"odd_tower\.json"):
        VisionTower(tiny_config(str(path)).vision)


def test_quick_gelu_of_an_architecture_is_kept(tmp_path):
    path = tmp_path / "quick_tower.json"
    path.write_text(json.dumps(TOWER | {"quick_gelu": True}))
    tower = VisionTower(tiny_config(str(path)).vision)
    assert {type(block.mlp.gelu).__name__ for block in tower.visual.transformer.resblocks} == {"QuickGELU"}


# ---- open_clip's own towers


@pytest.mark.parametrize(
    ("name", "n_features", "width", "last"),
    [
        ("ViT-S-32-alt", 50, 384, "transformer.resblocks.11."),
        ("convnext_tiny", 49, 768, "trunk.stages.3.blocks.2."),
        ("vit_medium_patch16_gap_256", 256, 512, "trunk.blocks.11."),
    ],
)
def test_other_towers_give_their_last_layers_features_and_train_their_last_block(name, n_features, width, last):
    size = 256 if name.endswith("256") else 224
    tower = VisionTower(VisionConfig(architecture=name, pretrained=None, image_size=size))
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    trained = {n for n, p in tower.visual.named_parameters() if p.requires_grad}
    assert features.shape == (1, n_features, width)
    assert tower.width == width
    assert {n for n in trained if "blocks." in n} == {n for n, _ in tower.visual.named_parameters() if n.startswith(last)}


def test_a_tower_without_layer_norms_is_measured():
    tower = VisionTower(VisionConfig(architecture="RN50", pretrained=None, trainable="all"))
    assert tower.width == 2048
