r"""Instruction data as one JSON object per line: a prompt with its completion, or a conversation, and images as files.

    {"images": ["a.jpg"], "prompt": "<image> What is this?", "completion": "A cat."}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image> What is this?"},
                                       {"role": "assistant", "content": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}

An example becomes one text with image marks; only completions or answers are supervised. Each `<image>` stands for the next
image of `images`; images without a mark come first. A completion follows its prompt as it is. A conversation is written turn
by turn in the turn template: images at the beginning of a question go before the template, a system message on a line before
the first turn. `generate` strips a prompt, so blanks between prompt and answer belong to the answer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.document import Document, ImageRef, Part
from datamodules.sources.base import TURN_TEMPLATE, ReadOptions
from datamodules.sources.jsonl import JsonLines, RecordError
from kosmos_lit.images import ImageError, probe
from kosmos_lit.tokenizer import trimmed

MARK = "<image>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Message = tuple[str, str]
"""Role (`system`, `user`, `assistant`) and text with marks."""
Run = tuple[str, bool]
"""Text with marks, and whether it is supervised."""


class Instruct(JsonLines):
    """One example per line."""

    format = "instruct"
    kind = "instruct"
    packing = "intact"
    columns = {"supervised": "|u1", "image_path_offsets": "<u8", "image_paths": "|u1"}  # noqa: RUF012

    def read(self, record: dict[str, Any], number: int, folder: Path, shard: int, options: ReadOptions) -> Document:
        runs, names = _read(record, options.turn_template)
        images = [_image(name, folder, shard) for name in names]
        parts: list[Part] = []
        supervised: list[bool] = []
        for part, is_supervised in _parts(runs, images):
            parts.append(part)
            supervised.append(is_supervised)
        return Document(number, tuple(parts), tuple(supervised))

    def image_bytes(self, path: Path, offset: int, length: int) -> bytes:
        """Return the bytes of an image's own file.

        Raises: OSError if the file is gone or its size has changed since it was prepared.
        """
        data = path.read_bytes()  # not `read_at`: too many files to keep open
        if len(data) != length:
            raise OSError(f"{path} has {len(data)} bytes, not {length}; it has changed since it was prepared")
        return data


def prompt_text(messages: Sequence[Message], turn_template: str = TURN_TEMPLATE) -> str:
    """Return the prompt for the next answer of a conversation, for `generate`; training rows hold the same text.

    Args:
        messages: (role, text) pairs: a system message if there is one, then user and assistant in turn, the user last.
        turn_template: the template of the model's training.

    Raises: ValueError if the roles are in another order.
    """
    runs = _conversation([*messages, ("assistant", "?")], turn_template)
    return "".join(text for text, _ in runs[:-1]).strip()


def _read(record: dict[str, Any], turn_template: str) -> tuple[list[Run], list[str]]:
    """Return a record's text, and the paths of its images in the order of their marks."""
    forms = [form for form in ("completion", "messages", "conversations") if form in record]
    if len(forms) != 1:
        raise RecordError("neither prompt and completion, nor messages, nor conversations", f"it has {sorted(record)}"[:200])
    images = _images(record)
    if forms == ["completion"]:
        prompt, completion = record.get("prompt", ""), record["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RecordError("prompt or completion is no text")
        return _marked([(prompt, False), (completion, True)], images)
    messages, images = _messages(record[forms[0]], images)
    return _marked(_conversation(messages, turn_template), images)


def _images(record: dict[str, Any]) -> list[str]:
    """Return the paths under a record's `images` or `image`; one of them may be empty."""
    lists = [value if isinstance(value, list) else [value] for key in ("images", "image") if (value := record.get(key))]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise RecordError("images and image name different images", reprlib.repr(lists))
    return [_path(image) for image in lists[0]] if lists else []


def _messages(value: Any, images: list[str]) -> tuple[list[Message], list[str]]:
    """Return a conversation's messages, and all images in order; a content part may name an image of its own."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RecordError("messages are no list of objects")
    unplaced, placed = list(images), []
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError("unknown role", f"{reprlib.repr(role)}; there are {', '.join(ROLES)}")
        content = message.get("content", message.get("value"))
        text = ""
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            words, own = _content(part)
            text += words
            for _ in range(words.count(MARK)):
                if own is None and not unplaced:
                    raise RecordError("more <image> marks than images", f"{len(images)} images")
                placed.append(own if own is not None else unplaced.pop(0))
        messages.append((ROLES[role], text))
    return messages, [*unplaced, *placed]


def _content(part: Any) -> tuple[str, str | None]:
    """Return the text of a content part, and the path of its image if it names one."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind in ("image", "image_url"):
        path = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
        path = path.get("url") if isinstance(path, dict) else path  # OpenAI's form
        return MARK, None if path is None else _path(path)
    raise RecordError("content is neither text nor image", reprlib.repr(part))


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecordError("an image is named by no path", reprlib.repr(value))
    if value.startswith("data:") or "://" in value.removeprefix("file://"):
        raise RecordError("an image is no file; save it as one", value[:100])
    return value.removeprefix("file://")


def _conversation(messages: Sequence[Message], turn_template: str) -> list[Run]:
    """Return a conversation as runs: all text between two answers is one run.

    Raises: RecordError if roles are not an optional system, then user and assistant in turn.
    """
    system = messages[0][1].strip() if messages and messages[0][0] == "system" else None
    turns = list(messages[1:] if system is not None else messages)
    roles = [role for role, _ in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise RecordError(
            "roles are not system (or none), then user and assistant in turn", ", ".join(role for role, _ in messages)
        )
    question = turn_template.removesuffix("{assistant}")
    gap = "" if question[:1].isspace() else " "
    runs: list[Run] = []
    for i in range(0, len(turns), 2):
        content, n_leading = turns[i][1].strip(), 0
        while content.startswith(MARK):
            content, n_leading = content[len(MARK) :].lstrip(), n_leading + 1
        if not content and not n_leading:
            raise RecordError("empty question")
        before = (f"{system}\n" if system else "") if i == 0 else gap
        runs += [(before + MARK * n_leading + question.replace("{user}", content), False), (turns[i + 1][1].strip(), True)]
    return runs


def _marked(runs: list[Run], images: list[str]) -> tuple[list[Run], list[str]]:
    """Return runs with a mark in front for each image that has none, and the images."""
    if any(MARK in text for text, is_supervised in runs if is_supervised):
        raise RecordError("an image in an answer", "the model writes text only")
    if any(not text.strip() for text, is_supervised in runs if is_supervised):
        raise RecordError("empty completion or answer")
    n_marks = sum(text.count(MARK) for text, _ in runs)
    if n_marks > len(images):
        raise RecordError("more <image> marks than images", f"{n_marks} marks, {len(images)} images")
    return [(MARK * (len(images) - n_marks), False), *runs], images


def _parts(runs: Sequence[Run], images: Sequence[ImageRef]) -> Iterator[tuple[Part, bool]]:
    """Yield runs as texts and images, stripped where `generate` strips a prompt: at its ends and beside images."""
    remaining, parts = iter(images), list[tuple[Part, bool]]()
    for text, is_supervised in runs:
        first, *others = text.split(MARK)
        parts.append((first, is_supervised))
        for other in others:
            parts += [(next(remaining), False), (other, is_supervised)]
    for number, part in trimmed(part for part, _ in parts):
        yield part, parts[number][1]


def _image(name: str, folder: Path, shard: int) -> ImageRef:
    try:
        data = (folder / name).read_bytes()
        probe(data)
    except OSError as error:
        raise RecordError("image cannot be read", f"{name}: {error.strerror}") from error
    except ImageError as error:
        raise RecordError(error.reason, f"{name}: {error}") from error
    except ValueError as error:  # a zero byte, or half a character
        raise RecordError("an image's path is none", reprlib.repr(name)) from error
    return ImageRef(shard, 0, len(data), name)
