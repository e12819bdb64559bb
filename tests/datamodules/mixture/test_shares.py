from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.config import CorpusConfig, RatioConfig, RatioStage
from datamodules.mixture.shares import NamedSource, amount, name_sources, ratios_by_step, row_shares
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
    ratios = ratios_by_step(RatioConfig(), stages, DEFAULT, [source("text"), source("pairs", "caption")])
    assert ratios == [(0, (5, 5, 0, 0)), (7, (1, 5, 0, 0)), (11, (1, 0, 0, 0))]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(7, {"text": 1}), (7, {"text": 2})], "from_step must rise, got 7 behind 7"),
        ([(7, {"interleaved": 1})], r"data\.ratio_stages from step 7\.interleaved is 1, but data\.interleaved is not given"),
        ([(7, {"text": 0})], r"data\.ratio_stages from step 7: at least one weight must be positive"),
    ],
)
def test_impossible_stages_are_refused_by_name(stages, message):
    ratio_stages = [RatioStage(from_step=step, ratio=RatioConfig(**ratio)) for step, ratio in stages]
    with pytest.raises(UserError, match=message):
        ratios_by_step(RatioConfig(), ratio_stages, DEFAULT, [source("text")])


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
def test_shares_in_rows_are_the_configured_shares_in_the_unit(unit, drawn, ratio):
    sources = [source(f"s{i}", kind, weight) for i, (kind, weight, *_) in enumerate(drawn)]
    each = {f"s{i}": totals(*numbers) for i, (_, _, *numbers) in enumerate(drawn)}
    kinds = {s.kind for s in sources}
    weights = [r if k in kinds else 0 for k, r in enumerate((*ratio, 0))]

    shares = row_shares(0, weights, sources, each, unit)

    # A source's amount of the unit: its share of rows, times what one of its rows holds.
    amounts_of = {
        s.name: shares.ratio[s.kind] * shares.weights[s.name] * Fraction(amount(each[s.name], unit), each[s.name].rows)
        for s in sources
    }
    total = sum(amounts_of.values())
    for s in sources:
        of_kind = sum(o.config.weight for o in sources if o.kind == s.kind)
        expected = Fraction(weights[s.kind], sum(weights)) * Fraction(s.config.weight) / Fraction(of_kind)
        assert amounts_of[s.name] / total == expected
    assert sum(shares.ratio) == 1
