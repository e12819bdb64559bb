from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.config import CorpusConfig, RatioConfig, RatioStage
from datamodules.mixture.shares import (
    NamedSource,
    Phase,
    Shares,
    amount,
    build_schedule,
    go_on,
    name_sources,
    ratios_by_step,
    shares,
)
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError

DEFAULT = (5.0, 5.0, 2.0, 0.0)


def config(index, format_="jsonl", weight=1.0, **more):
    return CorpusConfig(format=format_, input=["x"], index=index, weight=weight, **more)


def source(name, kind="text", weight=1.0):
    return NamedSource(name, CORPORA.index(kind), config(name, weight=weight))


def totals(rows, targets=0, begun=0):
    return SimpleNamespace(rows=rows, targets=targets, begun=begun)


def test_the_format_says_the_kind_of_a_named_source():
    named = name_sources({"text": config("a")}, {"books": config("b"), "pairs": config("c", "img2dataset")})
    assert {name: CORPORA[s.kind] for name, s in named.items()} == {"text": "text", "books": "text", "pairs": "caption"}


def test_a_source_named_like_a_kind_is_refused():
    with pytest.raises(UserError, match=r"data\.sources\.caption: that name belongs to data\.caption"):
        name_sources({}, {"caption": config("a", "img2dataset")})


def test_two_sources_of_one_index_are_refused():
    with pytest.raises(UserError, match="the sources text and books have the same index a"):
        name_sources({"text": config("a")}, {"books": config("a")})


def test_a_share_that_a_stage_leaves_out_stays_as_it_was():
    stages = [RatioStage(from_step=7, ratio=RatioConfig(text=1)), RatioStage(from_step=11, ratio=RatioConfig(caption=0))]
    found = ratios_by_step(RatioConfig(), stages, DEFAULT, [source("text"), source("pairs", "caption")])
    assert found == [(0, (5, 5, 0, 0)), (7, (1, 5, 0, 0)), (11, (1, 0, 0, 0))]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([(7, {"text": 1}), (7, {"text": 2})], "from_step must rise, got 7 behind 7"),
        ([(7, {"interleaved": 1})], r"data\.ratio_stages from step 7\.interleaved is 1, but data\.interleaved is not given"),
        ([(7, {"text": 0})], r"data\.ratio_stages from step 7: at least one weight must be positive"),
    ],
)
def test_stages_that_cannot_be_are_named(stages, said):
    given_stages = [RatioStage(from_step=step, ratio=RatioConfig(**ratio)) for step, ratio in stages]
    with pytest.raises(UserError, match=said):
        ratios_by_step(RatioConfig(), given_stages, DEFAULT, [source("text")])


def test_a_stage_at_step_0_is_refused():
    with pytest.raises(UserError, match=r"from_step must be positive, got 0; data\.ratio holds from step 0"):
        RatioStage(from_step=0, ratio=RatioConfig())


def test_a_kind_whose_sources_all_weigh_nothing_is_refused():
    with pytest.raises(UserError, match=r"data\.ratio\.text is 5, but all text sources have weight 0"):
        ratios_by_step(RatioConfig(), None, DEFAULT, [source("text", weight=0)])


amounts = st.integers(1, 10**6)


@given(
    st.sampled_from(["tokens", "loss_tokens", "documents"]),
    st.lists(st.tuples(st.sampled_from(CORPORA[:3]), st.integers(1, 99), amounts, amounts, amounts), min_size=1, max_size=6),
    st.tuples(*[st.integers(1, 9)] * 3),
)
def test_shares_in_rows_are_the_asked_shares_in_the_unit(unit, drawn, ratio):
    sources = [source(f"s{i}", kind, weight) for i, (kind, weight, *_) in enumerate(drawn)]
    each = {f"s{i}": totals(*numbers) for i, (_, _, *numbers) in enumerate(drawn)}
    there = {s.kind for s in sources}
    wanted = [r if k in there else 0 for k, r in enumerate((*ratio, 0))]

    found = shares(0, wanted, sources, each, unit)

    # What a source gives of the unit: its share of rows, times what one of its rows holds.
    given_ = {s.name: found.ratio[s.kind] * found.weights[s.name] * Fraction(amount(each[s.name], unit), each[s.name].rows)
              for s in sources}  # fmt: skip
    whole = sum(given_.values())
    for s in sources:
        of_kind = sum(o.config.weight for o in sources if o.kind == s.kind)
        asked = Fraction(wanted[s.kind], sum(wanted)) * Fraction(s.config.weight) / Fraction(of_kind)
        assert given_[s.name] / whole == asked
    assert sum(found.ratio) == 1


TEXT_ONLY = (Fraction(1), Fraction(0), Fraction(0), Fraction(0))


def texts(first_row, **weights):
    return Shares(first_row, TEXT_ONLY, {name: Fraction(w) for name, w in weights.items()})


def leg(*stages):
    return Phase(stages[0].first_row, stages)


def test_legs_go_through_a_checkpoint_as_plain_data():
    there = leg(texts(7, a="1/3", b="2/3"), texts(11, a=1))
    assert Phase.from_dict(there.to_dict()) == there


def test_a_run_that_goes_on_as_before_has_the_same_legs():
    phases = [leg(texts(0, a=1), texts(40, a="1/2", b="1/2"))]
    assert go_on(phases, phases[0], 17) == phases
    assert go_on(phases, leg(texts(0, a="1/2", b="1/2")), 60) == phases


def test_a_change_begins_a_leg_where_the_run_goes_on_and_keeps_what_was_known_before():
    phases = [leg(texts(0, a=1), texts(40, a="1/2", b="1/2"))]
    assert go_on(phases, leg(texts(0, b=1)), 17) == [*phases, leg(texts(17, b=1))]


def test_seen_from_a_row_there_are_the_shares_at_it_and_those_to_come():
    there = leg(texts(0, a=1), texts(40, b=1), texts(50, c=1))
    assert there.seen_from(40) == leg(texts(40, b=1), texts(50, c=1))
    assert there.seen_from(45) == leg(texts(45, b=1), texts(50, c=1))


@pytest.mark.parametrize("row", [1, 17, 30])
def test_a_change_on_the_way_leaves_past_rows_and_counts_on_behind_them(row):
    before = [leg(texts(0, a="1/2", b="1/2"), texts(31, a="1/5", b="4/5"))]
    after = go_on(before, leg(texts(0, b="1/4", c="3/4")), row)
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
