"""Matrices: one right candidate, and nothing but the matrix tells which."""

import io
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image

from datamodules.world.matrices import (
    LAYOUTS,
    VALUES,
    Matrix,
    Panel,
    draw_matrix,
    held_out_matrix,
    matrix_example,
    paint_panel,
    training_matrix,
)
from datamodules.world.scene import SIDE, Holdout

HOLDOUT = Holdout(3, 0.28)
CASES = [(n_context, n_varying) for n_context in (3, 4, 8) for n_varying in (1, 2, 3)]


def draw_matrices(n_context: int, n_varying: int, n: int = 61) -> list[Matrix]:
    random = Random(f"{n_context} {n_varying}")
    return [draw_matrix(random, n_context, n_varying) for _ in range(n)]


def missing_panel(matrix: Matrix) -> Panel:
    """Return the missing panel by the context alone: where all rows or all columns agree, they go on."""
    side = {3: 2, 4: 2, 8: 3}[len(matrix.context)]
    values_of = {}
    for name in VALUES:
        values = [getattr(panel, name) for panel in matrix.context]
        if len(matrix.context) == 4:  # two looks in turn
            assert values[:2] == values[2:]
            values_of[name] = values[0]
            continue
        rows = [values[i * side : (i + 1) * side] for i in range(side)]
        by_row = all(len(set(row)) == 1 for row in rows)
        by_column = all(len({row[i] for row in rows if i < len(row)}) == 1 for i in range(side))
        assert by_row or by_column, name
        values_of[name] = rows[-1][0] if by_row else rows[0][-1]
        assert not (by_row and by_column) or rows[-1][0] == rows[0][-1]
    return Panel(**values_of)


@pytest.mark.parametrize(("n_context", "n_varying"), CASES)
def test_exactly_one_candidate_follows_from_the_context_panels(n_context: int, n_varying: int) -> None:
    for matrix in draw_matrices(n_context, n_varying):
        assert [i for i, panel in enumerate(matrix.candidates) if panel == missing_panel(matrix)] == [matrix.target]
        assert len(set(matrix.candidates)) == 6


@pytest.mark.parametrize(("n_context", "n_varying"), CASES)
def test_every_look_is_as_frequent_as_others_among_the_candidates(n_context: int, n_varying: int) -> None:
    for matrix in draw_matrices(n_context, n_varying):
        for name in VALUES:
            counts = Counter(getattr(panel, name) for panel in matrix.candidates)
            assert len(set(counts.values())) == 1, name


@pytest.mark.parametrize("n_varying", [1, 2, 3])
def test_the_target_may_stand_anywhere(n_varying: int) -> None:
    places = Counter(matrix.target for matrix in draw_matrices(8, n_varying, 1201))
    assert all(130 < places[i] < 270 for i in range(6))  # 200 expected; five standard deviations are 65


def test_distractors_differ_in_every_kind_of_attribute() -> None:
    differing = Counter(
        name
        for n_varying in (1, 2, 3)
        for matrix in draw_matrices(8, n_varying)
        for name in VALUES
        if len({getattr(panel, name) for panel in matrix.candidates}) > 1
    )
    assert differing.keys() == VALUES.keys()


def test_matrices_of_training_show_and_ask_nothing_that_is_held_out() -> None:
    random = Random(5)
    for _ in range(13):
        for n_context, n_varying in CASES:
            matrix = training_matrix(random, HOLDOUT, n_context, n_varying)
            assert not HOLDOUT.is_held_out(matrix.combination())
            for panel in (*matrix.context, *matrix.candidates):
                look = ("object", panel.size, panel.colour, panel.shape, panel.place)
                many = ("count", panel.number, panel.colour, panel.shape)
                assert not HOLDOUT.is_held_out(many if panel.number > 1 else look)


def test_matrices_of_the_set_are_held_out() -> None:
    random = Random(7)
    assert all(HOLDOUT.is_held_out(held_out_matrix(random, HOLDOUT, 8, 2).combination()) for _ in range(31))


def test_a_candidate_is_as_often_right_as_wrong_in_training() -> None:
    random = Random(11)
    answers = Counter(a for _ in range(101) for _, a in matrix_example(random, HOLDOUT).turns if a in ("Yes", "No"))
    assert 0.38 < answers["Yes"] / answers.total() < 0.62  # some 270 tosses: four standard deviations


@pytest.mark.parametrize("number", LAYOUTS)
def test_a_panel_shows_as_many_things_as_it_should(number: int) -> None:
    for shape in VALUES["shape"]:
        panel = Panel(str(shape), "blue", "large", 4, number)
        pixels = np.asarray(Image.open(io.BytesIO(paint_panel(panel, 0)))).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        filled = pixels[..., 2] - pixels[..., 0] > 80
        assert n_patches(filled) == number


def n_patches(filled: np.ndarray) -> int:
    """Count connected regions, those of a pixel or two left out."""
    left, n_shapes = {tuple(at) for at in np.argwhere(filled)}, 0
    while left:
        queue, size = [left.pop()], 0
        while queue:
            y, x = queue.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        n_shapes += size > 3
    return n_shapes
