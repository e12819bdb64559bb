"""The prompts of the vision-language tasks, letter by letter, and their data files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit import tasks
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.requests import Generate, LogLikelihood
from kosmos_lit.evaluation.task import Task
from kosmos_lit.inference.config import GenerationConfig
from tests.kosmos_lit.tasks import image_datasets
from tests.kosmos_lit.tasks.scripted_responses import continuation, part_texts, prompt, requests

NO_METRICS: dict[str, Any] = {"metrics": []}
WEB = (
    "Given the context below from web page, extract the answer from the given text like this: Qusestion: Who is the "
    "publisher of this book? Answer: Penguin Books Ltd."
)


def coco(folder: Path, **options: Any) -> tasks.CocoCaption:
    return tasks.CocoCaption(str(image_datasets.karpathy(folder)), **NO_METRICS, **options)


# ---- captions


def test_captions_are_those_of_the_test_split(tmp_path: Path) -> None:
    samples = coco(tmp_path).samples()

    assert [sample.key for sample in samples] == [f"coco_{i}.jpg" for i in range(5)]
    assert samples[1].images == (tmp_path / "val2014" / "coco_1.jpg",)
    assert samples[1].data == {"captions": ["A blue square.", "the square 1 is blue"]}


def test_captions_demonstrations_are_of_train_and_restval(tmp_path: Path) -> None:
    assert [sample.key for sample in coco(tmp_path).pool()] == [f"coco_{i}.jpg" for i in range(5, 10)]


def test_captions_are_asked_for_with_a_beam_of_five(tmp_path: Path) -> None:
    task = coco(tmp_path)
    (request,) = requests(task, task.samples()[0])

    assert part_texts(request.parts) == ["[coco_0.jpg]", "An image of"]
    assert isinstance(request, Generate)
    assert request.settings.n_beams == 5


def test_a_demonstration_is_an_image_and_one_of_its_captions(tmp_path: Path) -> None:
    task = coco(tmp_path, n_shots=2, seed=3)
    pool = {sample.key: sample for sample in task.pool()}
    shots = [pool["coco_5.jpg"], pool["coco_8.jpg"]]

    parts = prompt(task, task.samples()[0], shots)

    assert parts[::2] == ["[coco_5.jpg]", "[coco_8.jpg]", "[coco_0.jpg]"]
    assert parts[1].removeprefix("An image of ") in pool["coco_5.jpg"].data["captions"]
    assert parts[3].removeprefix("An image of ") in pool["coco_8.jpg"].data["captions"]
    assert parts[5] == "An image of"
    assert parts == prompt(task, task.samples()[0], shots)


def test_the_caption_of_a_demonstration_depends_on_the_seed_and_the_sample(tmp_path: Path) -> None:
    tasks = [coco(tmp_path, n_shots=1, seed=seed) for seed in range(7)]
    shot, samples = tasks[0].pool()[0], tasks[0].samples()

    assert len({prompt(task, samples[0], [shot])[1] for task in tasks}) == 2
    assert len({prompt(tasks[0], sample, [shot])[1] for sample in samples}) == 2


def test_flickr30k_has_its_images_in_one_folder(tmp_path: Path) -> None:
    image_datasets.karpathy(tmp_path, "flickr30k")

    samples = tasks.Flickr30k(str(tmp_path), **NO_METRICS).samples()

    assert [sample.images[0] for sample in samples] == [
        tmp_path / "flickr30k-images" / f"flickr30k_{i}.jpg" for i in range(5)
    ]
    assert all(sample.images[0].is_file() for sample in samples)


# ---- questions


def test_vqav2_asks_greedily_and_shows_the_most_frequent_answer(tmp_path: Path) -> None:
    image_datasets.vqav2(tmp_path)
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path, "train2014", 3)), n_shots=1)
    sample, shot = task.samples()[1], task.pool()[2]

    (request,) = requests(task, sample, [shot])

    assert sample.key == "11"
    assert sample.images[0].is_file()
    assert part_texts(request.parts) == [
        "[COCO_train2014_000000000009.jpg]",
        "Question: What colour is number 2? Answer: green",
        "[COCO_val2014_000000000008.jpg]",
        "Question: What colour is number 1? Answer:",
    ]
    assert isinstance(request, Generate)
    assert request.settings.n_beams == 1


def test_vqav2_test_dev_has_no_answers_and_the_images_of_test(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path, "test-dev2015", answered=False)), split="test-dev2015")

    (first, *_) = task.samples()

    assert first.images == (tmp_path / "test2015" / "COCO_test2015_000000000007.jpg",)
    assert "answers" not in first.data


def test_vizwiz_reads_its_annotations_from_either_place(tmp_path: Path) -> None:
    image_datasets.vizwiz(tmp_path)
    beside = tasks.VizWiz(str(tmp_path)).samples()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "val.json").rename(tmp_path / "Annotations" / "val.json")
    in_folder = tasks.VizWiz(str(tmp_path)).samples()

    assert beside == in_folder
    assert prompt(tasks.VizWiz(str(tmp_path)), beside[2]) == [
        "[VizWiz_val_00000002.jpg]",
        "Question: What is this 2? Answer:",
    ]


def test_a_word_that_looks_like_a_mark_stays_a_word(tmp_path: Path) -> None:
    image_datasets.vqav2(tmp_path, n=1)
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    text = "What are <image> and {question}?"
    image_datasets.write(file, {"questions": [{"image_id": 7, "question": text, "question_id": 10}]})
    task = tasks.Vqav2(str(tmp_path))

    assert prompt(task, task.samples()[0])[1] == f"Question: {text} Answer:"


# ---- Raven


@pytest.mark.parametrize(("item", "number", "n"), [(0, "three", 3), (1, "four", 4), (2, "eight", 8)])
def test_raven_asks_about_each_candidate_after_the_context_images(tmp_path: Path, item: int, number: str, n: int) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path)))

    all_requests = requests(task, task.samples()[item])

    context = [f"[{j}.png]" for j in range(n)]
    assert [part_texts(request.parts) for request in all_requests] == [
        [f"Here are {number} images:", *context, "The following image is:", f"[{n + k}.png]", "Is it correct?"]
        for k in range(6)
    ]
    assert all(isinstance(request, LogLikelihood) and request.candidates == ("Yes",) for request in all_requests)


def test_raven_without_images_still_asks_six_times(tmp_path: Path) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path)), no="No")
    (sample, *_) = task.samples()

    all_requests = requests(task, type(sample)(key=sample.key, data=sample.data))

    expected = ["Here are three images:The following image is:Is it correct?"]
    assert [["".join(part_texts(request.parts))] for request in all_requests] == [expected] * 6


# ---- classes


def test_rendered_sst2_compares_both_sentiments(tmp_path: Path) -> None:
    task = tasks.RenderedSst2(str(image_datasets.rendered(tmp_path)))
    (request,) = requests(task, task.samples()[3], [task.pool()[0]])

    question = "Question: what is the sentiment of the opinion? Answer:"
    assert [sample.key for sample in task.samples()][2:4] == ["positive/0002.png", "negative/0000.png"]
    assert part_texts(request.parts) == ["[0000.png]", f"{question} positive", "[0000.png]", question]
    assert isinstance(request, LogLikelihood)
    assert request.candidates == ("positive", "negative")


def test_a_chain_of_thought_asks_again_with_the_rationale(tmp_path: Path) -> None:
    task = tasks.RenderedSst2ChainOfThought(str(image_datasets.rendered(tmp_path)))
    generator = task.ask(task.samples()[0], ())

    first = next(generator)
    second = generator.send([continuation(" A review {of} a film. ")])

    assert [part_texts(request.parts) for request in first] == [["[0000.png]", "Introduce this picture in detail:"]]
    question = "A review {of} a film. Question: what is the sentiment of the opinion? Answer:"
    assert [part_texts(request.parts) for request in second] == [["[0000.png]", question]]


def test_hateful_memes_takes_either_name_of_its_validation_split(tmp_path: Path) -> None:
    image_datasets.memes(tmp_path, ["dev", "train"])
    task = tasks.HatefulMemes(str(tmp_path), n_shots=1)
    sample = task.samples()[1]

    question = "Question: does this picture contain real hate speech? Answer:"
    expected = ["[train0.png]", f"{question} no", "[train3.png]", f"{question} yes", "[dev1.png]", question]
    assert prompt(task, sample, [task.pool()[0], task.pool()[3]]) == expected


# ---- pages


def test_websrc_asks_with_the_words_of_the_page(tmp_path: Path) -> None:
    task = tasks.WebSrc(str(image_datasets.websrc(tmp_path)))

    (first, *_) = samples = task.samples()

    assert [sample.key for sample in samples] == ["au010000000000", "au010000100001", "au010000200002"]
    text = "Context: Car 0 It costs $5,000 . Q: How much is it? A:"
    assert prompt(task, first) == ["[0100000.png]", f"{WEB} {text}"]


def test_websrc_cuts_a_long_page(tmp_path: Path) -> None:
    task = tasks.WebSrc(str(image_datasets.websrc(tmp_path)), max_words=3)

    assert prompt(task, task.samples()[0])[1] == f"{WEB} Context: Car 0 It Q: How much is it? A:"


def test_websrc_without_text_shows_the_image_alone(tmp_path: Path) -> None:
    task = tasks.WebSrc(str(image_datasets.websrc(tmp_path)), with_text=False)

    assert prompt(task, task.samples()[0]) == ["[0100000.png]", f"{WEB} Q: How much is it? A:"]
    assert task.published == "websrc_without_text"


def test_a_site_that_no_split_names_is_of_train(tmp_path: Path) -> None:
    samples = tasks.WebSrc(str(image_datasets.websrc(tmp_path)), split="train").samples()

    assert [sample.key for sample in samples] == ["bo070000000000", "bo070000100001"]


# ---- names


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet_is_read_in_folders_and_flat(tmp_path: Path, flat: bool) -> None:
    task = tasks.ImageNet(str(image_datasets.imagenet(tmp_path, flat)), names=str(tmp_path / "names.txt"))

    samples = task.samples()

    assert [sample.data["name"] for sample in samples] == ["tench"] * 3 + ["giant panda"] * 2 + ["tench"] * 2
    assert all(sample.images[0].is_file() for sample in samples)
    assert prompt(task, samples[0])[1] == "The photo of the"


def test_a_name_of_two_classes_is_one_choice(tmp_path: Path) -> None:
    task = tasks.ImageNet(str(image_datasets.imagenet(tmp_path)), constrained=True, names=str(tmp_path / "names.txt"))

    (request,) = requests(task, task.samples()[0])

    assert isinstance(request, Generate)
    assert request.settings == GenerationConfig(n_beams=2, max_new_tokens=32, choices=("tench", "giant panda"))


def test_the_thousand_names_are_for_a_thousand_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1000 names \(clip\) for 3 classes"):
        tasks.ImageNet(str(image_datasets.imagenet(tmp_path))).samples()


def test_folders_can_be_the_names(tmp_path: Path) -> None:
    samples = tasks.ImageNet(str(image_datasets.imagenet(tmp_path)), names="folders").samples()

    assert {sample.data["name"] for sample in samples} == {"n01440764", "n02510455", "n09999999"}


def test_birds_are_described_before_the_image(tmp_path: Path) -> None:
    task = tasks.Birds(str(image_datasets.birds(tmp_path)))

    assert prompt(task, task.samples()[4]) == [
        "Description of three toed woodpecker: It has black and white stripes throughout the body and a yellow crown. "
        "Description of downy woodpecker: It has white spots on its black wings and some red on its crown.",
        "[1.png]",
        "Question:what is the name of woodpecker in the picture? Answer:",
    ]


def test_birds_without_descriptions_name_both_kinds(tmp_path: Path) -> None:
    task = tasks.Birds(str(image_datasets.birds(tmp_path)), with_descriptions=False)

    question = "Question:what is the name of the woodpecker in the picture, three toed or downy? Answer:"
    assert prompt(task, task.samples()[0]) == ["[0.png]", question]


# ---- all of them

FILES = {
    "CocoCaption": "dataset_coco.json",
    "Flickr30k": "dataset_flickr30k.json",
    "Vqav2": "v2_mscoco_val2014_annotations.json",
    "VizWiz": "val.json or Annotations/val.json",
    "Raven": "items.json",
    "RenderedSst2": "test/positive/",
    "RenderedSst2ChainOfThought": "test/negative/",
    "HatefulMemes": "dev_seen.jsonl or dev.jsonl",
    "WebSrc": "*/*/dataset.csv",
    "ImageNet": "val/",
    "Birds": "birds.json",
}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_dataset_says_which_files_and_where_they_are_published(tmp_path: Path, name: str) -> None:
    task: Task = getattr(tasks, name)(str(tmp_path / "nowhere"))

    with pytest.raises(UserError) as raised:
        task.samples()

    message = str(raised.value)
    assert message.startswith(f"{task.title}: ")
    assert all(part in message for part in (FILES[name], str(tmp_path / "nowhere"), "http"))


def test_a_missing_folder_of_images_is_named(tmp_path: Path) -> None:
    image_datasets.karpathy(tmp_path)
    for image in (tmp_path / "val2014").iterdir():
        image.unlink()
    (tmp_path / "val2014").rmdir()

    with pytest.raises(UserError, match="no val2014/ under"):
        tasks.CocoCaption(str(tmp_path)).samples()


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    image_datasets.write(tmp_path / "items.json", [{"id": 1, "images": []}])

    with pytest.raises(UserError, match=r"items\.json is not as its authors publish it: KeyError: 'given'"):
        tasks.Raven(str(tmp_path)).samples()


def test_a_template_with_an_unknown_field_lists_the_known_ones(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path)), template="Q: {query} A:")

    with pytest.raises(UserError, match=r"it may use \{question\}"):
        prompt(task, task.samples()[0])


def test_other_data_in_the_same_files_have_no_published_metrics(tmp_path: Path) -> None:
    task = coco(tmp_path, title="Captions of the world")

    assert (task.title, task.published) == ("Captions of the world", None)


def test_chance_on_other_data_is_an_option(tmp_path: Path) -> None:
    kinds = [kind for kind in vars(tasks).values() if isinstance(kind, type)]

    assert len(kinds) == 22
    assert {kind.__name__: kind(str(tmp_path), chance=0.42).chance for kind in kinds} == {k.__name__: 0.42 for k in kinds}


def test_websrc_page_that_is_missing_fails_its_sample(tmp_path: Path) -> None:
    task = tasks.WebSrc(str(image_datasets.websrc(tmp_path)))
    first = task.samples()[0]
    Path(first.data["page"]).unlink()

    with pytest.raises(UserError, match=r"0100000\.html cannot be read: No such file"):
        prompt(task, first)


def test_options_are_kept_as_plain_data(tmp_path: Path) -> None:
    options = tasks.ImageNet(str(tmp_path), constrained=True).options

    assert json.loads(json.dumps(options, default=asdict))["settings"]["n_beams"] == 2
    assert (options["constrained"], options["n_shots"]) == (True, 0)
