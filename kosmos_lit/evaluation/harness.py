"""lm-evaluation-harness runs a model of ours: `python -m kosmos_lit.evaluation.harness --model kosmos_lit ...`.

The command is lm_eval's own with one more model, `kosmos_lit`; `--model_args` are the arguments of `HarnessModel`. It asks
without images. Needs the extra `eval`.
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
"""What tasks call the longest continuation; the first one counts."""
SETTINGS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "num_beams": "n_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "seed": "seed",
}
"""Fields of GenerationConfig by the names that tasks have for them."""

_log = logging.getLogger(__name__)


@register_model("kosmos_lit")
class HarnessModel(LM):
    """A model as lm_eval asks it.

    A request is one document: its tokens are those of context and continuation joined, and the continuation's are those
    behind what it has in common with the context alone. Where the border falls inside a token ("Answer:" and "yes" without
    a blank), that whole token counts as the continuation's.

    A context that is too long loses its beginning, never <s>; how many did is logged.
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
            batch_tokens: Most positions that are read at once; a single request may have more.
            stride: Tokens from one window of a long text to the next in `loglikelihood_rolling`; None: as many as fit, so
                that windows do not overlap, but for the last one.
            device: Where to run; None: a GPU if there is one.
            batch_size: Not used: requests are batched by length, see `batch_tokens`. lm_eval always gives one.
            max_batch_size: Not used either.

        Raises: UserError if there is no such model, or it comes without a tokenizer.
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
        """Positions of a row, <s> among them."""
        if stride is not None and not 0 < stride < self.max_length:
            raise UserError(f"kosmos_lit: stride must be from 1 to {self.max_length - 1}, got {stride}")
        self.stride = stride or self.max_length - 1
        size = engine.model.config.vision.image_size
        self._no_images = torch.empty(0, 3, size, size, dtype=torch.uint8)

    # ---- what lm_eval asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-probability in nats, and whether greedy decoding writes it.

        Raises: UserError if a continuation has no tokens, or more than a row has positions.
        """
        asked: list[tuple[str, str]] = [request.args for request in requests]
        pairs = self._split(asked)
        kept = [(self._fitting(context, len(rest)), rest) for context, rest in pairs]
        self._say_cut(sum(len(a) < len(b) for (a, _), (b, _) in zip(kept, pairs, strict=True)))
        answers = [(sum(t.log_prob for t in one), all(t.is_greedy for t in one)) for one in self._judge(kept, disable_tqdm)]
        for pair, answer in zip(asked, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability in nats of each whole text, every token of it counted once.

        A text that is longer than a row is read in windows, each with its own <s> as rows of training have: the first gives
        as many tokens as fit, each further one the next `stride` after as much context as fits before them.
        """
        texts: list[str] = [request.args[0] for request in requests]
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, ids in enumerate(self.tokenizer.encode_all(texts)):
            found = self._windows(ids.tolist())
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(texts)
        for owner, tokens in zip(owners, self._judge(windows, disable_tqdm), strict=True):
            totals[owner] += sum(token.log_prob for token in tokens)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of its stop strings.

        Raises: UserError if a task asks for a setting that there is none for, or for more tokens than a row has positions.
        """
        asked: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]
        settings = [generation_config(given) for _, given in asked]
        whole = [ids.tolist() for ids in self.tokenizer.encode_all([context.rstrip(" ") for context, _ in asked])]
        contexts = [self._fitting(ids, one.max_new_tokens) for ids, one in zip(whole, settings, strict=True)]
        self._say_cut(sum(len(a) < len(b) for a, b in zip(contexts, whole, strict=True)))
        items = [
            BatchItem((number,), repr(one), self._prompt(ids), (), [], [], one.max_new_tokens * one.n_beams)
            for number, (ids, one) in enumerate(zip(contexts, settings, strict=True))
        ]
        answers = [""] * len(asked)
        for batch in self._batches(items, disable_tqdm):
            prompts = [item.prompt for item in batch]
            written = self.engine.generate_batch(prompts, self._no_images, settings[batch[0].numbers[0]])
            for item, continuation in zip(batch, written, strict=True):
                [number] = item.numbers
                answers[number] = continuation.text
                self.cache_hook.add_partial("generate_until", asked[number], continuation.text)
        return answers

    @property
    def tokenizer_name(self) -> str:
        """What requests that lm_eval caches depend on."""
        return f"kosmos_lit-{self.tokenizer.fingerprint}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> NoReturn:
        """Raises: UserError: these models continue documents, and have no template of a conversation."""
        raise UserError("kosmos_lit: these models have no chat template; leave out --apply_chat_template")

    # ---- tokens

    def _split(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of contexts and continuations."""
        contexts = self.tokenizer.encode_all([context for context, _ in pairs])
        whole = self.tokenizer.encode_all([context + rest for context, rest in pairs])
        found = []
        for (context, rest), alone, joined in zip(pairs, contexts, whole, strict=True):
            n = min(len(alone), len(joined))
            differs = (alone[:n] != joined[:n]).nonzero()[0]
            border = int(differs[0]) if len(differs) else n
            if border == len(joined):
                raise UserError(f"kosmos_lit: the continuation {rest!r} of {context[-60:]!r} has no tokens")
            found.append((joined[:border].tolist(), joined[border:].tolist()))
        return found

    def _fitting(self, context: list[int], n_new: int) -> list[int]:
        """Return the end of a context that n_new tokens fit behind."""
        room = self.max_length - 1 - n_new
        if room < 0:
            raise UserError(
                f"kosmos_lit: {n_new} tokens behind <s> do not fit into the model's {self.max_length} positions; where a "
                f"task generates, give --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        return context[max(0, len(context) - room) :]

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return what is read and what is judged of a text in each of its windows."""
        room = self.max_length - 1
        ends = [0, *range(min(room, len(ids)), len(ids), self.stride), len(ids)]
        return [(ids[max(0, end - room) : start], ids[start:end]) for start, end in pairwise(ends) if start < end]

    def _prompt(self, context: Sequence[int]) -> Prompt:
        return Prompt(np.array([BOS, *context], dtype=np.int64), np.zeros(0, dtype=np.int64))

    # ---- the model

    def _judge(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool
    ) -> list[Sequence[TokenLogProb]]:
        """Return how likely each token of each continuation is; a context is read once for all of its continuations."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            numbers.setdefault(tuple(context), []).append(i)
        owners = list(numbers.values())
        items = []
        for number, (context, of) in enumerate(numbers.items()):
            candidates = [list(pairs[i][1]) for i in of]
            given = [0] * len(candidates)
            items.append(
                BatchItem((number,), "score", self._prompt(context), (), candidates, given, cache_capacity(candidates))
            )
        found: list[Sequence[TokenLogProb]] = [()] * len(pairs)
        for batch in self._batches(items, disable_tqdm):
            prompts, candidates_of = [item.prompt for item in batch], [item.candidates for item in batch]
            rows = self.engine.token_log_probs(prompts, candidates_of, self._no_images)
            for item, row in zip(batch, rows, strict=True):
                [number] = item.numbers
                for i, tokens in zip(owners[number], row, strict=True):
                    found[i] = tokens
        return found

    def _batches(self, items: Sequence[BatchItem], disable_tqdm: bool) -> Iterable[Batch]:
        return tqdm(make_batches(items, self.batch_tokens), desc="kosmos_lit", unit="batch", disable=disable_tqdm)

    def _say_cut(self, n: int) -> None:
        if n:
            _log.warning("%d contexts lost their beginnings: the model has %d positions", n, self.max_length)


def generation_config(given: Mapping[str, Any]) -> GenerationConfig:
    """Return a task's `generation_kwargs` as our settings.

    Sampling is on with `do_sample`, or where that is not given with a temperature above 0, as in lm_eval.

    Raises: UserError naming a setting that there is none for.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name, None) for name in LENGTHS]
    length = next((n for n in lengths if n is not None), 256)  # lm_eval's own default
    temperature = rest.pop("temperature", None)
    draws = rest.pop("do_sample", None)
    draws = bool(temperature) if draws is None else draws
    if draws and temperature == 0:
        raise UserError("kosmos_lit: generation_kwargs have do_sample and temperature 0; draw with a higher one, or do not")
    named = {SETTINGS[name]: rest.pop(name) for name in list(rest) if name in SETTINGS}
    if rest:
        known = ", ".join(sorted(["until", "do_sample", "temperature", LENGTHS[0], *SETTINGS]))
        raise UserError(f"kosmos_lit: no such generation_kwargs: {', '.join(rest)}; there are {known}")
    if not draws:
        named = {name: value for name, value in named.items() if name not in ("top_k", "top_p")}
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    heat = (1.0 if temperature is None else float(temperature)) if draws else 0.0
    return GenerationConfig(max_new_tokens=int(length), temperature=heat, stop=stop, **named)


def main() -> int:
    """Run lm_eval's command; return its exit status."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
