"""What the parsers of all verbs have in common: options are fields of dataclasses, and mistakes get helpful messages.

A name that does not exist is answered with the nearest one, or, if an earlier version had it, with what became of it.
Options are written out in full: an abbreviation could silently stand for another option.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from kosmos_lit.cli.renamed import renamed_flag
from kosmos_lit.errors import UserError, did_you_mean
from kosmos_lit.terminal import program

# A field's help is the docstring below it.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

UNKNOWN = re.compile(r"(?:Group '([\w.]+)' does not accept option '|[Oo]ption '|unrecognized arguments: --)([\w.-]+)")
"""How jsonargparse names an option that does not exist, after the group that it was looked for in."""
HELP = ("-h", "--help")
NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


class HelpfulParser(ArgumentParser):
    """A parser that raises UserError with a short message, and names the option that a misspelt one may stand for.

    jsonargparse makes the parsers of nested classes of the same type, so that they do the same.
    """

    verb = ""
    """Stands before messages; empty where they name the place themselves."""
    beside: tuple[str, ...] = ()
    """Names of options that a verb takes beside those of this parser."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.verb}{': ' * bool(self.verb)}{shorten(self._with_suggestion(message))}") from ex

    def validate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:  # an option that does not exist
            error.args = (self._with_suggestion(str(error.args[0])),)
            raise

    def option_names(self) -> list[str]:
        """Return the names of all options, those of a subcommand included, without dashes."""
        names = [name.removeprefix("--") for a in self._actions for name in a.option_strings if name[:2] == "--"]
        subcommands = self._subcommands_action.choices.values() if self._subcommands_action else ()
        return [*names, *(name for parser in subcommands for name in parser.option_names()), *self.beside]

    def _with_suggestion(self, message: str) -> str:
        if "did you mean" in message:  # a nested parser knew better
            return message
        if match := UNKNOWN.search(message):
            name, names = ".".join(filter(None, match.groups())), self.option_names()
            # A nested parser knows a part of the flag only.
            dashes = "--" if self.exit_on_error and "arguments: --" in message else ""
            return message + did_you_mean(f"{dashes}{name}", [f"{dashes}{n}" for n in names if not n.endswith("+")])
        if (match := NO_ATTRIBUTE.search(message)) is not None:
            with suppress(ImportError):
                return message.replace(match[0], match[0] + did_you_mean(match[2], dir(import_module(match[1]))))
        return message


def shorten(message: str) -> str:
    """Return the lines of a parser's message that say what is wrong, without the list of types that did not match."""
    # What jsonargparse says of each type in a union that a value does not match, and of how classes can be written.
    noise = re.compile(
        r"Does not validate against any|Subtypes: |Errors:$|Expected a <class 'NoneType'>|Given value( type)?: |^$"
        r"|Problem with given class_path|Expected a <class 'str'>$|Not a valid subclass|Subclass types expect"
        r"|a class path \(|a dict with"
    )
    lines = [re.sub(r"^[-*] ", "", line.strip()) for line in message.splitlines()]
    kept = [line for line in lines if not noise.search(line)]
    # Classes nest, the innermost last: that one has the mistake.
    classes = [m[1] for line in lines if (m := re.search(r"Problem with given class_path '(.*)':", line))]
    kept = [re.sub(r"Expected a <class '(\w+)'>. Got value: ", r"expected \1, got ", line) for line in kept]
    # dict.fromkeys: types of a union repeat one complaint. If all lines are noise, the message stays whole.
    return " ".join(dict.fromkeys([*kept, *(f"(in {name})" for name in classes[-1:])])) or message


class Parser(HelpfulParser):
    """The options of a verb beside Lightning's: the fields of its dataclasses.

    A list is written word after word (`--choices yes no`), or as in a config (`--choices '[yes, no]'`); a switch alone
    means true.
    """

    tables: tuple[type[Any], ...] = ()
    n_words: int | str = 0
    """Number of words that are no options; `+`: at least one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse names fields, where people write options.
        if match := re.search("arguments are required: (.*)", message):
            fields_ = match[1].split(", ")
            message = message.replace(match[1], ", ".join(f"--{f}" if f in self.option_names() else f for f in fields_))
        super().error(message, ex)

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return the dataclasses that arguments fill, in the order in which `verb_parser` got them.

        Raises: UserError for an option that does not exist, or a value that does not fit.
        """
        own, others = self._split(arguments)
        for word in others:
            self._refuse(word)
        if (n := len(others)) != self.n_words and not (n and self.n_words == "+"):
            [name] = [str(a.metavar) for a in self._actions if not a.option_strings] or [""]
            times = "at least once" if self.n_words == "+" else f"{self.n_words} times"
            takes = f"takes {name} {times}, got {n}" if name else f"takes options only, got {' '.join(others)}"
            raise UserError(f"{self.verb} {takes}")
        values = self.parse_args([*own, *others])
        return tuple(table(**{f.name: values[f.name] for f in fields(table)}) for table in self.tables)

    def read_known(self, arguments: Sequence[str]) -> tuple[Any, list[str]]:
        """Return the one dataclass, and the arguments that are not of it: those of `fit`."""
        own, others = self._split(arguments)
        [table] = self.read(own)
        for word in others:
            if message := renamed_flag(self.verb, word.partition("=")[0], self.option_names()):
                raise UserError(message)
        return table, others

    def _refuse(self, word: str) -> None:
        """Raises: UserError if a word is an option, as this parser has none of its name."""
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return
        if message := renamed_flag(self.verb, flag, self.option_names()):
            raise UserError(message)
        names = [f"--{name}" for name in self.option_names() if not name.endswith("+")]
        raise UserError(f"{self.verb}: unknown option {flag}{did_you_mean(flag, names) or '; --help lists the options'}")

    def _split(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the words of this parser's options, each option in one word, and all other words."""
        if set(arguments) & set(HELP):
            self.print_help()
            sys.exit(0)
        own, others, lists = list[str](), list[str](), dict[str, list[str]]()
        words = list(arguments)
        while words:
            word = words.pop(0)
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            typehint = getattr(action, "_typehint", None)
            if typehint is None or flag.endswith("+"):
                others.append(word)
            elif typehint is bool and not equals:
                is_value = words[:1] in (["true"], ["false"])
                own.append(f"{flag}={words.pop(0) if is_value else 'true'}")
            elif _is_list(typehint):
                values = [value] if equals else []
                while not equals and words and not words[0].startswith("--"):
                    values.append(words.pop(0))
                if flag not in lists:
                    own.append(flag)  # its place; the values follow below
                lists.setdefault(flag, []).extend(_written_list(values))
            elif equals or not words:
                own.append(word)
            else:
                own.append(f"{flag}={words.pop(0)}")
        # An empty list is a flag without a value, which argparse reports.
        return [f"{w}={json.dumps(lists[w])}" if lists.get(w) else w for w in own], others


def verb_parser(
    verb: str, *tables: type[Any], positionals: Mapping[str, tuple[int | str, str]] | None = None, **kwargs: Any
) -> Parser:
    """Return the parser of a verb.

    Args:
        verb: its name.
        tables: dataclasses whose fields are the options; a field's docstring is its help.
        positionals: fields of paths that are words in order, not options: their number, as argparse's `nargs`, and help.
        kwargs: of `argparse.ArgumentParser`: description, epilog.
    """
    parser = Parser(prog=f"{program()} {verb}", allow_abbrev=False, **kwargs)
    parser.verb, parser.tables = verb, tables
    positionals = positionals or {}
    for name, (nargs, text) in positionals.items():
        parser.n_words = nargs
        parser.add_argument(name, nargs=nargs, type=Path, metavar=name.removesuffix("s").upper(), help=text)
    for table in tables:
        parser.add_class_arguments(table, None, skip=set(positionals))
    for action in parser._actions:
        if _is_list(getattr(action, "_typehint", None)):
            action.metavar = "ITEM ..."
    return parser


def _is_list(typehint: Any) -> bool:
    if get_origin(typehint) in (Union, types.UnionType):
        return any(_is_list(arg) for arg in get_args(typehint))
    origin = get_origin(typehint)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _written_list(values: list[str]) -> list[str]:
    """Return the values, or those of a list that is written as in a config."""
    if len(values) == 1 and values[0].startswith("["):
        with suppress(yaml.YAMLError):
            content = yaml.safe_load(values[0])
            return [str(value) for value in content] if isinstance(content, list) else values
    return values
