from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.mixture import MAX_PERIOD, Mixture
from kosmos_lit.errors import UserError

ratios = st.lists(st.integers(0, 29), min_size=1, max_size=5).filter(any)


def most_off(mixture: Mixture, shares: list[Fraction], n_rows: int) -> Fraction:
    """How far any corpus is from its share after any number of rows."""
    given_rows, worst = [0] * len(shares), Fraction(0)
    for n in range(1, n_rows + 1):
        given_rows[mixture.locate(n - 1)[0]] += 1
        worst = max(worst, *(abs(g - n * s) for g, s in zip(given_rows, shares, strict=True)))
    return worst


@settings(deadline=None)
@given(ratios)
def test_every_prefix_is_less_than_one_row_off_the_ratio(ratio):
    mixture = Mixture(ratio)
    shares = [Fraction(w, sum(ratio)) for w in ratio]
    assert most_off(mixture, shares, 2 * mixture.period + 1) < 1


@pytest.mark.parametrize("ratio", [(5, 5, 2), (0.5, 0.5, 0.2), (10.0, 10.0, 4.0)])
def test_the_papers_ratio_is_kept_however_it_is_written(ratio):
    mixture = Mixture(ratio)
    assert mixture.weights == [5, 5, 2]
    assert most_off(mixture, [Fraction(5, 12), Fraction(5, 12), Fraction(2, 12)], 37) < 1


@settings(deadline=None)
@given(ratios, st.integers(0, 101))
def test_counts_are_what_locate_gives(ratio, n_rows):
    mixture = Mixture(ratio)
    located = [mixture.locate(row)[0] for row in range(n_rows)]
    assert mixture.counts(n_rows) == [located.count(k) for k in range(len(ratio))]


@settings(deadline=None)
@given(ratios)
def test_a_corpus_gives_its_rows_in_order_and_each_once(ratio):
    mixture = Mixture(ratio)
    located = [mixture.locate(row) for row in range(2 * mixture.period + 3)]
    for k in range(len(ratio)):
        numbers = [number for corpus, number in located if corpus == k]
        assert numbers == list(range(len(numbers)))


@settings(deadline=None)
@given(ratios)
def test_a_weight_of_zero_gives_no_row(ratio):
    mixture = Mixture(ratio)
    assert all(ratio[mixture.locate(row)[0]] for row in range(mixture.period))


@pytest.mark.parametrize("ratio", [(5.0, float("nan"), 2.0), (5.0, -3.0, 2.0), (float("inf"), 5.0, 2.0), (0.0, 0.0, 0.0)])
def test_impossible_weights_are_refused_by_their_values(ratio):
    with pytest.raises(UserError) as refused:
        Mixture(ratio)
    assert str(list(ratio)) in str(refused.value)


def test_a_single_corpus_gives_every_row():
    assert [Mixture((0, 3, 0)).locate(row) for row in (0, 1, 7)] == [(1, 0), (1, 1), (1, 7)]


def test_a_ratio_without_a_short_period_is_rounded_to_the_longest():
    weights = Mixture((1 / 3, 1 / 7, 1 / 11)).weights
    shares = [w / (1 / 3 + 1 / 7 + 1 / 11) for w in (1 / 3, 1 / 7, 1 / 11)]
    assert sum(weights) == MAX_PERIOD
    assert weights == pytest.approx([s * MAX_PERIOD for s in shares], abs=1)  # largest remainder rounds by less than 1
