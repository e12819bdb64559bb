import pytest

from kosmos_lit.ops.schedules import warmup_linear


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 1 / 5), (1, 2 / 5), (4, 1), (5, 1), (6, 12 / 13), (11, 7 / 13), (17, 1 / 13), (18, 0), (19, 0), (1000, 0)],
)
def test_the_rate_rises_to_the_last_warm_up_step_and_falls_to_zero(step, share):
    assert warmup_linear(step, warmup_steps=5, total_steps=18) == pytest.approx(share, abs=1e-15)


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert [warmup_linear(step, 0, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_run_that_ends_with_its_warm_up_has_no_step_of_more_than_the_peak():
    assert [warmup_linear(step, 3, 3) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 0])
