import json

from datamodules.document import Tally


def filled() -> Tally:
    tally = Tally(documents=3)
    tally.count_broken("broken reason", "line 5")
    tally.count_broken("broken reason", "line 7")
    tally.count_skipped("rule", "line 11")
    tally.add_note("dead link", "line 13")
    return tally


def test_a_tally_keeps_the_first_place_of_each_reason():
    assert filled().examples == {"broken reason": "line 5", "rule": "line 11", "dead link": "line 13"}


def test_a_tally_survives_json():
    assert Tally.from_dict(json.loads(json.dumps(filled().to_dict()))) == filled()


def test_the_broken_share_is_of_all_records_and_not_of_notes():
    assert filled().broken_share == 2 / 6


def test_adding_tallies_adds_every_counter():
    both = filled()
    both.add(filled())
    assert (both.documents, both.broken, both.skipped, both.notes) == (
        6,
        {"broken reason": 4},
        {"rule": 2},
        {"dead link": 2},
    )


def test_an_empty_tally_has_no_broken_share():
    assert Tally().broken_share == 0
