"""The embedded world as a data module: it is drawn if it is missing, and `predict` asks about held-out scenes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import torch

from datamodules.config import CorpusConfig, TokenizerConfig
from datamodules.io.hashing import hash_key
from datamodules.loader import PromptLoader
from datamodules.module import MixtureData
from datamodules.sources import ReadOptions
from datamodules.world.families import FamiliesConfig, corpora, write_families
from datamodules.world.finetune_task import TaskConfig, write_task
from datamodules.world.language import PROMPT, canonical_caption
from datamodules.world.scene import Holdout, Scene, held_out_scenes, paint_jpeg
from datamodules.world.sets import SetsConfig, write_sets
from datamodules.world.write import WorldConfig, write_world
from kosmos_lit.batch import PromptBatch
from kosmos_lit.images import decode

QUESTIONS = {"object": 1000, "count": 1000, "pair": 120}
"""Most questions of each kind; enough for every held-out combination of the first two."""
BATCH_SIZE = 64


class WorldData(MixtureData):
    """The world's three corpora, drawn, then prepared and mixed like any others, and questions about held-out scenes."""

    def __init__(
        self,
        world: WorldConfig,
        vocab_size: int = 512,
        val_share: float = 0.02,
        task: TaskConfig | None = None,
        turn_template: str = "{user} {assistant}",
        families: FamiliesConfig | None = None,
        sets: SetsConfig = SetsConfig(),
        **options: Any,
    ) -> None:
        """Take the world's size; all other options, except tokenizer and corpora, are those of MixtureData.

        Args:
            world: How much is drawn, and where.
            vocab_size: SentencePiece pieces of the world's tokenizer.
            val_share: Share of the documents kept for validation.
            task: Examples of a new task, drawn as instruction data; None: none.
            turn_template: Template of the task's questions and answers; the world's alphabet has no colon.
            families: Examples of the world's task families, each family a source under its name; None: none.
            sets: The families' evaluation sets, drawn beside the examples.
            **options: Those of MixtureData.
        """
        self.world, self.task, self.families, self.sets = world, task, families, sets
        if task is not None:
            options["instruct"] = CorpusConfig(
                format="instruct",
                input=[f"{task.path}/train.jsonl"],
                val_input=[f"{task.path}/val.jsonl"],
                index=f"{task.path}/index",
                read=ReadOptions(turn_template=turn_template),
            )
        folder = Path(world.path)

        def corpus(format_: Any, files: str, index: str) -> CorpusConfig:
            return CorpusConfig(format=format_, input=[str(folder / files)], index=str(folder / index), val_share=val_share)

        tokenizer_input: list[str] | None = None
        if families is not None:
            options["sources"] = corpora(families, folder, val_share) | (options.get("sources") or {})
            tokenizer_input = [
                str(folder / files) for files in ("text-*.jsonl.zst", "caption-*.tar", "families/text-*.jsonl.zst")
            ]
        super().__init__(
            tokenizer=TokenizerConfig(path=str(folder / "tokenizer"), vocab_size=vocab_size, input=tokenizer_input),
            text=corpus("jsonl", "text-*.jsonl.zst", "index/text"),
            caption=corpus("img2dataset", "caption-*.tar", "index/caption"),
            interleaved=corpus("warc", "pages-*.warc.gz", "index/interleaved"),
            **options,
        )

    def prepare_data(self) -> None:
        """Draw the world if it is missing, then prepare it."""
        write_world(self.world)
        if self.task is not None:
            write_task(self.task, self.world)
        if self.families is not None:
            write_families(self.families, self.world)
            write_sets(self.sets, self.world)
        super().prepare_data()

    def predict_dataloader(self) -> Iterable[Any]:
        """Return a loader of questions about held-out combinations, and about held-out examples of the task."""
        return PromptLoader(lambda: chain(self._scene_questions(), self.instruct_prompts()), self.seq_len)

    def _scene_questions(self) -> Iterator[PromptBatch]:
        random = Random(hash_key("questions", self.world.seed))
        holdout = Holdout(self.world.seed, self.world.held_out)
        for kind, limit in QUESTIONS.items():
            scenes = held_out_scenes(random, holdout, kind, limit)
            for i in range(0, len(scenes), BATCH_SIZE):
                yield self._ask(scenes[i : i + BATCH_SIZE], random)

    def _ask(self, scenes: list[Scene], random: Random) -> PromptBatch:
        images = [decode(paint_jpeg(scene, random), self.image_size, "square") for scene in scenes]
        n = len(scenes)
        return PromptBatch(
            prompts=[PROMPT] * n,
            images=torch.stack([torch.from_numpy(image) for image in images]),
            n_images=[1] * n,
            targets=[canonical_caption(scene) for scene in scenes],
            tasks=[scene.kind for scene in scenes],
        )
