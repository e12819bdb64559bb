"""Samples as cards for a page: images, prompt, target, prediction, and the probabilities of the candidates.

Here is what a card shows; `templates/cards.html` says how.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kosmos_lit.images import ImageError, open_rgb
from kosmos_lit.report.benchmarks import metric_label
from kosmos_lit.report.samples import SampleSelection, SelectedSample, candidate_shares

MARK = "<image>"
SIDE, SIDE_OF_MANY = 208, 104
"""Longest side of a thumbnail in pixels, alone and among several."""
TAIL = 700
"""Characters of a prompt that are visible, its last ones; the others are folded up."""
MOST_IMAGES, MOST_TEXTS, MOST_CANDIDATES, MOST_REFERENCES = 24, 3, 8, 5


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small image, or why there is none."""

    alt: str
    """The image in words."""
    data: str = ""
    """A JPEG in base64; empty if there is none."""
    width: int = 0
    height: int = 0
    """In pixels."""
    missing: str = ""
    """Why there is no image."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its images at their marks."""

    folded: str
    """The beginning of a long one, which is folded up."""
    parts: tuple[tuple[Thumbnail | None, str], ...]
    """Each visible image with the text after it; no image before the first text."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample."""

    kind: str
    """Failure or success."""
    why: str
    """Why it was selected."""
    key: str
    score: str
    prompt: Prompt | None
    """Of the first request; None without requests."""
    others: tuple[Thumbnail, ...]
    """Images of further requests with the same prompt."""
    steps: tuple[tuple[str, Prompt], ...]
    """In a chain of requests, what the model wrote before each next prompt, and the prompt."""
    targets: tuple[str, ...]
    """The target, or the first of several references."""
    n_more_targets: int
    prediction: str
    shares: tuple[tuple[str, float, bool], ...]
    """The likeliest candidates with their shares, 0 to 1, and whether each is the prediction."""
    n_more_candidates: int


@dataclass(frozen=True, kw_only=True)
class SampleCards:
    """The selected samples of a task."""

    groups: tuple[tuple[str, tuple[Card, ...]], ...]
    """Cards below a title."""
    failed: tuple[tuple[str, str], ...]
    """Key and error of samples that failed."""

    def __bool__(self) -> bool:
        """Return whether there is anything to show."""
        return bool(self.groups or self.failed)


def sample_cards(selection: SampleSelection, image_control: str) -> SampleCards:
    """Return the cards of a task.

    Args:
        selection: what `select_samples` returns.
        image_control: of the evaluation; with `blank` the model saw even grey, so the images are left out.
    """
    kinds = (("failure", selection.failures, selection.n_failures), ("success", selection.successes, selection.n_successes))
    groups = [
        (
            f"{len(group)} of {n:,} {'failures' if kind == 'failure' else 'successes'}",
            tuple(card(sample, kind, selection.metric, image_control) for sample in group),
        )
        for kind, group, n in kinds
        if group
    ]
    return SampleCards(groups=tuple(groups), failed=selection.failed)


def card(selected: SelectedSample, kind: str, metric: str, image_control: str) -> Card:
    """Return the card of a sample."""
    sample = selected.sample
    requests = sample.get("requests") or []
    prompt, others, steps = _requests(requests, image_control) if requests else (None, (), ())
    targets = _targets(sample.get("target"))
    prediction = sample.get("prediction")
    ranked = sorted(candidate_shares(sample), key=lambda item: -item[1])
    return Card(
        kind=kind,
        why=selected.why,
        key=str(sample["key"]),
        score=f"{metric_label(metric)} {selected.score:.2f}".strip(),
        prompt=prompt,
        others=others,
        steps=steps,
        targets=targets[:MOST_REFERENCES],
        n_more_targets=max(0, len(targets) - MOST_REFERENCES),
        prediction=_plain(prediction),
        shares=tuple((name, share, name == prediction) for name, share in ranked[:MOST_CANDIDATES]),
        n_more_candidates=max(0, len(ranked) - MOST_CANDIDATES),
    )


def _requests(
    requests: Sequence[Mapping[str, Any]], image_control: str
) -> tuple[Prompt, tuple[Thumbnail, ...], tuple[tuple[str, Prompt], ...]]:
    """Return the requests of a sample: the first in full, of the others what differs from it."""
    first, prompt = requests[0], _prompt(requests[0], image_control)
    images = [str(path) for path in first.get("images") or ()]
    same = [r for r in requests[1:] if r.get("prompt") == first.get("prompt")]
    if same and len(same) == len(requests) - 1:  # one prompt with several images, as for Raven's candidates
        # Images that are not those of the first request at the same index.
        changed = [[str(p) for i, p in enumerate(r.get("images") or ()) if images[i : i + 1] != [str(p)]] for r in same]
        # Counted from 2: the first request is shown in full.
        others = [(f"in request {i}", path) for i, paths in enumerate(changed, 2) for path in paths]
        return prompt, tuple(thumbnail(path, SIDE_OF_MANY, image_control, where) for where, path in others), ()
    steps = [(_plain(before.get("prediction", "")), _prompt(r, image_control)) for before, r in pairwise(requests)]
    return prompt, (), tuple(steps)


def _prompt(request: Mapping[str, Any], image_control: str) -> Prompt:
    """Return a request's prompt with its images at their marks; if the text itself contains marks, images come first."""
    prompt, images = str(request.get("prompt", "")), [str(path) for path in request.get("images") or ()]
    side = SIDE if len(images) == 1 else SIDE_OF_MANY
    texts = prompt.split(MARK)
    if len(texts) != len(images) + 1:
        texts = [*("" for _ in images), prompt]
    parts = list(zip([None, *images], texts, strict=True))  # each image with the text after it; no image before the first
    # From the end, parts are added until the visible texts are too long, too many, or have too many images.
    start, length, n_texts = len(parts) - 1, len(texts[-1]), 1
    while start and len(parts) - start <= MOST_IMAGES:
        # Images side by side have empty texts between them, which do not count.
        length, n_texts = length + len(texts[start - 1]), n_texts + bool(texts[start - 1])
        if length > TAIL or n_texts > MOST_TEXTS:
            break
        start -= 1
    folded = "".join((MARK if image else "") + text for image, text in parts[:start])
    visible = []
    for image, text in parts[start:]:
        # Twice TAIL: a text that is a little longer is not worth folding.
        tail = text[-TAIL:] if len(text) > 2 * TAIL else text
        folded += text[: len(text) - len(tail)]
        visible.append((thumbnail(image, side, image_control) if image else None, tail))
    return Prompt(folded=folded, parts=tuple(visible))


def thumbnail(path: str, side: int, image_control: str, where: str = "in the prompt") -> Thumbnail:
    """Return a small JPEG of an image file, or why there is none."""
    name = Path(path).name
    alt = f"Image {where}: {name}"
    if image_control == "blank":
        return Thumbnail(alt=alt, missing="an even grey")
    try:
        image = open_rgb(Path(path).read_bytes())
    except OSError:
        return Thumbnail(alt=alt, missing=f"{name}: the image file is missing")
    except ImageError as error:
        return Thumbnail(alt=alt, missing=f"{name}: {error.reason}")
    image.thumbnail((side, side))  # in place; smaller images keep their size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(alt=alt, data=data, width=image.width, height=image.height)


def _targets(target: object) -> tuple[str, ...]:
    """Return the target, or several references."""
    # People often give the same answer; each is listed once.
    return tuple(dict.fromkeys(_plain(x) for x in target)) if isinstance(target, list) else (_plain(target),)


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
