"""PDFs to pictures of their pages."""

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pypdfium2

from fundament.core import Media
from fundament.media.arrays import RGB, refusal
from fundament.media.formats import expect

_DOTS_PER_INCH = 150
_POINTS_PER_INCH = 72
_MOST_PAGE_PIXELS = 4096 * 4096  # a larger page is drawn with fewer dots per inch

_LOCK = threading.Lock()
"""PDFium is not thread-safe: whatever calls it, the closing of its objects included, holds this."""


def pages(media: Media) -> Iterator[RGB]:
    """Each page as on white paper at 150 dots per inch, uint8 `[height, width, 3]`, in their order.

    The document is opened anew for each page, so that nothing of it stays open while the caller works.

    Raises:
        InputError: it cannot be opened, needs a password, has no pages or too many, or one of them cannot be drawn.
    """
    expect(media)
    with _LOCK, closing(_open(media)) as document:
        n_pages = len(document)
    if n_pages == 0:
        raise refusal(media, "This PDF has no pages.")
    if n_pages > (most := media.limits.pdf_pages):
        raise refusal(media, f"This PDF has {n_pages} pages, more than the {most} allowed. Send it in parts.")
    for number in range(n_pages):
        yield _draw(media, number)


def _open(media: Media) -> pypdfium2.PdfDocument:
    try:
        return pypdfium2.PdfDocument(media.content)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise refusal(media, "This PDF is encrypted and needs a password. Send it without one.") from error
        raise refusal(media, "This PDF cannot be opened: it is damaged or cut short.") from error


def _draw(media: Media, number: int) -> RGB:
    with _LOCK, closing(_open(media)) as document:
        try:
            document.init_forms()
            with closing(document[number]) as page:
                width, height = page.get_size()
                scale = _DOTS_PER_INCH / _POINTS_PER_INCH
                if (n_pixels := width * height * scale**2) > _MOST_PAGE_PIXELS:
                    scale *= (_MOST_PAGE_PIXELS / n_pixels) ** 0.5
                with closing(page.render(scale=scale, rev_byteorder=True)) as bitmap:
                    return np.array(bitmap.to_numpy())
        except (pypdfium2.PdfiumError, ValueError) as error:
            raise refusal(media, f"Page {number + 1} of this PDF cannot be drawn.") from error
