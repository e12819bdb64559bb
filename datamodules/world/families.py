"""Training examples of the world's task families on disk, as instruction data.

    {"images": ["images/matrix-0/17-0.jpg", ...], "messages": [{"role": "user", "content": "Here are eight images: ..."},
    {"role": "assistant", "content": "Yes"}, ...]}

`blind/` holds the same examples without their images, for the text-only baseline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from datamodules.config import CorpusConfig
from datamodules.io.compression import compress_zstd
from datamodules.io.hashing import hash_key
from datamodules.io.pool import Progress, run_all
from datamodules.sources import ReadOptions
from datamodules.world.creatures import described_example, fact_example, look_example, named_example
from datamodules.world.example import Draw, Example
from datamodules.world.matrices import matrix_example
from datamodules.world.rendered_text import opinion_example, reading_example, site_example
from datamodules.world.scene import Holdout
from datamodules.world.scene_tasks import caption_example, class_example, few_shot_example, question_example
from datamodules.world.text_tasks import text_example
from datamodules.world.write import WorldConfig, is_drawn
from kosmos_lit.files import atomic_folder

Record = dict[str, Any]
"""A line of instruction data."""

FAMILIES: dict[str, tuple[Draw, float]] = {
    "captions": (caption_example, 0.5),
    "questions": (question_example, 1.5),
    "few_shot": (few_shot_example, 0.75),
    "matrices": (matrix_example, 4.0),
    "reading": (reading_example, 2.5),
    "opinions": (opinion_example, 1.0),
    "sites": (site_example, 1.25),
    "classes": (class_example, 0.5),
    "descriptions": (described_example, 1.5),
    "names": (named_example, 1.0),
    "looks": (look_example, 0.25),
    "facts": (fact_example, 0.4),
    "told": (text_example, 0.3),
}
"""The function that draws a family's examples, and its weight."""
TURN_TEMPLATE = "{user} {assistant}"
"""The examples contain their whole prompts."""
MARK = "<image>"
IDENTITY = "families.json"


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig:
    """How many examples of each family are drawn, and how often they are read."""

    n_examples: int = 5_000
    """Examples of a family of weight 1."""
    weights: dict[str, float] = field(default_factory=lambda: {name: weight for name, (_, weight) in FAMILIES.items()})
    """Relative share of each family, both in the examples' positions and in the number of examples drawn."""
    blind: bool = False
    """Train on the examples without their images."""
    shards: int = 2
    """Files per family."""


def write_families(config: FamiliesConfig, world: WorldConfig) -> None:
    """Draw the families' examples into the world's folder, unless they are already there.

    Raises: UserError if the folder holds others.
    """
    folder = Path(world.path) / "families"
    identity = {k: v for k, v in asdict(config).items() if k != "blind"} | {"world": world.seed, "held_out": world.held_out}
    if is_drawn(folder / IDENTITY, identity, "world"):
        return
    with atomic_folder(folder) as temporary:
        (temporary / "blind").mkdir()
        names = [name for name, weight in config.weights.items() if weight]
        tasks = [_Shard(config, world, name, shard, temporary) for name in names for shard in range(config.shards)]
        run_all(_write_shard, tasks, world.workers, "drawing the families", "examples")
        (temporary / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")


def corpora(config: FamiliesConfig, world: Path, val_share: float) -> dict[str, CorpusConfig]:
    """Return each family as a corpus."""
    folder = world / "families" / "blind" if config.blind else world / "families"
    return {
        family: CorpusConfig(
            format="instruct",
            input=[str(folder / f"{family}-*.jsonl")],
            weight=weight,
            val_share=val_share,
            index=str(world / "index" / ("blind" if config.blind else "families") / family),
            read=ReadOptions(turn_template=TURN_TEMPLATE),
        )
        for family, weight in config.weights.items()
        if weight
    }


class _Shard(NamedTuple):
    config: FamiliesConfig
    world: WorldConfig
    family: str
    number: int
    folder: Path


def _write_shard(task: _Shard, progress: Progress) -> None:
    config, world, family, shard, folder = task
    random = Random(hash_key("family", world.seed, family, shard))
    holdout = Holdout(world.seed, world.held_out)
    n = round(config.n_examples * config.weights[family] / config.shards)
    records = write_examples([FAMILIES[family][0](random, holdout) for _ in range(n)], folder, f"images/{family}-{shard}")
    _write_lines(folder / f"{family}-{shard}.jsonl", records)
    blind = [{"messages": [m | {"content": m["content"].replace(MARK, "").strip()} for m in r["messages"]]} for r in records]
    _write_lines(folder / "blind" / f"{family}-{shard}.jsonl", blind)
    texts = [{"text": " ".join(m["content"] for m in r["messages"])} for r in blind]
    data = "".join(json.dumps(text) + "\n" for text in texts).encode()
    (folder / f"text-{family}-{shard}.jsonl.zst").write_bytes(compress_zstd(data))
    progress(n)


def write_examples(examples: list[Example], folder: Path, image_folder: str) -> list[Record]:
    """Write the examples' images, equal ones once; return the records that name them."""
    (folder / image_folder).mkdir(parents=True)
    names: dict[bytes, str] = {}
    records = []
    for example in examples:
        messages, images = [], []
        for prompt, answer in example.turns:
            words = []
            for part in prompt:
                if isinstance(part, str):
                    words.append(part)
                    continue
                if part not in names:
                    names[part] = f"{image_folder}/{hashlib.sha256(part).hexdigest()[:16]}.jpg"
                    (folder / names[part]).write_bytes(part)
                words.append(MARK)
                images.append(names[part])
            messages += [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": answer}]
        records.append({"images": images, "messages": messages})
    return records


def _write_lines(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
