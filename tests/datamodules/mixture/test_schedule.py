from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.mixture.mixture import SourceMixture, SourceMixtureStage
from datamodules.mixture.schedule import MixtureSchedule, Phase, build_schedule, extend_phases
from datamodules.mixture.shares import Shares
from tests.datamodules.mixture.stages import KIND_OF, source_mixture_stages

TEXT_ONLY = (Fraction(1), Fraction(0), Fraction(0), Fraction(0))


def texts(first_row, **weights):
    return Shares(first_row, TEXT_ONLY, {name: Fraction(w) for name, w in weights.items()})


def phase(*stages):
    return Phase(stages[0].first_row, stages)


def test_phases_go_through_a_checkpoint_as_plain_data():
    original = phase(texts(7, a="1/3", b="2/3"), texts(11, a=1))
    assert Phase.from_dict(original.to_dict()) == original


def test_a_run_that_goes_on_as_before_has_the_same_phases():
    phases = [phase(texts(0, a=1), texts(40, a="1/2", b="1/2"))]
    assert extend_phases(phases, phases[0], 17) == phases
    assert extend_phases(phases, phase(texts(0, a="1/2", b="1/2")), 60) == phases


def test_a_change_begins_a_phase_where_the_run_goes_on_and_keeps_the_phases_before():
    phases = [phase(texts(0, a=1), texts(40, a="1/2", b="1/2"))]
    assert extend_phases(phases, phase(texts(0, b=1)), 17) == [*phases, phase(texts(17, b=1))]


def test_a_phase_starting_at_a_row_has_the_shares_at_it_and_those_to_come():
    full = phase(texts(0, a=1), texts(40, b=1), texts(50, c=1))
    assert full.starting_at(40) == phase(texts(40, b=1), texts(50, c=1))
    assert full.starting_at(45) == phase(texts(45, b=1), texts(50, c=1))


@pytest.mark.parametrize("row", [1, 17, 30])
def test_a_later_phase_leaves_past_rows_and_counts_on_behind_them(row):
    before = [phase(texts(0, a="1/2", b="1/2"), texts(31, a="1/5", b="4/5"))]
    after = extend_phases(before, phase(texts(0, b="1/4", c="3/4")), row)
    kinds = {"a": 0, "b": 0, "c": 0}
    old, new = build_schedule(before, kinds), build_schedule(after, kinds)
    assert [new.locate(n) for n in range(row)] == [old.locate(n) for n in range(row)]
    read = old.counts(row)
    rows = [new.locate(n) for n in range(row, row + 40)]
    assert [number for at, number in rows if at == 1] == list(range(read[1], read[1] + 10))
    assert [number for at, number in rows if at == 2] == list(range(30))
    assert new.counts(row + 40) == [read[0], read[1] + 10, 30]
    assert [new.row_of(at, number) for at, number in rows] == list(range(row, row + 40))
    assert new.row_of(0, read[0]) is None


@settings(deadline=None)
@given(source_mixture_stages(), source_mixture_stages(), st.integers(1, 150))
def test_rows_before_an_unforeseen_change_stay_as_they_were(before, after, change):
    old = SourceMixture(KIND_OF, before, 3)
    schedule = MixtureSchedule([(0, old), (change, SourceMixture(KIND_OF, after, 3))])
    assert [schedule.locate(row) for row in range(change)] == [old.locate(row) for row in range(change)]


@settings(deadline=None)
@given(source_mixture_stages(), source_mixture_stages(), st.integers(1, 150))
def test_sources_go_on_where_they_were_after_an_unforeseen_change(before, after, change):
    old, new = (
        SourceMixture((*KIND_OF, 0), [SourceMixtureStage(s.first_row, s.ratio, (*s.weights, weight)) for s in stages], 3)
        for stages, weight in ((before, 0), (after, 2))
    )
    schedule, rows = MixtureSchedule([(0, old), (change, new)]), [0] * 7
    for row in range(change + 100):
        assert schedule.counts(row) == rows
        source, number = schedule.locate(row)
        assert (number, schedule.row_of(source, number)) == (rows[source], row)
        rows[source] += 1
