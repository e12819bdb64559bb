import gzip
import hashlib

import numpy as np
import pytest

from datamodules.document import ImageRef, Tally
from datamodules.sources import SOURCES, ReadOptions
from tests.datamodules import sample_data

SOURCE = SOURCES["warc"]
IMAGES = [(f"{sample_data.SITE}/{n}.png", "image/png", sample_data.png(n)) for n in range(7)]
HTML = "text/html"


def read(path, **options):
    """A shard's documents, what became of its pages, and of its images."""
    chosen, pages, images = ReadOptions(**options), Tally(), Tally()
    listed = np.sort(SOURCE.list_images(path, 0, chosen, images), order="url")
    return list(SOURCE.documents(path, 0, chosen, pages, listed)), pages, images


def one(path, *blocks, images=IMAGES, head="", **options):
    """Read a crawl of the given images and of one page that shows them."""
    sample_data.write_warc(path, [*images, (f"{sample_data.SITE}/p.html", HTML, sample_data.page(*blocks, head=head))])
    return read(path, **options)


def shown(path, document):
    """A document with its images' bytes in place of their references."""
    return [SOURCE.image_bytes(path, p.offset, p.length) if isinstance(p, ImageRef) else p for p in document.parts]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_page_is_its_texts_and_images_in_order(tmp_path, name):
    [document], pages, images = one(tmp_path / name, "one", "2.png", "two", "0.png", "1.png", "three")
    assert shown(tmp_path / name, document) == [
        "one",
        sample_data.png(2),
        "two",
        sample_data.png(0),
        sample_data.png(1),
        "three",
    ]
    assert (pages, images) == (Tally(), Tally(documents=7))


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_page_is_named_by_its_url(tmp_path, name):
    sample_data.write_warc(tmp_path / name, sample_data.crawl(5, 0))
    documents, _, _ = read(tmp_path / name)
    assert [SOURCE.record_name(tmp_path / name, d.record) for d in documents] == [
        f"{sample_data.SITE}/{n}.html" for n in range(5)
    ]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_images_keep_their_original_bytes(tmp_path, name):
    sample_data.write_warc(tmp_path / name, sample_data.crawl(5, 0))
    documents, _, _ = read(tmp_path / name)
    found = [hashlib.sha256(p).digest() for d in documents for p in shown(tmp_path / name, d) if isinstance(p, bytes)]
    assert found == [hashlib.sha256(body).digest() for _, mime, body in sample_data.crawl(5, 0) if mime.startswith("image")]


@pytest.mark.parametrize(
    ("image", "counter", "reason"),
    [
        (("image/png", sample_data.png(0, 61, 101)), "skipped", "image too small"),
        (("image/png", sample_data.plain_png()), "skipped", "image of one colour"),
        (("image/svg+xml", b"<svg/>"), "skipped", "not a raster image"),
        (("image/jpeg", b"<html>gone</html>"), "broken", "not an image"),
        (("image/png", sample_data.hollow_png()), "broken", "image cannot be decoded"),
        (("image/png", sample_data.png(0)[:-100]), "broken", "image cannot be decoded"),
    ],
)
def test_an_image_that_cannot_be_used_is_counted_and_its_page_goes_on(tmp_path, image, counter, reason):
    images = [(f"{sample_data.SITE}/x.png", *image), *IMAGES[1:4]]
    path = tmp_path / "a.warc.gz"
    [document], pages, tally = one(path, "one", "1.png", "two", "x.png", "three", "2.png", images=images)
    assert shown(path, document) == ["one", sample_data.png(1), "two\nthree", sample_data.png(2)]
    assert getattr(tally, counter) == {reason: 1}
    assert pages.notes.total() == 1


def test_a_dead_link_is_noted_and_the_page_goes_on(tmp_path):
    path = tmp_path / "a.warc.gz"
    [document], pages, _ = one(path, "1.png", "one", "gone.png", "two", "2.png")
    assert shown(path, document) == [sample_data.png(1), "one\ntwo", sample_data.png(2)]
    assert pages.notes == {"dead link: image not in the crawl": 1}
    assert pages.examples["dead link: image not in the crawl"] == f"{sample_data.SITE}/gone.png on {sample_data.SITE}/p.html"


def test_a_page_is_cut_before_its_sixth_image(tmp_path):
    path = tmp_path / "a.warc.gz"
    [document], pages, _ = one(path, *(b for n in range(7) for b in (f"{n}.png", f"text {n}")))
    assert shown(path, document)[-2:] == [sample_data.png(4), "text 4"]
    assert pages.notes == {"page cut before image 6": 1}


def test_smaller_images_can_be_asked_for(tmp_path):
    images = [(f"{sample_data.SITE}/{n}.png", "image/png", sample_data.png(n, 31, 37)) for n in range(2)]
    documents, _, _ = one(tmp_path / "a.warc.gz", "0.png", "text", "1.png", images=images, min_image_side=31)
    assert len(documents) == 1


def test_about_half_of_the_single_image_pages_are_kept_and_the_others_counted(tmp_path):
    pages = [(f"{sample_data.SITE}/{n}.html", HTML, sample_data.page("0.png", f"text {n}")) for n in range(101)]
    sample_data.write_warc(tmp_path / "a.warc.gz", [IMAGES[0], *pages])
    documents, tally, _ = read(tmp_path / "a.warc.gz")
    assert abs(len(documents) - 50.5) < 5 * (101 / 4) ** 0.5  # five standard deviations of a fair draw
    assert tally.skipped == {"single-image page, by draw": 101 - len(documents)}


def test_the_draw_of_single_image_pages_is_seeded(tmp_path):
    pages = [(f"{sample_data.SITE}/{n}.html", HTML, sample_data.page("0.png", f"text {n}")) for n in range(31)]
    sample_data.write_warc(tmp_path / "a.warc.gz", [IMAGES[0], *pages])
    assert read(tmp_path / "a.warc.gz", seed=3) == read(tmp_path / "a.warc.gz", seed=3)
    assert read(tmp_path / "a.warc.gz", seed=3)[0] != read(tmp_path / "a.warc.gz", seed=5)[0]


def test_navigation_and_scripts_are_left_out(tmp_path):
    skipped = b'<nav><img src="0.png">Home</nav><script>x()</script>'
    body = b"<html><body>" + skipped + b'<p>text</p><img src="1.png"><img src="2.png"></body></html>'
    sample_data.write_warc(tmp_path / "a.warc.gz", [*IMAGES, (f"{sample_data.SITE}/p.html", HTML, body)])
    [document], _, _ = read(tmp_path / "a.warc.gz")
    assert shown(tmp_path / "a.warc.gz", document) == ["text", sample_data.png(1), sample_data.png(2)]


def test_links_are_relative_to_the_base(tmp_path):
    images = [(f"https://cdn.example/deep/{n}.png", "image/png", sample_data.png(n)) for n in range(2)]
    head = '<base href="https://CDN.example/deep/">'
    [document], _, _ = one(tmp_path / "a.warc.gz", "0.png", "text", "../deep/1.png", images=images, head=head)
    assert shown(tmp_path / "a.warc.gz", document) == [sample_data.png(0), "text", sample_data.png(1)]


def test_a_page_that_cannot_be_read_is_counted_and_the_next_one_read(tmp_path):
    good = (f"{sample_data.SITE}/p.html", HTML, sample_data.page("0.png", "text", "1.png"))
    sample_data.write_warc(tmp_path / "a.warc.gz", [*IMAGES, (f"{sample_data.SITE}/empty.html", HTML, b""), good])
    documents, pages, _ = read(tmp_path / "a.warc.gz")
    assert len(documents) == 1
    assert pages.broken == {"page cannot be parsed": 1}


def test_a_page_with_a_link_that_is_no_url_does_not_stop_the_shard(tmp_path):
    path = tmp_path / "a.warc.gz"
    [document], _, _ = one(path, "0.png", "text", "http://[::1/x.png", "1.png")
    assert shown(path, document) == [sample_data.png(0), "text", sample_data.png(1)]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_record_that_is_cut_off_anywhere_ends_its_shard_and_is_counted(tmp_path, name):
    sample_data.write_warc(tmp_path / name, sample_data.crawl(3, 0))
    data = (tmp_path / name).read_bytes()
    last = read(tmp_path / name)[0][-1].record
    for kept in range(last + 1, len(data) - 17, 11):  # the last bytes are no content: line ends, and gzip's checksum
        (tmp_path / f"{kept}-{name}").write_bytes(data[:kept])
        documents, pages, _ = read(tmp_path / f"{kept}-{name}")
        assert (len(documents), pages.broken) == (2, {"shard cut off or corrupt": 1}), f"cut behind byte {kept}"


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_sound_shard_is_not_taken_for_one_that_is_cut_off(tmp_path, name):
    others = [
        (f"{sample_data.SITE}/x.bin", "application/octet-stream", b"\0" * 97),
        (f"{sample_data.SITE}/x.css", "text/css", b""),
    ]
    sample_data.write_warc(tmp_path / name, [*others, *sample_data.crawl(3, 0), *others])
    _, pages, images = read(tmp_path / name)
    assert (pages.broken, images.broken) == ({}, {})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_image_that_is_cut_off_is_counted(tmp_path, share):
    first, second, third = (sample_data.warc_record(*r) for r in IMAGES[:3])
    (tmp_path / "a.warc.gz").write_bytes(first + second + third[: int(share * len(third))])
    _, _, images = read(tmp_path / "a.warc.gz")
    assert images.documents == 2
    assert images.broken == {"shard cut off or corrupt": 1}


def test_a_file_that_is_no_warc_is_counted(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"no WARC at all\r\n\r\n" * 11)
    documents, pages, _ = read(tmp_path / "a.warc")
    assert documents == []
    assert pages.broken == {"shard cut off or corrupt": 1}


def test_a_body_whose_encoding_is_broken_does_not_end_the_shard(tmp_path):
    squeezed = gzip.compress(sample_data.page("0.png", "text " * 101, "1.png"), mtime=0)
    broken = squeezed[:40] + b"\xff" * 40
    bad = sample_data.warc_record(f"{sample_data.SITE}/bad.html", HTML, broken, headers=[("Content-Encoding", "gzip")])
    good = sample_data.warc_record(f"{sample_data.SITE}/good.html", HTML, sample_data.page("0.png", "text", "1.png"))
    (tmp_path / "a.warc.gz").write_bytes(b"".join(sample_data.warc_record(*r) for r in IMAGES) + bad + good)
    documents, _, _ = read(tmp_path / "a.warc.gz")
    assert [SOURCE.record_name(tmp_path / "a.warc.gz", d.record) for d in documents] == [f"{sample_data.SITE}/good.html"]


def test_a_body_that_was_sent_compressed_is_read(tmp_path):
    squeezed = gzip.compress(sample_data.page("0.png", "text", "1.png"), mtime=0)
    record = sample_data.warc_record(f"{sample_data.SITE}/p.html", HTML, squeezed, headers=[("Content-Encoding", "gzip")])
    (tmp_path / "a.warc.gz").write_bytes(b"".join(sample_data.warc_record(*r) for r in IMAGES) + record)
    [document], _, _ = read(tmp_path / "a.warc.gz")
    assert shown(tmp_path / "a.warc.gz", document) == [sample_data.png(0), "text", sample_data.png(1)]


def test_texts_for_a_tokenizer_need_no_survey(tmp_path):
    sample_data.write_warc(
        tmp_path / "a.warc.gz", [(f"{sample_data.SITE}/p.html", HTML, sample_data.page("one", "0.png", "two"))]
    )
    assert list(SOURCE.texts(tmp_path / "a.warc.gz", ReadOptions(), Tally())) == ["one", "two"]


def test_a_record_that_is_not_there_is_an_error_about_its_file(tmp_path):
    sample_data.write_warc(tmp_path / "a.warc.gz", sample_data.crawl(3, 0))
    with pytest.raises(OSError, match=r"a\.warc\.gz: no WARC record at byte 7"):
        SOURCE.image_bytes(tmp_path / "a.warc.gz", 7, 101)
