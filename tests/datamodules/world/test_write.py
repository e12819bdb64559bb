import json
import re

import pyarrow.parquet as pq
import pytest

from datamodules.document import Tally
from datamodules.prepare.index import prepare_corpus
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.jsonl import lines
from datamodules.world import language, write
from datamodules.world.language import canonical_caption
from datamodules.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Holdout, Scene, Thing
from datamodules.world.write import WorldConfig, write_world
from kosmos_lit.errors import UserError

SIZE = {"seed": 3, "n_pairs": 61, "n_pages": 23, "n_texts": 97, "shards": 2, "workers": 1}


def config(folder, **changes):
    return WorldConfig(path=str(folder), **(SIZE | changes))


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "drawn"
    write_world(config(folder))
    return folder


@pytest.fixture(scope="module")
def told(world):
    """Every sentence of the training corpora, by corpus."""
    tables = [pq.read_table(p).column("caption").to_pylist() for p in sorted(world.glob("*.parquet"))]
    texts = {"caption": [c for table in tables for c in table]}
    for name, format_, pattern in (("pages", "warc", "pages-*"), ("text", "jsonl", "text-*")):
        paths = sorted(world.glob(pattern))
        texts[name] = [t for p in paths for t in SOURCES[format_].texts(p, ReadOptions(), Tally())]
    return texts


def test_a_world_has_as_much_as_asked(told):
    assert len(told["caption"]) == 61
    assert len(told["text"]) == 97


def test_a_world_is_the_same_twice(world, tmp_path):
    write_world(config(tmp_path / "again", workers=2))
    assert content(tmp_path / "again") == content(world)


def test_another_seed_draws_another_world(world, tmp_path):
    write_world(config(tmp_path / "other", seed=5))
    other, this = content(tmp_path / "other"), content(world)
    assert other.keys() == this.keys()
    assert all(other[name] != this[name] for name in this)


def test_a_world_is_drawn_once(world):
    before = {p: p.stat().st_mtime_ns for p in world.iterdir()}
    write_world(config(world))
    assert {p: p.stat().st_mtime_ns for p in world.iterdir()} == before


def test_another_world_is_refused_and_both_are_named(world):
    with pytest.raises(UserError, match="n_pairs is 61 there, 67 here"):
        write_world(config(world, n_pairs=67))


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError):
        write_world(config(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("kind", ["caption", "pages", "text"])
def test_every_scene_that_is_drawn_or_told_may_be_trained_on(monkeypatch, tmp_path, kind):
    scenes = []
    original = write.training_scene

    def noticed(random, kind_, holdout):
        scenes.append(original(random, kind_, holdout))
        return scenes[-1]

    for module in (write, language):
        monkeypatch.setattr(module, "training_scene", noticed)
    write._write_shard(config(tmp_path, shards=1), kind, 0, tmp_path)
    holdout = Holdout(3, 0.28)
    assert len(scenes) >= {"caption": 61, "pages": 23, "text": 97}[kind]
    assert not any(holdout.is_held_out(c) for scene in scenes for c in scene.combinations())


@pytest.mark.parametrize("kind", ["caption", "pages", "text"])
def test_no_scene_is_drawn_or_told_but_for_the_training_scenes(monkeypatch, tmp_path, kind):
    def none(*arguments):
        raise LookupError("a scene is asked for")

    for module in (write, language):
        monkeypatch.setattr(module, "training_scene", none)
    with pytest.raises(LookupError):
        write._write_shard(config(tmp_path, shards=1), kind, 0, tmp_path)


def held_out_descriptions():
    holdout = Holdout(3, 0.28)
    things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(len(PLACES))]
    scenes = [Scene("object", (t,)) for t in things]
    scenes += [Scene("count", (Thing(s, c, "small", 0),) * n) for s in SHAPES for c in COLOURS for n in (2, 3, 4)]
    return [canonical_caption(s) for s in scenes if holdout.is_held_out(s.own_combination())]


def test_there_are_enough_held_out_descriptions():
    assert len(held_out_descriptions()) >= 200


@pytest.mark.parametrize("corpus", ["caption", "pages", "text"])
def test_no_held_out_description_stands_in_the_training_corpora(told, corpus):
    # "at the top" also begins "at the top left", which is another place.
    either = "|".join(map(re.escape, held_out_descriptions()))
    found = re.compile(rf"\b(?:{either})\b(?! left| right)", re.IGNORECASE)
    assert [m[0] for t in told[corpus] if (m := found.search(t))] == []


def test_descriptions_that_may_be_trained_on_do_stand_there(told):
    holdout = Holdout(3, 0.28)
    things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(len(PLACES))]
    allowed = [canonical_caption(s) for t in things if holdout.allows(s := Scene("object", (t,)))]
    for corpus in told.values():
        assert any(description in t for t in corpus for description in allowed)


def test_each_corpus_can_be_prepared_without_anything_broken(world, tokenizer_folder, tmp_path):
    patterns = {"jsonl": "text-*.zst", "img2dataset": "caption-*.tar", "warc": "pages-*.warc.gz"}
    made = {
        f: prepare_corpus(format=f, inputs=[str(world / p)], tokenizer=tokenizer_folder, output=tmp_path / f)
        for f, p in patterns.items()
    }
    assert [made[f].n_documents for f in ("jsonl", "img2dataset")] == [97, 61]
    assert 0 < made["warc"].n_documents <= 23
    tallies = [corpus.manifest[name] for corpus in made.values() for name in ("tally", "image_tally")]
    assert all(tally["broken"] == {} for tally in tallies)


def test_captions_and_parquet_say_the_same(world):
    table = pq.read_table(world / "caption-00000.parquet").to_pylist()
    documents = SOURCES["img2dataset"].documents(world / "caption-00000.tar", 0, ReadOptions(), Tally(), None)
    assert [d.parts[1] for d in documents] == [row["caption"] for row in table]


def test_texts_of_the_world_know_their_place(world):
    metas = [json.loads(line)["meta"] for line in lines(world / "text-00001.jsonl.zst")]
    assert metas == [{"shard": 1, "n": n} for n in range(49)]


def test_backgrounds_are_not_part_of_a_combination():
    thing = Thing(SHAPES[0], "red", "small", 3)
    combinations = {Scene("object", (thing,), b).own_combination() for b in BACKGROUNDS}
    assert len(combinations) == 1
