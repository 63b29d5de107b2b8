"""What decoded media is, and how a file is refused."""

import re

import numpy as np
from numpy.typing import NDArray

from fundament.core import Media
from fundament.errors import Fault, InputError

RGB = NDArray[np.uint8]
"""A picture, `[height, width, 3]`."""
Samples = NDArray[np.float32]
"""A sound of one channel, `[samples]`, from -1 to 1 where it was recorded so."""


def check_interest(media: Media) -> None:
    """End the decoding of a file that nobody waits for.

    Raises:
        InputError: which nobody reads either.
    """
    if media.interest.lost:
        raise refusal(media, "Nobody waits for this file any more.")


SCAN = rb"\xff\xda\0[\x06-\x0e][\x01-\x04]"
"""How a scan of a JPEG begins."""
MOST_SCANS = 100
"""Of a JPEG; a progressive one has ten."""


def check_scans(media: Media, jpeg: bytes) -> None:
    """Refuse a JPEG that goes over its picture again and again, which a hundred bytes ask for (ITU-T T.81, B.2.3).

    Raises:
        InputError: it has too many scans.
    """
    if (n_scans := sum(1 for _ in re.finditer(SCAN, jpeg))) > MOST_SCANS:
        told = f"holds a JPEG of {n_scans:,} scans, more than the {MOST_SCANS} allowed. Save it anew."
        raise refusal(media, f"This {media.kind} {told}")


def refusal(media: Media, message: str) -> InputError:
    """The error of a file that is not taken."""
    return InputError(Fault(media.origin, message, "media"))
