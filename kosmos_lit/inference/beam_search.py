"""Beam search as transformers 5 has it: what ends, how it scores, and when the search stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.head import Head
from kosmos_lit.inference.logits_processors import NEVER, LogitsProcessors
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.tokenizer import EOS

BLOCK = 256
"""Scores whose highest is compared first when the highest of a vocabulary are looked for."""


@dataclass
class FinishedBeams:
    """The best complete continuations of one prompt."""

    settings: GenerationConfig
    found: list[tuple[float, list[int], str]] = field(default_factory=list)
    """At most n_beams: score, tokens, why they ended; the best first."""
    is_final: bool = False
    """What other prompts of the batch still write must not change this one's answer."""

    def add(self, total: float, tokens: list[int], length: int, end: str) -> None:
        """Take a continuation of that log-probability and length, unless the search is over."""
        if not self.is_final:
            self.found.append((total / length**self.settings.length_penalty, tokens, end))
            self.found = sorted(self.found, key=lambda scored: -scored[0])[: self.settings.n_beams]

    def settle(self, best_running: float, length: int, n_steps: int) -> None:
        """Be final if, by the rule of `beam_stop`, no running beam counts any more.

        Args:
            best_running: log-probability of the best running beam.
            length: its tokens.
            n_steps: the most it could have.
        """
        s = self.settings
        if best_running == NEVER:
            self.is_final = True
        elif len(self.found) == s.n_beams:
            at = n_steps if s.beam_stop == "exact" and s.length_penalty > 0 else length
            self.is_final |= s.beam_stop == "first" or self.found[-1][0] >= best_running / at**s.length_penalty


class BeamTree:
    """The running beams: where in the reading's tree each of them stands."""

    def __init__(self, prefill: Prefill, n: int, need_history: bool) -> None:
        self.prefill, self.n = prefill, n
        B, self.device = len(prefill.tokens), prefill.device
        self.ancestors = torch.zeros(B, n, 0, dtype=torch.bool, device=self.device)
        self.history = prefill.tokens[:, None].expand(B, n, -1) if need_history else None  # (B, n, T + t)
        self._itself = torch.eye(n, dtype=torch.bool, device=self.device).expand(B, n, n)

    def grow(self, parents: Tensor, tokens: Tensor, depth: int) -> Tensor:
        """Let beam i of each row go on from beam `parents[i]` with `tokens[i]`, (B, n) both; return (B, n, D)."""
        self.ancestors = torch.cat([_pick(self.ancestors, parents), self._itself], dim=2)
        if self.history is not None:
            self.history = torch.cat([_pick(self.history, parents), tokens[:, :, None]], dim=2)
        return self.prefill.write(tokens, depth, self.ancestors)


def _pick(table: Tensor, parents: Tensor) -> Tensor:
    """Return (B, n, S) with row i taken from row `parents[i]`."""
    return table.gather(1, parents[:, :, None].expand(-1, -1, table.shape[2]))


def search_beams(
    prefill: Prefill, head: Head, processors: LogitsProcessors, stop_strings: StopStrings
) -> list[tuple[list[int], str]]:
    """Return the best continuation found of each of B prompts, without </s>, and why it ends: `end`, `stop` or `length`.

    A beam that ends counts only if it is among the n best continuations of its step.
    """
    settings, n, B = processors.settings, processors.settings.n_beams, len(prefill.tokens)
    tree = BeamTree(prefill, n, processors.need_history)
    finished = [FinishedBeams(settings) for _ in range(B)]
    written: list[list[list[int]]] = [[[] for _ in range(n)] for _ in range(B)]
    totals = torch.full((B, n), NEVER, device=tree.device)
    totals[:, 0] = 0.0  # all beams of a prompt are equal at first: let one of them speak
    alive = torch.zeros(B, n, dtype=torch.bool)  # on the host: beams that go on
    hidden = prefill.hidden[:, None].expand(B, n, -1)
    for step in range(1, processors.n_steps + 1):
        scores = _scores(head, processors, hidden, tree.history, written)  # (B, n, V)
        best, parents, tokens = _best(scores, totals, 2 * n)  # enough to go on if n of them end
        kept = torch.zeros(B, n, dtype=torch.int64)
        for b, ranked in enumerate(zip(best.tolist(), parents.tolist(), tokens.tolist(), strict=True)):
            going_on: list[list[int]] = []
            for rank, (total, parent, token) in enumerate(zip(*ranked, strict=True)):
                ids = written[b][parent] if token == EOS else [*written[b][parent], token]
                end = "end" if token == EOS else "stop" if stop_strings.end(ids) else ""
                if total == NEVER or len(going_on) == n:
                    break
                if not end:
                    kept[b, len(going_on)] = rank
                    going_on.append(ids)
                elif rank < n:
                    finished[b].add(total, ids, step, end)
            alive[b] = torch.arange(n) < len(going_on)
            written[b] = going_on + [[]] * (n - len(going_on))
        kept = kept.to(tree.device)
        totals = best.gather(1, kept).masked_fill(~alive.to(tree.device), NEVER)
        parents, tokens = parents.gather(1, kept), tokens.gather(1, kept)
        running = totals.tolist()
        for result, total in zip(finished, running, strict=True):
            result.settle(total[0], step, processors.n_steps)
        if step == processors.n_steps or all(result.is_final for result in finished):
            break
        hidden = tree.grow(parents, tokens, step - 1)
    for b, result in enumerate(finished):
        for total, ids in zip(running[b], written[b], strict=True):
            if total > NEVER:
                result.add(total, ids, step, "length")
    return [(result.found[0][1], result.found[0][2]) for result in finished]


def _scores(
    head: Head,
    processors: LogitsProcessors,
    hidden: Tensor,
    history: Tensor | None,
    written: Sequence[Sequence[Sequence[int]]],
) -> Tensor:
    """Return (B, n, V) log-probabilities under the rules, after (B, n, D) hidden states."""
    B, n, _ = hidden.shape
    log_probs = head.logits(hidden.flatten(0, 1)).log_softmax(-1)
    rows = [ids for beams in written for ids in beams]
    return processors.apply(log_probs, None if history is None else history.flatten(0, 1), rows).view(B, n, -1)


def _best(scores: Tensor, totals: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best continuations of each row: their totals, beams and tokens, (B, k) each, the best first.

    Args:
        scores: (B, n, V) of the next token.
        totals: (B, n) of each beam so far.
        k: how many.
    """
    (B, n, V), k_each = scores.shape, min(k, scores.shape[2])  # only the k best of a beam can be among the row's
    each, tokens = (x.view(B, n, k_each) for x in _highest(scores.flatten(0, 1), k_each))
    best, at = (each + totals[:, :, None]).flatten(1).topk(min(k, n * V))
    return best, at // each.shape[2], tokens.flatten(1).gather(1, at)


def _highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and places, (R, k) each, of the k highest of each row of (R, V), the highest first.

    A vocabulary is long: first the k blocks with the highest members are found, which hold all that is looked for.
    """
    R, n = len(scores), scores.shape[1] // BLOCK
    if n <= 2 * k:
        return scores.topk(k)
    blocks = scores[:, : n * BLOCK].view(R, n, BLOCK)
    chosen = blocks.amax(2).topk(k).indices  # (R, k)
    rest = scores[:, n * BLOCK :]
    members = torch.cat([rest, blocks.gather(1, chosen[:, :, None].expand(R, k, BLOCK)).flatten(1)], dim=1)
    values, at = members.topk(k)
    at = at - rest.shape[1]  # negative: one of the rest
    return values, torch.where(at < 0, at + scores.shape[1], chosen.gather(1, at.clamp(min=0) // BLOCK) * BLOCK + at % BLOCK)
