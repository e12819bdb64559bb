"""A web page to text and images in reading order, and the rules by which KOSMOS-1 makes a document of it.

The paper (section 3.1, appendix B.1.3): at most five images, half of the pages with a single image dropped, images
under 64 pixels and of a single colour dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit

from lxml import etree, html

from datamodules.document import ImageRef, Part, Tally
from datamodules.io.hashing import hash_key, share_of
from datamodules.sources.base import ReadOptions

MAX_PAGE_BYTES = 10_000_000
"""Larger pages are left out: parsing time grows with them, and hostile pages are large."""

MAX_TAG_WORDS = 20_000
"""Pages with more words in one tag are left out: the parser compares each attribute with all before it."""
LONG_TAG = 1 << 16
"""Bytes of a tag that is worth counting; an image in an attribute is one word, however long."""

_BLOCKS = frozenset(
    "address article blockquote body caption center dd details div dl dt figcaption figure h1 h2 h3 h4 h5 h6 header hr li "
    "main ol p pre section summary table tbody tfoot thead tr ul".split()
)
_CELLS = frozenset(("td", "th"))
_SKIPPED = frozenset(
    "aside audio button canvas datalist footer form head iframe map math nav noscript object script select style svg "
    "template textarea video".split()
)
_SKIPPED_ROLES = frozenset(("navigation", "banner", "contentinfo", "search", "menu", "menubar"))
_SKIPPED_CLASSES = re.compile(
    r"(?:^|\s)(?:(?:site-|page-)?(?:nav|navbar|navheader|navfooter|navigation|menu|sidebar|breadcrumbs?|footer)|cookie-\S+)(?:\s|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Link:
    """An image that a page shows, by its absolute URL."""

    url: str


class PageError(ValueError):
    """A page that cannot be read; the message is a short phrase for counting."""


def extract(page: bytes, url: str, charset: str | None) -> list[str | Link]:
    """Walk a page in document order and return its texts and image links.

    Scripts, forms and what is marked as navigation is left out. Lines follow the page's blocks.

    Raises: PageError if there is nothing to parse.
    """
    if len(page) > MAX_PAGE_BYTES:
        raise PageError("page too large")
    tags = (piece[piece.find(b"<") :] for piece in page.split(b">") if len(piece) > LONG_TAG)
    if any(len(tag.split()) > MAX_TAG_WORDS for tag in tags):
        raise PageError("tag with too many attributes")
    try:
        root = html.document_fromstring(page, parser=_parser(charset))
    except (etree.LxmlError, ValueError, AssertionError) as error:
        raise PageError("page cannot be parsed") from error
    base = next((b for h in root.xpath("//base/@href") if (b := _absolute(url, h))), url)
    parts: list[str | Link] = []
    text: list[str] = []
    for piece in _pieces(root, base):
        if isinstance(piece, str):
            text.append(piece)
        else:
            parts += [*_lines(text), piece]
            text = []
    return [*parts, *_lines(text)]


def _parser(charset: str | None) -> html.HTMLParser:
    try:
        return html.HTMLParser(encoding=charset, recover=True)
    except LookupError:  # a charset that nobody knows: the page may say better
        return html.HTMLParser(recover=True)


def _absolute(base: str, link: str) -> str | None:
    """Return the URL that a link means, None if it means none."""
    try:
        return urljoin(base, link)
    except ValueError:
        return None


def _pieces(root: etree._Element, base: str) -> Iterator[str | Link]:
    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    n_pre = 0
    for event, element in walk:
        if event in ("comment", "pi"):
            yield _inline(element.tail, n_pre)
            continue
        tag = element.tag
        if event == "start":
            if _is_skipped(element):
                walk.skip_subtree()
                continue
            if tag in _BLOCKS or tag == "br":
                yield "\n"
            n_pre += tag == "pre"
            if tag == "img" and (link := _link(element, base)):
                yield link
            yield _inline(element.text, n_pre)
        else:
            if not _is_skipped(element):
                n_pre -= tag == "pre"
                if tag in _BLOCKS:
                    yield "\n"
                elif tag in _CELLS:
                    yield " "
            if element is not root:
                yield _inline(element.tail, n_pre)


def _inline(text: str | None, n_pre: int) -> str:
    if not text:
        return ""
    return text if n_pre else re.sub(r"\s+", " ", text)


def _lines(text: list[str]) -> list[str]:
    lines = (" ".join(line.split()) for line in "".join(text).split("\n"))
    joined = "\n".join(line for line in lines if line)
    return [joined] if joined else []


def _is_skipped(element: etree._Element) -> bool:
    get = element.get
    return (
        element.tag in _SKIPPED
        or get("role") in _SKIPPED_ROLES
        or get("hidden") is not None
        or get("aria-hidden") == "true"
        or bool(_SKIPPED_CLASSES.search(f"{get('class') or ''} {get('id') or ''}"))
    )


def _link(image: etree._Element, base: str) -> Link | None:
    for attribute in ("src", "data-src", "data-original"):
        source = (image.get(attribute) or "").strip()
        if source and not source.startswith("data:") and (url := _absolute(base, source)):
            return Link(url)
    return None


def url_hash(url: str) -> int:
    """Return the hash under which a crawl's images are looked up; scheme and host in lower case, no fragment."""
    try:
        parts = urlsplit(urldefrag(url.strip()).url)
        url = parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc.lower()).geturl()
    except ValueError:
        pass  # not a URL that urllib takes apart: looked up as it stands
    return hash_key("url", url)


def compose(
    page: list[str | Link], url: str, find: Callable[[str], ImageRef | str], options: ReadOptions, tally: Tally
) -> tuple[Part, ...] | None:
    """Make a document of a page by KOSMOS-1's rules, or count in `tally` why not.

    Args:
        page: what `extract` returned.
        url: the page's URL, which also decides the draw for single-image pages.
        find: maps an image's URL to where it lies, or to the reason why it cannot be used.
        options: the rules' numbers.
        tally: gets the reasons.
    """
    parts: list[Part] = []
    n_images = 0
    for piece in page:
        if isinstance(piece, Link):
            found = find(piece.url)
            if isinstance(found, str):
                tally.add_note(found, f"{piece.url} on {url}")
                continue
            if n_images == options.max_images:
                tally.add_note(f"page cut before image {options.max_images + 1}", url)
                break
            parts.append(found)
            n_images += 1
        elif parts and isinstance(parts[-1], str):
            parts[-1] += "\n" + piece
        else:
            parts.append(piece)
    if not n_images:
        tally.count_skipped("page without a usable image", url)
    elif not any(isinstance(part, str) for part in parts):
        tally.count_skipped("page without text", url)
    elif n_images == 1 and share_of(hash_key("single-image page", options.seed, url)) >= options.keep_single_image:
        tally.count_skipped("single-image page, by draw", url)
    else:
        return tuple(parts)
    return None
