"""What decoded media is, and how a file is refused."""

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


def refusal(media: Media, message: str) -> InputError:
    """The error of a file that is not taken."""
    return InputError(Fault(media.origin, message, "media"))
