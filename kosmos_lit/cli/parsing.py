"""What the options of the verbs beside Lightning's have in common."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from kosmos_lit.errors import UserError


class Parser(argparse.ArgumentParser):
    """No abbreviations; mistakes become UserErrors."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help shows what it takes")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Name a misspelt option before argparse complains about the one that it was meant to be."""
        names = set(self._option_string_actions)
        required = [name for action in self._actions if action.required for name in action.option_strings]
        for word in args or ():
            option = word.split("=")[0]
            # Required options alone: argparse reports them as missing before it reports the misspelt word.
            close = difflib.get_close_matches(option, required, 1) if option.startswith("--") and option not in names else []
            if close:
                self.error(f"unknown option {option}; did you mean {close[0]}?")
        return super().parse_known_args(args, namespace)
