"""A program: a PDF on standard input, its pages as pixels on standard output.

It writes a line of JSON, `{"pages": n}` or `{"error": why}`, and then of each page the line `{"width", "height",
"stride"}` and `height * stride` bytes: rows of RGB, three bytes a pixel, filled up to the stride.
"""

import json
import sys
from typing import Any

import pypdfium2

_POINTS_PER_INCH = 72


def main(dots_per_inch: int, most_pixels: int, most_pages: int) -> None:
    """Draw every page, or say why not.

    Args:
        dots_per_inch: of the drawing.
        most_pixels: of a page; a larger one is drawn with fewer dots per inch.
        most_pages: past which none is drawn.
    """
    try:
        document = pypdfium2.PdfDocument(sys.stdin.buffer.read())
    except pypdfium2.PdfiumError as error:
        _say(error="password" if "password" in str(error).lower() else "damaged")
        return
    n_pages = len(document)
    _say(pages=n_pages)
    if n_pages <= most_pages:
        document.init_forms()
        for number in range(n_pages):
            _draw(document[number], dots_per_inch / _POINTS_PER_INCH, most_pixels)


def _draw(page: Any, scale: float, most_pixels: int) -> None:
    width, height = page.get_size()
    if (n_pixels := width * height * scale**2) > most_pixels:
        scale *= (most_pixels / n_pixels) ** 0.5
    bitmap = page.render(scale=scale, rev_byteorder=True)
    _say(width=bitmap.width, height=bitmap.height, stride=bitmap.stride)
    sys.stdout.buffer.write(bitmap.buffer)
    bitmap.close()
    page.close()


def _say(**what: object) -> None:
    sys.stdout.buffer.write(json.dumps(what).encode() + b"\n")
    sys.stdout.buffer.flush()  # before a page that may be the last


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
