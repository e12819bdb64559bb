"""Log-likelihoods of candidates: a shared prompt is prefilled once, and shared beginnings of candidates are decoded once.

A candidate may begin with context that is not scored, images included. So prompts that differ only at their ends become
one prompt, their common prefix, and candidates that begin with the rest of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kosmos_lit.inference.lm_head import LMHead
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.trie import ROOT, Trie
from kosmos_lit.tokenizer import PAD

MAX_NODES = 1024
"""Tokens that are decoded side by side in one row; a longer list of candidates is decoded in parts."""
MAX_LOGITS = 1 << 24
"""Logits held at once, in numbers."""


class TokenLogProb(NamedTuple):
    """How likely a token is after the tokens before it."""

    log_prob: float
    """In nats."""
    is_greedy: bool
    """Whether no token is likelier: greedy decoding would generate it."""


def cache_capacity(candidates: Sequence[Sequence[int]]) -> int:
    """Return the tokens that a row's cache needs room for to score these candidates."""
    # A candidate longer than MAX_NODES is a part of its own; without any, `max` needs the 0 as a second number.
    return min(max(MAX_NODES, *map(len, candidates), 0), sum(map(len, candidates)))


def slot_token(image: int) -> int:
    """Return the number that stands in a candidate for a slot of the image with that index; its own inverse."""
    return -1 - image  # negative, as no token's id is


def score_candidates(
    prefill: Prefill,
    head: LMHead,
    candidates: Sequence[Sequence[Sequence[int]]],
    n_context: Sequence[Sequence[int]] | None = None,
) -> list[list[list[TokenLogProb]]]:
    """Return the log-probability of every token of every candidate.

    Args:
        prefill: B prompts.
        head: the output matrix.
        candidates: B lists of token sequences; each continues its prompt. An image is <image>, its `slot_token` as many
            times as it has latents, and </image>.
        n_context: for each candidate, how many of its first tokens are context and not scored; None: none.
    """
    skipped = n_context if n_context is not None else [[0] * len(row) for row in candidates]
    scored: list[list[list[TokenLogProb]]] = [[[] for _ in row] for row in candidates]
    parts = [list(_parts(row)) for row in candidates]
    for number in range(max(len(row) for row in parts)):
        # Rows with fewer parts wait beside the others with an empty one.
        part = [row[number] if number < len(row) else [] for row in parts]  # B lists of indices into `candidates`
        tries = [Trie([row[i] for i in indices]) for row, indices in zip(candidates, part, strict=True)]
        paths = [
            [_path(trie, end)[skipped[b][i] :] for i, end in zip(part[b], trie.ends, strict=True)]
            for b, trie in enumerate(tries)
        ]
        targets = [sorted({node for path in row for node in path}) for row in paths]  # shared nodes once
        for b, of_node in enumerate(_score_tries(prefill, head, tries, targets)):
            for i, path in zip(part[b], paths[b], strict=True):
                scored[b][i] = [of_node[node] for node in path]
    return scored


def _path(trie: Trie, end: int) -> list[int]:
    """Return the nodes from the root to an end."""
    path = []
    while end != ROOT:
        path.append(end)
        end = trie.parents[end]
    return path[::-1]


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the sequences' indices in parts of at most MAX_NODES tokens, in lexicographic order."""
    part: list[int] = []
    n_nodes = 0
    # Sorted, sequences with a common beginning fall into one part and share its nodes.
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        if part and n_nodes + len(sequences[i]) > MAX_NODES:
            yield part
            part, n_nodes = [], 0
        part.append(i)
        n_nodes += len(sequences[i])
    yield part


def _score_tries(
    prefill: Prefill, head: LMHead, tries: Sequence[Trie], targets: Sequence[Sequence[int]]
) -> list[dict[int, TokenLogProb]]:
    """Return the log-probability of each target node's token after its parent."""
    B, n = len(tries), max(len(trie) for trie in tries)
    prefill.rewind()  # the part before leaves its room in the cache
    before = prefill.hidden[:, None]  # (B, 1 + n, D): the prompts' ends, then the nodes
    if n:
        tokens = torch.full((B, n), PAD)
        depths = torch.zeros(B, n, dtype=torch.int64)
        ancestors = torch.eye(n, dtype=torch.bool).repeat(B, 1, 1)  # padding too attends to itself
        for b, trie in enumerate(tries):
            ids = torch.tensor(trie.tokens, dtype=torch.int64)
            # Slots hold the id of <image>, as in prompts; latents replace its embedding.
            tokens[b, : len(trie)] = torch.where(ids < 0, prefill.image_id, ids)
            depths[b, : len(trie)] = torch.tensor(trie.depths, dtype=torch.int64)
            ancestors[b, : len(trie), : len(trie)] = torch.from_numpy(trie.ancestors())
        device = prefill.device
        after = prefill.decode(tokens.to(device), depths.to(device), ancestors.to(device), *_images(prefill, tries))
        before = torch.cat([before, after], dim=1)
    pairs = zip(tries, targets, strict=True)
    return [_log_probs(head, before[b], trie, nodes) for b, (trie, nodes) in enumerate(pairs)]


def _images(prefill: Prefill, tries: Sequence[Trie]) -> tuple[Tensor | None, Tensor | None]:
    """Return the latents of the images in the tries, (M, L, D), and (M, 2) row and first slot of each.

    An image's slots follow one another: all came into the trie with the same candidate.
    """
    # A slot whose parent is <image>, and no other slot of its image, is the first one.
    firsts = [
        (b, node, slot_token(token))
        for b, trie in enumerate(tries)
        for node, (token, parent) in enumerate(zip(trie.tokens, trie.parents, strict=True))
        if token < 0 and (parent == ROOT or trie.tokens[parent] != token)
    ]
    if not firsts:
        return None, None
    assert prefill.image_latents is not None
    index = torch.tensor(firsts, device=prefill.device)
    return prefill.image_latents[index[:, 2]], index[:, :2]


def _log_probs(head: LMHead, before: Tensor, trie: Trie, targets: Sequence[int]) -> dict[int, TokenLogProb]:
    """Return the log-probability of each target node's token, from (1 + n, D) hidden states of root and nodes."""
    parents = {node: trie.parents[node] - ROOT for node in targets}  # the root is row 0
    inner = sorted(set(parents.values()))  # leaves need no logits
    row_of = {parent: row for row, parent in enumerate(inner)}
    scored: dict[int, TokenLogProb] = {}
    n_rows = max(1, MAX_LOGITS // head.vocab_size)
    for first in range(0, len(inner), n_rows):
        index = torch.tensor(inner[first : first + n_rows], device=before.device)
        log_probs = head.logits(before[index]).log_softmax(-1)
        nodes = [node for node, parent in parents.items() if first <= row_of[parent] < first + n_rows]
        rows = torch.tensor([row_of[parents[node]] - first for node in nodes], device=before.device)
        ids = torch.tensor([trie.tokens[node] for node in nodes], device=before.device)
        values = log_probs[rows, ids]
        is_greedy = values >= log_probs.amax(-1)[rows]
        for node, *pair in zip(nodes, values.tolist(), is_greedy.tolist(), strict=True):
            scored[node] = TokenLogProb(*pair)
    return scored
