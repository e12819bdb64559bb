"""Samples as HTML cards: images, prompt, target, prediction, and the probabilities of the candidates."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from kosmos_lit.images import ImageError, open_rgb
from kosmos_lit.report.samples import SampleSelection, SelectedSample, candidate_shares
from kosmos_lit.report.tables import metric_label

MARK = "<image>"
SIDE, SIDE_OF_MANY = 208, 104
"""Longest side of a thumbnail in pixels, alone and among several."""
TAIL = 700
"""Characters of a prompt that are visible, its last ones; the others are folded up."""
MOST_IMAGES, MOST_TEXTS, MOST_CANDIDATES, MOST_REFERENCES = 24, 3, 8, 5


def cards(selection: SampleSelection, image_control: str) -> str:
    """Return the selected samples of a task as HTML.

    Args:
        selection: what `select_samples` returns.
        image_control: of the evaluation; with `blank` the model saw even grey, so the images are left out.
    """
    parts = []
    kinds = (("failure", selection.failures, selection.n_failures), ("success", selection.successes, selection.n_successes))
    for name, group, n in kinds:
        if group:
            title = f"{len(group)} of {n:,} {'failures' if name == 'failure' else 'successes'}"
            html = "\n".join(card(sample, name, selection.metric, image_control) for sample in group)
            parts.append(f'<h3>{title}</h3>\n<div class="cards">\n{html}\n</div>')
    if selection.failed:
        rows = "".join(f"<li>{escape(key)}: {escape(error)}</li>" for key, error in selection.failed)
        parts.append(f'<h3>Failed, counted in no metric</h3>\n<ul class="notes">{rows}</ul>')
    return "\n".join(parts)


def card(selected: SelectedSample, kind: str, metric: str, image_control: str) -> str:
    """Return one sample as HTML."""
    sample = selected.sample
    requests = sample.get("requests") or []
    score = f"{metric_label(metric)} {selected.score:.2f}".strip()
    shares = candidate_shares(sample)
    prediction = f'<span class="prediction">{_text(sample.get("prediction"))}</span>'
    return (
        f'<article class="{kind}"><header><span>{escape(selected.why)}</span>'
        f"<span>{escape(str(sample['key']))} · {escape(score)}</span></header>\n"
        f'{_requests(requests, image_control)}\n<dl class="answers"><dt>target</dt><dd>{_targets(sample.get("target"))}</dd>'
        f"<dt>prediction</dt><dd>{prediction}</dd></dl>{_shares(shares, sample.get('prediction'))}</article>"
    )


def _requests(requests: Sequence[Mapping[str, Any]], image_control: str) -> str:
    """Return the requests of a sample: the first in full, of the others what differs from it."""
    if not requests:
        return ""
    first = requests[0]
    images = [str(path) for path in first.get("images") or ()]
    parts = [_prompt(str(first.get("prompt", "")), images, image_control)]
    same = [r for r in requests[1:] if r.get("prompt") == first.get("prompt")]
    if same and len(same) == len(requests) - 1:  # one prompt with several images, as for Raven's candidates
        # Images that are not those of the first request at the same index.
        changed = [[str(p) for i, p in enumerate(r.get("images") or ()) if images[i : i + 1] != [str(p)]] for r in same]
        # Counted from 2: the first request is shown in full.
        others = "".join(
            _image(p, SIDE_OF_MANY, image_control, f"in request {i}") for i, row in enumerate(changed, 2) for p in row
        )
        return f'{parts[0]}<div class="step"><span class="soft">the same prompt with each of</span><br>{others}</div>'
    # In a chain of requests, what the model wrote last comes before each next prompt.
    for before, request in pairwise(requests):
        prompt = _prompt(str(request.get("prompt", "")), [str(p) for p in request.get("images") or ()], image_control)
        parts.append(f'<div class="written">{_text(before.get("prediction", ""))}</div><div class="step">{prompt}</div>')
    return "".join(parts)


def _prompt(prompt: str, images: Sequence[str], image_control: str) -> str:
    """Return a prompt with its images at their marks; if the text itself contains marks, images come first."""
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
    head = "".join((MARK if image else "") + text for image, text in parts[:start])
    visible = ""
    for image, text in parts[start:]:
        # Twice TAIL: a text that is a little longer is not worth folding.
        tail = text[-TAIL:] if len(text) > 2 * TAIL else text
        head += text[: len(text) - len(tail)]
        visible += (_image(image, side, image_control) if image else "") + escape(tail)
    folded = f'<details><summary>{len(head):,} characters before</summary><div class="prompt">{escape(head)}</div></details>'
    return f'{folded if head else ""}<div class="prompt">{visible}</div>'


def _image(path: str, side: int, image_control: str, where: str = "in the prompt") -> str:
    name = escape(Path(path).name)
    if image_control == "blank":
        return '<span class="missing">an even grey</span>'
    try:
        width, height, data = thumbnail(Path(path), side)
    except ImageError as error:
        return f'<span class="missing">{name}: {escape(error.reason)}</span>'
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="Image {where}: {name}">'


def thumbnail(path: Path, side: int) -> tuple[int, int, str]:
    """Return width and height of a small JPEG of an image, and the JPEG in base64.

    Raises: ImageError if the file is missing or cannot be decoded.
    """
    try:
        image = open_rgb(path.read_bytes())
    except OSError as error:
        raise ImageError("the image file is missing", str(path)) from error
    image.thumbnail((side, side))  # in place; smaller images keep their size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return image.width, image.height, base64.b64encode(buffer.getvalue()).decode("ascii")


def _shares(shares: Sequence[tuple[str, float]], prediction: object) -> str:
    """Return the candidates with their shares as bars, the likeliest first."""
    if not shares:
        return ""
    ranked = sorted(shares, key=lambda item: -item[1])
    rows = "".join(
        f'<li><span{mark}>{escape(name)}</span><i style="width:{100 * share:.0f}%"></i>'
        f"<span>{100 * share:.0f} %</span></li>"
        for name, share in ranked[:MOST_CANDIDATES]
        # A list of one binds a name within the expression.
        for mark in [' class="prediction"' if name == prediction else ""]
    )
    n_more = len(ranked) - MOST_CANDIDATES
    return f'<ul class="shares">{rows}</ul>' + (
        f'<div class="soft">and {n_more:,} more candidates</div>' if n_more > 0 else ""
    )


def _targets(target: object) -> str:
    """Return the target, or the first of several references."""
    if not isinstance(target, list):
        return _text(target)
    # People often give the same answer; each is listed once.
    texts = list(dict.fromkeys(_plain(x) for x in target))
    more = f' <span class="soft">and {len(texts) - MOST_REFERENCES} more</span>' if len(texts) > MOST_REFERENCES else ""
    return "<br>".join(escape(x) for x in texts[:MOST_REFERENCES]) + more


def _text(value: object) -> str:
    text = _plain(value)
    return escape(text) if text.strip() else '<span class="soft">nothing</span>'


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
