"""Evaluates a model on tasks: distributes the samples over processes, stores the results, computes the metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from kosmos_lit.checks.device import describe_device
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.image_control import shuffle_images
from kosmos_lit.evaluation.progress import TaskProgress
from kosmos_lit.evaluation.results import METRICS, Failure, Result, without_nan
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.evaluation.storage import Store, check_fingerprint, read_metrics, weights_digest
from kosmos_lit.evaluation.task import Sample, Task, limit_samples
from kosmos_lit.files import write_atomically
from kosmos_lit.inference.engine import Engine

NO_PARTNER = Failure("no images to exchange", "too few samples have as many images but other ones")


class Ranks(Protocol):
    """The processes that share an evaluation, each with the full model."""

    rank: int
    world_size: int

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value on all ranks, after all of them have called."""


class SingleProcess:
    """One process."""

    rank, world_size = 0, 1

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value


def read_samples(config: EvalConfig) -> dict[str, list[Sample]]:
    """Return the samples of each task, by its name.

    Raises: UserError naming all datasets that are missing.
    """
    samples, missing = {}, list[UserError]()
    for name, task in config.enabled_tasks.items():
        try:
            samples[name] = limit_samples(task, task.samples(), config.max_samples)
            read_pool(name, task)  # its missing files are an error now, not after hours of other tasks
        except UserError as error:
            missing.append(error)
    if len(missing) > 1:
        # The same file may serve several tasks.
        messages = dict.fromkeys(map(str, missing))
        raise UserError("\n  ".join([f"{len(missing)} of {len(config.enabled_tasks)} tasks cannot be read:", *messages]))
    if missing:
        raise missing[0]
    return samples


def read_pool(name: str, task: Task) -> Sequence[Sample]:
    """Return the samples that a task's demonstrations are drawn from; none without demonstrations.

    Raises: UserError if files are missing, or have too few samples.
    """
    pool = task.pool() if task.n_shots else ()
    if task.n_shots and len(pool) <= task.n_shots:
        raise UserError(f"{name}: n_shots is {task.n_shots}, but there are {len(pool)} demonstrations to draw from")
    return pool


class Evaluation:
    """A model with tasks, and the folder of their results."""

    def __init__(
        self,
        engine: Engine,
        config: EvalConfig,
        folder: Path,
        *,
        model_info: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        replace: bool = False,
        quiet: bool = False,
        samples: Mapping[str, Sequence[Sample]] | None = None,
    ) -> None:
        """Read the samples of all tasks, and check the results that the folder has already.

        Args:
            engine: the model, unsharded on this process, with its tokenizer.
            config: tasks and settings.
            folder: of the results.
            model_info: facts of the model for `metrics.json`: its checkpoint, step ...
            ranks: the processes that share the work; None: this process alone.
            replace: delete results of other weights or options; else they are an error.
            quiet: print no progress.
            samples: those of each task, if `read_samples` has been called before.

        Raises: UserError if a dataset is missing, or the folder has results of another evaluation.
        """
        self.config, self.folder, self.ranks, self.quiet = config, folder, ranks or SingleProcess(), quiet
        self.scheduler = RequestScheduler(
            engine, batch_tokens=config.batch_tokens, image_fit=config.image_fit, image_control=config.image_control
        )
        self.samples = samples if samples is not None else read_samples(config)
        self.model_info = {"parameters": sum(p.numel() for p in engine.model.parameters()), **(model_info or {})}
        # A digest of the weights, not their path: a moved checkpoint continues. Values after an underscore may differ.
        self.fingerprint = {
            "weights": weights_digest(engine.model),
            "tokenizer": self.scheduler.tokenizer.fingerprint,
            "image_control": config.image_control,
            "image_fit": config.image_fit,
            "precision": self.model_info.get("precision", "32-true"),
            "_checkpoint": self.model_info.get("checkpoint"),
            "_step": self.model_info.get("step"),
        }
        self._on_rank_zero(lambda: self._check_fingerprints(replace))

    def _check_fingerprints(self, replace: bool) -> None:
        check_fingerprint(self.folder, self.fingerprint, replace=replace)
        for name, task in self.config.enabled_tasks.items():
            # A smaller limit selects a part of the same samples, so results are of use under another one.
            options = {"_max_samples" if option == "max_samples" else option: v for option, v in task.options.items()}
            check_fingerprint(self.folder / name, {"class": _class_path(task)} | options, replace=replace)

    def _on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run something on rank zero; return its result, or raise its error, on all ranks.

        An error on one rank alone would leave the others waiting.
        """
        # On rank zero a pair of result and message, which the broadcast gives to the others.
        outcome: Any = None
        if self.ranks.rank == 0:
            try:
                outcome = work(), None
            except UserError as error:
                outcome = None, str(error)
        value, message = self.ranks.broadcast(outcome)
        if message is not None:
            raise UserError(message)
        return value

    def run(self, name: str) -> dict[str, Any]:
        """Evaluate the remaining samples of a task; return its entry in `metrics.json`, on all ranks.

        Raises: UserError if none of its samples has an outcome.
        """
        task, samples, store = self.config.enabled_tasks[name], self.samples[name], Store(self.folder / name)
        keys = [sample.key for sample in samples]
        # One rank merges the files of an earlier start, which may have had another number of ranks.
        done = self._on_rank_zero(lambda: store.gather(keys))
        pool = read_pool(name, task)
        controlled: Sequence[Sample | None] = samples
        # All samples, also those with results: a restart must not change who exchanges images with whom.
        if self.config.image_control == "shuffled":
            controlled = shuffle_images(samples, task.seed)
        # Every n-th sample, not a block: datasets are often sorted by class or length, and ranks should take equally long.
        remaining = [i for i, key in enumerate(keys) if key not in done][self.ranks.rank :: self.ranks.world_size]
        is_quiet = self.quiet or self.ranks.rank > 0
        # & keys: the folder may have samples that a smaller limit leaves out.
        progress = TaskProgress(name, len(samples), len(done & set(keys)), self.ranks.world_size, quiet=is_quiet)
        with store.writer(self.ranks.rank) as writer:
            # Samples without a partner fail without a request.
            failed = [Result(keys[i], [], None, NO_PARTNER) for i in remaining if controlled[i] is None]
            writer.write(failed)
            progress.add(len(failed))
            for results in self.scheduler.run(task, [s for i in remaining if (s := controlled[i]) is not None], pool):
                writer.write(results)
                progress.add(len(results))
        self.ranks.broadcast(None)  # a barrier: all ranks have written
        entry: dict[str, Any] = self._on_rank_zero(lambda: self._write_metrics(name, task, store, keys, progress.seconds))
        progress.end_with(entry)
        # Raised once all is on disk: the samples' file says why each of them failed.
        if entry["n_failed"] == entry["n_samples"] > 0:
            [(reason, n)] = list(entry["failures"].items())[:1]  # the most frequent: `failures` is sorted
            raise UserError(f"{name}: all samples failed, {n} of them so: {reason}, {entry['example']}")
        return entry

    def _write_metrics(self, name: str, task: Task, store: Store, keys: Sequence[str], seconds: float) -> dict[str, Any]:
        """Merge the results of all ranks, and write the task's entry to `metrics.json` beside those of other tasks."""
        store.gather(keys)
        expected = set(keys)
        # The folder may have more, from a start with a larger max_samples: they stay, but do not count.
        results = [result for result in store.results() if result.key in expected]
        answered = [(result.key, result.outcome) for result in results if result.outcome is not None]
        # Scores such as CIDEr need all samples; they are written to each sample's line afterwards.
        outcomes = task.add_corpus_scores([outcome for _, outcome in answered])
        pairs = zip(answered, outcomes, strict=True)
        store.rescore({key: new.scores for (key, old), new in pairs if new.scores != old.scores})
        failures = [result.failure for result in results if result.failure is not None]
        # A rank on a machine with another disk has written its part elsewhere.
        if missing := expected - {result.key for result in results}:
            raise UserError(f"{self.folder / name}: {len(missing)} results are missing: all processes must share the folder")
        entry = {
            "class": _class_path(task),
            "title": task.title,
            "published": task.published,
            "main_metric": task.main_metric,
            "chance": task.chance,
            "n_shots": task.n_shots,
            "seed": task.seed,
            "n_samples": len(results),
            "n_failed": len(failures),
            "failures": dict(Counter(failure.reason for failure in failures).most_common()),
            "example": failures[0].detail if failures else None,
            # Through JSON: tuples become lists, settings text, as in the fingerprint.
            "options": json.loads(json.dumps(task.options, default=str)),
            "seconds": round(seconds, 1),
            "metrics": {key: asdict(metric) for key, metric in task.metrics(outcomes).items()} if outcomes else {},
        }
        evaluation = {
            "model": self.model_info | {"weights": self.fingerprint["weights"]},
            "image_control": self.config.image_control,
            "machine": describe_device(self.scheduler.engine.device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            # Tasks are evaluated one after another; the entries of earlier ones stay.
            "tasks": read_metrics(self.folder).get("tasks", {}) | {name: entry},
        }
        failed_keys = [result.key for result in results if result.failure is not None]
        for file, text in task.submission_files(outcomes, failed_keys).items():
            write_atomically(self.folder / name / file, text.encode())
        # Last: a folder with this entry has all other files of the task.
        content = json.dumps(without_nan(evaluation), indent=1, ensure_ascii=False)
        write_atomically(self.folder / METRICS, content.encode())
        return entry


def evaluate(
    engine: Engine, config: EvalConfig, folder: str | Path, model_info: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in this process; return the tasks' entries in `metrics.json` by their names.

    Args:
        engine: the model with its tokenizer.
        config: tasks and settings.
        folder: of the results; samples that it has already are not evaluated again.
        model_info: facts of the model for `metrics.json`.

    Raises: UserError as `Evaluation` does.
    """
    evaluation = Evaluation(engine, config, Path(folder), model_info=model_info)
    return {name: evaluation.run(name) for name in config.enabled_tasks}


def _class_path(task: Task) -> str:
    return f"{type(task).__module__}.{type(task).__qualname__}"
