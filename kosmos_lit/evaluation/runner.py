"""Evaluates a model on tasks: who asks about which samples, what is kept, what it sums up to."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from math import nan
from pathlib import Path
from typing import Any, Protocol

import torch

from kosmos_lit.checks.device import describe_device
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.image_control import shuffle_images
from kosmos_lit.evaluation.record import Failure, Result
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.evaluation.storage import METRICS, Store, check_fingerprint, read_metrics, without_nan, write_whole
from kosmos_lit.evaluation.task import Sample, Task, chosen
from kosmos_lit.model import Kosmos
from kosmos_lit.terminal import clock_time, write_line
from kosmos_lit.tokenizer import Tokenizer

LINE_SECONDS = 10.0
"""Between two lines of progress where they stand one after the other."""
REDRAW_SECONDS = 0.2
"""Between two on a terminal."""
NOBODY = "no other sample's images"


class Ranks(Protocol):
    """The processes that share an evaluation out, each with the whole model."""

    rank: int
    world: int

    def broadcast(self, value: Any) -> Any:
        """Return what the first process gives, on all of them; nobody goes on before all have come here."""


class SingleProcess:
    """One process."""

    rank, world = 0, 1

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value


def read_samples(config: EvalConfig) -> dict[str, list[Sample]]:
    """Return whom each task asks about, by its name.

    Raises: UserError if a dataset is missing.
    """
    found = {}
    for name, task in config.named.items():
        found[name] = chosen(task, task.samples(), config.max_samples)
        read_pool(name, task)  # what is missing there is said now, not when its turn comes
    return found


def read_pool(name: str, task: Task) -> Sequence[Sample]:
    """Return what a task's demonstrations are drawn from; nothing if it has none.

    Raises: UserError if files are missing, or there are too few.
    """
    pool = task.pool() if task.n_shots else ()
    if task.n_shots and len(pool) <= task.n_shots:
        raise UserError(f"{name}: n_shots is {task.n_shots}, but there are {len(pool)} demonstrations to draw from")
    return pool


class Evaluation:
    """The tasks of one model, and a folder that keeps their results."""

    def __init__(
        self,
        model: Kosmos,
        tokenizer: Tokenizer,
        config: EvalConfig,
        folder: Path,
        *,
        about: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        replace: bool = False,
        quiet: bool = False,
        samples: Mapping[str, Sequence[Sample]] | None = None,
    ) -> None:
        """Read the samples of all tasks, and take up what the folder holds of an earlier start.

        Args:
            model: the model, whole on this process.
            tokenizer: its tokenizer.
            config: tasks, and how to ask.
            folder: where results are kept.
            about: what `metrics.json` is to say of the model: its checkpoint, step ...
            ranks: who shares the work; None: this process alone.
            replace: whether results of other weights or options in the folder are deleted; else they are a mistake.
            quiet: whether nothing is said of how far it is.
            samples: those of each task, where `read_samples` has been called before.

        Raises: UserError if a dataset is missing, or the folder holds results of something else.
        """
        self.config, self.folder, self.ranks, self.quiet = config, folder, ranks or SingleProcess(), quiet
        self.engine = RequestScheduler(
            model, tokenizer, batch_tokens=config.batch_tokens, image_fit=config.image_fit,
            image_control=config.image_control,
        )  # fmt: skip
        self.samples = samples if samples is not None else read_samples(config)
        self.about = {"parameters": sum(p.numel() for p in model.parameters()), **(about or {})}
        self.identity = {
            "weights": weights_digest(model), "tokenizer": tokenizer.fingerprint, "image_control": config.image_control,
            "image_fit": config.image_fit, "precision": self.about.get("precision", "32-true"),
            "_checkpoint": self.about.get("checkpoint"), "_step": self.about.get("step"),
        }  # fmt: skip
        self._do_first(lambda: self._check_fingerprints(replace))

    def _check_fingerprints(self, replace: bool) -> None:
        check_fingerprint(self.folder, self.identity, replace=replace)
        for name, task in self.config.named.items():
            options = {"_max_samples" if option == "max_samples" else option: v for option, v in task.options.items()}
            check_fingerprint(self.folder / name, {"class": _class_path(task)} | options, replace=replace)

    def _do_first(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something, and all have its result, or its mistake."""
        found: Any = None
        if self.ranks.rank == 0:
            try:
                found = work(), None
            except UserError as error:
                found = None, str(error)
        value, mistake = self.ranks.broadcast(found)
        if mistake is not None:
            raise UserError(mistake)
        return value

    def run(self, name: str) -> dict[str, Any]:
        """Ask what has not been asked of a task yet; return its entry in `metrics.json`, on all processes.

        Raises: UserError if none of its samples could be asked about.
        """
        task, samples, store = self.config.named[name], self.samples[name], Store(self.folder / name)
        order = [sample.key for sample in samples]
        done = self._do_first(lambda: store.gather(order))
        pool = read_pool(name, task)
        shown: Sequence[Sample | None] = samples
        if self.config.image_control == "shuffled":
            shown = shuffle_images(samples, task.seed)
        missing = [i for i, sample in enumerate(samples) if sample.key not in done][self.ranks.rank :: self.ranks.world]
        watch = TaskProgress(name, len(samples), len(done & set(order)), self.ranks, quiet=self.quiet)
        with store.writer(self.ranks.rank) as writer:
            alone = [Result(samples[i].key, [], None, Failure(NOBODY, "as many")) for i in missing if shown[i] is None]
            writer.write(alone)
            watch.add(len(alone))
            for results in self.engine.run(task, [s for i in missing if (s := shown[i]) is not None], pool):
                writer.write(results)
                watch.add(len(results))
        self.ranks.broadcast(None)  # all have written
        entry: dict[str, Any] = self._do_first(lambda: self._sum_up(name, task, store, order, watch.seconds))
        watch.end(entry)
        if entry["n_failed"] == entry["n_samples"] > 0:
            [(reason, n)] = list(entry["failures"].items())[:1]
            raise UserError(f"{name}: nothing could be asked about any of {n} samples: {reason}, {entry['example']}")
        return entry

    def _sum_up(self, name: str, task: Task, store: Store, order: Sequence[str], seconds: float) -> dict[str, Any]:
        """Gather the results of all processes, and write the task's figures beside those that are there."""
        store.gather(order)
        wanted = set(order)
        results = [result for result in store.results() if result.key in wanted]
        answered = [(result.key, result.outcome) for result in results if result.outcome is not None]
        outcomes = task.scored([outcome for _, outcome in answered])
        pairs = zip(answered, outcomes, strict=True)
        store.rescore({key: new.scores for (key, old), new in pairs if new.scores != old.scores})
        failures = [result.failure for result in results if result.failure is not None]
        if lacking := wanted - {result.key for result in results}:
            raise UserError(f"{self.folder / name}: {len(lacking)} results are missing: all processes must share it")
        entry = {
            "class": _class_path(task), "title": task.title, "published": task.published, "headline": task.headline,
            "chance": task.chance, "n_shots": task.n_shots, "seed": task.seed, "n_samples": len(results),
            "n_failed": len(failures), "failures": dict(Counter(failure.reason for failure in failures).most_common()),
            "example": failures[0].detail if failures else None,
            "options": json.loads(json.dumps(task.options, default=str)), "seconds": round(seconds, 1),
            "metrics": {key: asdict(metric) for key, metric in task.metrics(outcomes).items()} if outcomes else {},
        }  # fmt: skip
        whole = {
            "model": self.about | {"weights": self.identity["weights"]}, "image_control": self.config.image_control,
            "machine": describe_device(_device(self.engine.model)), "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "tasks": read_metrics(self.folder).get("tasks", {}) | {name: entry},
        }  # fmt: skip
        failed = [result.key for result in results if result.failure is not None]
        for file, text in task.files(outcomes, failed).items():
            write_whole(self.folder / name / file, text.encode())
        write_whole(self.folder / METRICS, json.dumps(without_nan(whole), indent=1, ensure_ascii=False).encode())
        return entry


    def report(self) -> list[Path]:
        """Write the report of all that the folder holds; return the files that there are."""
        from kosmos_lit.report.evaluation import write_report

        return [self.folder / METRICS, *write_report(self.folder)]


def evaluate(
    model: Kosmos, tokenizer: Tokenizer, config: EvalConfig, folder: str | Path, about: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in this process; return the tasks' entries in `metrics.json` by their names.

    Args:
        model: the model; `model.tokenizer` need not be set.
        tokenizer: its tokenizer.
        config: tasks, and how to ask.
        folder: where results are kept; what is there already is not asked again.
        about: what `metrics.json` is to say of the model.

    Raises: UserError as `Evaluation` does.
    """
    evaluation = Evaluation(model, tokenizer, config, Path(folder), about=about)
    return {name: evaluation.run(name) for name in config.named}


class TaskProgress:
    """Says how far a task is, on the first process."""

    def __init__(self, name: str, n: int, n_before: int, ranks: Ranks, *, quiet: bool) -> None:
        """Take the task's name, its samples, and those that had been asked about before."""
        self._name, self._n, self._before, self._world = name, n, n_before, ranks.world
        self._is_silent = quiet or ranks.rank > 0
        self._asked, self._drawn = 0, 0.0
        self._began = self._drawn = time.monotonic()
        self._terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, n: int) -> None:
        """Count samples of this process; the others are taken to be as fast."""
        self._asked += n
        now = time.monotonic()
        if self._is_silent or now - self._drawn < (REDRAW_SECONDS if self._terminal else LINE_SECONDS):
            return
        self._drawn = now
        asked = min(self._asked * self._world, self._n - self._before)
        speed, left = asked / self.seconds, self._n - self._before - asked
        time_left = f"  {clock_time(left / speed)} left" if speed else ""
        write_line(f"{self._name}  {self._before + asked:,} of {self._n:,} samples  {speed:.1f}/s{time_left}")

    def end(self, entry: Mapping[str, Any]) -> None:
        """Say what came out."""
        if not self._is_silent:
            before = f", {self._before:,} of them before" if self._before else ""
            failed = f", {entry['n_failed']:,} failed" if entry["n_failed"] else ""
            how = f"{self._n:,} samples in {clock_time(self.seconds)}{before}{failed}"
            write_line(f"{self._name}  {headline(entry)}  ({how})", keep=True)


def headline(entry: Mapping[str, Any]) -> str:
    """Return a task's figure for people: 61.7 [52.5, 70.0]."""
    metric = entry["metrics"].get(entry["headline"])
    if metric is None:
        return f"no {entry['headline']}"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{entry['headline']} {value:.1f} [{low:.1f}, {high:.1f}]"


def summary(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the tasks' headline figures, 100 times what they are, with their intervals."""
    wide = max(len("task"), *map(len, entries)) + 2
    lines = [f"{'task':<{wide}}{'metric':<18}{'value':>7}{'95 % interval':>17}{'chance':>9}{'samples':>10}{'failed':>8}"]
    for name, entry in entries.items():
        metric = entry["metrics"].get(entry["headline"], {"value": nan, "low": nan, "high": nan})
        value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
        chance = "" if entry["chance"] is None else f"{100 * entry['chance']:.1f}"
        lines.append(
            f"{name:<{wide}}{entry['headline']:<18}{value:>7.1f}{f'{low:.1f} to {high:.1f}':>17}{chance:>9}"
            f"{entry['n_samples']:>10,}{entry['n_failed']:>8,}"
        )
    return "\n".join(lines)


def weights_digest(model: Kosmos) -> str:
    """Return what tells weights from others, whatever file they came from: sums of bits by tensor, alike on every device."""
    total = 0
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.detach().contiguous().view(-1)
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        place = hash_of(name + str(tuple(tensor.shape)))
        total += place * (1 + 2 * int(whole.view(ints).sum(dtype=torch.int64)))
    return f"{total % (1 << 64):016x}"


def hash_of(text: str) -> int:
    """Return an odd number that follows from a text."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") | 1


def _device(model: Kosmos) -> torch.device:
    return model.decoder.embed_tokens.weight.device


def _class_path(task: Task) -> str:
    return f"{type(task).__module__}.{type(task).__qualname__}"
