"""Runs the requests of many samples through a model.

The generators of `Task.ask` advance in lock-step: the requests of all of them are sorted by length and batched, whichever
sample they belong to. A response does not depend on the other requests of its batch. A request that cannot be encoded or
answered (an unreadable image, a prompt that is too long) fails its own sample, with the reason.
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
from kosmos_lit.evaluation.image_control import GREY, ImageControl
from kosmos_lit.evaluation.prompts import encode_answers, encode_prompts, prompt_text
from kosmos_lit.evaluation.requests import Generate, LogLikelihood, Request, Response
from kosmos_lit.evaluation.results import Failure, Result
from kosmos_lit.evaluation.session import SampleSession
from kosmos_lit.evaluation.task import Sample, Task
from kosmos_lit.images import Fit, ImageError, Pixels, load
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.results import Continuation, ScoredCandidate
from kosmos_lit.inference.scoring import slot_token
from kosmos_lit.inference.trie import ChoiceTrie

WINDOW = 512
"""Samples in progress at the same time; more would need less padding, but an interruption would lose more."""
N_READERS = 4
"""Threads that read the images of a batch while the model computes the one before."""

IndexedResponse = tuple[int, Response | Failure]
"""A request's index with its response, or with the reason why it has none."""


class RequestScheduler:
    """A model that answers requests."""

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int = 16384,
        image_fit: Fit = "square",
        image_control: ImageControl = "true",
        share_prefixes: bool = True,
    ) -> None:
        """Take a model, unsharded on this process, and the settings.

        Args:
            engine: the model with its tokenizer.
            batch_tokens: largest batch in positions; a single request may have more.
            image_fit: how an image becomes square.
            image_control: `blank` puts grey in the place of a sample's own images, `none` removes all images from all
                prompts; `shuffled` is done before, on the samples (`image_control.shuffle_images`).
            share_prefixes: merge log-likelihood requests of one sample whose prompts begin alike; the responses are the same
                without.

        Raises: UserError if the engine has no tokenizer.
        """
        if engine.tokenizer is None:
            raise UserError("evaluation needs a model with a tokenizer; this one has none")
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer
        self.batch_tokens, self.image_fit, self.image_control = batch_tokens, image_fit, image_control
        self.share_prefixes = share_prefixes

    # ---- samples

    def run(self, task: Task, samples: Sequence[Sample], pool: Sequence[Sample] = ()) -> Iterator[list[Result]]:
        """Yield the results of samples as soon as they are known: those of a batch together, in no set order.

        Args:
            task: the task.
            samples: its samples.
            pool: samples that demonstrations are drawn from.
        """
        for first in range(0, len(samples), WINDOW):
            yield from self._run_window(task, samples[first : first + WINDOW], pool)

    def _run_window(self, task: Task, samples: Sequence[Sample], pool: Sequence[Sample]) -> Iterator[list[Result]]:
        is_blank = self.image_control == "blank"
        sessions = [SampleSession(s, task.ask(s, task.shots(s, pool)), s.images if is_blank else ()) for s in samples]
        for session in sessions:
            session.start()
        # Samples that failed before their first request, or need none.
        if done := [session.result() for session in sessions if session.is_done]:
            yield done
        # Each round answers the requests that all samples wait for at the moment.
        while running := [session for session in sessions if not session.is_done]:
            # For each request the number of its session, and its own number in that session.
            owners = [(number, i) for number, session in enumerate(running) for i in range(len(session.requests))]
            requests = [running[number].requests[i] for number, i in owners]
            blank = [running[number].blank for number, _ in owners]
            for responses in self._respond(requests, blank, [number for number, _ in owners]):
                done = []
                for index, response in responses:
                    number, i = owners[index]
                    if running[number].receive(i, response):
                        done.append(running[number].result())
                yield done

    # ---- requests

    def respond(self, requests: Sequence[Request]) -> list[Response | Failure]:
        """Return the model's response to each request, or the reason why there is none."""
        responses: dict[int, Response | Failure] = {}
        # Sample 0 throughout: any two requests may be merged.
        for some in self._respond(requests, [frozenset()] * len(requests), [0] * len(requests)):
            responses.update(some)
        return [responses[i] for i in range(len(requests))]

    def _respond(
        self, requests: Sequence[Request], blank: Sequence[frozenset[Path]], sample_numbers: Sequence[int]
    ) -> Iterator[list[IndexedResponse]]:
        """Yield the responses by batch, each request's once.

        Args:
            requests: the requests.
            blank: for each request the images to replace by grey.
            sample_numbers: the sample of each request; those of one sample may be merged.
        """
        items, failed = self._encode(requests, blank)
        items = self._merge(items, sample_numbers) if self.share_prefixes else items
        if failed:
            yield failed
        queue = make_batches(items, self.batch_tokens)
        with ThreadPoolExecutor(N_READERS) as readers:
            # One batch ahead: more would only hold more images in memory.
            ahead = [self._start_reading(batch, readers) for batch in queue[:1]]
            # zip_longest: nothing follows the last batch.
            for batch, following in zip_longest(queue, queue[1:]):
                pixels = {path: reading.result() for path, reading in ahead.pop().items()}
                if following is not None:
                    # Started before the batch runs, so that reading and computing overlap.
                    ahead.append(self._start_reading(following, readers))
                yield self._run_batch(batch, pixels, requests)

    def _encode(
        self, requests: Sequence[Request], blank: Sequence[frozenset[Path]]
    ) -> tuple[list[BatchItem], list[IndexedResponse]]:
        """Return the requests as items, and the failures of those that cannot be encoded."""
        items, failed = list[BatchItem](), list[IndexedResponse]()
        n_latents, limit = self.model.config.connector.n_latents, self.model.config.decoder.max_seq_len
        parts_of = [_without_images(request) if self.image_control == "none" else request.parts for request in requests]
        # One call for all prompts: the tokenizer encodes many texts faster together.
        prompts = encode_prompts(parts_of, self.tokenizer, n_latents)
        n_steps_of: dict[tuple[str, ...], int | Failure] = {}
        for index, (request, parts, prompt) in enumerate(zip(requests, parts_of, prompts, strict=True)):
            # Only images of the sample itself turn grey; demonstrations keep theirs.
            images = tuple((part, part in blank[index]) for part in parts if isinstance(part, Path))
            candidates: list[list[int]] = []
            if isinstance(request, LogLikelihood):
                candidates = encode_answers(parts, request.candidates, self.tokenizer)
                empty = next((t for t, ids in zip(request.candidates, candidates, strict=True) if not ids), None)
                # Candidates are alternatives after one prompt: the longest one decides whether the row fits.
                n_new = max(map(len, candidates), default=0)
                if empty is not None:
                    failed.append((index, Failure("candidate without tokens", repr(empty))))
                    continue
                if not candidates:
                    failed.append((index, Failure("no candidates", prompt_text(parts)[-80:])))
                    continue
            else:
                n_steps = self._n_steps(request.settings, n_steps_of)
                if isinstance(n_steps, Failure):
                    failed.append((index, n_steps))
                    continue
                n_new = n_steps
            if (length := len(prompt.tokens)) + n_new > limit:
                why = f"{length} positions and {n_new} new ones; the model has {limit}"
                failed.append((index, Failure("prompt too long", why)))
                continue
            items.append(BatchItem.of(index, request, prompt, images, candidates, n_new))
        return items, failed

    def _merge(self, items: Sequence[BatchItem], sample_numbers: Sequence[int]) -> list[BatchItem]:
        by_sample: dict[int, list[BatchItem]] = {}
        for item in items:
            by_sample.setdefault(sample_numbers[item.indices[0]], []).append(item)  # not merged yet: one index each
        merged = []
        image, n_latents = self.tokenizer.special.image, self.model.config.connector.n_latents
        for own in by_sample.values():
            merged += merge_prefixes([item for item in own if item.kind == "score"], image, n_latents)
            # A prompt to generate from has no candidates that could take over its end.
            merged += [item for item in own if item.kind != "score"]
        return merged

    def _n_steps(self, settings: GenerationConfig, n_steps_of: dict[tuple[str, ...], int | Failure]) -> int | Failure:
        """Return the largest number of tokens that generation takes; `n_steps_of` keeps it by the choices."""
        if not settings.choices:
            return settings.max_new_tokens
        # ImageNet has 1,000 choices and 50,000 samples: the trie's depth is computed once.
        key = (str(settings.max_new_tokens), *settings.choices)
        if key not in n_steps_of:
            try:
                n_steps_of[key] = ChoiceTrie(settings.choices, self.tokenizer, settings.max_new_tokens).n_steps
            except UserError as error:
                n_steps_of[key] = Failure("invalid choices", str(error))  # kept too: thousands of samples share it
        return n_steps_of[key]

    def _start_reading(self, batch: Batch, readers: ThreadPoolExecutor) -> dict[Path, Future[Pixels | Failure]]:
        # Each file once, however many items show it.
        paths = dict.fromkeys(path for item in batch for path, _ in item.images)
        return {path: readers.submit(self._read, path) for path in paths}

    def _read(self, path: Path) -> Pixels | Failure:
        try:
            return load(path, self.model.config.vision.image_size, self.image_fit)
        except ImageError as error:
            return Failure("unreadable image", str(error) if str(path) in str(error) else f"{path}: {error}")

    def _run_batch(
        self, batch: Batch, pixels: dict[Path, Pixels | Failure], requests: Sequence[Request]
    ) -> list[IndexedResponse]:
        responses: list[IndexedResponse] = []
        items = []
        # A merged item has the requests of one sample, so all of them fail with an image of one.
        for item in batch:
            unreadable = next((p for path, _ in item.images if isinstance(p := pixels[path], Failure)), None)
            if unreadable is None:
                items.append(item)
            else:
                responses += [(index, unreadable) for index in item.indices]
        if items:
            images, places = self._stack(items, pixels)
            # A batch has requests of one kind: the first one stands for all.
            first = requests[items[0].indices[0]]
            try:
                if isinstance(first, Generate):
                    # indices[0]: requests to generate are not merged, so an item has one.
                    continuations = self._generate(items, first.settings, images, places)
                    responses += [(item.indices[0], text) for item, text in zip(items, continuations, strict=True)]
                else:
                    responses += self._score(items, requests, images, places)
            except UserError as error:  # not raised: other ranks, which wait for this one, would never know
                failure = Failure("model error", str(error))
                responses += [(index, failure) for item in items for index in item.indices]
        return responses

    def _stack(self, items: Batch, pixels: dict[Path, Pixels | Failure]) -> tuple[Tensor, list[list[int]]]:
        """Return the images of a batch, each once, and for each item the places of its images among them."""
        # All blank images are one, under the key None.
        paths_of = [[None if is_blank else path for path, is_blank in item.images] for item in items]
        place = {path: i for i, path in enumerate(dict.fromkeys(chain.from_iterable(paths_of)))}
        size = self.model.config.vision.image_size
        images = torch.empty(len(place), 3, size, size, dtype=torch.uint8)
        for path, i in place.items():
            image = pixels[path] if path is not None else None
            assert not isinstance(image, Failure)
            images[i] = GREY if image is None else torch.from_numpy(image)
        return images, [[place[path] for path in paths] for paths in paths_of]

    def _generate(
        self, items: Batch, settings: GenerationConfig, images: Tensor, places: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        prompts = [item.prompt for item in items]
        return self.engine.generate_batch(prompts, images, settings, image_index=_prompt_images(items, places))

    def _score(
        self, items: Batch, requests: Sequence[Request], images: Tensor, places: Sequence[Sequence[int]]
    ) -> list[IndexedResponse]:
        prompts, n_unscored = [item.prompt for item in items], [item.n_unscored for item in items]
        # Negative ids are slots of images: from an item's own index to the index in the batch.
        candidates = [
            [[slot_token(place[slot_token(s)]) if s < 0 else s for s in ids] for ids in item.candidates]
            for item, place in zip(items, places, strict=True)
        ]
        image_index = _prompt_images(items, places)
        scored = self.engine.token_log_probs(prompts, candidates, images, image_index=image_index, n_context=n_unscored)
        responses: list[IndexedResponse] = []
        # Rows are in the order of candidates: each request of a merged item takes its own in turn.
        for item, rows in zip(items, map(iter, scored), strict=True):
            for index in item.indices:
                request = requests[index]
                assert isinstance(request, LogLikelihood)
                log_probs = [tuple(t.log_prob for t in next(rows)) for _ in request.candidates]
                responses.append((index, tuple(map(ScoredCandidate, request.candidates, log_probs))))
        return responses


def _prompt_images(items: Batch, places: Sequence[Sequence[int]]) -> Tensor:
    """Return the index in the batch's images for each image of its prompts, (M,)."""
    # Behind the prompt's images an item lists those of its candidates.
    indices = [place[: len(item.prompt.slots)] for item, place in zip(items, places, strict=True)]
    return torch.tensor(list(chain.from_iterable(indices)), dtype=torch.int64)


def _without_images(request: Request) -> tuple[str, ...]:
    """Return a prompt with a blank for each image, which keeps the words around it apart."""
    return tuple(part if isinstance(part, str) else " " for part in request.parts)
