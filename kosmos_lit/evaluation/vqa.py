"""VQA accuracy: the share of people that an open-ended answer agrees with (Antol et al. 2015, https://visualqa.org/evaluation).

An answer that at least three of the other people gave counts 1, two 2/3, one 1/3. Before that, answers are normalised, in
this order:

    signs go where a blank is beside one of their kind    "yes, it is" -> "yes it is"
        or the text has a comma between digits            "1,000" -> "1000"
        and are a blank elsewhere                         "black/white" -> "black white"
    full stops go, unless a digit follows                 "u.s." -> "us", but "1.5" stays
    lower case; numbers up to ten are digits              "Two", "none" -> "2", "0"
    articles go                                           "the dog" -> "dog"
    contractions have their apostrophe                    "dont" -> "don't"

Colons and apostrophes are no such signs. Deviation: the benchmark's code, of which there are several versions, leaves
answers as they are where all ten people agree; here both sides are always normalised, as the benchmark's page says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = frozenset({"a", "an", "the"})
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
"""Those that the benchmark knows."""
MENDED = {word[:at] + word[at + 1 :]: word for word in CONTRACTIONS for at, letter in enumerate(word) if letter == "'"}
"""Each with one of its apostrophes left out, and as it should be."""


def normalised(answer: str) -> str:
    """Return an answer as it is compared."""
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    text, in_number = given, COMMA_IN_NUMBER.search(given) is not None
    for sign in SIGNS:
        goes = in_number or f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if goes else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", text).lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, leave_one_out: bool = True) -> float:
    """Return how far an answer agrees with people's, 0 to 1.

    Args:
        prediction: the model's answer.
        answers: those of n people, ten in VQAv2 and VizWiz.
        leave_one_out: average over the n sets of n - 1 people, as the benchmark does; else min(1, matches / 3).
    """
    n, m = len(answers), sum(normalised(answer) == normalised(prediction) for answer in answers)
    if not leave_one_out:
        return min(1.0, m / 3)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n
