"""Samples exchange their images under the control `shuffled`."""

from __future__ import annotations

from pathlib import Path

from kosmos_lit.evaluation.image_control import shuffle_images
from kosmos_lit.evaluation.task import Sample


def test_images_that_all_samples_share_cannot_be_shuffled() -> None:
    [one, other] = Path("one.png"), Path("other.png")
    samples = [Sample(key=f"{i}", images=(one,)) for i in range(3)] + [Sample(key="3", images=(other,)), Sample(key="4")]

    shuffled = shuffle_images(samples, 0)

    assert [s is not None and s.images for s in shuffled].count((one,)) == 1
    assert shuffled.count(None) == 2
    assert shuffled[3] is not None
    assert shuffled[4] == samples[4]
