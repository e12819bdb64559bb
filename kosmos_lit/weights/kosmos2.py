"""Kosmos-2 as `transformers` has it, both ways.

Equal in evaluation mode. In training its model drops embeddings out twice in a row (so at rate 1 - 0.9^2 for 0.1), and
draws nothing in our order; ours drops them out once, as the released code does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kosmos_lit.config import CLIP_MEAN, CLIP_STD, ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, EOS, PAD, Tokenizer
from kosmos_lit.weights.files import read_json, read_tensors
from kosmos_lit.weights.folder import assemble, give_tokenizer, new_folder
from kosmos_lit.weights.keys import TRANSFORMERS, check_shapes, shapes_of
from kosmos_lit.weights.towers import parse_config, side, strange_settings, tower_architecture, tower_sizes

if TYPE_CHECKING:
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

MODEL_TYPE = "kosmos-2"
_POSITION_BUFFERS = ("text_model.model.embed_positions.weights", "vision_model.model.embeddings.position_ids")
"""Computed, but written to file by earlier versions."""


def from_transformers(source: str | Path | Kosmos2ForConditionalGeneration) -> Kosmos:
    """Return a Kosmos with the weights of a transformers Kosmos-2: a model in memory (copied), or a folder of one.

    A folder's tokenizer and image statistics come along; a model in memory has none.

    Raises: UserError if it is no Kosmos-2, or one with settings that no Kosmos has, or its tensors are not all there.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        config = kosmos_config(_read_config(folder), *_statistics(folder))
        tensors = read_tensors(folder)
        kosmos = _assemble(config, tensors, str(folder))
        give_tokenizer(kosmos, Tokenizer.from_transformers(folder), str(folder))
        return kosmos
    return _assemble(kosmos_config(source.config), source.state_dict(), type(source).__name__)


def to_transformers(kosmos: Kosmos) -> Kosmos2ForConditionalGeneration:
    """Return a copy of a Kosmos as transformers' Kosmos-2, in evaluation mode.

    Raises: UserError saying what would be lost, if the model has parts that Kosmos-2 has not.
    """
    from transformers import Kosmos2ForConditionalGeneration

    config = transformers_config(kosmos.config)
    ours = {name: tensor.detach().cpu() for name, tensor in kosmos.state_dict().items()}
    theirs = {name: t.clone() for name, t in TRANSFORMERS.to_theirs(ours).items() if name != TRANSFORMERS.head}
    dtype = next(iter(theirs.values())).dtype
    model: Any = Kosmos2ForConditionalGeneration.from_pretrained(None, config=config, state_dict=theirs, dtype=dtype)
    for name, parameter in model.named_parameters():  # it has turned all of them into one dtype
        parameter.data = theirs[name]
    model.eval()
    return model  # type: ignore[no-any-return]


def export_transformers(kosmos: Kosmos, folder: str | Path) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` read.

    Raises: UserError as `to_transformers` does, if the model has no tokenizer, or if the folder is not empty.
    """
    from transformers import CLIPImageProcessor, Kosmos2Processor

    processor_class: Any = Kosmos2Processor
    if kosmos.tokenizer is None:
        raise UserError("the model has no tokenizer, which an export for transformers needs")
    model = to_transformers(kosmos)
    vision, tokenizer = kosmos.config.vision, kosmos.tokenizer
    side = {"height": vision.image_size, "width": vision.image_size}
    images = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=list(vision.mean), image_std=list(vision.std)
    )
    n_places = sum(name.startswith("<patch_index_") for name in tokenizer.extra)
    processor = processor_class(images, tokenizer.to_transformers(), num_patch_index_tokens=n_places)
    with new_folder(folder) as path:
        model.save_pretrained(path)
        processor.save_pretrained(path)
        # Their processor gives its tokenizer six tags in any case, for which a model without them has no embeddings.
        tokenizer.save_transformers(path)
        tokenizer.save(path)


def kosmos_config(
    config: Kosmos2Config,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> KosmosConfig:
    """Return the configuration of the same model here.

    Raises: UserError naming every setting that no Kosmos has.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    fixed: dict[str, Any] = {
        "activation_function": "gelu", "layer_norm_eps": 1e-5, "scale_embedding": True, "activation_dropout": 0,
        "layerdrop": 0, "add_cross_attention": False, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    wrong = [
        f"text_config.{name} is {getattr(text, name)!r}, only {value!r} is known here"
        for name, value in fixed.items()
        if getattr(text, name) != value
    ]
    wrong += strange_settings(vision)
    if wrong:
        raise UserError(f"no Kosmos is like this Kosmos-2: {'; '.join(wrong)}")
    return KosmosConfig(
        vision=VisionConfig(
            architecture=tower_architecture(vision), pretrained=None, image_size=side(vision.image_size), trainable="all",
            feature_length=1.0, mean=mean, std=std,
        ),
        connector=ConnectorConfig(
            kind="resampler", n_latents=config.latent_query_num, n_heads=text.attention_heads,
            attention_dropout_rate=text.attention_dropout,
        ),
        decoder=DecoderConfig(
            vocab_size=text.vocab_size, dim=text.embed_dim, n_layers=text.layers, n_heads=text.attention_heads,
            ffn_dim=text.ffn_dim, max_seq_len=text.max_position_embeddings, norm="sub", positions="sinusoidal",
            dropout_rate=text.dropout, attention_dropout_rate=text.attention_dropout,
        ),
    )  # fmt: skip


def transformers_config(config: KosmosConfig) -> Kosmos2Config:
    """Return the configuration of the same model in transformers.

    Raises: UserError saying what would be lost.
    """
    from transformers import Kosmos2Config

    vision, connector, decoder = config.vision, config.connector, config.decoder
    lost = []
    if decoder.positions != "sinusoidal":
        lost.append(f"decoder.positions {decoder.positions}: Kosmos-2 adds sinusoids instead")
    if decoder.norm != "sub":
        lost.append(f"decoder.norm {decoder.norm}: Kosmos-2 has sub-LayerNorm")
    if connector.kind != "resampler":
        lost.append(f"connector.kind {connector.kind}: Kosmos-2 has a resampler of one cross-attention")
    elif connector.n_heads != decoder.n_heads:
        lost.append(f"connector.n_heads {connector.n_heads}: Kosmos-2 takes the decoder's {decoder.n_heads}")
    if vision.feature_length != 1.0:
        lost.append(f"vision.feature_length {vision.feature_length}: Kosmos-2 scales features to length 1")
    tower = tower_sizes(config.vision)
    if tower is None:
        lost.append(f"vision.architecture {vision.architecture}: Kosmos-2 has a plain CLIP ViT with a class token")
    if lost or tower is None:
        raise UserError(
            f"transformers has no counterpart of this model; Kosmos-2 would lose {'; '.join(lost)}. "
            "`export --format safetensors` keeps everything"
        )
    return Kosmos2Config(
        text_config={
            "vocab_size": decoder.vocab_size, "max_position_embeddings": decoder.max_seq_len, "embed_dim": decoder.dim,
            "layers": decoder.n_layers, "ffn_dim": decoder.ffn_dim, "attention_heads": decoder.n_heads,
            "dropout": decoder.dropout_rate, "attention_dropout": decoder.attention_dropout_rate,
        },
        vision_config=tower | {"image_size": vision.image_size},
        latent_query_num=connector.n_latents,
    )  # fmt: skip


def _assemble(config: KosmosConfig, tensors: dict[str, torch.Tensor], where: str) -> Kosmos:
    with torch.device("meta"):
        shapes = shapes_of(Kosmos(config).state_dict())
    tensors = {name: t for name, t in tensors.items() if name not in _POSITION_BUFFERS}
    embedding = TRANSFORMERS.theirs("decoder.embed_tokens.weight")[0]
    head = tensors.pop(str(TRANSFORMERS.head), None)
    wanted = TRANSFORMERS.wanted(shapes)
    wanted.pop(str(TRANSFORMERS.head))
    check_shapes(shapes_of(tensors), wanted, where)
    if head is not None and not torch.equal(head, tensors[embedding]):
        raise UserError(f"{where}: {TRANSFORMERS.head} differs from {embedding}, and a Kosmos has one matrix for both")
    return assemble(config, TRANSFORMERS.to_ours(tensors, shapes), where)


def _read_config(folder: Path) -> Kosmos2Config:
    from transformers import Kosmos2Config

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: a folder as transformers writes a Kosmos-2 was expected")
    about = read_json(folder / "config.json")
    if about.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder}/config.json is of model_type {about.get('model_type')!r}, not {MODEL_TYPE!r}")
    config: Kosmos2Config = parse_config(Kosmos2Config, about, folder)
    return config


def _statistics(folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and deviation of the folder's image processor; CLIP's if it has none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        about = read_json(folder / name) if (folder / name).is_file() else {}
        about = about.get("image_processor", about)
        if not (isinstance(about, dict) and "image_mean" in about and "image_std" in about):
            continue
        mean, std = about["image_mean"], about["image_std"]
        for values in (mean, std):
            if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
                raise UserError(f"{folder / name}: image_mean {mean} and image_std {std} should be three numbers each")
        return tuple(mean), tuple(std)
    return CLIP_MEAN, CLIP_STD
