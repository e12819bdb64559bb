"""A sample that is being asked about: its task's generator, and what has been asked and said so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.formatting import readable
from kosmos_lit.evaluation.record import Failure, Result
from kosmos_lit.evaluation.requests import LogLikelihood, Request, Response
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample
from kosmos_lit.inference.config import GenerationConfig

MOST_SHOWN = 16
"""Choices that a result lists; of more it says how many there were."""

_DEFAULTS = asdict(GenerationConfig())


class SampleSession:
    """Drives `Task.ask` of one sample."""

    def __init__(self, sample: Sample, asking: RequestGenerator, blank: Iterable[Path] = ()) -> None:
        """Take a sample, its task's generator, and the images that are to be shown blank."""
        self.sample, self.blank = sample, frozenset(blank)
        self.requests: Sequence[Request] = ()
        """What it asks now."""
        self.outcome: Outcome | None = None
        self.failure: Failure | None = None
        self._asking = asking
        self._said: list[dict[str, Any]] = []
        self._answers: dict[int, Response] = {}

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to ask."""
        return self.outcome is not None or self.failure is not None

    def start(self) -> None:
        """Let it ask for the first time."""
        self._go_on(None)

    def _go_on(self, answers: Sequence[Response] | None) -> None:
        try:
            self.requests = self._asking.send(answers)  # type: ignore[arg-type]
            while not self.requests:
                self.requests = self._asking.send([])
        except StopIteration as end:
            self.outcome = end.value
        except UserError as error:  # what is wrong with one sample must not end the others' evaluation
            self.failure = Failure("sample that cannot be asked about", str(error))
        self._answers = {}

    def take(self, i: int, answer: Response | Failure) -> bool:
        """Take the answer to request i; return whether the sample is done with it."""
        if self.is_done:
            return False  # another request of it has failed
        if isinstance(answer, Failure):
            self.failure = answer
            self._asking.close()
            self._said += [_asked(request) for request in self.requests]
            return True
        self._answers[i] = answer
        if len(self._answers) == len(self.requests):
            answers = [self._answers[i] for i in range(len(self.requests))]
            self._said += [_asked(*each) for each in zip(self.requests, answers, strict=True)]
            self._go_on(answers)
        return self.is_done

    def result(self) -> Result:
        """Return what has become of it."""
        return Result(self.sample.key, self._said, self.outcome, self.failure)


def _asked(request: Request, answer: Response | None = None) -> dict[str, Any]:
    """Return a request and its answer as plain data."""
    images = [str(part) for part in request.parts if not isinstance(part, str)]
    found: dict[str, Any] = {"prompt": readable(request.parts), "images": images}
    if isinstance(request, LogLikelihood):
        found["candidates"] = list(request.candidates)
        if isinstance(answer, tuple):
            found["log_probs"] = [list(scored.log_probs) for scored in answer]
        return found
    settings = {name: value for name, value in asdict(request.settings).items() if value != _DEFAULTS[name]}
    if len(request.settings.choices) > MOST_SHOWN:
        settings["choices"] = f"{len(request.settings.choices)} of the task"
    found["settings"] = {"max_new_tokens": request.settings.max_new_tokens} | settings
    if answer is not None and not isinstance(answer, tuple):
        found |= {"prediction": answer.text, "finish_reason": answer.finish_reason}
    return found
