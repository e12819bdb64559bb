"""Logits processors: pure functions on scores, and the object that applies those of the settings.

Their results equal those of transformers' logits processors of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.trie import ChoiceTrie
from kosmos_lit.tokenizer import BOS, EOS, PAD, UNK, Tokenizer

NEVER = float("-inf")


def penalise_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide the positive (R, V) scores of tokens in the (R, S) history by `penalty`, multiply the negative ones."""
    # An id that occurs twice in the history is scattered twice, with the same value.
    repeated = scores.gather(1, history)
    return scores.scatter(1, history, torch.where(repeated < 0, repeated * penalty, repeated / penalty))


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Forbid the tokens that would repeat a run of `size` tokens of the (R, S) history; </s> stays allowed.

    Deviation from transformers: there a prompt that holds </s> can leave a continuation no way to end.
    """
    S = history.shape[1]
    if size > S:
        return scores
    # Of size 1, both beginnings are empty and equal: every token of the history is forbidden.
    runs = history.unfold(1, size, 1)  # (R, S - size + 1, size)
    repeated = (runs[..., :-1] == history[:, None, S - size + 1 :]).all(-1)
    row, start = repeated.nonzero(as_tuple=True)
    ids = runs[row, start, -1]
    row, ids = row[ids != EOS], ids[ids != EOS]
    return scores.index_put((row, ids), scores.new_tensor(NEVER))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Forbid all but the k highest of each row; those equal to the k-th stay too."""
    least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Forbid the least likely tokens that together have a probability of at most 1 - p; keep at least one."""
    ascending, ids = scores.sort()
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False  # p may be smaller than the highest probability
    # From sorted order back to the order of ids.
    return scores.masked_fill(torch.zeros_like(dropped).scatter(1, ids, dropped), NEVER)


def forbidden_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids that stand for no text: control tokens but </s> and </line>, and rows beyond the tokenizer's."""
    s = tokenizer.special
    control = [BOS, PAD, UNK, s.mask, s.doc_end, s.image, s.image_end, s.chunk_end]
    return [*control, *range(tokenizer.vocab_size, vocab_size)]  # the embedding may have more rows than there are ids


class LogitsProcessors:
    """The logits processors of one call."""

    def __init__(self, settings: GenerationConfig, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        """Raises: UserError if two choices have the same tokens, or one has too many."""
        self.settings = settings
        self.choices = ChoiceTrie(settings.choices, tokenizer, settings.max_new_tokens) if settings.choices else None
        ids = [] if settings.allow_control_tokens else forbidden_ids(tokenizer, vocab_size)
        self.forbidden = torch.tensor(ids, dtype=torch.int64, device=device)
        """(n,) ids that are never generated unless a choice has them."""
        self.need_history = settings.repetition_penalty != 1 or settings.no_repeat_ngram_size is not None
        self.need_scores = self.need_history or self.choices is not None or settings.temperature > 0
        """Whether a step needs scores, and not only the likeliest allowed token."""
        self.n_steps = self.choices.n_steps if self.choices else settings.max_new_tokens

    def apply(self, scores: Tensor, history: Tensor | None, generated: Sequence[Sequence[int]]) -> Tensor:
        """Return (R, V) processed scores; the argument may be overwritten.

        Args:
            scores: (R, V) logits or log-probabilities in float32.
            history: (R, S) prompt and continuation of each row, if `need_history`.
            generated: the R continuations so far.
        """
        s = self.settings
        # The order of transformers: each processor sees what those before it have left.
        if history is not None and s.repetition_penalty != 1:
            scores = penalise_repetition(scores, history, s.repetition_penalty)
        if history is not None and s.no_repeat_ngram_size is not None:
            scores = forbid_repeated_ngrams(scores, history, s.no_repeat_ngram_size)
        if self.choices is None:
            scores[:, self.forbidden] = NEVER
        else:
            scores = self._only_choices(scores, generated)
        if s.temperature > 0:
            scores = scores / s.temperature
        if s.top_k is not None:
            scores = keep_top_k(scores, s.top_k)
        if s.top_p is not None:
            scores = keep_top_p(scores, s.top_p)
        return scores

    def _only_choices(self, scores: Tensor, generated: Sequence[Sequence[int]]) -> Tensor:
        assert self.choices is not None
        allowed = [(row, id_) for row, ids in enumerate(generated) for id_ in self.choices.next_tokens(ids)]
        index = torch.tensor(allowed, dtype=torch.int64, device=scores.device).view(-1, 2).unbind(1)
        return torch.full_like(scores, NEVER).index_put(index, scores[index])
