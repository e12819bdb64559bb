"""Lightning's Trainer with the callbacks of configs/base.yaml, and a bare loop over the same model and batches, in one run.

    python -m benchmarks.loop [--steps 60] [--rounds 5] [--threads 1] [--profile] [--json FILE]

Batches are collated beforehand, so that no loader is measured. The loops take turns; a step is forward, backward, clipping,
AdamW and schedule in each:

    bare             these five and nothing else
    Trainer          Lightning with KosmosLit, without callbacks and loggers
    every 10 steps   as configs/base.yaml has it: StepLog, Progress, Predictions, Checkpoints, a CSV and a TensorBoard logger
    every step       the same, logging at every step

Two models: `small`, the quickstart's; and `least`, which computes next to nothing, so that the overhead of a loop shows.
Numbers are medians over the rounds, of CPU time (a machine may have other work to do) and of the clock. `--profile` prints
the functions that take most of the time of `every 10 steps` with `least`.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import io
import json
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu.bench import drawn
from benchmarks.step import show
from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import describe_device
from kosmos_lit.cli.trainer import IGNORED_WARNINGS, KosmosCLI
from kosmos_lit.config import KosmosConfig
from kosmos_lit.lit import KosmosLit
from kosmos_lit.model import Kosmos

CONFIG = Path(__file__).with_name("loop.yaml")
MODELS = {
    "small": [],
    "least": [
        "--model.kosmos.decoder.dim=16",
        "--model.kosmos.decoder.n_layers=1",
        "--model.kosmos.decoder.ffn_dim=16",
        "--data.global_batch_rows=1",
        "--data.micro_batch_rows=1",
    ],
}
TRAINERS = {
    "Trainer": ["--trainer.callbacks=null", "--trainer.logger=false", "--trainer.enable_checkpointing=false"],
    "every 10 steps": ["--trainer.log_every_n_steps=10"],
    "every step": ["--trainer.log_every_n_steps=1"],
}
N_BATCHES, WARM_UP = 12, 10
"""Batches to train on, and steps before the clock runs."""
Seconds = tuple[float, float]
"""Wall-clock and CPU seconds of a step."""


def now(device: torch.device) -> Seconds:
    """Return the wall-clock and CPU seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class Batches:
    """Batches that repeat for ever."""

    def __init__(self, batches: Sequence[KosmosBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[KosmosBatch]:
        while True:
            yield from self.batches


class Clock(Callback):
    """Measures the time per step, without the warm-up."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.seconds: Seconds = (0.0, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self._started = now(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP + self.n_steps:
            wall, cpu = (end - begun for end, begun in zip(now(pl_module.device), self._started, strict=True))
            self.seconds = wall / (self.n_steps + 1), cpu / (self.n_steps + 1)


class Loop:
    """One model with its batches, trained with or without Lightning."""

    def __init__(self, flags: Sequence[str], folder: Path, n_steps: int) -> None:
        self.flags, self.folder, self.n_steps = list(flags), folder, n_steps
        self._net: Kosmos | None = None
        cli = self._cli([])
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        stream = iter(cli.datamodule.train_dataloader())
        self.batches = [next(stream) for _ in range(N_BATCHES)]

    def _cli(self, flags: Sequence[str]) -> KosmosCLI:
        with tempfile.TemporaryDirectory() as unused:  # for a fresh name alone
            root = self.folder / Path(unused).name
        arguments = ["-c", str(CONFIG), *self.flags, *flags, f"--trainer.max_steps={WARM_UP + self.n_steps + 1}"]
        arguments += [f"--trainer.default_root_dir={root}", f"--data.world.path={self.folder / 'world'}"]
        cli = KosmosCLI(arguments, run=False)
        cli.model._build_model = partial(self._initial, cli.model.config, cli.trainer.strategy.root_device)
        return cli

    def _initial(self, config: KosmosConfig, device: torch.device) -> Kosmos:
        """Return a copy of one model: to draw a large one on a CPU takes half a minute each time."""
        if self._net is None:
            self._net = drawn(config, device).cpu()
        return copy.deepcopy(self._net)

    def bare(self) -> Seconds:
        """Train without Lightning."""
        cli = self._cli([])
        lit: KosmosLit = cli.model
        device, precision = cli.trainer.strategy.root_device, cli.trainer.precision_plugin
        lit.configure_model()
        net, c = lit.net.to(device).train(), lit.optimizer_config
        if device.type == "cuda":  # as in a run
            net.compile_blocks()
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        started = 0.0, 0.0
        for number, batch in zip(range(WARM_UP + self.n_steps + 1), Batches(self.batches), strict=False):
            if number == WARM_UP:
                started = now(device)
            batch = batch.to(device)
            with precision.forward_context():
                loss, _ = net.loss(batch, 1 / batch.n_step_targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 2.0)
            optimizer.step()
            schedule.step()
        wall, cpu = (end - begun for end, begun in zip(now(device), started, strict=True))
        return wall / (self.n_steps + 1), cpu / (self.n_steps + 1)

    def trainer(self, flags: Sequence[str], profile: cProfile.Profile | None = None) -> Seconds:
        """Train with Lightning, as a run does."""
        cli = self._cli(flags)
        clock = Clock(self.n_steps)
        cli.trainer.callbacks.append(clock)
        cli.datamodule.train_dataloader = lambda: Batches(self.batches)
        if profile is not None:
            profile.enable()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        if profile is not None:
            profile.disable()
        return clock.seconds


def compare(loop: Loop, n_rounds: int, trainers: Mapping[str, Sequence[str]] = TRAINERS) -> list[dict[str, Any]]:
    """Return the lines of the table: the bare loop, then each of `trainers`, which are given by their flags."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in ("bare", *trainers)}
    for number in range(n_rounds):
        names = list(seconds) if number % 2 == 0 else list(seconds)[::-1]
        for name in names:
            seconds[name].append(loop.bare() if name == "bare" else loop.trainer(trainers[name]))
            gc.collect()  # cycles of references in Lightning keep a model alive
    lines = []
    for name, rounds in seconds.items():
        line: dict[str, Any] = {"loop": name}
        pairs = list(zip(seconds["bare"], rounds, strict=True))
        for clock, i in (("CPU", 1), ("clock", 0)):
            line[f"{clock} ms a step"] = round(1000 * statistics.median(own[i] for own in rounds), 2)
            line[f"{clock} ms beyond bare"] = round(1000 * statistics.median(own[i] - bare[i] for bare, own in pairs), 2)
            line[f"{clock} ratio"] = round(statistics.median(bare[i] / own[i] for bare, own in pairs), 3)
        lines.append(line)
    return lines


def profiled(loop: Loop, n_lines: int = 25) -> str:
    """Return the functions that take most of the time of a run with the callbacks of configs/base.yaml."""
    profile, text = cProfile.Profile(), io.StringIO()
    loop.trainer(TRAINERS["every 10 steps"], profile)
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(n_lines)
    return text.getvalue()


def run(folder: Path, models: Sequence[str], n_steps: int, n_rounds: int, *, profile: bool = False) -> dict[str, Any]:
    """Measure models of `MODELS`; print tables on the way."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    results: dict[str, Any] = {
        "machine": describe_device(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "steps": n_steps,
        "rounds": n_rounds,
    }
    print("; ".join(f"{name} {value}" for name, value in results.items()), flush=True)
    for name in models:
        loop = Loop(MODELS[name], folder, n_steps)
        print(f"{name} model")
        results[name] = compare(loop, n_rounds)
        show(results[name])
        if profile and name == "least":
            print(profiled(loop))
    return results


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=60, help="measured per loop and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="where the results are written too")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), a.models, a.steps, a.rounds, profile=a.profile)
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
