import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.mixture.steps import Steps


@st.composite
def histories(draw):
    """Steps of a run that went on some times, with other global batches or the same, and what each step reads."""
    steps, sizes = Steps.constant(draw(st.integers(1, 7))), []
    for _ in range(draw(st.integers(1, 4))):
        sizes += [steps.borders[-1][2]] * draw(st.integers(0, 5))
        steps = steps.resume(len(sizes), draw(st.integers(1, 7)))
    return steps, [*sizes, *[steps.borders[-1][2]] * 5]


@given(histories())
def test_steps_follow_one_another_without_a_gap_whatever_they_read(history):
    steps, sizes = history
    at = 0
    for step, size in enumerate(sizes, start=1):
        assert steps.rows(step) == range(at, at + size)
        at += size


@given(histories())
def test_a_row_belongs_to_the_step_after_the_whole_steps_before_it(history):
    steps, sizes = history
    for row in range(sum(sizes)):
        assert row in steps.rows(steps.step(row) + 1)


@given(histories())
def test_steps_go_through_a_checkpoint_as_plain_data(history):
    assert Steps.from_list(history[0].to_list()) == history[0]


@pytest.mark.parametrize("step", [0, 10])
def test_a_run_that_goes_on_as_before_has_one_border(step):
    assert Steps.constant(12).resume(step, 12) == Steps.constant(12)
