"""Images, PDFs, videos and sounds: from what a caller sent to plain NumPy.

Every function that decodes raises `InputError` with the file's place in the request: of a file that cannot be read,
that is of another kind than it is said to be, that is larger or takes longer than its limits allow, or that nobody
waits for any more. Nothing that a file refers to is opened.
"""

from collections.abc import Iterator

from fundament.core import Media
from fundament.media.arrays import RGB
from fundament.media.documents import pages
from fundament.media.images import picture
from fundament.media.recordings import frames, sound

__all__ = ["RGB", "frames", "pictures", "sound"]


def pictures(media: Media) -> Iterator[RGB]:
    """An image, or a PDF's pages in their order, uint8 `[height, width, 3]`; one of them in memory at a time.

    Raises:
        InputError: the file cannot be read, or is too large.
    """
    if media.kind == "pdf":
        yield from pages(media)
    else:
        yield picture(media)
