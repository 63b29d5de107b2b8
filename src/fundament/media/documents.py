"""PDFs to pictures of their pages.

A page is a program and can ask for hours of drawing, and PDFium is not thread-safe: each document is drawn by a process
of its own.
"""

import json
from collections.abc import Iterator
from typing import IO

import numpy as np

from fundament.core import Media
from fundament.media import pdfium
from fundament.media.arrays import RGB, check_interest, refusal
from fundament.media.bounded import bounded, feed
from fundament.media.formats import expect

_DOTS_PER_INCH = 150
_MOST_PAGE_PIXELS = 4096 * 4096
_MOST_CPU_SECONDS = 30


def pages(media: Media, *, most_seconds: int = _MOST_CPU_SECONDS) -> Iterator[RGB]:
    """Each page as on white paper at 150 dots per inch, uint8 `[height, width, 3]`, in their order.

    Args:
        media: the file.
        most_seconds: of processor time, for all pages together.

    Raises:
        InputError: it cannot be opened, needs a password, has no pages or too many, or takes too much to draw.
    """
    expect(media)
    numbers = (_DOTS_PER_INCH, _MOST_PAGE_PIXELS, media.limits.pdf_pages)
    with bounded(pdfium.__file__, *numbers, seconds=most_seconds, interest=media.interest) as process:
        assert process.stdout is not None
        feed(process, media.content)
        for number in range(_count(media, process.stdout)):
            check_interest(media)
            yield _read(media, process.stdout, number + 1)


def _count(media: Media, pipe: IO[bytes]) -> int:
    told = json.loads(pipe.readline() or b'{"error": "damaged"}')
    if told.get("error") == "password":
        raise refusal(media, "This PDF is encrypted and needs a password. Send it without one.")
    if "error" in told:
        raise refusal(media, "This PDF cannot be opened: it is damaged or cut short.")
    n_pages = int(told["pages"])
    if n_pages == 0:
        raise refusal(media, "This PDF has no pages.")
    if n_pages > (most := media.limits.pdf_pages):
        raise refusal(media, f"This PDF has {n_pages:,} pages, more than the {most} allowed. Send it in parts.")
    return n_pages


def _read(media: Media, pipe: IO[bytes], number: int) -> RGB:
    undrawn = refusal(media, f"Page {number} of this PDF cannot be drawn: it is damaged, or takes too much to draw.")
    try:
        page = json.loads(pipe.readline())
    except ValueError:  # nothing, or half a line: the process was ended
        raise undrawn from None
    pixels = pipe.read(page["height"] * page["stride"])
    if len(pixels) < page["height"] * page["stride"]:
        raise undrawn
    rows = np.frombuffer(pixels, dtype=np.uint8).reshape(page["height"], page["stride"])
    return np.array(rows[:, : 3 * page["width"]]).reshape(page["height"], page["width"], 3)
