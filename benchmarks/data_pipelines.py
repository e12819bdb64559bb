"""The pipelines that benchmarks/data.py compares: each yields collated batches of caption pairs without end.

All read the same tars, shuffled, and yield tensors on the host. Ours are uint8 images, to be normalised on the device, and
packed rows of tokens; the others' are those that their users build: normalised float images (uint8 with our decoder) and one
padded row of tokens for each pair.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from datamodules import MixtureData
from datamodules.loader import BatchLayout, Loader, MicroBatches, RenderOptions
from kosmos_lit.images import decode
from kosmos_lit.tokenizer import BOS, EOS, PAD, Tokenizer

SIDE = 224
SHUFFLED = 1000
"""Pairs in the others' shuffle buffers."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP."""

Count = tuple[int, int]
"""Images and rows of a batch."""


class MissingError(RuntimeError):
    """A pipeline that cannot be measured on this machine; the message is the reason."""


@dataclass(frozen=True)
class Task:
    """The input of every pipeline but ours."""

    tars: list[str]
    tokenizer: Tokenizer
    batch_pairs: int
    """Caption pairs of a batch: as many as one of our rows holds on average."""
    workers: int
    """Worker processes; 0: none."""


# ---- ours


def rendering(data: MixtureData) -> RenderOptions:
    """Return render options that allow no bad images."""
    return RenderOptions(
        tokenizer=data.tokenizer,
        image_size=SIDE,
        fit="crop",
        n_latents=data.n_latents,
        max_bad_share=dict.fromkeys(data.prepared, 0.0),
    )


def ours(data: MixtureData, workers: int, first_row: int = 0) -> Iterator[Count]:
    """Read the packed and shuffled rows of a data module, one row a batch."""
    layout = BatchLayout(first_row=first_row, global_batch_rows=8, micro_batch_rows=1)
    for batch in Loader(MicroBatches(data.stream(), layout, rendering(data)), workers):
        yield len(batch.images), len(batch.rows)


# ---- webdataset


def _padded(batch: list[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, captions = zip(*batch, strict=True)
    tokens = torch.full((len(captions), max(map(len, captions))), PAD)
    for row, ids in zip(tokens, captions, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return torch.stack(images), tokens


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [BOS, *tokenizer.encode(text).tolist(), EOS]


def _decoded(data: bytes) -> torch.Tensor:
    return torch.from_numpy(decode(data, SIDE, "crop"))


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _scaled() -> list[Any]:
    return [Resize(SIDE, InterpolationMode.BICUBIC), CenterCrop(SIDE)]


def _webdataset(task: Task, own_decoder: bool) -> Iterator[Count]:
    if importlib.util.find_spec("webdataset") is None:
        raise MissingError("webdataset is not installed: pip install -e '.[bench]'")
    import webdataset as wds

    # Repeated shards: otherwise the buffer would hold the whole corpus, and nothing would be read while it is emptied.
    shards = wds.WebDataset(task.tars, resampled=True, shardshuffle=False, seed=0)
    pipeline = shards.shuffle(SHUFFLED, initial=SHUFFLED)
    tokens = partial(_ids, task.tokenizer)
    if own_decoder:
        pipeline = pipeline.to_tuple("jpg", "txt").map_tuple(_decoded, lambda data: tokens(_text(data)))
    else:
        transform = Compose([*_scaled(), ToTensor(), Normalize(MEAN, STD)])
        pipeline = pipeline.decode("pil").to_tuple("jpg", "txt").map_tuple(transform, tokens)
    pipeline = pipeline.batched(task.batch_pairs, collation_fn=_padded)
    loader = DataLoader(pipeline, batch_size=None, num_workers=task.workers, prefetch_factor=4 if task.workers else None)
    for images, _ in loader:
        yield len(images), len(images)


def webdataset(task: Task) -> Iterator[Count]:
    """Read with webdataset as most of its users do: Pillow, Resize, CenterCrop, ToTensor, Normalize."""
    return _webdataset(task, own_decoder=False)


def webdataset_own_decoder(task: Task) -> Iterator[Count]:
    """Read with webdataset, but decode with `kosmos_lit.images.decode` to uint8."""
    return _webdataset(task, own_decoder=True)


# ---- megatron-energon


def energon(task: Task) -> Iterator[Count]:
    """Read caption samples with megatron-energon: its default image decoder, and the same transform."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.energon") is None:
        raise MissingError("megatron-energon is not installed: pip install megatron-energon")
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    transform = Compose([*_scaled(), Normalize(MEAN, STD)])  # its decoder yields floats in [0, 1]
    tokens = partial(_ids, task.tokenizer)

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc, type-arg]
        @stateless
        def encode_sample(self, sample: Any) -> tuple[torch.Tensor, list[int]]:
            return transform(sample.image), tokens(sample.caption)

        def batch(self, samples: list[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
            return _padded(samples)

    folder = Path(task.tars[0]).parent
    _prepare_energon(folder)
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=task.workers),
        batch_size=task.batch_pairs,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for images, _ in get_loader(dataset, prefetch_factor=4):
        yield len(images), len(images)


def _prepare_energon(folder: Path) -> None:
    if (folder / ".nv-meta" / "dataset.yaml").exists():
        return
    command = [
        str(Path(sys.executable).with_name("energon")),
        "prepare",
        str(folder),
        "--non-interactive",
        "--no-progress",
        "--split-ratio",
        "1,0,0",
        "--num-workers",
        "1",
        "--sample-type",
        "CaptioningSample",
        "--field-map",
        '{"image": "jpg", "caption": "txt"}',
    ]
    process = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if process.returncode:
        raise MissingError(f"energon prepare failed: {process.stdout.strip().splitlines()[-1]}")
