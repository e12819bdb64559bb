"""Asks a model what tasks want to know, for many samples side by side.

The generators of `Task.ask` run in lock-step: what all of them ask for at the same time is sorted by length and read in
batches, whoever asked. An answer does not depend on what else is in its batch. What cannot be asked (an image that cannot
be read, a prompt that is too long) fails its sample, with the reason, and no other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.batching import Batch, BatchItem, make_batches, merge_prefixes
from kosmos_lit.evaluation.formatting import encode_answers, encode_prompts, readable
from kosmos_lit.evaluation.image_control import GREY, ImageControl
from kosmos_lit.evaluation.record import Failure, Result
from kosmos_lit.evaluation.requests import Generate, LogLikelihood, Request, Response
from kosmos_lit.evaluation.session import SampleSession
from kosmos_lit.evaluation.task import Sample, Task
from kosmos_lit.images import Fit, ImageError, Pixels, load
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.results import Continuation, ScoredCandidate
from kosmos_lit.inference.scoring import slot_token
from kosmos_lit.inference.trie import ChoiceTrie
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer

WINDOW = 512
"""Samples that are asked about side by side; more of them would pad less, and be lost more at an interruption."""
READERS = 4
"""Threads that read the images of a batch while the model is at the one before."""


class RequestScheduler:
    """A model that answers requests."""

    def __init__(
        self,
        model: Kosmos,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 16384,
        image_fit: Fit = "square",
        image_control: ImageControl = "true",
        share_prefixes: bool = True,
    ) -> None:
        """Take a model, whole on this process, and how to ask it.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            batch_tokens: most positions that are read at once; a single request may have more.
            image_fit: how an image becomes square.
            image_control: `blank` shows an even grey for a sample's own images, `none` leaves all out of all prompts; who
                gets whose is settled before (`image_control.shuffle_images`).
            share_prefixes: whether comparisons of one sample whose prompts begin alike are read as one; without, each
                prompt is read on its own, with the same answers.
        """
        self.model, self.tokenizer, self.engine = model, tokenizer, Engine(model, tokenizer)
        self.batch_tokens, self.image_fit, self.image_control = batch_tokens, image_fit, image_control
        self.share_prefixes = share_prefixes

    # ---- samples

    def run(self, task: Task, samples: Sequence[Sample], pool: Sequence[Sample] = ()) -> Iterator[list[Result]]:
        """Ask about samples, and yield results as they are there: those of a batch together, in no set order.

        Args:
            task: what is asked.
            samples: whom about.
            pool: what demonstrations are drawn from.
        """
        for first in range(0, len(samples), WINDOW):
            yield from self._run_window(task, samples[first : first + WINDOW], pool)

    def _run_window(self, task: Task, samples: Sequence[Sample], pool: Sequence[Sample]) -> Iterator[list[Result]]:
        is_blank = self.image_control == "blank"
        started = [SampleSession(s, task.ask(s, task.shots(s, pool)), s.images if is_blank else ()) for s in samples]
        for session in started:
            session.start()
        if done := [session.result() for session in started if session.is_done]:
            yield done
        while asking := [session for session in started if not session.is_done]:
            owners = [(session, i) for session in asking for i in range(len(session.requests))]
            requests = [session.requests[i] for session, i in owners]
            whose = {id(session): i for i, session in enumerate(asking)}
            askers = [whose[id(session)] for session, _ in owners]
            for answered in self._answer(requests, [session.blank for session, _ in owners], askers):
                done = []
                for number, answer in answered:
                    session, i = owners[number]
                    if session.take(i, answer):
                        done.append(session.result())
                yield done

    # ---- requests

    def answer(self, requests: Sequence[Request]) -> list[Response | Failure]:
        """Return what the model says to each request, or why it could not be asked."""
        found: dict[int, Response | Failure] = {}
        for answered in self._answer(requests, [frozenset()] * len(requests), [0] * len(requests)):
            found.update(answered)
        return [found[i] for i in range(len(requests))]

    def _answer(
        self, requests: Sequence[Request], blank: Sequence[frozenset[Path]], askers: Sequence[int]
    ) -> Iterator[list[tuple[int, Response | Failure]]]:
        """Yield numbers of requests with their answers, each once: those of a batch together.

        Comparisons of one asker whose prompts begin alike are read as one.
        """
        items, failed = self._units(requests, blank)
        items = self._joined(items, askers) if self.share_prefixes else items
        if failed:
            yield failed
        queue = make_batches(items, self.batch_tokens)
        with ThreadPoolExecutor(READERS) as readers:
            ahead = [self._begin(batch, readers) for batch in queue[:1]]
            for batch, following in zip_longest(queue, queue[1:]):
                decoded = {key: reading.result() for key, reading in ahead.pop().items()}
                if following is not None:
                    ahead.append(self._begin(following, readers))
                yield self._ask(batch, decoded, requests)

    def _units(
        self, requests: Sequence[Request], blank: Sequence[frozenset[Path]]
    ) -> tuple[list[BatchItem], list[tuple[int, Response | Failure]]]:
        """Return what can be asked, encoded; and the others with the reason."""
        items, failed = list[BatchItem](), list[tuple[int, Response | Failure]]()
        n_latents, limit = self.model.config.connector.n_latents, self.model.config.decoder.max_seq_len
        shown = [_without_images(request) if self.image_control == "none" else request.parts for request in requests]
        prompts = encode_prompts(shown, self.tokenizer, n_latents)
        choices: dict[tuple[str, ...], int | Failure] = {}
        for number, (request, parts, prompt) in enumerate(zip(requests, shown, prompts, strict=True)):
            images = tuple((part, part in blank[number]) for part in parts if isinstance(part, Path))
            candidates: list[list[int]] = []
            if isinstance(request, LogLikelihood):
                candidates = encode_answers(parts, request.candidates, self.tokenizer)
                empty = next((t for t, ids in zip(request.candidates, candidates, strict=True) if not ids), None)
                n_new = max(map(len, candidates), default=0)
                if empty is not None:
                    failed.append((number, Failure("candidate without tokens", repr(empty))))
                    continue
                if not candidates:
                    failed.append((number, Failure("no candidates", readable(parts)[-80:])))
                    continue
            else:
                steps = self._steps(request.settings, choices)
                if isinstance(steps, Failure):
                    failed.append((number, steps))
                    continue
                n_new = steps
            if (length := len(prompt.tokens)) + n_new > limit:
                why = f"{length} positions and {n_new} new ones; the model has {limit}"
                failed.append((number, Failure("prompt too long", why)))
                continue
            items.append(BatchItem.of(number, request, prompt, images, candidates, n_new))
        return items, failed

    def _joined(self, items: Sequence[BatchItem], askers: Sequence[int]) -> list[BatchItem]:
        of_asker: dict[int, list[BatchItem]] = {}
        for item in items:
            of_asker.setdefault(askers[item.numbers[0]], []).append(item)
        found = []
        image, n_latents = self.tokenizer.special.image, self.model.config.connector.n_latents
        for own in of_asker.values():
            found += merge_prefixes([item for item in own if item.kind == "score"], image, n_latents)
            found += [item for item in own if item.kind != "score"]
        return found

    def _steps(self, settings: GenerationConfig, known: dict[tuple[str, ...], int | Failure]) -> int | Failure:
        """Return how many tokens may be written."""
        if not settings.choices:
            return settings.max_new_tokens
        key = (str(settings.max_new_tokens), *settings.choices)
        if key not in known:
            try:
                known[key] = ChoiceTrie(settings.choices, self.tokenizer, settings.max_new_tokens).n_steps
            except UserError as error:
                known[key] = Failure("choices that cannot be asked", str(error))
        return known[key]

    def _begin(self, batch: Batch, readers: ThreadPoolExecutor) -> dict[Path, Future[Pixels | Failure]]:
        """Start to read each image of a batch."""
        paths = dict.fromkeys(path for item in batch for path, _ in item.images)
        return {path: readers.submit(self._read, path) for path in paths}

    def _read(self, path: Path) -> Pixels | Failure:
        try:
            return load(path, self.model.config.vision.image_size, self.image_fit)
        except ImageError as error:
            return Failure("an image cannot be read", str(error) if str(path) in str(error) else f"{path}: {error}")

    def _ask(
        self, batch: Batch, decoded: dict[Path, Pixels | Failure], requests: Sequence[Request]
    ) -> list[tuple[int, Response | Failure]]:
        answered: list[tuple[int, Response | Failure]] = []
        items = []
        for item in batch:
            bad = next((found for path, _ in item.images if isinstance(found := decoded[path], Failure)), None)
            if bad is None:
                items.append(item)
            else:
                answered += [(number, bad) for number in item.numbers]
        if items:
            images, places = self._stack(items, decoded)
            asked = requests[items[0].numbers[0]]
            try:
                if isinstance(asked, Generate):
                    written = self._write(items, asked.settings, images, places)
                    answered += [(item.numbers[0], answer) for item, answer in zip(items, written, strict=True)]
                else:
                    answered += self._score(items, requests, images, places)
            except UserError as error:  # of this batch: other processes, which wait for this one, know nothing of it
                failure = Failure("the model cannot answer", str(error))
                answered += [(number, failure) for item in items for number in item.numbers]
        return answered

    def _stack(self, items: Batch, decoded: dict[Path, Pixels | Failure]) -> tuple[Tensor, list[list[int]]]:
        """Return the images of a batch, each once, and for each request's images which of them they are."""
        # All that are blank are one image.
        kept = [[None if is_blank else path for path, is_blank in item.images] for item in items]
        place = {path: i for i, path in enumerate(dict.fromkeys(chain.from_iterable(kept)))}
        size = self.model.config.vision.image_size
        images = torch.empty(len(place), 3, size, size, dtype=torch.uint8)
        for path, i in place.items():
            found = decoded[path] if path is not None else None
            assert not isinstance(found, Failure)
            images[i] = GREY if found is None else torch.from_numpy(found)
        return images, [[place[path] for path in paths] for paths in kept]

    def _write(
        self, items: Batch, settings: GenerationConfig, images: Tensor, places: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        prompts = [item.prompt for item in items]
        return self.engine.generate_batch(prompts, images, settings, image_index=_shown(items, places))

    def _score(
        self, items: Batch, requests: Sequence[Request], images: Tensor, places: Sequence[Sequence[int]]
    ) -> list[tuple[int, Response | Failure]]:
        prompts, given = [item.prompt for item in items], [item.given for item in items]
        candidates = [
            [[slot_token(place[slot_token(s)]) if s < 0 else s for s in ids] for ids in item.candidates]
            for item, place in zip(items, places, strict=True)
        ]
        image_index = _shown(items, places)
        found = self.engine.token_log_probs(prompts, candidates, images, image_index=image_index, n_context=given)
        answers: list[tuple[int, Response | Failure]] = []
        for item, rows in zip(items, map(iter, found), strict=True):
            for number in item.numbers:
                request = requests[number]
                assert isinstance(request, LogLikelihood)
                log_probs = [tuple(t.log_prob for t in next(rows)) for _ in request.candidates]
                answers.append((number, tuple(map(ScoredCandidate, request.candidates, log_probs))))
        return answers


def _shown(items: Batch, places: Sequence[Sequence[int]]) -> Tensor:
    """Return which image of a batch each place of its prompts shows."""
    found = [place[: len(item.prompt.slots)] for item, place in zip(items, places, strict=True)]
    return torch.tensor(list(chain.from_iterable(found)), dtype=torch.int64)


def _without_images(request: Request) -> tuple[str, ...]:
    """Return a prompt with a blank for each image: words around one stay apart."""
    return tuple(part if isinstance(part, str) else " " for part in request.parts)
