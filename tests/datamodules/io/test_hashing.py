from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.io.hashing import hash_bytes, hash_key, hash_numbers, permutation, share_of

keys = st.integers(0, 2**64 - 1)


@given(st.integers(0, 997), keys)
def test_a_permutation_holds_every_number_once(n, key):
    assert sorted(permutation(n, key).tolist()) == list(range(n))


def test_another_key_draws_another_permutation():
    assert permutation(101, 3).tolist() != permutation(101, 5).tolist()


def test_hashes_are_the_same_on_every_machine():
    # by hand: blake2b-64 of nothing; splitmix64's first output from state 0
    assert hash_bytes(b"") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little")
    assert hash_numbers([0], 0).tolist() == [0xE220A8397B1DCDAF]


def test_the_parts_of_a_key_do_not_run_together():
    assert hash_key("rows", 1, 23) != hash_key("rows", 12, 3)


@given(keys)
@example(2**64 - 1)
def test_a_share_lies_in_the_half_open_unit_interval(key):
    assert 0 <= share_of(key) < 1


def test_shares_are_spread_evenly():
    below = sum(share_of(int(h)) < 0.25 for h in hash_numbers(range(10_007), 11))
    assert abs(below - 10_007 / 4) < 5 * (10_007 * 3 / 16) ** 0.5  # five standard deviations of a fair draw
