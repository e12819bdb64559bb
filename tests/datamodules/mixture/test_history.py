from fractions import Fraction

import pytest

from datamodules.mixture.history import History
from datamodules.mixture.schedule import Phase
from datamodules.mixture.shares import Shares
from kosmos_lit.errors import UserError

RULES = {"seed": 3, "seq_len": 101}
TEXT_ONLY = (Fraction(1), Fraction(0), Fraction(0), Fraction(0))


def history(sources=("a", "b"), documents=11, first_row=0, **rules):
    weights = {name: Fraction(1, len(sources)) for name in sources}
    contents = {name: {"kind": "text", "documents": documents, "shards": "5f"} for name in sources}
    return History(RULES | rules, contents, [Phase(first_row, (Shares(first_row, TEXT_ONLY, weights),))])


def test_a_history_goes_through_a_checkpoint_as_plain_data():
    assert History.from_dict(history().to_dict()) == history()


def test_the_same_data_go_on_without_a_message():
    merged, changes = history().resume(history(), 17, accept=False)
    assert (merged, changes) == (history(), [])


def test_another_rule_is_refused_even_if_changes_are_accepted():
    with pytest.raises(UserError, match="another one: seed was 3, is 5; resume with that run's data"):
        history().resume(history(seed=5), 17, accept=True)


def test_a_source_of_other_documents_is_refused_even_if_changes_are_accepted():
    with pytest.raises(UserError, match=r"source a held other documents: documents was 11, is 13\. Put its files"):
        history().resume(history(documents=13), 17, accept=True)


@pytest.mark.parametrize(
    ("sources", "change"),
    [(("a", "b", "c"), "source c is new"), (("a",), "source b is no longer read")],
)
def test_another_list_of_sources_must_be_accepted(sources, change):
    with pytest.raises(UserError, match=f"from row 17 on .*{change}; shares of rows were .*Set data.accept_changes"):
        history().resume(history(sources), 17, accept=False)

    merged, changes = history().resume(history(sources), 17, accept=True)

    assert changes[0] == change
    assert merged.phases == [*history().phases, *history(sources, first_row=17).phases]


def test_a_removed_source_is_remembered_and_must_come_back_as_it_was():
    without, _ = history().resume(history(("a",)), 17, accept=True)
    assert list(without.kinds) == ["a", "b"]
    with pytest.raises(UserError, match="source b held other documents"):
        without.resume(_with_other_b(), 23, accept=True)


def _with_other_b():
    same = history()
    return History(same.rules, {**same.sources, "b": {"kind": "text", "documents": 13, "shards": "5f"}}, same.phases)
