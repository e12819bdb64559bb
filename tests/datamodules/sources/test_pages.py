import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.document import ImageRef, Tally
from datamodules.sources import ReadOptions, pages
from datamodules.sources.pages import Link, PageError, document_parts, extract, url_hash
from tests.datamodules import sample_data

URL = "https://pages.example/news/today.html"


def parts(body: str, head: str = "") -> list[str | Link]:
    return extract(f"<html><head>{head}</head><body>{body}</body></html>".encode(), URL, "utf-8")


def document_of(*page: str | Link, url: str = URL, find=lambda url: ImageRef(0, len(url), 3), **options):
    tally = Tally()
    return document_parts(list(page), url, find, ReadOptions(**options), tally), tally


def test_texts_and_images_come_in_document_order():
    items = parts('<h1>One</h1><p>two <img src="a.jpg"> three</p><img src="b.jpg"><div>four<div>five</div>six</div>')
    assert items == [
        "One\ntwo",
        Link("https://pages.example/news/a.jpg"),
        "three",
        Link("https://pages.example/news/b.jpg"),
        "four\nfive\nsix",
    ]


@pytest.mark.parametrize(
    "skipped",
    [
        '<nav>menu<img src="x.jpg"></nav>',
        "<script>var x = '<p>x</p>';</script>",
        "<style>p {}</style>",
        "<form>name<input></form>",
        "<footer>imprint</footer>",
        "<aside>more</aside>",
        "<noscript>no</noscript>",
        '<div role="navigation">menu</div>',
        '<div class="wide sidebar">links</div>',
        '<div id="footer">imprint</div>',
        "<div hidden>secret</div>",
        '<div aria-hidden="true">secret</div>',
        "<!-- comment -->",
        "<?php echo ?>",
        "<svg><text>drawn</text></svg>",
        '<iframe src="x"></iframe>',
    ],
)
def test_what_is_no_content_is_left_out_and_what_follows_it_kept(skipped):
    assert parts(f"<p>before</p>{skipped}<p>after</p>") == ["before\nafter"]


def test_text_right_behind_what_is_left_out_is_kept():
    assert parts("<p>be<script>x</script>hind <!-- c -->all</p>") == ["behind all"]


def test_words_of_content_are_not_taken_for_navigation():
    assert parts('<div class="navy menus">kept</div>') == ["kept"]


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("a.jpg", "https://pages.example/news/a.jpg"),
        ("/a.jpg", "https://pages.example/a.jpg"),
        ("../a.jpg", "https://pages.example/a.jpg"),
        ("//cdn.example/a.jpg", "https://cdn.example/a.jpg"),
        ("http://other.example/a.jpg", "http://other.example/a.jpg"),
        (" a.jpg ", "https://pages.example/news/a.jpg"),
    ],
)
def test_relative_links_are_resolved(source, url):
    assert parts(f'<img src="{source}">') == [Link(url)]


@pytest.mark.parametrize(
    ("base", "url"),
    [("/img/", "https://pages.example/img/a.jpg"), ("https://b.example/", "https://b.example/a.jpg")],
)
def test_links_are_relative_to_the_pages_base(base, url):
    assert parts('<img src="a.jpg">', f'<base href="{base}">') == [Link(url)]


def test_images_that_load_late_are_links():
    assert parts('<img src="data:image/gif;base64,R0" data-src="a.jpg"><img data-original="b.jpg"><img alt="none">') == [
        Link("https://pages.example/news/a.jpg"),
        Link("https://pages.example/news/b.jpg"),
    ]


@pytest.mark.parametrize("image", ['<img src="http://[::1">', '<img src="//[">'])
def test_a_link_that_is_no_url_does_not_cost_the_page(image):
    texts = [p for p in parts(f"<p>before {image} after</p>") if isinstance(p, str)]
    assert " ".join(texts).split() == ["before", "after"]


def test_a_base_that_is_no_url_does_not_cost_the_page():
    assert parts("<p>text</p>", '<base href="http://[::1">') == ["text"]


def test_white_space_is_joined_but_in_preformatted_text():
    assert parts("<p>a\n  b\t c</p><pre>d\ne</pre>") == ["a b c\nd\ne"]


def test_cells_of_a_table_are_kept_apart():
    assert parts("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>") == ["a b\nc"]


def test_a_break_is_a_line():
    assert parts("<p>a<br>b</p>") == ["a\nb"]


@pytest.mark.parametrize("page", [b"", b"   "])
def test_a_page_without_anything_is_an_error(page):
    with pytest.raises(PageError):
        extract(page, URL, None)


def test_a_page_of_an_unknown_charset_is_read_as_it_describes_itself():
    page = '<html><head><meta charset="utf-8"></head><body>größer</body></html>'
    assert extract(page.encode(), URL, "utf8mb4") == ["größer"]


def test_a_page_that_is_too_large_is_an_error(monkeypatch):
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 101)
    with pytest.raises(PageError, match="too large"):
        extract(b"<p>" + b"x" * 101, URL, None)


def test_a_tag_of_200_000_attributes_is_an_error():
    attributes = b" ".join(b"a%d=1" % i for i in range(200_000))  # libxml2 would take minutes
    with pytest.raises(PageError, match="too many attributes"):
        extract(b"<p " + attributes + b">text</p>", URL, None)


def test_an_image_inside_an_attribute_does_not_cost_the_page():
    page = b"<p>before</p><img src='data:image/png;base64," + b"iVBOR" * 200_000 + b"'><p>behind</p>"
    assert extract(page, URL, None) == ["before\nbehind"]


@pytest.mark.parametrize("tag", [b"<div>a ", b"<b>a ", b"<table><tr><td>a ", b"<nav>"])
def test_100_000_nested_elements_are_read_as_far_as_the_parser_goes(tag):
    items = extract(b"<p>before</p>" + tag * 100_000 + b"deep", URL, None)
    assert items[0].startswith("before")
    assert len("".join(items)) < 10_000


def test_the_headers_charset_is_used():
    assert extract("<p>größer</p>".encode("latin-1"), URL, "iso-8859-1") == ["größer"]


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="<>/=\"'!?-&;ab pimgsrc[]:", max_size=97))
def test_no_page_however_broken_is_more_than_an_error(body):
    try:
        items = extract(body.encode(), URL, "utf-8")
    except PageError:
        return
    assert all(isinstance(item, Link) or item.strip() for item in items)


def test_texts_around_a_dead_link_are_joined():
    find = {"u:a": ImageRef(0, 3, 5), "u:b": "dead link", "u:c": ImageRef(0, 7, 11)}.__getitem__
    document, tally = document_of(Link("u:a"), "one", Link("u:b"), "two", Link("u:c"), find=find)
    assert document == (ImageRef(0, 3, 5), "one\ntwo", ImageRef(0, 7, 11))
    assert tally.notes == {"dead link": 1}


def test_a_page_ends_before_its_sixth_image():
    page = [x for n in range(7) for x in (Link("u" * (n + 1)), f"text {n}")]
    document, tally = document_of(*page)
    assert [p.offset if isinstance(p, ImageRef) else p for p in document] == [
        1,
        "text 0",
        2,
        "text 1",
        3,
        "text 2",
        4,
        "text 3",
        5,
        "text 4",
    ]
    assert tally.notes == {"page cut before image 6": 1}


def test_a_page_of_five_images_is_not_cut():
    document, tally = document_of(*[x for n in range(5) for x in (Link("u" * (n + 1)), f"text {n}")], "the end")
    assert len(document) == 10
    assert document[-1] == "text 4\nthe end"
    assert tally == Tally()


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (("text",), "page without a usable image"),
        ((), "page without a usable image"),
        ((Link("a"), Link("b")), "page without text"),
    ],
)
def test_a_page_without_images_or_without_text_is_left_out(page, reason):
    document, tally = document_of(*page)
    assert document is None
    assert tally.skipped == {reason: 1}


def test_about_half_of_the_pages_with_a_single_image_are_kept():
    n_kept = sum(document_of(Link("a"), "text", url=f"https://pages.example/{n}")[0] is not None for n in range(997))
    assert abs(n_kept - 997 / 2) < 5 * (997 / 4) ** 0.5  # five standard deviations of a fair draw


def test_the_draw_of_single_image_pages_depends_on_the_seed_alone():
    def kept(seed):
        return [document_of(Link("a"), "text", url=f"u:{n}", seed=seed)[0] is not None for n in range(101)]

    assert kept(3) == kept(3)
    assert kept(3) != kept(5)


@pytest.mark.parametrize(("share", "n_kept"), [(0.0, 0), (1.0, 101)])
def test_none_or_all_of_the_single_image_pages_can_be_kept(share, n_kept):
    documents = [document_of(Link("a"), "text", url=f"u:{n}", keep_single_image=share)[0] for n in range(101)]
    assert sum(document is not None for document in documents) == n_kept


def test_equal_urls_are_looked_up_alike():
    assert url_hash("HTTPS://Pages.Example/A.jpg#top") == url_hash(" https://pages.example/A.jpg")
    assert url_hash("https://pages.example/A.jpg") != url_hash("https://pages.example/a.jpg")


def test_what_is_no_url_has_a_hash():
    assert url_hash("http://[::1") == url_hash("http://[::1")


def test_the_tests_own_pages_are_read_as_meant():
    assert extract(sample_data.page("one", "a.png", "two"), URL, None) == [
        "one",
        Link("https://pages.example/news/a.png"),
        "two",
    ]
