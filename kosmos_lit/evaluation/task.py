"""A task: samples of a dataset, the requests about one of them, and the scores of the responses.

`Task.ask` is a generator: it yields a list of requests, receives the list of their responses, may yield again (a chain of
thought), and returns an outcome. The scheduler drives the generators of many samples side by side, so that requests of
different samples share a batch while a task reads as if there were one sample.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.requests import Request, Response
from kosmos_lit.evaluation.statistics import Metric, mean_metric


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a dataset, as its authors' files have it."""

    key: str
    """Identifies the sample in the files; unique in its split."""
    images: tuple[Path, ...] = ()
    """Its own images; the control `shuffled` exchanges these between samples."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The other fields, plain data: question, answers, label ..."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The prediction for one sample, and its scores."""

    prediction: str
    """The model's answer: the generated text, or the likeliest candidate."""
    target: Any
    """The right answer, plain data: a label, or a list of references."""
    scores: Mapping[str, float]
    """The sample's value of each metric; 0 to 1 unless the metric says otherwise."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Further values: those that a metric needs (a probability for ROC-AUC), or that a reader wants to see (a rationale).

    `probabilities`, if any: {candidate: probability among all candidates}, which decided the prediction; reports draw it."""


RequestGenerator = Generator[Sequence[Request], Sequence[Response], Outcome]


class OptionRecorder(ABCMeta):
    """Keeps the constructor arguments of each instance as `options`: results are only comparable with the same ones."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        # Of the arguments as passed, whatever the constructor has made of them.
        instance.options = _constructor_options(cls, args, kwargs)
        return instance


class Task(metaclass=OptionRecorder):
    """One block of rows of a table: a dataset in its authors' files, a prompt, a metric.

    Subclasses read files only in `samples` and `pool`, never in `__init__`, so that a configuration can be checked and
    printed without the data.
    """

    title: str
    """Name in tables."""
    published: str | None = None
    """Key of the published metrics in `report/published.yaml`; None: there are none."""
    chance: float | None = None
    """Accuracy of guessing, 0 to 1; None: not defined."""
    main_metric: ClassVar[str]
    """Name of the metric that stands for the task in a summary."""
    options: dict[str, Any]
    """Arguments of the constructor by name, defaults included."""

    def __init__(
        self,
        path: str,
        n_shots: int = 0,
        seed: int = 0,
        max_samples: int | None = None,
        title: str | None = None,
        chance: float | None = None,
    ) -> None:
        """Set the options that every task has.

        Args:
            path: Folder with the dataset's files as their authors distribute them.
            n_shots: Demonstrations before each question, drawn from the training split.
            seed: Seed of the demonstrations, and of the samples that `max_samples` keeps.
            max_samples: Largest number of samples, drawn by the seed; None: all. `samples` returns all of them.
            title: Name of other data in the same files, which have no published metrics; None: the dataset itself.
            chance: Accuracy of guessing on such data; None: the task's own.
        """
        self.path, self.n_shots, self.seed, self.max_samples = Path(path), n_shots, seed, max_samples
        # None keeps the class's value, or what a subclass's constructor has set before this one.
        if chance is not None:
            self.chance = chance
        if title is not None:
            self.title, self.published = title, None

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """Return the samples of the evaluated split, in the order of its files.

        Raises: UserError naming the missing files, and where their authors publish them.
        """

    def pool(self) -> Sequence[Sample]:
        """Return the samples that demonstrations are drawn from; called only if `n_shots` is positive."""
        return ()

    @abstractmethod
    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Yield requests, receive their responses, return the outcome."""

    def add_corpus_scores(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return outcomes with the scores that need all samples together (CIDEr); by default unchanged."""
        return outcomes

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        """Return the task's metrics with their intervals; by default the mean of each score over the samples."""
        names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
        return {name: mean_metric([outcome.scores[name] for outcome in outcomes]) for name in names}

    def submission_files(self, outcomes: Sequence[Outcome], failed_keys: Sequence[str]) -> dict[str, str]:
        """Return texts to write beside the results by file name, such as a benchmark server's input; by default none.

        Args:
            outcomes: of the samples that have one.
            failed_keys: keys of the other samples.
        """
        return {}

    def shots(self, sample: Sample, pool: Sequence[Sample]) -> list[Sample]:
        """Draw the demonstrations of a sample: a function of the seed and the sample's key alone.

        Raises: UserError if the pool has too few samples.
        """
        # A string seeds by its SHA-512, so it draws the same in every process, unlike a hash() of it.
        # One more than needed, in case it is the sample itself: a pool has up to half a million samples.
        n = min(self.n_shots + 1, len(pool)) if self.n_shots else 0
        drawn = [other for other in Random(f"{self.seed} {sample.key}").sample(pool, n) if other.key != sample.key]
        if len(drawn) < self.n_shots:
            raise UserError(f"{self.title}: n_shots is {self.n_shots}, but the pool has {len(drawn)} other samples")
        return drawn[: self.n_shots]


def limit_samples(task: Task, samples: Sequence[Sample], max_samples: int | None = None) -> list[Sample]:
    """Return a task's samples in order, at most as many as the task's own limit and `max_samples` allow.

    The task's seed selects them, and a smaller selection is part of every larger one: results are of use after the limit is
    raised.

    Raises: UserError if two samples have the same key.
    """
    if duplicates := [key for key, n in Counter(sample.key for sample in samples).items() if n > 1]:
        raise UserError(f"{task.title}: {len(duplicates)} keys belong to several samples, such as {duplicates[0]!r}")
    # The first None stands for all samples, which no limit exceeds.
    n = min(len(samples) if limit is None else limit for limit in (None, task.max_samples, max_samples))
    if n >= len(samples):
        return list(samples)
    # The first n of one permutation: what a smaller n selects, a larger one does too.
    order = list(range(len(samples)))
    Random(f"samples {task.seed}").shuffle(order)
    return [samples[i] for i in sorted(order[:n])]  # in the files' order again


def _constructor_options(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor with defaults, and with those of base classes that its `**` reaches."""
    options: dict[str, Any] = {}
    # From the class up, each constructor once; inherited ones are those of a base.
    for number, owner in enumerate(c for c in cls.__mro__ if "__init__" in vars(c)):
        parameters = list(signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        # Positional arguments are those of the class's own constructor; bases get theirs by keyword.
        positional = dict(zip((p.name for p in named), args, strict=False)) if number == 0 else {}
        # A default of a subclass goes before that of its base.
        defaults = {p.name: p.default for p in named if p.default is not Parameter.empty and p.name not in options}
        options |= defaults | positional
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break  # a constructor without ** passes nothing on
    return options | dict(kwargs)
