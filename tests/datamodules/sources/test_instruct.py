import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.document import ImageRef, Tally
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.instruct import prompt_text
from kosmos_lit.errors import UserError
from tests.datamodules import sample_data


def read(folder, *records, **options):
    """Read records from a file beside which images a.png, b.png and c.png lie."""
    for i, name in enumerate("abc"):
        (folder / f"{name}.png").write_bytes(sample_data.png(i))
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    sample_data.write_lines(folder / "x.jsonl", lines)
    tally = Tally()
    return list(SOURCES["instruct"].documents(folder / "x.jsonl", 3, ReadOptions(**options), tally, None)), tally


def written(document):
    """Parts as text, the learnt ones in brackets, an image by its name."""
    parts = zip(document.parts, document.supervised, strict=True)
    return [
        part.path if isinstance(part, ImageRef) else f"[{part}]" if is_supervised else part for part, is_supervised in parts
    ]


def only(folder, record, **options):
    [document], tally = read(folder, record, **options)
    assert not tally.broken
    return written(document)


def talk(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_a_completion_follows_its_prompt_as_it_is_and_alone_is_learnt(tmp_path):
    record = {"images": ["a.png"], "prompt": "see <image> here:", "completion": " a cat\nand a dog "}
    assert only(tmp_path, record) == ["see", "a.png", "here:", "[ a cat\nand a dog]"]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("x: ", "well", ["x:", "[ well]"]),
        ("x: ", " well ", ["x:", "[  well]"]),
        ("x", "well", ["x", "[well]"]),
        ("x\n", "well", ["x", "[\nwell]"]),
        (" ", " well", ["[well]"]),
        ("x <image> ", " well", ["x", "a.png", "[well]"]),
    ],
)
def test_blanks_before_a_completion_are_its_head_unless_it_begins_or_follows_an_image(
    tmp_path, prompt, completion, expected
):
    images = {"images": ["a.png"]} if "<image>" in prompt else {}
    assert only(tmp_path, {"prompt": prompt, "completion": completion} | images) == expected


def test_images_without_a_mark_come_first(tmp_path):
    record = {"images": ["a.png", "b.png", "c.png"], "prompt": "x <image> y", "completion": "z"}
    assert only(tmp_path, record) == ["a.png", "b.png", "x", "c.png", "y", "[z]"]


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else(tmp_path):
    record = {"messages": [{"role": "system", "content": "Be short."}, *talk("one", "1", "two", "2")]}
    expected = ["Be short.\nQuestion: one Answer:", "[ 1]", " Question: two Answer:", "[ 2]"]
    assert only(tmp_path, record) == expected


def test_images_that_begin_a_question_stand_before_its_template(tmp_path):
    record = {"images": ["a.png", "b.png"], "messages": talk("<image>\nwhat", "x", "and <image> there", "y")}
    expected = ["a.png", "Question: what Answer:", "[ x]", " Question: and", "b.png", "there Answer:", "[ y]"]
    assert only(tmp_path, record) == expected


def test_content_may_be_parts_that_name_their_images(tmp_path):
    question = [
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "file://c.png"}},
        {"type": "image"},
    ]
    record = {"images": ["a.png"], "messages": talk(question, [{"type": "text", "text": "x"}])}
    assert only(tmp_path, record) == ["b.png", "Question: what is", "c.png", "a.png", "Answer:", "[ x]"]


def test_llavas_form_is_the_same_example(tmp_path):
    record = {
        "id": "7",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "x"}],
    }
    assert only(tmp_path, record) == only(tmp_path, {"images": ["a.png"], "messages": talk("<image>what", "x")})


def test_the_turn_template_may_be_another(tmp_path):
    template = "### User:\n{user}\n### Bot:\n{assistant}"
    record = {"messages": talk("one", "1", "two", "2")}
    assert only(tmp_path, record, turn_template="\n" + template) == [
        "### User:\none\n### Bot:",
        "[\n1]",
        "\n### User:\ntwo\n### Bot:",
        "[\n2]",
    ]


@pytest.mark.parametrize("template", ["{user}", "{assistant}", "{user} {assistant} .", "{user} {user} {assistant}"])
def test_a_template_must_have_one_question_and_end_with_the_answer(template):
    with pytest.raises(UserError, match="turn_template must hold"):
        ReadOptions(turn_template=template)


def test_a_prompt_for_generate_is_what_stands_before_the_answer(tmp_path):
    record = {"images": ["a.png"], "messages": [{"role": "system", "content": "s"}, *talk("<image> one", "1", "two", "2")]}
    messages = [(m["role"], m["content"]) for m in record["messages"]]
    assert prompt_text(messages[:-1]) == "s\n<image>Question: one Answer: 1 Question: two Answer:"


NO_FORM = "neither prompt and completion, nor messages, nor conversations"
ORDER = "roles are not system (or none), then user and assistant in turn"
NO_FILE = "an image is no file; save it as one"
TWO_NAMES = "images and image name different images"


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (b"{", "line is not JSON", "line 2"),
        (b"[{}]", "line is no JSON object", ""),
        (b"[", "line is not JSON", "a JSON array"),
        (b"\xff", "line is not UTF-8", ""),
        ({"prompt": "x"}, NO_FORM, "['prompt']"),
        ({"prompt": "x", "completion": "y", "messages": []}, NO_FORM, ""),
        ({"prompt": 3, "completion": "y"}, "prompt or completion is no text", ""),
        ({"prompt": "x", "completion": " \n"}, "empty completion or answer", ""),
        ({"messages": talk("x", "")}, "empty completion or answer", ""),
        ({"messages": talk(" ", "x")}, "empty question", ""),
        ({"messages": "x"}, "messages are no list of objects", ""),
        ({"messages": []}, ORDER, ""),
        ({"messages": talk("x")}, ORDER, "user"),
        ({"messages": talk("x", "y")[::-1]}, ORDER, "assistant, user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role", "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "content is neither text nor image", "None"),
        ({"messages": talk([{"type": "audio", "audio": "a.wav"}], "x")}, "content is neither text nor image", "audio"),
        ({"prompt": "<image>", "completion": "x"}, "more <image> marks than images", "1 marks, 0 images"),
        ({"images": ["a.png"], "messages": talk("<image> <image>", "x")}, "more <image> marks than images", "1 images"),
        ({"images": ["a.png"], "prompt": "x", "completion": "a <image>"}, "an image in an answer", ""),
        ({"images": ["no.png"], "prompt": "x", "completion": "y"}, "image cannot be read", "no.png: No such file"),
        ({"images": ["x.jsonl"], "prompt": "x", "completion": "y"}, "not an image", "x.jsonl"),
        ({"images": ["http://a/b.png"], "prompt": "x", "completion": "y"}, NO_FILE, "http"),
        ({"images": ["data:image/png;base64,AA"], "prompt": "x", "completion": "y"}, NO_FILE, ""),
        ({"images": [7], "prompt": "x", "completion": "y"}, "an image is named by no path", "7"),
        ({"images": ["a\0.png"], "prompt": "x", "completion": "y"}, "an image's path is none", r"a\x00.png"),
        ({"images": ["\ud800"], "prompt": "x", "completion": "y"}, "an image's path is none", r"\ud800"),
        ({"images": ["a.png"], "image": "b.png", "prompt": "x", "completion": "y"}, TWO_NAMES, "b.png"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role", "['user']"),
        ({"messages": [{"role": {"user": 1}, "content": "x"}]}, "unknown role", "{'user': 1}"),
    ],
)
def test_a_broken_record_is_counted_with_its_line_and_the_next_one_read(tmp_path, record, reason, detail):
    sound = {"prompt": "x", "completion": "y"}
    documents, tally = read(tmp_path, sound, record, sound)
    assert [document.record for document in documents] == [1, 3]
    assert tally.broken == {reason: 1}
    assert tally.examples[reason].startswith("x.jsonl, line 2")
    assert detail in tally.examples[reason]


@pytest.mark.parametrize("other", [[], None, "", ["a.png"]])
def test_an_image_is_kept_beside_an_empty_or_equal_list(tmp_path, other):
    record = {"image": "a.png", "images": other, "prompt": "x", "completion": "y"}
    assert only(tmp_path, record)[0] == "a.png"


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
LEAVES |= st.sampled_from(["<image>", "a.png", "no.png", "user", "gpt", "text", "image", "a\0", "\ud800", "..", "file://"])
KEYS = st.sampled_from(
    [
        "images",
        "image",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "role",
        "from",
        "content",
        "value",
        "type",
        "text",
        "image_url",
        "url",
        "path",
    ]
) | st.text(max_size=3)
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
TURNS = st.lists(st.fixed_dictionaries({"role": st.just("user") | ANYTHING, "content": ANYTHING}), max_size=3)
NEARLY = st.fixed_dictionaries(
    {}, optional={"images": ANYTHING, "image": ANYTHING, "prompt": ANYTHING, "completion": ANYTHING, "messages": TURNS}
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=ANYTHING | NEARLY)
def test_whatever_json_a_line_holds_it_is_an_example_or_counted_as_broken(tmp_path, record):
    documents, tally = read(tmp_path, record)
    assert len(documents) + tally.broken.total() == 1
    for place in tally.examples.values():
        assert place.encode()  # can be printed


def test_an_image_that_has_changed_is_not_read(tmp_path):
    [document], _ = read(tmp_path, {"images": ["a.png"], "prompt": "x", "completion": "y"})
    ref = document.parts[0]
    (tmp_path / "a.png").write_bytes(sample_data.png(0) + b"more")
    with pytest.raises(OSError, match="it has changed since it was prepared"):
        SOURCES["instruct"].image_bytes(tmp_path / ref.path, ref.offset, ref.length)
