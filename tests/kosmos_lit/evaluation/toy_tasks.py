"""Tasks with toy samples, and images on disk, for tests of evaluation."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kosmos_lit.evaluation.requests import Generate, LogLikelihood
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig

WORDS = "the cat sat on mat a red square and blue circle jackdaws love my big sphinx of quartz".split()


def draw_images(folder: Path, n: int, side: int = 17) -> list[Path]:
    """Write n images of noise, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)).save(path)
    return paths


class TwoRounds(Task):
    """First scores candidates, then generates with the likelier in the prompt; every third sample only scores."""

    title, main_metric, chance = "TwoRounds", "accuracy", 0.5

    def __init__(self, path: str, n: int = 7, max_new_tokens: int = 5, **options: int) -> None:
        """Set the sizes.

        Args:
            path: Folder with images.
            n: Samples.
            max_new_tokens: Of the second response.
            options: Those of every task.
        """
        super().__init__(path, **options)
        self.n, self.max_new_tokens = n, max_new_tokens

    def samples(self) -> Sequence[Sample]:
        """Return samples with 0, 1 or 2 images and prompts of different lengths."""
        paths = sorted(self.path.glob("*.png"), key=lambda path: int(path.stem))
        return [
            Sample(
                key=f"s{i}",
                images=tuple(paths[(i + j) % len(paths)] for j in range(i % 3)),
                data={"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 5)), "label": i % 2},
            )
            for i in range(self.n)
        ]

    def pool(self) -> Sequence[Sample]:
        """Return samples for demonstrations."""
        return [Sample(key=f"shot {i}", data={"text": WORDS[i], "label": 1}) for i in range(5)]

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Score, then generate."""
        before = tuple(f"{shot.data['text']} yes " for shot in shots)
        prompt = (*before, *sample.images, sample.data["text"])
        [candidates] = yield [LogLikelihood(prompt, ("a cat", "red square and"))]
        assert isinstance(candidates, tuple)
        best = max(range(2), key=lambda i: candidates[i].mean)
        data = {"log_probs": [candidates[0].total, candidates[1].total]}
        if int(sample.key[1:]) % 3 != 2:
            settings = GenerationConfig(max_new_tokens=self.max_new_tokens, n_beams=1 + int(sample.key[1:]) % 2)
            [continuation] = yield [Generate((*prompt, " ", candidates[best].text), settings)]
            data["written"] = continuation.text  # type: ignore[union-attr, assignment]
        scores = {"accuracy": float(best == sample.data["label"])}
        return Outcome(prediction=candidates[best].text, target=sample.data["label"], scores=scores, data=data)


class Crashing(TwoRounds):
    """Kills or interrupts its process at the sample s4 if its folder has a file `die` that says which."""

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask as `TwoRounds` does."""
        trigger = self.path / "die"
        if sample.key == "s4" and trigger.exists():
            how = trigger.read_text()
            trigger.unlink()
            if how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from super().ask(sample, shots))
