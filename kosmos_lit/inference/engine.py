"""A model with its tokenizer: generation, scoring, logits. `docs/generation.md` says what each setting means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kosmos_lit.batch import check_slots, find_slots
from kosmos_lit.errors import UserError
from kosmos_lit.images import ImageError, ImageLike, as_list
from kosmos_lit.images import load as load_image
from kosmos_lit.inference.beam_search import search_beams
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.lm_head import LMHead
from kosmos_lit.inference.logits_processors import LogitsProcessors
from kosmos_lit.inference.prefill import Prefill, check_length
from kosmos_lit.inference.prompts import Prompt, encode_prompt
from kosmos_lit.inference.results import Continuation, ScoredCandidate
from kosmos_lit.inference.sampling import RandomStreams, sample_tokens
from kosmos_lit.inference.scoring import TokenLogProb, cache_capacity, score_candidates
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import padded_positions
from kosmos_lit.tokenizer import EOS, PAD, Tokenizer
from kosmos_lit.weights.load import load_model


def load(path: str | Path) -> Engine:
    """Return a trained model with its tokenizer, in evaluation mode.

    Args:
        path: a run's checkpoint, a folder that `export` or `import` wrote, or a folder of transformers' Kosmos-2.

    Raises: UserError if it is none of these, or its tensors do not fit.
    """
    return Engine(*load_model(path))


class Engine:
    """A model and its tokenizer; None for the tokenizer leaves `logits` of text alone."""

    def __init__(self, model: Kosmos, tokenizer: Tokenizer | None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def to(self, device: torch.device | str) -> Self:
        """Move the model to a device."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.decoder.embed_tokens.weight.device

    # ---- one prompt

    def generate(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **settings: Any) -> str:
        """Return the model's continuation of a prompt, as `main.py generate` prints it.

        Args:
            prompt: `<image>` stands for the next image; images beyond these marks come before the text.
            images: one or more: paths, bytes of files, Pillow images, (3, H, W) uint8 arrays or tensors.
            settings: fields of `GenerationConfig`.

        Raises: UserError for an image that cannot be read, for unknown settings, or if there are too many tokens.
        """
        pixels = self.pixels(images)
        encoded = self.encode(prompt, len(pixels))
        [continuation] = self.generate_batch([encoded], pixels, GenerationConfig.from_dict(settings))
        return continuation.text

    def score(
        self, prompt: str, candidates: Sequence[str], images: ImageLike | Sequence[ImageLike] = ()
    ) -> list[ScoredCandidate]:
        """Return how likely each candidate is as the continuation of a prompt, as `main.py generate --score` prints it.

        Args:
            prompt: as in `generate`.
            candidates: texts that could follow; the prompt is prefilled once for all of them.
            images: as in `generate`.

        Raises: UserError for an image that cannot be read, a candidate without tokens, or if there are too many of them.
        """
        if isinstance(candidates, str):
            raise UserError(f"candidates must be a list of texts, got one text, {candidates!r}")
        pixels = self.pixels(images)
        [scored] = self.score_batch([self.encode(prompt, len(pixels))], [candidates], pixels)
        return scored

    @torch.no_grad()  # not inference mode: a caller may go on to compute with the result
    def logits(self, tokens: Tensor | Sequence[int], images: ImageLike | Sequence[ImageLike] = ()) -> Tensor:
        """Return the logits of every next token, (T, V), or (B, T, V) for a batch, in the model's present mode.

        Args:
            tokens: (T,) or (B, T) ids, one document a row, padded with <pad> on either side; an image is <image>, as many
                <image> again as it has latents, and </image>.
            images: the images in the order of their slots, in any form that `generate` takes.

        Raises: UserError if tokens are no ids of the model or too many, or tokens and images do not fit.
        """
        model, config = self.model, self.model.config
        ids = _checked_ids(tokens, config.decoder.vocab_size, config.decoder.max_seq_len)
        rows = ids if ids.ndim == 2 else ids[None]  # (B, T)
        pixels, slots = self.pixels(images), torch.empty(0, 2, dtype=torch.int64)
        # The id of <image> is the tokenizer's: without one, ids can be text only.
        if len(pixels) or self.tokenizer is not None:
            special = self._require_tokenizer().special
            slots = find_slots(rows, special.image)
            try:
                check_slots(rows, slots, len(pixels), config.connector.n_latents, special.image, special.image_end)
            except ValueError as error:
                raise UserError(str(error)) from error
        positions, mask = padded_positions(rows != PAD)  # (B, T), (B, 1, T, T)
        rows, slots, positions, mask = (t.to(self.device) for t in (rows, slots, positions, mask))
        latents = model.encode_images(pixels) if len(pixels) else None
        logits = model.decoder.logits(model.decoder(rows, positions, mask, latents, slots))
        return logits if ids.ndim == 2 else logits[0]

    # ---- batches of prompts

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        images: Tensor,
        settings: GenerationConfig = GenerationConfig(),  # frozen, so that calls can share it
        *,
        image_index: Tensor | None = None,
    ) -> list[Continuation]:
        """Return a continuation of each prompt; it does not depend on the other prompts. Dropout is off meanwhile.

        Args:
            prompts: B prompts, of any lengths and with any numbers of images.
            images: (N, 3, H, W) uint8, the images of all prompts in order.
            settings: how to generate.
            image_index: (M,) which of `images` each of the prompts' M images is, so that a repeated image is encoded
                once; None: M = N, in order.

        Raises: UserError if prompt and continuation are longer than the model's rows, or choices cannot be told apart;
        ValueError if the images are not those of the prompts.
        """
        if not prompts:
            return []
        tokenizer, decoder = self._require_tokenizer(), self.model.decoder
        processors = LogitsProcessors(settings, tokenizer, decoder.config.vocab_size, self.device)
        stop_strings = StopStrings(settings.stop, tokenizer)
        check_length(max(len(prompt.tokens) for prompt in prompts), processors.n_steps, decoder.config.max_seq_len)
        with _evaluating(self.model):
            # Each step appends one token per beam to a prompt's row of the cache.
            prefill = self._prefill(prompts, images, processors.n_steps * settings.n_beams, image_index)
            head = LMHead(decoder, processors.forbidden)
            if settings.n_beams > 1:
                generated = search_beams(prefill, head, processors, stop_strings)
            else:
                draws = settings.temperature > 0
                random_streams = RandomStreams(prompts, images, settings.seed, image_index) if draws else None
                generated = sample_tokens(prefill, head, processors, stop_strings, random_streams)
        # A choice is returned as in the settings: its tokens may not decode to the same spelling.
        text = processors.choices.text if processors.choices else stop_strings.cut
        return [Continuation(text(ids), tuple(ids), finish_reason) for ids, finish_reason in generated]

    def score_batch(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[str]],
        images: Tensor,
        *,
        with_end: bool = False,
    ) -> list[list[ScoredCandidate]]:
        """Return how likely each candidate is as the continuation of its prompt.

        Log-probabilities are the model's own, over its whole vocabulary.

        Args:
            prompts: B prompts.
            candidates: B lists of strings, each read as text that follows the prompt with a space between.
            images: (N, 3, H, W) uint8, the images of all prompts in order.
            with_end: count the </s> after each candidate too.

        Raises: UserError if a candidate has no tokens, or with its prompt is longer than the model's rows.
        """
        if len(candidates) != len(prompts):
            raise UserError(
                f"score: {len(prompts)} prompts but {len(candidates)} lists of candidates; give each prompt its own"
            )
        tokenizer, end = self._require_tokenizer(), [EOS] if with_end else []
        ids = [[[*tokenizer.encode(text).tolist(), *end] for text in row] for row in candidates]
        for texts, row in zip(candidates, ids, strict=True):
            for text, tokens in zip(texts, row, strict=True):
                if len(tokens) == len(end):
                    raise UserError(f"score: the candidate {text!r} has no tokens")
        scored = self.token_log_probs(prompts, ids, images)
        return [
            [ScoredCandidate(text, tuple(t.log_prob for t in tokens)) for text, tokens in zip(*row, strict=True)]
            for row in zip(candidates, scored, strict=True)
        ]

    @torch.inference_mode()
    def token_log_probs(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[Sequence[int]]],
        images: Tensor,
        *,
        image_index: Tensor | None = None,
        n_context: Sequence[Sequence[int]] | None = None,
    ) -> list[list[list[TokenLogProb]]]:
        """Return the log-probability of every token of each candidate, in nats, and whether no other token is likelier.

        Args:
            prompts: B prompts.
            candidates: B lists of token sequences; `score_candidates` says how images stand in them.
            images: as in `generate_batch`.
            image_index: as in `generate_batch`.
            n_context: for each candidate, how many of its first tokens are context and not scored; None: none.

        Raises: UserError if a candidate with its prompt is longer than the model's rows.
        """
        # Without a candidate, no prompt needs the model.
        if not any(candidates):
            return [[] for _ in prompts]
        for prompt, row in zip(prompts, candidates, strict=True):
            check_length(len(prompt.tokens), max(map(len, row), default=0), self.model.config.decoder.max_seq_len)
        with _evaluating(self.model):
            prefill = self._prefill(prompts, images, max(cache_capacity(row) for row in candidates), image_index)
            # Log-probabilities are over the whole vocabulary, control tokens included.
            none_forbidden = torch.zeros(0, dtype=torch.int64, device=self.device)
            return score_candidates(prefill, LMHead(self.model.decoder, none_forbidden), candidates, n_context)

    # ---- inputs

    def encode(self, prompt: str, n_images: int) -> Prompt:
        """Return a prompt as training rows have it; see `encode_prompt`."""
        return encode_prompt(prompt, n_images, self._require_tokenizer(), self.model.config.connector.n_latents)

    def pixels(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Return images as the tower takes them, (N, 3, H, W) uint8, on the model's device; both sides are scaled.

        Raises: UserError naming the image that cannot be read.
        """
        size = self.model.config.vision.image_size
        sources = as_list(images)
        pixels = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
        for number, image in enumerate(sources):
            try:
                pixels[number] = torch.from_numpy(load_image(image, size, "square"))
            except ImageError as error:
                raise UserError(f"image {number}: {error}") from error
        return pixels.to(self.device)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; give one to Engine, or load the model from a folder that has one")
        return self.tokenizer

    def _prefill(self, prompts: Sequence[Prompt], images: Tensor, capacity: int, image_index: Tensor | None) -> Prefill:
        prefill = Prefill(self.model, prompts, images, self._require_tokenizer().special, capacity, image_index)
        # `argmax` takes NaN for the maximum: decoding would return some token in silence.
        if not bool(prefill.hidden.isfinite().all()):
            raise UserError("the model gives no finite numbers after the prompt; its weights have diverged or are damaged")
        return prefill


def _checked_ids(tokens: Tensor | Sequence[int], vocab_size: int, max_seq_len: int) -> Tensor:
    """Return (T,) or (B, T) int64 ids on the CPU.

    Raises: UserError if they are none, or too many for the model.
    """
    try:
        ids = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"tokens must be (T,) or (B, T) ids, rows of one length: {error}") from error
    # Any integer dtype will do; bool and floats are mistakes.
    kind = str(ids.dtype).removeprefix("torch.")
    if ids.ndim not in (1, 2) or not ids.numel() or "int" not in kind:
        raise UserError(f"tokens must be (T,) or (B, T) ids, at least one of them; got {tuple(ids.shape)} {kind}")
    # Checked on the host: on a GPU, an id beyond the embedding is an assertion after which CUDA is unusable.
    low, high, longest = int(ids.min()), int(ids.max()), int((ids != PAD).sum(-1).max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"tokens lie in {low} to {high}, but the model has {vocab_size} embeddings, from 0 on")
    if longest > max_seq_len:  # padding takes no position
        raise UserError(f"{longest} tokens exceed the model's {max_seq_len} positions")
    return ids.long()


@contextmanager
def _evaluating(model: Kosmos) -> Iterator[None]:
    """Put all modules in evaluation mode, and each back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}  # a caller may hold parts of it in evaluation mode
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training  # not `train()`, which would set the children too
