"""lm-evaluation-harness with a model of this project: `python -m kosmos_lit.evaluation.harness --model kosmos_lit ...`.

The command is lm_eval's own with one more model, `kosmos_lit`; `--model_args` are the arguments of `HarnessModel`. It reads
texts only, no images, and needs the extra `eval`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.batching import Batch, BatchItem, make_batches
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine, load
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.scoring import TokenLogProb, cache_capacity
from kosmos_lit.tokenizer import BOS, Tokenizer

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the maximum number of new tokens; the first one in this order counts."""
SETTINGS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "num_beams": "n_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "seed": "seed",
}
"""Fields of GenerationConfig by their names in `generation_kwargs`."""

_log = logging.getLogger(__name__)


@register_model("kosmos_lit")
class HarnessModel(LM):
    """A model behind lm_eval's interface.

    A request is one document: its tokens are those of context and continuation joined, and the continuation's are those
    after the ids in common with the context alone. If the border lies inside a token ("Answer:" and "yes" without a blank),
    that token belongs to the continuation.

    Contexts that are too long lose their beginnings, never <s>; their number is logged.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        engine: Engine | None = None,
        batch_tokens: int = 16384,
        stride: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a model, or take one.

        Args:
            path: A checkpoint of a run, or a folder that `export` or `import` wrote.
            engine: A model with its tokenizer, instead of `path`.
            batch_tokens: Largest batch in positions; a single request may have more.
            stride: Tokens from one window of a long text to the next in `loglikelihood_rolling`; None: as many as fit, so
                that only the last window overlaps with the one before.
            device: Device of the model; None: a GPU if there is one.
            batch_size: Not used: requests are batched by length, see `batch_tokens`. lm_eval always passes one.
            max_batch_size: Not used either.

        Raises: UserError if the path has no model, or the model no tokenizer.
        """
        super().__init__()
        if (path is None) == (engine is None):
            raise UserError("kosmos_lit: give --model_args path=CHECKPOINT_OR_FOLDER")
        if engine is None:
            assert path is not None
            engine = load(path)
        if engine.tokenizer is None:
            raise UserError(f"kosmos_lit: the model {path or ''} comes without a tokenizer; export it with one")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self.engine = engine.to(self._device)
        self.tokenizer: Tokenizer = engine.tokenizer
        self.batch_tokens = batch_tokens
        self.max_length = engine.model.config.decoder.max_seq_len
        """Positions of a row, <s> included."""
        if stride is not None and not 0 < stride < self.max_length:
            raise UserError(f"kosmos_lit: stride must be from 1 to {self.max_length - 1}, got {stride}")
        self.stride = stride or self.max_length - 1
        size = engine.model.config.vision.image_size
        # The engine takes images with every batch; the harness has none.
        self._no_images = torch.empty(0, 3, size, size, dtype=torch.uint8)

    # ---- the interface of lm_eval

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability in nats, and whether greedy decoding generates it.

        Raises: UserError if a continuation has no tokens, or more than a row has positions.
        """
        texts: list[tuple[str, str]] = [request.args for request in requests]
        # Ids, cut to the length of a row, then their log-probabilities.
        pairs = self._split(texts)
        fitting = [(self._truncate(context, len(rest)), rest) for context, rest in pairs]
        self._warn_of_truncation(sum(len(a) < len(b) for (a, _), (b, _) in zip(fitting, pairs, strict=True)))
        log_probs = self._token_log_probs(fitting, disable_tqdm)
        responses = [(sum(t.log_prob for t in tokens), all(t.is_greedy for t in tokens)) for tokens in log_probs]
        for pair, response in zip(texts, responses, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, response)  # lm_eval's --use_cache
        return responses

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability in nats of each full text, every token counted once.

        A text longer than a row is split into windows, each with its own <s> as in rows of training: the first window scores
        as many tokens as fit, each further one the next `stride` after as much context as fits before them.
        """
        texts: list[str] = [request.args[0] for request in requests]
        # The windows of all texts stand in one list, so that they are batched by length together.
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, ids in enumerate(self.tokenizer.encode_all(texts)):
            own = self._windows(ids.tolist())
            windows += own
            owners += [owner] * len(own)
        totals = [0.0] * len(texts)
        for owner, tokens in zip(owners, self._token_log_probs(windows, disable_tqdm), strict=True):
            totals[owner] += sum(token.log_prob for token in tokens)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the first of its stop strings.

        Raises: UserError if a task has an unsupported setting, or asks for more tokens than a row has positions.
        """
        pairs: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]
        settings = [generation_config(kwargs) for _, kwargs in pairs]
        # A blank at the end would be a token of its own; in training it begins the next word.
        full = [ids.tolist() for ids in self.tokenizer.encode_all([context.rstrip(" ") for context, _ in pairs])]
        contexts = [self._truncate(ids, one.max_new_tokens) for ids, one in zip(full, settings, strict=True)]
        self._warn_of_truncation(sum(len(a) < len(b) for a, b in zip(contexts, full, strict=True)))
        items = [
            # repr: requests share a batch if their settings are equal, as the engine takes one setting a batch.
            BatchItem((index,), repr(one), self._prompt(ids), (), [], [], one.max_new_tokens * one.n_beams)
            for index, (ids, one) in enumerate(zip(contexts, settings, strict=True))
        ]
        texts = [""] * len(pairs)
        for batch in self._batches(items, disable_tqdm):
            prompts = [item.prompt for item in batch]
            first = batch[0].indices[0]  # a batch has one kind, and a kind one setting
            continuations = self.engine.generate_batch(prompts, self._no_images, settings[first])
            for item, continuation in zip(batch, continuations, strict=True):
                [index] = item.indices
                texts[index] = continuation.text
                self.cache_hook.add_partial("generate_until", pairs[index], continuation.text)
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of requests that lm_eval caches."""
        return f"kosmos_lit-{self.tokenizer.fingerprint}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> NoReturn:
        """Raises: UserError: these models continue documents, and have no chat template."""
        raise UserError("kosmos_lit: these models have no chat template; leave out --apply_chat_template")

    # ---- tokens

    def _split(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of contexts and continuations, split where the joined text's ids leave the context's."""
        contexts = self.tokenizer.encode_all([context for context, _ in pairs])
        full = self.tokenizer.encode_all([context + rest for context, rest in pairs])
        ids = []
        for (context, rest), alone, joined in zip(pairs, contexts, full, strict=True):
            n = min(len(alone), len(joined))
            # The border is the first id that differs, or the end of the shorter sequence.
            differs = (alone[:n] != joined[:n]).nonzero()[0]
            border = int(differs[0]) if len(differs) else n
            if border == len(joined):
                raise UserError(f"kosmos_lit: the continuation {rest!r} of {context[-60:]!r} has no tokens")
            ids.append((joined[:border].tolist(), joined[border:].tolist()))
        return ids

    def _truncate(self, context: list[int], n_new: int) -> list[int]:
        """Return the end of a context that leaves room for n_new tokens."""
        room = self.max_length - 1 - n_new  # 1: <s>
        if room < 0:
            raise UserError(
                f"kosmos_lit: {n_new} tokens after <s> do not fit into the model's {self.max_length} positions; if a task "
                f"generates, give --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        # Not context[-room:], which is the whole context where room is 0.
        return context[max(0, len(context) - room) :]

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return the context and the scored ids of each window of a text."""
        room = self.max_length - 1
        # The first window ends where a row does, each further one `stride` later, the last one with the text.
        ends = [0, *range(min(room, len(ids)), len(ids), self.stride), len(ids)]
        # start < end: an empty text has no window.
        return [(ids[max(0, end - room) : start], ids[start:end]) for start, end in pairwise(ends) if start < end]

    def _prompt(self, context: Sequence[int]) -> Prompt:
        return Prompt(np.array([BOS, *context], dtype=np.int64), np.zeros(0, dtype=np.int64))  # no slots: no images

    # ---- the model

    def _token_log_probs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool
    ) -> list[Sequence[TokenLogProb]]:
        """Return the log-probability of each token of each continuation; equal contexts share one prefill."""
        # Multiple choice repeats the context for every candidate.
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            by_context.setdefault(tuple(context), []).append(i)
        owners = list(by_context.values())
        # An item is one context with the continuations of all its requests.
        items = []
        for index, (context, own) in enumerate(by_context.items()):
            candidates = [list(pairs[i][1]) for i in own]
            n_unscored = [0] * len(candidates)
            items.append(
                BatchItem((index,), "score", self._prompt(context), (), candidates, n_unscored, cache_capacity(candidates))
            )
        log_probs: list[Sequence[TokenLogProb]] = [()] * len(pairs)
        for batch in self._batches(items, disable_tqdm):
            prompts, candidates_of = [item.prompt for item in batch], [item.candidates for item in batch]
            rows = self.engine.token_log_probs(prompts, candidates_of, self._no_images)
            for item, row in zip(batch, rows, strict=True):
                [index] = item.indices
                for i, tokens in zip(owners[index], row, strict=True):
                    log_probs[i] = tokens
        return log_probs

    def _batches(self, items: Sequence[BatchItem], disable_tqdm: bool) -> Iterable[Batch]:
        return tqdm(make_batches(items, self.batch_tokens), desc="kosmos_lit", unit="batch", disable=disable_tqdm)

    def _warn_of_truncation(self, n: int) -> None:
        if n:
            _log.warning("%d contexts lost their beginnings: the model has %d positions", n, self.max_length)


def generation_config(generation_kwargs: Mapping[str, Any]) -> GenerationConfig:
    """Return the settings of a task's `generation_kwargs`.

    Sampling is on with `do_sample`, or without that key with a temperature above 0, as in lm_eval.

    Raises: UserError naming unsupported keys: to ignore one would silently change the measurement.
    """
    # A copy: keys are popped until only unsupported ones are left.
    rest = dict(generation_kwargs)
    until = rest.pop("until", None) or []
    # All are popped: a second name of the length is no unsupported key.
    lengths = [rest.pop(name, None) for name in LENGTHS]
    length = next((n for n in lengths if n is not None), 256)  # lm_eval's own default
    temperature = rest.pop("temperature", None)
    do_sample = rest.pop("do_sample", None)
    do_sample = bool(temperature) if do_sample is None else do_sample
    if do_sample and temperature == 0:
        raise UserError("kosmos_lit: generation_kwargs have do_sample and temperature 0; raise it, or leave do_sample out")
    # list: the loop removes keys from `rest`.
    named = {SETTINGS[name]: rest.pop(name) for name in list(rest) if name in SETTINGS}
    if rest:
        supported = ", ".join(sorted(["until", "do_sample", "temperature", LENGTHS[0], *SETTINGS]))
        raise UserError(f"kosmos_lit: unsupported generation_kwargs: {', '.join(rest)}; supported are {supported}")
    if not do_sample:  # GenerationConfig refuses them, tasks often leave them in
        named = {name: value for name, value in named.items() if name not in ("top_k", "top_p")}
    # Tasks give one string or a list, with empty ones in it, which would stop at once.
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    # 0 stands for greedy decoding or beams in GenerationConfig, whatever the task's temperature.
    temperature = (1.0 if temperature is None else float(temperature)) if do_sample else 0.0
    return GenerationConfig(max_new_tokens=int(length), temperature=temperature, stop=stop, **named)


def main() -> int:
    """Run lm_eval's command; return its exit status."""
    try:
        cli_evaluate()
    except UserError as error:
        # Message and exit code as on the project's own command line, without lm_eval's traceback.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
