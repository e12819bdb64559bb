"""A task that the world's corpora never set: questions about one thing of an image, as instruction data on disk.

{"images": ["train/00000.jpg"], "messages": [{"role": "user", "content": "<image> what colour is it"},
{"role": "assistant", "content": "red"}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from datamodules.io.hashing import hash_key
from datamodules.world.scene import PLACES, Holdout, Scene, held_out_scenes, paint, training_scene
from datamodules.world.write import WorldConfig, encode_jpeg, is_drawn
from kosmos_lit.files import atomic_folder

IDENTITY = "task.json"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How many examples of the task are drawn."""

    path: str
    """Folder of the drawn examples."""
    seed: int = 0
    """Decides every scene, question and stroke."""
    n_examples: int = 200
    """Examples to train on."""
    n_questions: int = 300
    """Most held-out examples: one for each combination of look and place that no corpus and no example shows."""


def write_task(config: TaskConfig, world: WorldConfig) -> None:
    """Draw the task's `train.jsonl` and `val.jsonl` with their images, unless they are already there.

    Raises: UserError if the folder holds another task.
    """
    folder = Path(config.path)
    identity = {k: v for k, v in asdict(config).items() if k != "path"}
    identity |= {"world": world.seed, "held_out": world.held_out}
    if is_drawn(folder / IDENTITY, identity, "task"):
        return
    holdout = Holdout(world.seed, world.held_out)
    with atomic_folder(folder) as temporary:
        random = Random(hash_key("task", config.seed, "train"))
        shown = [training_scene(random, "object", holdout) for _ in range(config.n_examples)]
        _write(temporary, "train", shown, random)
        random = Random(hash_key("task", config.seed, "val"))
        _write(temporary, "val", held_out_scenes(random, holdout, "object", config.n_questions), random)
        (temporary / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")


def question(scene: Scene, random: Random) -> tuple[str, str]:
    """Return one of three questions about a scene of one thing, and its answer."""
    [thing] = scene.things
    answers = {
        "what colour is it": thing.colour,
        "what shape is it": thing.shape,
        "where is it": PLACES[thing.place],
    }
    asked = random.choice(list(answers))
    return asked, answers[asked]


def _write(folder: Path, split: str, scenes: Sequence[Scene], random: Random) -> None:
    (folder / split).mkdir()
    lines = []
    for i, scene in enumerate(scenes):
        name = f"{split}/{i:05d}.jpg"
        (folder / name).write_bytes(encode_jpeg(paint(scene, random)))
        asked, answer = question(scene, random)
        messages = [{"role": "user", "content": f"<image> {asked}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"images": [name], "messages": messages}) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
