"""PDFs: a picture of each page, in order, whatever the pages ask for."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fundament.core import Interest, Media, MediaLimits
from fundament.errors import InputError
from fundament.media import pictures
from fundament.media.documents import pages
from tests.media.files import BLUE, GREEN, RED, Pixels, encrypted, many_pages, painted, pdf, plain, unfolding


def drawn(content: bytes, limits: MediaLimits | None = None) -> list[Pixels]:
    return list(pictures(Media("pdf", content, limits=limits or MediaLimits())))


def refused(content: bytes, limits: MediaLimits | None = None) -> str:
    with pytest.raises(InputError) as refusal:
        drawn(content, limits)
    return refusal.value.faults[0].message


def test_every_page_is_a_picture_at_150_dots_per_inch() -> None:
    found = drawn(pdf([painted(RED), painted(GREEN), painted(BLUE)], box="0 0 144 72"))
    assert [page.shape for page in found] == [(150, 300, 3)] * 3
    assert [page[75, 150].tolist() for page in found] == [[*RED], [*GREEN], [*BLUE]]
    assert all(page.flags.writeable for page in found)


def test_a_page_is_paper_and_no_byte_between_its_rows_is_seen() -> None:
    [page] = drawn(pdf([b"0 0 0 rg 0 0 36.48 100 re f"], box="0 0 48.48 24"))
    assert page.shape == (50, 101, 3)
    assert np.unique(page[:, :70]).tolist() == [0]
    assert np.unique(page[:, 80:]).tolist() == [255]


def test_a_page_as_large_as_a_house_is_drawn_smaller() -> None:
    [page] = drawn(pdf([painted(RED)], box="0 0 100000 50000"))
    height, width, _ = page.shape
    assert 0.99 * 4096**2 < height * width < 1.01 * 4096**2
    assert abs(width / height - 2) < 0.01


def test_a_file_may_begin_with_blanks() -> None:
    assert len(drawn(b"\xef\xbb\xbf\r\n" + pdf([b""]))) == 1


def test_pages_are_counted_before_they_are_drawn() -> None:
    limits = MediaLimits(pdf_pages=3)
    assert len(drawn(many_pages(3), limits)) == 3
    assert refused(many_pages(4), limits) == "This PDF has 4 pages, more than the 3 allowed. Send it in parts."
    assert refused(many_pages(10_000)) == "This PDF has 10,000 pages, more than the 100 allowed. Send it in parts."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encrypted(), "needs a password"),
        (pdf([]), "cannot be opened"),
        (b"%PDF-1.7\n", "cannot be opened"),
        (b"%PDF-1.7\n" + bytes(range(256)) * 100, "cannot be opened"),
        (plain(RED), 'its bytes are PNG. Where it is taken, send it as {"image": …}'),
        (plain(RED, form="JPEG") + pdf([b""]), "its bytes are JPEG"),
        (b"GIF89a" + pdf([b""]), "its bytes are GIF"),
        (b"x" + pdf([b""]), "not a PDF of a known format"),
    ],
)
def test_what_cannot_be_read_is_refused(content: bytes, words: str) -> None:
    assert words in refused(content)


def test_a_page_that_asks_for_too_much_is_refused_and_its_process_ends() -> None:
    with pytest.raises(InputError) as refusal:
        list(pages(Media("pdf", unfolding()), most_seconds=4))  # its own start takes one
    assert "Page 1 of this PDF cannot be drawn" in refusal.value.faults[0].message


def test_pages_that_nobody_wants_are_not_drawn() -> None:
    found = pages(Media("pdf", many_pages(100)))
    assert next(found).shape == (150, 150, 3)
    found.close()


def test_the_process_of_a_page_that_nobody_waits_for_any_more_is_ended() -> None:
    interest = Interest()
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(list, pages(Media("pdf", unfolding(), interest=interest), most_seconds=300))
        while not interest.endings:
            assert not drawing.done()
            time.sleep(0.01)
        interest.lose()
        assert isinstance(drawing.exception(timeout=60), InputError)
    assert not interest.endings


def test_pages_that_nobody_waits_for_any_more_are_not_drawn() -> None:
    interest = Interest()
    found = pages(Media("pdf", many_pages(100), interest=interest))
    assert next(found).shape == (150, 150, 3)
    interest.lose()
    with pytest.raises(InputError, match="Nobody waits"):
        next(found)
