"""Reports by the templates in `templates/`, in which all texts of datasets and models are escaped.

A page is one HTML file without scripts or external files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render_page(template: str, **values: Any) -> str:
    """Return a page by an HTML template; every text is escaped."""
    return _environment(None).get_template(template).render(values)


def render_markdown(template: str, **values: Any) -> str:
    """Return Markdown by a template; in every text, what begins a tag or a column is escaped."""
    return _environment(_markdown_escaped).get_template(template).render(values)


@cache
def _environment(finalize: Callable[[Any], Any] | None) -> Environment:
    """Return the templates with a function that every expression goes through before it is escaped for HTML."""
    return Environment(
        loader=PackageLoader("kosmos_lit.report"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _markdown_escaped(value: Any) -> Any:
    # What a macro returns has been escaped; Markup is what autoescape leaves alone.
    return value if hasattr(value, "__html__") else Markup(plain(str(value)))


def plain(text: str) -> str:
    """Return text with the characters escaped that begin a tag or a column in Markdown."""
    # & first: it begins the other entities.
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " ")):
        text = text.replace(mark, entity)
    return text
