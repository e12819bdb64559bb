"""The families' training examples: drawn the same twice, free of what is held out, read by the real reader."""

import json
from random import Random

import pytest

from datamodules.document import Document, Tally
from datamodules.sources import SOURCES, ReadOptions
from datamodules.world import creatures, rendered_text, scene_tasks, text_tasks
from datamodules.world.families import FAMILIES, TURN_TEMPLATE, FamiliesConfig, write_families
from datamodules.world.language import canonical_caption, look
from datamodules.world.scene import COLOURS, SHAPES, Holdout
from datamodules.world.write import WorldConfig
from kosmos_lit.errors import UserError

RULES = Holdout(3, 0.28)


def config(folder, **changes):
    return WorldConfig(path=str(folder), **({"seed": 3, "workers": 1} | changes))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    write_families(FamiliesConfig(n_examples=23), config(folder))
    return folder / "families"


def records(folder, family):
    paths = sorted(folder.glob(f"{family}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def said(folder, family):
    """Return the text of each example."""
    return [" ".join(message["content"] for message in record["messages"]) for record in records(folder, family)]


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_families_are_the_same_twice(families, tmp_path):
    write_families(FamiliesConfig(n_examples=23), config(tmp_path, workers=2))
    assert content(tmp_path / "families") == content(families)


def test_other_families_in_the_folder_are_refused(families):
    with pytest.raises(UserError, match="n_examples is 23 there, 29 here"):
        write_families(FamiliesConfig(n_examples=29), config(families.parent))


def test_a_baseline_without_images_takes_the_families_that_are_there(families):
    before = content(families)
    write_families(FamiliesConfig(n_examples=23, blind=True), config(families.parent))
    assert content(families) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_of_instructions_reads_every_example(families, family):
    tally = Tally()
    options = ReadOptions(turn_template=TURN_TEMPLATE)
    found: list[Document] = []
    for shard, path in enumerate(sorted(families.glob(f"{family}-*.jsonl"))):
        found += SOURCES["instruct"].documents(path, shard, options, tally, None)
    assert len(found) == len(records(families, family)) > 0
    assert not tally.broken


@pytest.mark.parametrize("family", FAMILIES)
def test_blind_examples_have_the_same_words_and_no_images(families, family):
    seen, blind = said(families, family), records(families / "blind", family)
    assert not any("images" in record for record in blind)
    words = [" ".join(m["content"] for m in record["messages"]) for record in blind]
    assert [text.split() for text in words] == [text.replace("<image>", " ").split() for text in seen]


# ---- held out


@pytest.mark.parametrize("family", ["captions", "questions", "few_shot", "classes"])
def test_no_scene_of_an_example_is_held_out(monkeypatch, family):
    scenes = []
    original = scene_tasks.any_scene

    def noticed(*arguments, **options):
        scenes.append(original(*arguments, **options))
        return scenes[-1]

    monkeypatch.setattr(scene_tasks, "any_scene", noticed)
    random = Random(5)
    for _ in range(31):
        FAMILIES[family][0](random, RULES)
    assert len(scenes) >= 31
    assert all(RULES.allows(scene) for scene in scenes)


def test_no_caption_of_the_families_tells_of_a_held_out_scene(families):
    told_of = {record["messages"][1]["content"] for record in records(families, "captions")}
    random = Random(7)
    kinds = ("object", "count", "pair") * 997
    unseen = {canonical_caption(scene_tasks.any_scene(random, kind, RULES, held_out=True)) for kind in kinds}
    assert len(unseen) > 300
    assert not told_of & unseen


def test_no_opinion_that_is_held_out_is_read_in_training(families):
    every = [
        rendered_text.Opinion(subject, adverb, adjective)
        for subject in rendered_text.SUBJECTS
        for adverb in (*rendered_text.DEGREES, *rendered_text.NEGATIONS)
        for adjective in (*rendered_text.PRAISE, *rendered_text.BLAME)
    ]
    unseen = {opinion.rationale for opinion in every if RULES.is_held_out(opinion.combination())}
    assert 0.2 < len(unseen) / len(every) < 0.36  # 896 draws with probability 0.28: six standard deviations
    texts = said(families, "opinions")
    assert not [text for text in texts if any(rationale in text for rationale in unseen)]


def test_no_line_of_a_page_in_training_is_held_out(families):
    random = Random(11)
    sites = [rendered_text.training_site(random, RULES) for _ in range(53)]
    assert not any(RULES.is_held_out(site.combination(row)) for site in sites for row in range(rendered_text.ROWS))


def test_no_pair_of_creatures_that_is_held_out_is_described_in_training():
    random = Random(13)
    for _ in range(53):
        pair = creatures.draw_pair(random, RULES, held_out=False)
        assert not RULES.is_held_out(creatures.pair_combination(*pair))
        assert not RULES.is_held_out(creatures.pair_combination(*pair[::-1]))


def test_nothing_that_is_held_out_is_told(families):
    texts = said(families, "told")
    unseen = {f: [] for f in ("copa", "piqa", "story")}
    for family, found in unseen.items():
        found += [(c, s) for c in COLOURS for s in SHAPES if RULES.is_held_out(text_tasks.combination(family, c, s))]
        assert found
    starts = {"copa": "Somebody drew", "piqa": "To make something"}
    for family, start in starts.items():
        some = [text for text in texts if text.startswith(start)]
        assert not [text for text in some for colour, shape in unseen[family] if f"{colour} {shape}" in text]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_has_a_name_together_with_a_colour_or_size_but_the_questions_that_are_asked(families, family):
    names = {name for name in creatures.named(RULES) if family != "facts" or not creatures.is_asked_in_training(name, RULES)}
    looks = {*COLOURS, "small", "large", "larger", *SHAPES}
    for text in said(families, family):
        words = {word.strip("?.,:") for word in text.split()}
        assert not (words & names and words & looks), text


def test_about_a_quarter_of_the_names_is_never_asked_about():
    names = list(creatures.named(RULES))
    asked = [name for name in names if creatures.is_asked_in_training(name, RULES)]
    assert len(names) == len(set(creatures.named(RULES).values())) == 140
    assert 0.5 < len(asked) / len(names) < 0.9


# ---- what the answers are


def test_an_opinion_is_turned_by_its_negation():
    assert rendered_text.Opinion("film", "very", "good").sentiment == "positive"
    assert rendered_text.Opinion("film", "not", "good").sentiment == "negative"
    assert rendered_text.Opinion("film", "never", "dull").sentiment == "positive"


def test_no_word_of_an_opinion_but_both_together_tells_the_sentiment():
    random = Random(17)
    drawn = [rendered_text.draw_opinion(random, RULES, held_out=False) for _ in range(2000)]
    for part in (lambda o: o.adverb in rendered_text.NEGATIONS, lambda o: o.adjective in rendered_text.PRAISE):
        for value in (True, False):
            of_kind = [opinion.sentiment == "positive" for opinion in drawn if part(opinion) == value]
            assert 0.42 < sum(of_kind) / len(of_kind) < 0.58  # about 1,000 tosses: five standard deviations


def test_questions_about_two_things_have_one_right_answer():
    random = Random(19)
    for _ in range(53):
        scene = scene_tasks.any_scene(random, "pair", RULES, held_out=False)
        found = scene_tasks.questions(scene, random)
        one, other = scene.things
        assert ("colour of one" in found) == (one.shape != other.shape)
        assert ("shape of one" in found) == (one.colour != other.colour)
        question, answer = found["relation"]
        true = scene_tasks.relation(one, other)
        ways = ((one, true, other), (other, scene_tasks.OPPOSITE[true], one))
        says_so = question in {f"is the {look(a)} {way} the {look(b)}?" for a, way, b in ways}
        assert says_so == (answer == "yes")
