"""Import and export of Kosmos-2 as `transformers` has it.

Both models are equal in evaluation mode. In training, that of transformers applies dropout to embeddings twice in a row (a
rate of 1 - 0.9^2 for 0.1); ours applies it once, as the released code does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kosmos_lit.config import CLIP_MEAN, CLIP_STD, ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.state_dicts.files import read_json, read_tensors
from kosmos_lit.state_dicts.keys import TRANSFORMERS, check_shapes, shapes_of
from kosmos_lit.tokenizer import BOS, EOS, PAD, Tokenizer
from kosmos_lit.weights.folder import LoadedModel, build_model, check_own, check_tokenizer, new_folder
from kosmos_lit.weights.towers import parse_config, square_side, tower_architecture, tower_sizes, unsupported_settings

if TYPE_CHECKING:
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

MODEL_TYPE = "kosmos-2"
_POSITION_BUFFERS = ("text_model.model.embed_positions.weights", "vision_model.model.embeddings.position_ids")
"""Computed buffers, which earlier versions of transformers wrote to file."""


def from_transformers(source: str | Path | Kosmos2ForConditionalGeneration) -> LoadedModel:
    """Return the model of a transformers Kosmos-2 in memory (copied) or in a folder, and the folder's tokenizer.

    Mean and deviation of pixels are those of the folder's image processor, or CLIP's.

    Raises: UserError if it is no Kosmos-2, or one with settings that no Kosmos has, or tensors are missing.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        config = read_kosmos2_config(folder)
        model = _build_model(config, read_tensors(folder), str(folder))
        tokenizer = Tokenizer.from_transformers(folder)
        check_tokenizer(tokenizer, config, str(folder))
        return LoadedModel(model, tokenizer)
    return LoadedModel(_build_model(kosmos_config(source.config), source.state_dict(), type(source).__name__), None)


def read_kosmos2_config(folder: Path) -> KosmosConfig:
    """Return the configuration of a folder of transformers' Kosmos-2.

    Raises: UserError if it is none, or one with settings that no Kosmos has.
    """
    return kosmos_config(_read_config(folder), *_statistics(folder))


def to_transformers(model: Kosmos) -> Kosmos2ForConditionalGeneration:
    """Return a copy of a Kosmos as transformers' Kosmos-2, in evaluation mode.

    Raises: UserError listing what would be lost, if the model has parts that Kosmos-2 lacks.
    """
    from transformers import Kosmos2ForConditionalGeneration

    config = transformers_config(model.config)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # Without the output matrix: transformers ties it to the embedding.
    tensors = {name: t.clone() for name, t in TRANSFORMERS.to_external(tensors).items() if name != TRANSFORMERS.head}
    dtype = next(iter(tensors.values())).dtype
    kosmos2: Any = Kosmos2ForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    for name, parameter in kosmos2.named_parameters():  # from_pretrained has cast all of them to one dtype
        parameter.data = tensors[name]
    kosmos2.eval()
    return kosmos2  # type: ignore[no-any-return]


def export_transformers(model: Kosmos, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` read.

    Raises: UserError as `to_transformers` does, if there is no tokenizer, or if the folder is not empty.
    """
    from transformers import CLIPImageProcessor, Kosmos2Processor

    processor_class: Any = Kosmos2Processor
    if tokenizer is None:
        raise UserError("the model has no tokenizer, which an export for transformers needs")
    kosmos2, vision = to_transformers(model), model.config.vision
    side = {"height": vision.image_size, "width": vision.image_size}
    image_processor = CLIPImageProcessor(
        # No crop: images are scaled on both sides, as `Engine.pixels` does.
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=list(vision.mean),
        image_std=list(vision.std),
    )
    n_patch_tokens = sum(name.startswith("<patch_index_") for name in tokenizer.extra)
    processor = processor_class(image_processor, tokenizer.to_transformers(), num_patch_index_tokens=n_patch_tokens)
    with new_folder(folder) as path:
        kosmos2.save_pretrained(path)
        processor.save_pretrained(path)
        # The processor always adds six tags to its tokenizer; a model without them has no embeddings for these. So our own
        # tokenizer files replace the ones it wrote.
        tokenizer.save_transformers(path)
        tokenizer.save(path)


def kosmos_config(
    config: Kosmos2Config,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> KosmosConfig:
    """Return the Kosmos configuration of the same model.

    Raises: UserError naming every setting that no Kosmos has.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    # Settings of transformers that a Kosmos has as constants.
    fixed: dict[str, Any] = {
        "activation_function": "gelu",
        "layer_norm_eps": 1e-5,
        "scale_embedding": True,
        "activation_dropout": 0,
        "layerdrop": 0,
        "add_cross_attention": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    wrong = [
        f"text_config.{name} is {getattr(text, name)!r}, only {value!r} is supported"
        for name, value in fixed.items()
        if getattr(text, name) != value
    ]
    wrong += unsupported_settings(vision)
    if wrong:
        raise UserError(f"no Kosmos is like this Kosmos-2: {'; '.join(wrong)}")
    return KosmosConfig(
        vision=VisionConfig(
            architecture=tower_architecture(vision),
            pretrained=None,
            image_size=square_side(vision.image_size),
            trainable="all",
            feature_length=1.0,
            mean=mean,
            std=std,
        ),
        connector=ConnectorConfig(
            kind="resampler",
            n_latents=config.latent_query_num,
            n_heads=text.attention_heads,
            attention_dropout_rate=text.attention_dropout,
        ),
        decoder=DecoderConfig(
            vocab_size=text.vocab_size,
            dim=text.embed_dim,
            n_layers=text.layers,
            n_heads=text.attention_heads,
            ffn_dim=text.ffn_dim,
            max_seq_len=text.max_position_embeddings,
            norm="sub",
            positions="sinusoidal",
            dropout_rate=text.dropout,
            attention_dropout_rate=text.attention_dropout,
        ),
    )


def transformers_config(config: KosmosConfig) -> Kosmos2Config:
    """Return the configuration of the same model in transformers.

    Raises: UserError listing what would be lost.
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
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_seq_len,
            "embed_dim": decoder.dim,
            "layers": decoder.n_layers,
            "ffn_dim": decoder.ffn_dim,
            "attention_heads": decoder.n_heads,
            "dropout": decoder.dropout_rate,
            "attention_dropout": decoder.attention_dropout_rate,
        },
        vision_config=tower | {"image_size": vision.image_size},
        latent_query_num=connector.n_latents,
    )


def _build_model(config: KosmosConfig, tensors: dict[str, torch.Tensor], where: str) -> Kosmos:
    check_own(config, len(tensors), where)
    shapes = shapes_of(Kosmos.on_meta(config).state_dict())
    tensors = {name: t for name, t in tensors.items() if name not in _POSITION_BUFFERS}  # computed anew
    embedding = TRANSFORMERS.external_names("decoder.embed_tokens.weight")[0]
    head = tensors.pop(str(TRANSFORMERS.head), None)  # tied to the embedding: some files have it, some do not
    expected = TRANSFORMERS.external_shapes(shapes)
    expected.pop(str(TRANSFORMERS.head))
    check_shapes(shapes_of(tensors), expected, where)
    if head is not None and not torch.equal(head, tensors[embedding]):
        raise UserError(f"{where}: {TRANSFORMERS.head} differs from {embedding}, and a Kosmos has one matrix for both")
    return build_model(config, TRANSFORMERS.to_kosmos(tensors, shapes), where)


def _read_config(folder: Path) -> Kosmos2Config:
    from transformers import Kosmos2Config

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: a folder as transformers writes a Kosmos-2 was expected")
    table = read_json(folder / "config.json")
    if table.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder}/config.json is of model_type {table.get('model_type')!r}, not {MODEL_TYPE!r}")
    config: Kosmos2Config = parse_config(Kosmos2Config, table, folder)
    return config


def _statistics(folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and deviation of the folder's image processor; CLIP's if it has none."""
    # Recent versions nest the image processor in the first; earlier ones wrote the second, flat.
    for name in ("processor_config.json", "preprocessor_config.json"):
        table = read_json(folder / name) if (folder / name).is_file() else {}
        table = table.get("image_processor", table)
        if not (isinstance(table, dict) and "image_mean" in table and "image_std" in table):
            continue
        mean, std = table["image_mean"], table["image_std"]
        for values in (mean, std):
            if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
                raise UserError(f"{folder / name}: image_mean {mean} and image_std {std} should be three numbers each")
        return tuple(mean), tuple(std)
    return CLIP_MEAN, CLIP_STD
