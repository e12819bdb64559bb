"""Log-probabilities of given continuations: the prompt is read once, and what candidates have in common once too.

A candidate may begin with what is given and not scored, images too. So prompts that differ only at their ends are one
prompt, what they have in common, with candidates that begin with the rest of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kosmos_lit.inference.head import Head
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.trie import ROOT, Trie
from kosmos_lit.tokenizer import PAD

MOST_NODES = 1024
"""Tokens that are read side by side in one row; a longer list of candidates is read in parts."""
MOST_LOGITS = 1 << 24
"""Logits held at once, in numbers."""


class TokenLogProb(NamedTuple):
    """How likely a token is at its place."""

    log_prob: float
    """In nats."""
    is_greedy: bool
    """Whether none is likelier: greedy decoding would write it."""


def places(candidates: Sequence[Sequence[int]]) -> int:
    """Return the most tokens that one row needs room for, to have these candidates scored."""
    return min(max(MOST_NODES, *map(len, candidates), 0), sum(map(len, candidates)))


def slot_token(image: int) -> int:
    """Return what stands in a candidate for a slot of an image, given by its number among those of the reading."""
    return -1 - image


def score_candidates(
    prefill: Prefill,
    head: Head,
    candidates: Sequence[Sequence[Sequence[int]]],
    given: Sequence[Sequence[int]] | None = None,
) -> list[list[list[TokenLogProb]]]:
    """Return how likely every token of every candidate is.

    Args:
        prefill: B prompts.
        head: the output matrix.
        candidates: B lists of token sequences; each continues its prompt. An image is <image>, `slot_of` it as many times
            as it has latents, and </image>.
        given: for each candidate how many of its first tokens are not scored; None: none.
    """
    n_given = given if given is not None else [[0] * len(row) for row in candidates]
    found: list[list[list[TokenLogProb]]] = [[[] for _ in row] for row in candidates]
    parts = [list(_parts(row)) for row in candidates]
    for number in range(max(len(row) for row in parts)):
        chosen = [row[number] if number < len(row) else [] for row in parts]  # B lists of places in `candidates`
        tries = [Trie([row[i] for i in part]) for row, part in zip(candidates, chosen, strict=True)]
        paths = [
            [_path(trie, end)[n_given[b][i] :] for i, end in zip(chosen[b], trie.ends, strict=True)]
            for b, trie in enumerate(tries)
        ]
        wanted = [sorted({node for path in row for node in path}) for row in paths]
        for b, of_node in enumerate(_score_tries(prefill, head, tries, wanted)):
            for i, path in zip(chosen[b], paths[b], strict=True):
                found[b][i] = [of_node[node] for node in path]
    return found


def _path(trie: Trie, end: int) -> list[int]:
    """Return the nodes from the root to an end."""
    path = []
    while end != ROOT:
        path.append(end)
        end = trie.parents[end]
    return path[::-1]


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the sequences' numbers in parts of at most MOST_NODES tokens, neighbours in the dictionary together."""
    part: list[int] = []
    n_nodes = 0
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        if part and n_nodes + len(sequences[i]) > MOST_NODES:
            yield part
            part, n_nodes = [], 0
        part.append(i)
        n_nodes += len(sequences[i])
    yield part


def _score_tries(
    prefill: Prefill, head: Head, tries: Sequence[Trie], wanted: Sequence[Sequence[int]]
) -> list[dict[int, TokenLogProb]]:
    """Return how likely each wanted node's token is after its parent."""
    B, n = len(tries), max(len(trie) for trie in tries)
    prefill.rewind()
    before = prefill.hidden[:, None]  # (B, 1 + n, D): the prompts' ends, then the nodes
    if n:
        tokens = torch.full((B, n), PAD)
        depths = torch.zeros(B, n, dtype=torch.int64)
        ancestors = torch.eye(n, dtype=torch.bool).repeat(B, 1, 1)  # places beyond a row's tree see themselves
        for b, trie in enumerate(tries):
            ids = torch.tensor(trie.tokens, dtype=torch.int64)
            tokens[b, : len(trie)] = torch.where(ids < 0, prefill.image, ids)
            depths[b, : len(trie)] = torch.tensor(trie.depths, dtype=torch.int64)
            ancestors[b, : len(trie), : len(trie)] = torch.from_numpy(trie.ancestors())
        device = prefill.device
        after = prefill.write(tokens.to(device), depths.to(device), ancestors.to(device), *_images(prefill, tries))
        before = torch.cat([before, after], dim=1)
    pairs = zip(tries, wanted, strict=True)
    return [_next_likelihoods(head, before[b], trie, nodes) for b, (trie, nodes) in enumerate(pairs)]


def _images(prefill: Prefill, tries: Sequence[Trie]) -> tuple[Tensor | None, Tensor | None]:
    """Return the latents of the images in the trees, (M, L, D), and (M, 2) row and first slot of each.

    An image's slots follow one another: they came into the tree together.
    """
    firsts = [
        (b, node, slot_token(token))  # its own inverse
        for b, trie in enumerate(tries)
        for node, (token, parent) in enumerate(zip(trie.tokens, trie.parents, strict=True))
        if token < 0 and (parent == ROOT or trie.tokens[parent] != token)
    ]
    if not firsts:
        return None, None
    assert prefill.seen is not None
    at = torch.tensor(firsts, device=prefill.device)
    return prefill.seen[at[:, 2]], at[:, :2]


def _next_likelihoods(head: Head, before: Tensor, trie: Trie, wanted: Sequence[int]) -> dict[int, TokenLogProb]:
    """Return how likely each wanted node's token is, from (1 + n, D) hidden states of root and nodes."""
    parents = {node: trie.parents[node] - ROOT for node in wanted}  # the root is row 0
    inner = sorted(set(parents.values()))
    row_of = {parent: row for row, parent in enumerate(inner)}
    found: dict[int, TokenLogProb] = {}
    n_rows = max(1, MOST_LOGITS // head.vocab_size)
    for first in range(0, len(inner), n_rows):
        at = torch.tensor(inner[first : first + n_rows], device=before.device)
        log_probs = head.logits(before[at]).log_softmax(-1)
        nodes = [node for node, parent in parents.items() if first <= row_of[parent] < first + n_rows]
        rows = torch.tensor([row_of[parents[node]] - first for node in nodes], device=before.device)
        ids = torch.tensor([trie.tokens[node] for node in nodes], device=before.device)
        values = log_probs[rows, ids]
        is_greedy = values >= log_probs.amax(-1)[rows]
        for node, *pair in zip(nodes, values.tolist(), is_greedy.tolist(), strict=True):
            found[node] = TokenLogProb(*pair)
    return found
