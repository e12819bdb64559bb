"""Metrics of short answers: exact match and F1 of words (SQuAD, WebSRC), and VQA accuracy.

SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single blanks.

VQA accuracy (Antol et al. 2015, https://visualqa.org/evaluation): the share of people that an open-ended answer agrees with.
An answer that at least three of the other people gave counts 1, two 2/3, one 1/3. Before that, answers are normalised, in
this order:

    signs go where a blank is beside one of their kind    "yes, it is" -> "yes it is"
        or the text has a comma between digits            "1,000" -> "1000"
        and are a blank elsewhere                         "black/white" -> "black white"
    full stops go, unless a digit follows                 "u.s." -> "us", but "1.5" stays
    lower case; numbers up to ten are digits              "Two", "none" -> "2", "0"
    articles go                                           "the dog" -> "dog"
    contractions have their apostrophe                    "dont" -> "don't"

Colons and apostrophes are not among the signs. Deviation: the benchmark's code, of which there are several versions, leaves
answers as they are where all ten people agree; here both sides are always normalised, as the benchmark's page says.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

# Whole words only: "another" keeps its "an".
SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")  # "1,000"
FULL_STOP = re.compile(r"\.(?!\d)")  # that of "u.s.", not of "1.5"
VQA_ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""The contractions in the benchmark's code."""
CONTRACTION_OF = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
}
"""Each contraction by its spellings with one apostrophe missing."""


def normalise_squad(text: str) -> str:
    """Return a text as SQuAD's metrics compare it."""
    # Punctuation before articles, as in SQuAD's code: "a-b" becomes "ab" and keeps its "a".
    return " ".join(SQUAD_ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised prediction equals a normalised reference, else 0."""
    return float(normalise_squad(prediction) in {normalise_squad(reference) for reference in references})


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best harmonic mean of precision and recall of normalised words over the references, 0 to 1.

    Two texts without any words are equal.
    """
    words = normalise_squad(prediction).split()
    return max(_f1(words, normalise_squad(reference).split()) for reference in references)


def _f1(prediction: Sequence[str], target: Sequence[str]) -> float:
    # Without words, precision or recall would be 0 / 0.
    if not prediction or not target:
        return float(list(prediction) == list(target))
    n_common = (Counter(prediction) & Counter(target)).total()  # a word counts as often as both have it
    # 2PR / (P + R), where P = common / predicted words and R = common / target words.
    return 2 * n_common / (len(prediction) + len(target))


def normalise_vqa(answer: str) -> str:
    """Return an answer as VQA accuracy compares it."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text, has_number = answer, COMMA_IN_NUMBER.search(answer) is not None
    for sign in SIGNS:
        # The original answer decides for every sign, as in the benchmark's code, not the text with earlier signs replaced.
        goes = has_number or f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if goes else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", text).lower().split()]
    return " ".join(CONTRACTION_OF.get(word, word) for word in words if word not in VQA_ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, leave_one_out: bool = True) -> float:
    """Return how far a prediction agrees with people's answers, 0 to 1.

    Args:
        prediction: the model's answer.
        answers: those of n people, ten in VQAv2 and VizWiz.
        leave_one_out: average over the n sets of n - 1 people, as the benchmark does; else min(1, matches / 3).
    """
    n, m = len(answers), sum(normalise_vqa(answer) == normalise_vqa(prediction) for answer in answers)
    if not leave_one_out:
        return min(1.0, m / 3)
    # Without one of the m matching people m - 1 others match, without one of the n - m others m do.
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n
