import hashlib
import pickle
import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datamodules.mixture.mixture import Mixture, SourceMixture, SourceMixtureStage, Stage
from datamodules.mixture.weights import MAX_PERIOD
from kosmos_lit.errors import UserError
from tests.datamodules.mixture.stages import KIND_OF, mixture_stages, source_mixture_stages

ratios = st.lists(st.integers(0, 29), min_size=1, max_size=5).filter(any)


def prefix_ideal_counts(stages: list[Stage], n_rows: int) -> list[list[Fraction]]:
    """What each option should have had after 0, 1, ... rows, added up row by row."""
    targets = [[Fraction(0)] * len(stages[0].weights)]
    for row in range(n_rows):
        weights = [s.weights for s in stages if s.first_row <= row][-1]
        targets.append([t + Fraction(w, sum(weights)) for t, w in zip(targets[-1], weights, strict=True)])
    return targets


def most_off(mixture: Mixture, stages: list[Stage], n_rows: int) -> Fraction:
    """How far any option is from its target after any number of rows."""
    counts, worst = [0] * len(stages[0].weights), Fraction(0)
    for row, target in enumerate(prefix_ideal_counts(stages, n_rows)[1:]):
        counts[mixture.locate(row)[0]] += 1
        worst = max(worst, *(abs(g - t) for g, t in zip(counts, target, strict=True)))
    return worst


def some_rows(stages: list[Stage]) -> int:
    """Rows up to the third period of the last stage."""
    return stages[-1].first_row + 3 * sum(stages[-1].weights)


# ---- one stage


@pytest.mark.parametrize(
    ("ratio", "sequence"),
    [
        ((5, 5, 2, 0), "010120101201"),
        ((5, 5, 2), "010120101201"),
        ((3, 1), "0010"),
        ((0.9, 0.1, 0), "0000010000"),
        ((7, 3, 2, 1), "0102001030210"),
    ],
)
def test_the_sequence_of_one_stage_stays_what_it_was(ratio, sequence):
    mixture = Mixture.constant(ratio)
    assert "".join(str(mixture.locate(row)[0]) for row in range(3 * len(sequence))) == 3 * sequence


def test_a_long_sequence_stays_what_it_was_where_deadlines_nearly_meet():
    weights = (31415, 27182, 16180, 14142, 5772)
    mixture = Mixture.constant(weights)
    sequence = bytes(mixture.locate(row)[0] for row in range(sum(weights)))
    assert hashlib.sha256(sequence).hexdigest().startswith("4b76da83a0aad643")  # by comparing fractions, row by row


@settings(deadline=None)
@given(ratios)
def test_every_prefix_is_less_than_one_row_off_the_ratio(ratio):
    assert most_off(Mixture.constant(ratio), [Stage(0, tuple(ratio))], 2 * sum(ratio) + 1) < 1


@pytest.mark.parametrize("ratio", [(5, 5, 2), (0.5, 0.5, 0.2), (Fraction(5, 12), Fraction(5, 12), Fraction(1, 6))])
def test_the_papers_ratio_is_kept_however_it_is_written(ratio):
    mixture = Mixture.constant(ratio)
    assert mixture.parts == [[5, 5, 2]]
    assert most_off(mixture, [Stage(0, (5, 5, 2))], 37) < 1


@settings(deadline=None)
@given(ratios)
def test_a_weight_of_zero_gives_no_row(ratio):
    mixture = Mixture.constant(ratio)
    assert all(ratio[mixture.locate(row)[0]] for row in range(sum(ratio)))


@pytest.mark.parametrize("ratio", [(5.0, float("nan"), 2.0), (5.0, -3.0, 2.0), (float("inf"), 5.0, 2.0), (0.0, 0.0, 0.0)])
def test_impossible_weights_are_refused_by_their_values(ratio):
    with pytest.raises(UserError) as refused:
        Mixture.constant(ratio)
    assert str(list(ratio)) in str(refused.value)


def test_a_single_option_gives_every_row():
    assert [Mixture.constant((0, 3, 0)).locate(row) for row in (0, 1, 7)] == [(1, 0), (1, 1), (1, 7)]


def test_a_ratio_without_a_short_period_is_rounded_to_the_longest():
    parts = Mixture.constant((1 / 3, 1 / 7, 1 / 11)).parts[0]
    shares = [w / (1 / 3 + 1 / 7 + 1 / 11) for w in (1 / 3, 1 / 7, 1 / 11)]
    assert sum(parts) == MAX_PERIOD
    assert parts == pytest.approx([s * MAX_PERIOD for s in shares], abs=1)  # largest remainder rounds by less than 1


def test_a_share_that_rounding_would_make_zero_is_refused():
    with pytest.raises(UserError, match=r"weight \[1e-07\] is less than 1 part in 100000 of \[1, 1e-07\]"):
        Mixture.constant((1, 1e-7))


# ---- stages


@settings(deadline=None, max_examples=200)
@given(mixture_stages())
def test_every_prefix_keeps_tijdemans_bound_across_stages(stages):
    n_used = sum(any(column) for column in zip(*(s.weights for s in stages), strict=True))
    assert most_off(Mixture(stages), stages, some_rows(stages)) <= 1 - Fraction(1, max(2, 2 * n_used - 2))


@settings(deadline=None)
@given(mixture_stages())
def test_the_target_is_the_sum_of_the_shares_of_each_row(stages):
    mixture, n_rows = Mixture(stages), some_rows(stages)
    assert [mixture.ideal_counts(n) for n in range(n_rows + 1)] == prefix_ideal_counts(stages, n_rows)


@settings(deadline=None)
@given(mixture_stages())
def test_counts_are_what_locate_gives(stages):
    mixture, n_rows = Mixture(stages), some_rows(stages)
    located = [mixture.locate(row)[0] for row in range(n_rows)]
    counted = [0] * len(stages[0].weights)
    for row in range(n_rows):
        assert mixture.counts(row) == counted
        counted[located[row]] += 1


@settings(deadline=None)
@given(mixture_stages())
def test_an_option_gives_its_rows_in_order_and_each_once(stages):
    mixture = Mixture(stages)
    located = [mixture.locate(row) for row in range(some_rows(stages))]
    for option in range(len(stages[0].weights)):
        numbers = [number for o, number in located if o == option]
        assert numbers == list(range(len(numbers)))


@settings(deadline=None)
@given(mixture_stages())
def test_the_row_of_a_number_is_where_it_is_located(stages):
    mixture, n_rows = Mixture(stages), some_rows(stages)
    assert [mixture.row_of(*mixture.locate(row)) for row in range(n_rows)] == list(range(n_rows))


@settings(deadline=None)
@given(mixture_stages())
def test_a_number_that_never_comes_has_no_row(stages):
    mixture, last = Mixture(stages), stages[-1]
    after = mixture.counts(some_rows(stages))
    rows = [mixture.row_of(option, number) for option, number in enumerate(after)]
    assert [row is None for row in rows] == [not weight for weight in last.weights]


@settings(deadline=None)
@given(mixture_stages(), st.integers(1, 4))
def test_an_option_gets_at_most_one_row_more_once_its_weight_is_zero(stages, at):
    assume(at < len(stages))
    mixture = Mixture(stages)
    end = stages[at + 1].first_row if at + 1 < len(stages) else some_rows(stages)
    more = [b - a for a, b in zip(mixture.counts(stages[at].first_row), mixture.counts(end), strict=True)]
    assert all(m <= 1 for m, weight in zip(more, stages[at].weights, strict=True) if not weight)


@settings(deadline=None)
@given(mixture_stages())
def test_a_stage_with_the_shares_of_the_one_before_changes_nothing(stages):
    last = stages[-1]
    again = Stage(last.first_row + 3, tuple(2 * w for w in last.weights))
    mixture, split = Mixture(stages), Mixture([*stages, again])
    assert all(mixture.locate(row) == split.locate(row) for row in range(some_rows(stages)))


def test_an_option_that_comes_back_goes_on_where_it_was():
    stages = [Stage(0, (1, 1)), Stage(7, (1, 0)), Stage(11, (1, 1))]
    mixture = Mixture(stages)
    assert "".join(str(mixture.locate(row)[0]) for row in range(16)) == "0101010" + "0000" + "10101"
    assert mixture.locate(11) == (1, 3)


def test_long_stages_take_no_more_than_their_periods():
    rng = random.Random(5)
    firsts = (0, 10**8 + 7, 3 * 10**11 + 1, 10**15)
    weights = ((5, 5, 2), (997, 3, 101), (2, 3, 0), (1, 1, 1))
    mixture = Mixture([Stage(*stage) for stage in zip(firsts, weights, strict=True)])
    borders = [row + near for row in firsts[1:] for near in range(-5, 6)]
    for n in [*borders, *(rng.randrange(2 * 10**15) for _ in range(100))]:
        assert all(abs(c - t) < 1 for c, t in zip(mixture.counts(n), mixture.ideal_counts(n), strict=True))
        assert mixture.row_of(*mixture.locate(n)) == n
    assert len(pickle.dumps(mixture)) < 50_000


def test_stages_without_a_common_period_are_rounded_to_the_same_parts():
    primes = [99_991, 99_989, 99_971, 99_961, 99_929, 99_923, 99_907, 99_901, 99_881, 99_877]
    mixture = Mixture([Stage(1_000 * n, (p - 7, 7)) for n, p in enumerate(primes)])
    assert [sum(parts) for parts in mixture.parts] == [MAX_PERIOD] * len(mixture.parts)
    for n in range(11_000):
        assert all(abs(c - t) < 1 for c, t in zip(mixture.counts(n), mixture.ideal_counts(n), strict=True))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"must begin at row 0, got stages that begin at \[\]"),
        ([Stage(5, (1, 1))], r"must begin at row 0, got stages that begin at \[5\]"),
        ([Stage(0, (1, 1)), Stage(7, (1, 0)), Stage(7, (0, 1))], "stage 2 of a mixture must begin after row 7, .* got 7"),
        ([Stage(0, (1, 1)), Stage(7, (1, 0, 3))], r"got stages with \[2, 3\] weights"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        Mixture(stages)


def test_an_impossible_weight_is_refused_with_its_stage():
    with pytest.raises(UserError, match=r"from row 700 on: weights must be finite and not negative, got \[5, -1\]"):
        Stage(700, (5, -1))


# ---- sources within kinds


@settings(deadline=None)
@given(source_mixture_stages())
def test_every_prefix_is_less_than_one_row_off_in_kinds_and_in_sources_of_a_kind(stages):
    mixture, kind_rows, rows = SourceMixture(KIND_OF, stages, 3), [0] * 3, [0] * 6
    kind_target, target = [Fraction(0)] * 3, [Fraction(0)] * 6
    weights_of: dict[int, list[int]] = {}
    for row in range(stages[-1].first_row + 200):
        for stage in stages:
            for kind in range(3):  # a kind's weights count from its first row of the stage on
                if stage.first_row <= row and stage.ratio[kind]:
                    weights_of[kind] = [w if k == kind else 0 for w, k in zip(stage.weights, KIND_OF, strict=True)]
        ratio = [s.ratio for s in stages if s.first_row <= row][-1]
        kind_target = [t + Fraction(r, sum(ratio)) for t, r in zip(kind_target, ratio, strict=True)]
        source, number = mixture.locate(row)
        kind = KIND_OF[source]
        assert number == rows[source]
        rows[source] += 1
        kind_rows[kind] += 1
        shares = weights_of[kind]
        target = [t + Fraction(w, sum(shares)) for t, w in zip(target, shares, strict=True)]
        assert all(abs(r - t) < 1 for r, t in zip(kind_rows, kind_target, strict=True))
        assert all(abs(r - t) < 1 for r, t in zip(rows, target, strict=True))


@settings(deadline=None)
@given(source_mixture_stages())
def test_counts_and_rows_of_sources_are_what_locate_gives(stages):
    mixture, rows = SourceMixture(KIND_OF, stages, 3), [0] * 6
    for row in range(stages[-1].first_row + 100):
        assert mixture.counts(row) == rows
        source, number = mixture.locate(row)
        assert mixture.row_of(source, number) == row
        rows[source] += 1


@settings(deadline=None)
@given(mixture_stages())
def test_with_one_source_per_kind_a_source_mixture_is_the_mixture_of_kinds(stages):
    n = len(stages[0].weights)
    by_source = SourceMixture(range(n), [SourceMixtureStage(s.first_row, s.weights, (3,) * n) for s in stages], n)
    by_kind, n_rows = Mixture(stages), some_rows(stages)
    assert [by_source.locate(row) for row in range(n_rows)] == [by_kind.locate(row) for row in range(n_rows)]


def test_a_source_that_never_comes_again_has_no_row():
    stages = [SourceMixtureStage(0, (1, 1), (1, 1, 1)), SourceMixtureStage(8, (1, 0), (1, 0, 0))]
    mixture = SourceMixture((0, 0, 1), stages, 2)
    counts = mixture.counts(100)
    assert [mixture.row_of(source, counts[source]) is None for source in range(3)] == [False, True, True]


def test_a_pickled_source_mixture_locates_the_same_rows_and_is_small():
    rng = random.Random(3)
    weights = tuple(rng.random() for _ in range(16))
    mixture = SourceMixture([0] * 11 + [1] * 4 + [2], [SourceMixtureStage(0, (5, 5, 2), weights)], 3)
    pickled = pickle.dumps(mixture)
    assert len(pickled) < 300_000  # two cycles of 100,000 bytes, and counts every 256 rows
    rows = [rng.randrange(10**9) for _ in range(101)]
    assert [pickle.loads(pickled).locate(row) for row in rows] == [mixture.locate(row) for row in rows]


def test_a_kind_with_a_share_needs_a_source_with_a_weight():
    stages = [SourceMixtureStage(0, (1, 1), (1, 1, 1)), SourceMixtureStage(500, (1, 1), (1, 1, 0))]
    with pytest.raises(UserError, match=r"from row 500 on, sources of kind 1: at least one weight .* got \[0\]"):
        SourceMixture((0, 0, 1), stages, 2)
