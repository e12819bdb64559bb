"""Beam search as in transformers 5: which beams finish, how they score, and when the search stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.lm_head import LMHead
from kosmos_lit.inference.logits_processors import NEVER, LogitsProcessors
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.tokenizer import EOS

BLOCK = 256
"""Scores in a block of the vocabulary, for the two-level top-k."""


@dataclass
class FinishedBeams:
    """The best complete continuations of one prompt."""

    settings: GenerationConfig
    hypotheses: list[tuple[float, list[int], str]] = field(default_factory=list)
    """At most n_beams: score, tokens, finish reason; the best first."""
    is_done: bool = False
    """Whether the search of this prompt is over. Those of other prompts in the batch may go on, without changing it."""

    def add(self, total: float, tokens: list[int], length: int, finish_reason: str) -> None:
        """Add a hypothesis of that log-probability and length, unless the search is over."""
        if not self.is_done:
            self.hypotheses.append((total / length**self.settings.length_penalty, tokens, finish_reason))
            self.hypotheses = sorted(self.hypotheses, key=lambda scored: -scored[0])[: self.settings.n_beams]

    def update_is_done(self, best_running: float, length: int, n_steps: int) -> None:
        """End the search if, by the rule of `beam_stop`, no running beam counts any more.

        Args:
            best_running: log-probability of the best running beam.
            length: its tokens.
            n_steps: the most it could have.
        """
        s = self.settings
        if best_running == NEVER:
            self.is_done = True
        elif len(self.hypotheses) == s.n_beams:
            # Totals only fall. With a positive penalty, a beam that kept its total would score best at its longest.
            at = n_steps if s.beam_stop == "exact" and s.length_penalty > 0 else length
            self.is_done |= s.beam_stop == "first" or self.hypotheses[-1][0] >= best_running / at**s.length_penalty


class BeamTree:
    """The running beams, each a path in the tree of decoded tokens."""

    def __init__(self, prefill: Prefill, n: int, need_history: bool) -> None:
        self.prefill, self.n = prefill, n
        B, self.device = len(prefill.tokens), prefill.device
        self.ancestors = torch.zeros(B, n, 0, dtype=torch.bool, device=self.device)
        self.history = prefill.tokens[:, None].expand(B, n, -1) if need_history else None  # (B, n, T + t)
        self._itself = torch.eye(n, dtype=torch.bool, device=self.device).expand(B, n, n)  # a beam's new token sees itself

    def extend(self, parents: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """Make beam i of each row beam `parents[i]` plus `tokens[i]`, (B, n) both; return (B, n, D)."""
        self.ancestors = torch.cat([_pick(self.ancestors, parents), self._itself], dim=2)  # (B, n, n t) after t steps
        if self.history is not None:
            self.history = torch.cat([_pick(self.history, parents), tokens[:, :, None]], dim=2)
        return self.prefill.decode(tokens, depth, self.ancestors)


def _pick(table: Tensor, parents: Tensor) -> Tensor:
    """Return (B, n, S) with row i taken from row `parents[i]`."""
    return table.gather(1, parents[:, :, None].expand(-1, -1, table.shape[2]))


def search_beams(
    prefill: Prefill, head: LMHead, processors: LogitsProcessors, stop_strings: StopStrings
) -> list[tuple[list[int], str]]:
    """Return the best hypothesis of each of B prompts, without </s>, and its finish reason: `end`, `stop` or `length`.

    A beam that ends counts only if it is among the n best continuations of its step.
    """
    settings, n, B = processors.settings, processors.settings.n_beams, len(prefill.tokens)
    tree = BeamTree(prefill, n, processors.need_history)
    finished = [FinishedBeams(settings) for _ in range(B)]
    generated: list[list[list[int]]] = [[[] for _ in range(n)] for _ in range(B)]
    totals = torch.full((B, n), NEVER, device=tree.device)
    totals[:, 0] = 0.0  # all beams of a prompt are equal at first, so only one takes part in the first step
    alive = torch.zeros(B, n, dtype=torch.bool)  # on the host: beams that go on
    hidden = prefill.hidden[:, None].expand(B, n, -1)
    for step in range(1, processors.n_steps + 1):
        scores = _scores(head, processors, hidden, tree.history, generated)  # (B, n, V)
        best, parents, tokens = _best(scores, totals, 2 * n)  # enough to go on if n of them end
        # Beams that do not go on repeat rank 0; their totals become NEVER below.
        ranks = torch.zeros(B, n, dtype=torch.int64)
        # Each row's continuations, the best first: the first n that do not end go on.
        for b, ranked in enumerate(zip(best.tolist(), parents.tolist(), tokens.tolist(), strict=True)):
            extended: list[list[int]] = []
            for rank, (total, parent, token) in enumerate(zip(*ranked, strict=True)):
                ids = generated[b][parent] if token == EOS else [*generated[b][parent], token]
                finish_reason = "end" if token == EOS else "stop" if stop_strings.occurs_in(ids) else ""
                # Ranks descend: all that follow are impossible too, or n beams go on and no later end is among the n best.
                if total == NEVER or len(extended) == n:
                    break
                if not finish_reason:
                    ranks[b, len(extended)] = rank
                    extended.append(ids)
                elif rank < n:
                    # The length is `step`: </s> counts, which `ids` lack.
                    finished[b].add(total, ids, step, finish_reason)
            alive[b] = torch.arange(n) < len(extended)
            generated[b] = extended + [[]] * (n - len(extended))
        # From 2n continuations to the n beams that go on.
        ranks = ranks.to(tree.device)
        totals = best.gather(1, ranks).masked_fill(~alive.to(tree.device), NEVER)
        parents, tokens = parents.gather(1, ranks), tokens.gather(1, ranks)
        running = totals.tolist()
        for beams, total in zip(finished, running, strict=True):
            beams.update_is_done(total[0], step, processors.n_steps)
        if step == processors.n_steps or all(beams.is_done for beams in finished):
            break
        hidden = tree.extend(parents, tokens, step - 1)
    # What still runs at the limit counts too; `add` leaves out prompts whose search has ended.
    for b, beams in enumerate(finished):
        for total, ids in zip(running[b], generated[b], strict=True):
            if total > NEVER:
                beams.add(total, ids, step, "length")
    return [beams.hypotheses[0][1:] for beams in finished]


def _scores(
    head: LMHead,
    processors: LogitsProcessors,
    hidden: Tensor,
    history: Tensor | None,
    generated: Sequence[Sequence[Sequence[int]]],
) -> Tensor:
    """Return (B, n, V) processed log-probabilities, after (B, n, D) hidden states."""
    B, n, _ = hidden.shape
    log_probs = head.logits(hidden.flatten(0, 1)).log_softmax(-1)
    rows = [ids for beams in generated for ids in beams]
    return processors.apply(log_probs, None if history is None else history.flatten(0, 1), rows).view(B, n, -1)


def _best(scores: Tensor, totals: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best continuations of each row: their totals, beams and tokens, (B, k) each, the best first.

    Args:
        scores: (B, n, V) of the next token.
        totals: (B, n) of each beam so far.
        k: how many.
    """
    (B, n, V), k_each = scores.shape, min(k, scores.shape[2])  # only the k best of a beam can be among the row's
    each, tokens = (x.view(B, n, k_each) for x in _highest(scores.flatten(0, 1), k_each))  # (B, n, k_each)
    best, index = (each + totals[:, :, None]).flatten(1).topk(min(k, n * V))
    return best, index // each.shape[2], tokens.flatten(1).gather(1, index)


def _highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices, (R, k) each, of the k highest of each row of (R, V), the highest first."""
    R, n = len(scores), scores.shape[1] // BLOCK
    if n <= 2 * k:  # the top blocks would be half of the vocabulary or more
        return scores.topk(k)
    # topk over a whole vocabulary is slow. The k blocks with the highest maxima, and the tail, hold all of the k highest.
    blocks = scores[:, : n * BLOCK].view(R, n, BLOCK)
    top_blocks = blocks.amax(2).topk(k).indices  # (R, k)
    tail = scores[:, n * BLOCK :]
    members = torch.cat([tail, blocks.gather(1, top_blocks[:, :, None].expand(R, k, BLOCK)).flatten(1)], dim=1)
    values, index = members.topk(k)
    index = index - tail.shape[1]  # negative: in the tail
    in_block = top_blocks.gather(1, index.clamp(min=0) // BLOCK) * BLOCK + index % BLOCK
    return values, torch.where(index < 0, index + scores.shape[1], in_block)
