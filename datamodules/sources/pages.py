"""Web pages as text and images in reading order, and KOSMOS-1's rules for making documents of them.

Source: the paper, section 3.1 and appendix B.1.3: at most five images, half of the pages with a single image dropped, images
under 64 pixels or of a single colour dropped.
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
"""Larger pages are not parsed: parsing time grows with size, and hostile pages are large."""

MAX_TAG_WORDS = 20_000
"""Pages with more words in one tag are not parsed: the parser compares each attribute with all before it."""
LONG_TAG = 1 << 16
"""Bytes above which a tag's words are counted; an image in an attribute is one word, however long."""

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
    """An image of a page, by its absolute URL."""

    url: str


class PageError(ValueError):
    """A page that cannot be read; the message is a short phrase to count it under."""


def extract(page: bytes, url: str, charset: str | None) -> list[str | Link]:
    """Return a page's texts and image links in document order.

    Scripts, forms and everything marked as navigation are skipped. Each block of the page begins a line.

    Raises: PageError if there is nothing to parse.
    """
    if len(page) > MAX_PAGE_BYTES:
        raise PageError("page too large")
    tags = (chunk[chunk.find(b"<") :] for chunk in page.split(b">") if len(chunk) > LONG_TAG)
    if any(len(tag.split()) > MAX_TAG_WORDS for tag in tags):
        raise PageError("tag with too many attributes")
    try:
        root = html.document_fromstring(page, parser=_parser(charset))
    except (etree.LxmlError, ValueError, AssertionError) as error:
        raise PageError("page cannot be parsed") from error
    base = next((b for h in root.xpath("//base/@href") if (b := _absolute(url, h))), url)
    parts: list[str | Link] = []
    text: list[str] = []
    for item in _walk(root, base):
        if isinstance(item, str):
            text.append(item)
        else:
            parts += [*_lines(text), item]
            text = []
    return [*parts, *_lines(text)]


def _parser(charset: str | None) -> html.HTMLParser:
    try:
        return html.HTMLParser(encoding=charset, recover=True)
    except LookupError:  # an unknown charset: the page's own declaration may be right
        return html.HTMLParser(recover=True)


def _absolute(base: str, link: str) -> str | None:
    """Return the absolute URL of a link, or None if it has none."""
    try:
        return urljoin(base, link)
    except ValueError:
        return None


def _walk(root: etree._Element, base: str) -> Iterator[str | Link]:
    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    n_pre = 0  # open <pre> elements, inside which white space counts
    for event, element in walk:
        if event in ("comment", "pi"):
            yield _inline(element.tail, n_pre)  # lxml hangs the text after a comment on the comment
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
    for attribute in ("src", "data-src", "data-original"):  # pages that load images late keep them in the others
        source = (image.get(attribute) or "").strip()
        if source and not source.startswith("data:") and (url := _absolute(base, source)):
            return Link(url)
    return None


def url_hash(url: str) -> int:
    """Return the hash by which a crawl's images are looked up: no fragment, scheme and host in lower case."""
    try:
        parts = urlsplit(urldefrag(url.strip()).url)
        url = parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc.lower()).geturl()
    except ValueError:
        pass  # urllib cannot parse it: looked up as it is
    return hash_key("url", url)


def document_parts(
    page: list[str | Link], url: str, find: Callable[[str], ImageRef | str], options: ReadOptions, tally: Tally
) -> tuple[Part, ...] | None:
    """Return the parts of a page's document by KOSMOS-1's rules; None, and a count in `tally`, if it yields none.

    Args:
        page: the result of `extract`.
        url: the page's URL; it also seeds the draw for single-image pages.
        find: maps an image's URL to its place, or to the reason why it cannot be used.
        options: the numbers in the rules.
        tally: counts the reasons.
    """
    parts: list[Part] = []
    n_images = 0
    for item in page:
        if isinstance(item, Link):
            image = find(item.url)
            if isinstance(image, str):
                tally.add_note(image, f"{item.url} on {url}")
                continue
            if n_images == options.max_images:
                tally.add_note(f"page cut before image {options.max_images + 1}", url)
                break
            parts.append(image)
            n_images += 1
        elif parts and isinstance(parts[-1], str):
            parts[-1] += "\n" + item  # the image between two texts was unusable
        else:
            parts.append(item)
    if not n_images:
        tally.count_skipped("page without a usable image", url)
    elif not any(isinstance(part, str) for part in parts):
        tally.count_skipped("page without text", url)
    elif n_images == 1 and share_of(hash_key("single-image page", options.seed, url)) >= options.keep_single_image:
        tally.count_skipped("single-image page, by draw", url)
    else:
        return tuple(parts)
    return None
