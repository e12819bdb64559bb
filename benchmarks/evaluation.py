"""Samples a second of the evaluation's scheduler, and of scoring each pair of prompt and candidate on its own, in one run.

    python -m benchmarks.evaluation [--samples 24] [--rounds 3] [--threads 1] [--json PATH] [--least 3]

Three random sets: questions about an image and questions of text alone, four candidates each, prompts of 60 to 200
positions; and Raven's test, eight images and six candidates that are images too, ranked by the probability of
"Yes". Both sides have the same weights, a decoder of D 512, run in this process round by round in turn, and read images
from disk. The scheduler prefills each prompt once for all its candidates, the common beginning of Raven's six prompts once,
and encodes each image once a batch. The run fails unless scores agree to 1e-4 and the scheduler is `least` times as fast by
CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from kosmos_lit.checks.device import describe_device
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.evaluation.prompts import encode_answers, encode_prompts
from kosmos_lit.evaluation.requests import LogLikelihood, scored_candidates
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.images import load
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.terminal import table
from kosmos_lit.tokenizer import Tokenizer

N_LATENTS, SIDE = 16, 112
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "st", "r")]
TOLERANCE = 1e-4
"""Nats of a candidate, float32."""


class RandomRequests(Task):
    """Log-likelihood requests that the benchmark has drawn."""

    title, main_metric = "Random requests", "accuracy"

    def __init__(self, requests: Sequence[Sequence[LogLikelihood]]) -> None:
        """Take the requests of each sample."""
        super().__init__("nowhere")
        self.requests = requests

    def samples(self) -> list[Sample]:
        """Return one sample for each list of requests."""
        return [Sample(key=str(i)) for i in range(len(self.requests))]

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Score the candidates, and keep their log-probabilities."""
        responses = yield self.requests[int(sample.key)]
        totals = [candidate.total for response in responses for candidate in scored_candidates(response)]
        return Outcome(prediction="", target="", scores={}, data={"totals": totals})


@dataclass(frozen=True)
class Timing:
    """One set on both sides."""

    name: str
    n_samples: int
    n_pairs: int
    samples_per_second: float
    """Of the scheduler, by wall clock."""
    samples_per_second_alone: float
    ratio: float
    """By wall clock, median over the rounds."""
    ratio_cpu: float
    """By CPU time, median over the rounds."""
    largest_difference: float
    """Between a candidate's log-probabilities, nats."""


def make_tokenizer() -> Tokenizer:
    """Train a small vocabulary on the words."""
    import io

    import sentencepiece

    model, random = io.BytesIO(), Random(0)
    sentences = [" ".join(random.choices(WORDS, k=12)) for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=160,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return Tokenizer(model.getvalue())


def make_model(tokenizer: Tokenizer) -> Kosmos:
    """Return a model with random weights, large enough that Python is no part of the time."""
    tower = {"image_size": SIDE, "patch_size": 14, "width": 192, "layers": 4, "head_width": 64}
    text = {"context_length": 3, "vocab_size": 7, "width": 8, "heads": 1, "layers": 1}
    architecture = {"embed_dim": 192, "vision_cfg": tower, "text_cfg": text}
    config = KosmosConfig(
        vision=VisionConfig(architecture=architecture, pretrained=None, image_size=SIDE),
        connector=ConnectorConfig(n_latents=N_LATENTS, n_heads=8),
        decoder=DecoderConfig(
            vocab_size=max(8192, tokenizer.vocab_size), dim=512, n_layers=6, n_heads=8, ffn_dim=2048, max_seq_len=512
        ),
    )
    return Kosmos.create(config).eval()


def draw_sets(folder: Path, n: int) -> dict[str, list[list[LogLikelihood]]]:
    """Return the requests of each sample of each set, and write the images."""
    random = Random(1)

    def text(low: int, high: int) -> str:
        return " ".join(random.choices(WORDS, k=random.randint(low, high)))

    def image() -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.png"
        noise = np.random.default_rng(len(path.name)).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(random.randrange(99))).resize((SIDE, SIDE)).save(path)
        return path

    def four() -> tuple[str, ...]:
        return tuple(text(1, 4) for _ in range(4))

    raven = []
    for _ in range(max(2, n // 4)):
        context = tuple(part for _ in range(8) for part in (image(),))
        head = ("Here are eight images:", *context, "The following image is:")
        raven.append([LogLikelihood((*head, image(), "Is it correct?"), ("Yes",)) for _ in range(6)])
    return {
        "image": [[LogLikelihood((image(), f"Question: {text(20, 80)} Answer:"), four())] for _ in range(n)],
        "text": [[LogLikelihood((f"{text(30, 95)} Answer:",), four())] for _ in range(n)],
        "raven": raven,
    }


def by_scheduler(model: Kosmos, tokenizer: Tokenizer, requests: Sequence[Sequence[LogLikelihood]]) -> list[float]:
    """Return the log-probabilities of all candidates, by the scheduler."""
    task = RandomRequests(requests)
    totals: dict[str, list[float]] = {}
    for results in RequestScheduler(Engine(model, tokenizer), batch_tokens=4096).run(task, task.samples()):
        totals |= {result.key: result.outcome.data["totals"] for result in results if result.outcome}
    return [total for i in range(len(requests)) for total in totals[str(i)]]


def by_pairs(model: Kosmos, tokenizer: Tokenizer, requests: Sequence[Sequence[LogLikelihood]]) -> list[float]:
    """Return the log-probabilities of all candidates, by one call for each pair of a prompt and a candidate."""
    totals = []
    for request in (request for own in requests for request in own):
        for candidate in request.candidates:
            [prompt] = encode_prompts([request.parts], tokenizer, N_LATENTS)
            paths = [part for part in request.parts if isinstance(part, Path)]
            pixels = np.stack([load(p, SIDE, "square") for p in paths]) if paths else np.zeros((0, 3, SIDE, SIDE), np.uint8)
            ids = encode_answers(request.parts, [candidate], tokenizer)
            [[log_probs]] = Engine(model, tokenizer).token_log_probs([prompt], [ids], torch.from_numpy(pixels))
            totals.append(sum(token.log_prob for token in log_probs))
    return totals


def timed(side: Callable[[], list[float]]) -> tuple[list[float], float, float]:
    """Return the log-probabilities of one side, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    totals = side()
    return totals, time.perf_counter() - wall, time.process_time() - cpu


def measure(
    name: str, model: Kosmos, tokenizer: Tokenizer, requests: Sequence[Sequence[LogLikelihood]], rounds: int
) -> Timing:
    """Return the timing of both sides on a set.

    Raises: SystemExit if their scores differ.
    """
    times, difference = [], 0.0
    by_pairs(model, tokenizer, requests[:1])  # warm-up
    for _ in range(rounds):
        ours, wall, cpu = timed(lambda: by_scheduler(model, tokenizer, requests))
        alone, wall_alone, cpu_alone = timed(lambda: by_pairs(model, tokenizer, requests))
        difference = max(difference, float(np.abs(np.subtract(ours, alone)).max()))
        times.append((wall, wall_alone, wall_alone / wall, cpu_alone / cpu))
    if difference > TOLERANCE:
        raise SystemExit(f"{name}: scores differ by up to {difference}")
    wall, wall_alone, ratio, ratio_cpu = (statistics.median(column) for column in zip(*times, strict=True))
    n = len(requests)
    return Timing(name, n, len(ours), n / wall, n / wall_alone, ratio, ratio_cpu, difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=24, help="of the sets of questions; a quarter of them of Raven's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="file of the results")
    parser.add_argument("--least", type=float, default=3.0, help="ratio by CPU time below which the run fails")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    n = sum(p.numel() for p in model.parameters())
    description = f"{describe_device(torch.device('cpu'))}, {a.threads} threads, {n:,} parameters"
    print(description)
    with tempfile.TemporaryDirectory() as folder:
        sets = draw_sets(Path(folder), a.samples)
        timings = [measure(name, model, tokenizer, requests, a.rounds) for name, requests in sets.items()]
    headers = ["set", "samples", "pairs", "scheduler /s", "pairs /s", "ratio", "by CPU", "differ by"]
    rows = [
        [
            t.name,
            t.n_samples,
            t.n_pairs,
            f"{t.samples_per_second:.2f}",
            f"{t.samples_per_second_alone:.2f}",
            f"{t.ratio:.2f}",
            f"{t.ratio_cpu:.2f}",
            f"{t.largest_difference:.1e}",
        ]
        for t in timings
    ]
    print(table(headers, rows))
    if a.json:
        a.json.write_text(
            json.dumps({"machine": description, "sets": [asdict(t) for t in timings]}, indent=1), encoding="utf-8"
        )
    if slow := [t.name for t in timings if t.ratio_cpu < a.least]:
        raise SystemExit(f"less than {a.least} times as fast as pairs on their own: {', '.join(slow)}")


if __name__ == "__main__":
    main()
