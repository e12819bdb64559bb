"""A task: samples of a dataset, how a model is asked about one, and what its answers are worth.

`Task.ask` is a generator: it yields a list of requests, gets the list of their answers, may ask again with them (a chain of
thought), and returns an outcome. The engine drives the generators of many samples side by side, so that requests of
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
from kosmos_lit.evaluation.requests import Parts, Request, Response
from kosmos_lit.evaluation.statistics import Metric, mean_metric


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a dataset, as its authors' files have it."""

    key: str
    """What finds it in the files; unique in its split."""
    images: tuple[Path, ...] = ()
    """Its own images; the control with shuffled images exchanges these among samples."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The rest, plain data: question, answers, label ..."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one sample."""

    prediction: str
    """The model's answer: what it wrote, or the candidate it holds likeliest."""
    target: Any
    """What would have been right, plain data: a label, or a list of references."""
    scores: Mapping[str, float]
    """What the answer is worth by each per-sample measure; 0 to 1 unless the measure says otherwise."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Beside that what the figures need (a probability for ROC-AUC), or a reader wants to see (a rationale).

    `shares`, if any: what decided between candidates, as {candidate: share of 1}; reports draw it."""


RequestGenerator = Generator[Sequence[Request], Sequence[Response], Outcome]


class Recorded(ABCMeta):
    """Keeps what its classes' objects were made with, as it is part of what their results are of."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.options = _options(cls, args, kwargs)
        return made


class Task(metaclass=Recorded):
    """One row block of a table: a dataset in its authors' files, a prompt, a metric.

    Subclasses read files only in `samples` and `pool`, never in `__init__`, so that a configuration can be checked and
    printed where there is no data.
    """

    title: str
    """Name in tables."""
    published: str | None = None
    """Key of the published figures in `evaluation.published`; None: there are none."""
    chance: float | None = None
    """Share that guessing gets right, 0 to 1; None: not defined."""
    headline: ClassVar[str]
    """The figure that stands for the task in a summary."""
    options: dict[str, Any]
    """What it was made with, defaults too, by name."""

    def __init__(
        self,
        path: str,
        n_shots: int = 0,
        seed: int = 0,
        max_samples: int | None = None,
        title: str | None = None,
        chance: float | None = None,
    ) -> None:
        """Take what every task has.

        Args:
            path: Folder with the dataset's files as their authors distribute them.
            n_shots: Demonstrations before each question, drawn from the training split.
            seed: Seed of the demonstrations, and of the choice where `max_samples` leaves some out.
            max_samples: Most samples, drawn by the seed; None: all. `samples` returns all of them.
            title: Name of other data in the same files, with which nothing published compares; None: the dataset itself.
            chance: Share that guessing gets right in such data; None: as the task says.
        """
        self.path, self.n_shots, self.seed, self.max_samples = Path(path), n_shots, seed, max_samples
        if chance is not None:
            self.chance = chance
        if title is not None:
            self.title, self.published = title, None

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """Return the samples of the evaluated split, in the order of its files.

        Raises: UserError saying which files are missing, and where their authors publish them.
        """

    def pool(self) -> Sequence[Sample]:
        """Return the samples that demonstrations are drawn from; read only if `n_shots` is positive."""
        return ()

    @abstractmethod
    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Yield requests, receive their answers, return what they are worth."""

    def scored(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return outcomes with those of their scores that only all samples together give; by default as they are."""
        return outcomes

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        """Return the task's figures with their intervals; by default the mean of each per-sample score."""
        names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
        return {name: mean_metric([outcome.scores[name] for outcome in outcomes]) for name in names}

    def files(self, outcomes: Sequence[Outcome], failed: Sequence[str]) -> dict[str, str]:
        """Return texts to keep beside the figures, by file name, such as what a benchmark takes; by default none.

        Args:
            outcomes: of the samples that could be asked about.
            failed: keys of the others.
        """
        return {}

    def shots(self, sample: Sample, pool: Sequence[Sample]) -> list[Sample]:
        """Draw the demonstrations of a sample: the same for the same seed and sample, whatever else is evaluated.

        Raises: UserError if there are not enough of them.
        """
        # One more than needed, in case it is the sample itself: a pool has up to half a million samples.
        n = min(self.n_shots + 1, len(pool)) if self.n_shots else 0
        drawn = [other for other in Random(f"{self.seed} {sample.key}").sample(pool, n) if other.key != sample.key]
        if len(drawn) < self.n_shots:
            raise UserError(f"{self.title}: {self.n_shots} demonstrations are asked for, but {len(drawn)} are there")
        return drawn[: self.n_shots]


def chosen(task: Task, samples: Sequence[Sample], most: int | None = None) -> list[Sample]:
    """Return a task's samples, or as many of them as it and `most` allow, in their order.

    Which ones follows from the task's seed, and fewer are always among more: what has been asked is of use when more is.

    Raises: UserError if two have the same key.
    """
    if twice := [key for key, n in Counter(sample.key for sample in samples).items() if n > 1]:
        raise UserError(f"{task.title}: {len(twice)} keys are of several samples, {twice[0]!r} for one")
    n = min(len(samples) if limit is None else limit for limit in (None, task.max_samples, most))
    if n >= len(samples):
        return list(samples)
    drawn = list(range(len(samples)))
    Random(f"samples {task.seed}").shuffle(drawn)
    return [samples[i] for i in sorted(drawn[:n])]


def _options(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor and of those that it hands its further ones on to, with their defaults."""
    found: dict[str, Any] = {}
    for number, owner in enumerate(c for c in cls.__mro__ if "__init__" in vars(c)):
        parameters = list(signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        given = zip((p.name for p in named), args, strict=False) if number == 0 else ()
        found |= {p.name: p.default for p in named if p.default is not Parameter.empty and p.name not in found} | dict(given)
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return found | dict(kwargs)


def joined(*prompts: Parts) -> Parts:
    """Return prompts as one, one after another."""
    return tuple(part for parts in prompts for part in parts)
