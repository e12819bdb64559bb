import numpy as np
import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.inference.trie import ROOT, ChoiceTrie, Trie
from kosmos_lit.tokenizer import EOS


def test_common_beginnings_are_held_once():
    trie = Trie([[5, 6, 7], [5, 6], [5, 8], [9]])
    assert (trie.tokens, trie.parents, trie.depths) == ([5, 6, 7, 8, 9], [ROOT, 0, 1, 0, ROOT], [0, 1, 2, 1, 0])
    assert trie.ends == [2, 1, 3, 4]
    assert [trie.next_tokens(path) for path in ([], [5], [5, 6], [9])] == [[5, 9], [6, 8], [7], []]


def test_a_node_attends_to_itself_and_its_ancestors():
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert np.array_equal(Trie([[5, 6, 7], [5, 8], [9]]).ancestors(), np.array(expected, dtype=bool))


def test_a_choice_that_begins_another_may_end_or_go_on(kosmos_tokenizer):
    cat, cats = (kosmos_tokenizer.encode(text).tolist() for text in ("the cat", "the cat sat"))
    assert cats[: len(cat)] == cat
    choices = ChoiceTrie(["the cat", "the cat sat"], kosmos_tokenizer, 99)
    assert choices.next_tokens(cat) == [EOS, cats[len(cat)]]
    assert choices.text(cats) == "the cat sat"


def test_choices_that_read_the_same_cannot_be_told_apart(kosmos_tokenizer):
    with pytest.raises(UserError, match="'the cat' and 'the  cat' are the same tokens"):
        ChoiceTrie(["the cat", "the  cat"], kosmos_tokenizer, 99)


def test_a_choice_must_fit(kosmos_tokenizer):
    n = len(kosmos_tokenizer.encode("the cat"))
    ChoiceTrie(["the cat"], kosmos_tokenizer, n + 1)
    with pytest.raises(UserError, match=f"'the cat' has {n} tokens; with </s> it must take 2 to max_new_tokens = {n}"):
        ChoiceTrie(["the cat"], kosmos_tokenizer, n)
