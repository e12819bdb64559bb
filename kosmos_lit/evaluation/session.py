"""A sample in evaluation: its task's generator, and the requests and responses so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.prompts import prompt_text
from kosmos_lit.evaluation.requests import LogLikelihood, Request, Response
from kosmos_lit.evaluation.results import Failure, Result
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample
from kosmos_lit.inference.config import GenerationConfig

MAX_LISTED_CHOICES = 16
"""Choices that a result lists; of more it has the number only."""

_DEFAULTS = asdict(GenerationConfig())


class SampleSession:
    """Drives `Task.ask` of one sample."""

    def __init__(self, sample: Sample, generator: RequestGenerator, blank: Iterable[Path] = ()) -> None:
        """Take a sample, its task's generator, and the images to replace by grey."""
        self.sample, self.blank = sample, frozenset(blank)
        self.requests: Sequence[Request] = ()
        """The requests without responses yet."""
        self.outcome: Outcome | None = None
        self.failure: Failure | None = None
        self._generator = generator
        self._records: list[dict[str, Any]] = []
        self._responses: dict[int, Response] = {}

    @property
    def is_done(self) -> bool:
        """Whether the sample has its outcome, or has failed."""
        return self.outcome is not None or self.failure is not None

    def start(self) -> None:
        """Run the generator up to its first requests."""
        self._advance(None)

    def _advance(self, responses: Sequence[Response] | None) -> None:
        try:
            # send(None) starts a generator.
            self.requests = self._generator.send(responses)  # type: ignore[arg-type]
            while not self.requests:  # no response would ever come for an empty list
                self.requests = self._generator.send([])
        except StopIteration as end:
            self.outcome = end.value
        except UserError as error:  # a mistake in one sample must not end the evaluation of the others
            self.failure = Failure("invalid sample", str(error))
        self._responses = {}

    def receive(self, i: int, response: Response | Failure) -> bool:
        """Take the response to request i; return whether the sample is done with it."""
        if self.is_done:
            return False  # another of its requests has failed before
        if isinstance(response, Failure):
            self.failure = response
            self._generator.close()
            # The requests of this round are listed without responses.
            self._records += [_record(request) for request in self.requests]
            return True
        self._responses[i] = response
        if len(self._responses) == len(self.requests):
            # In the order of the requests: batches answer them in any order.
            responses = [self._responses[i] for i in range(len(self.requests))]
            self._records += [_record(*each) for each in zip(self.requests, responses, strict=True)]
            self._advance(responses)
        return self.is_done

    def result(self) -> Result:
        """Return the result of a sample that is done."""
        return Result(self.sample.key, self._records, self.outcome, self.failure)


def _record(request: Request, response: Response | None = None) -> dict[str, Any]:
    """Return a request and its response as plain data."""
    images = [str(part) for part in request.parts if not isinstance(part, str)]
    record: dict[str, Any] = {"prompt": prompt_text(request.parts), "images": images}
    if isinstance(request, LogLikelihood):
        record["candidates"] = list(request.candidates)
        if isinstance(response, tuple):
            record["log_probs"] = [list(candidate.log_probs) for candidate in response]
        return record
    # Only what differs from the defaults: a line has to be read by people.
    settings = {name: value for name, value in asdict(request.settings).items() if value != _DEFAULTS[name]}
    if len(request.settings.choices) > MAX_LISTED_CHOICES:
        settings["choices"] = f"{len(request.settings.choices)} of the task"
    record["settings"] = {"max_new_tokens": request.settings.max_new_tokens} | settings
    if response is not None and not isinstance(response, tuple):
        record |= {"prediction": response.text, "finish_reason": response.finish_reason}
    return record
