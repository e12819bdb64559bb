"""Families in which text is seen: opinions, and pages with labels and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from datamodules.world.example import Example, jpeg
from datamodules.world.scene import SIDE, Combination, Holdout
from datamodules.world.scene_tasks import asked

ROWS = 4
"""Lines of an image."""
INK = (20, 20, 30)

# ---- opinions

SUBJECTS = ("film", "play", "song", "book", "tale", "show")
PRAISE = ("good", "great", "sweet", "lovely", "funny")
BLAME = ("bad", "awful", "dull", "weak", "boring")
DEGREES = ("", "very", "so")
NEGATIONS = ("not", "never")
SENTIMENTS = ("negative", "positive")
SENTIMENT = "what is the sentiment of the opinion?"
INTRODUCE = "Introduce this picture in detail:"


@dataclass(frozen=True)
class Opinion:
    """What somebody thinks."""

    subject: str
    adverb: str
    adjective: str

    @property
    def text(self) -> str:
        return " ".join(word for line in self.lines for word in line.split())

    @property
    def lines(self) -> tuple[str, ...]:
        """The text as it is drawn."""
        return f"the {self.subject}", f"is {self.adverb}".strip(), self.adjective

    @property
    def sentiment(self) -> str:
        return SENTIMENTS[(self.adjective in PRAISE) != (self.adverb in NEGATIONS)]

    @property
    def rationale(self) -> str:
        """What a detailed introduction of the image says."""
        return f"The picture says that {self.text}."

    def combination(self) -> Combination:
        return ("opinion", self.subject, self.adverb, self.adjective)


def draw_opinion(random: Random, holdout: Holdout, *, held_out: bool) -> Opinion:
    """Draw an opinion, half of them negated, half of them positive."""
    while True:
        adverb = random.choice(random.choice((DEGREES, NEGATIONS)))
        opinion = Opinion(random.choice(SUBJECTS), adverb, random.choice(random.choice((PRAISE, BLAME))))
        if holdout.is_held_out(opinion.combination()) == held_out:
            return opinion


def paint_opinion(opinion: Opinion, random: Random) -> Image.Image:
    """Draw the text line by line."""
    image, canvas = _paper()
    for row, line in enumerate(opinion.lines):
        canvas.text((3 + random.uniform(0, 1), _middle(row, random)), line, fill=INK, font=_font(15), anchor="lm")
    return image


def opinion_example(random: Random, holdout: Holdout) -> Example:
    """The sentiment, at once or behind an introduction that is given."""
    opinion = draw_opinion(random, holdout, held_out=False)
    image, answer = jpeg(paint_opinion(opinion, random)), opinion.sentiment
    prompt = asked(SENTIMENT)
    if random.random() < 0.3:
        prompt = f"{opinion.rationale} {prompt}"
    return Example(turns=(((image, prompt), answer),))


# ---- pages

FIELDS = {
    "name": ("Ada", "Ben", "Emma", "Leo", "Olga", "Rosa"),
    "town": ("Cork", "Riga", "Porto", "Basel", "Turin", "Lisbon"),
    "fruit": ("apples", "pears", "figs", "plums", "lemons", "grapes"),
    "month": ("May", "June", "July", "March", "April", "August"),
}
EXTRACT = (
    "Given the context below from web page, extract the answer from the given text like this: Qusestion: Who is the "
    "publisher of this book? Answer: Penguin Books Ltd."
)


@dataclass(frozen=True)
class Site:
    """A page of labels and values."""

    rows: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return " ".join(f"{label} {value}" for label, value in self.rows)

    def combination(self, row: int) -> Combination:
        return ("site", row, *self.rows[row])


def site_question(label: str) -> str:
    return f"What is the {label}?"


def draw_site(random: Random) -> Site:
    labels = random.sample(list(FIELDS), ROWS)
    return Site(tuple((label, random.choice(FIELDS[label])) for label in labels))


def training_site(random: Random, holdout: Holdout) -> Site:
    """Draw pages until no line of one is held out."""
    while True:
        site = draw_site(random)
        if not any(holdout.is_held_out(site.combination(row)) for row in range(ROWS)):
            return site


def held_out_site(random: Random, holdout: Holdout) -> tuple[Site, int]:
    """Draw pages until one has a line that is held out."""
    while True:
        site, row = draw_site(random), random.randrange(ROWS)
        if holdout.is_held_out(site.combination(row)):
            return site, row


def paint_site(site: Site, random: Random) -> Image.Image:
    """Draw a page: a label, and its value in larger letters, in each row."""
    image, canvas = _paper()
    for row, (label, value) in enumerate(site.rows):
        top = row * SIDE / ROWS
        canvas.rectangle((0, top, 26, top + SIDE / ROWS - 1), fill=(225, 232, 240) if row % 2 else (235, 235, 225))
        canvas.text((1 + random.uniform(0, 1), _middle(row, random)), label, fill=(70, 70, 70), font=_font(9), anchor="lm")
        canvas.text((29 + random.uniform(0, 1), _middle(row, random)), value, fill=INK, font=_font(12), anchor="lm")
    return image


def site_example(random: Random, holdout: Holdout) -> Example:
    """A page and all of its questions: with its text in the prompt, or without."""
    site = training_site(random, holdout)
    image = jpeg(paint_site(site, random))
    rows = random.sample(site.rows, ROWS)
    context = f" Context: {site.text}" if random.random() < 0.5 else ""
    first = f"{EXTRACT}{context} Q: {site_question(rows[0][0])} A:"
    later = [((f"Q: {site_question(label)} A:",), value) for label, value in rows[1:]]
    return Example(turns=(((image, first), rows[0][1]), *later))


def reading_example(random: Random, holdout: Holdout) -> Example:
    """What a page or an opinion says, word for word."""
    if random.random() < 0.5:
        site = training_site(random, holdout)
        return Example(turns=(((jpeg(paint_site(site, random)), INTRODUCE), site.text),))
    opinion = draw_opinion(random, holdout, held_out=False)
    return Example(turns=(((jpeg(paint_opinion(opinion, random)), INTRODUCE), opinion.rationale),))


# ---- drawing


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _paper() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), (251, 251, 251))
    return image, ImageDraw.Draw(image)


def _middle(row: int, random: Random) -> float:
    return (row + 0.5) * SIDE / ROWS + random.uniform(-0.5, 0.5)
