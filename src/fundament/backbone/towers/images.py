"""Images as vision towers read them: resized, cut into patches, and only then made numbers around zero.

An image is uint8 `[height, width, 3]`, RGB. It stays in bytes until a batch runs: a quarter of the memory while it
waits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fundament.backbone.checkpoint import Checkpoint, Config
from fundament.errors import CheckpointError, Fault, InputError

PROCESSOR = "preprocessor_config.json"

Pixels = NDArray[np.uint8]
"""`[height, width, 3]`, RGB."""

LONGEST_FORM = 200
"""How many times as long as the other a side may be. Qwen's own processor reads no longer image, and others would make
a memory full of one."""
_LONG_FORM = 8  # likewise, from which on only the middle of it is resized

_BICUBIC = (3, "bicubic")  # how processors' configs name the only filter that is served: Pillow's number, or the word
_RESCALED = {"rescale_factor": 1 / 255, "do_rescale": True, "do_normalize": True, "do_resize": True}


@dataclass(frozen=True, slots=True)
class Patches:
    """An image cut into squares.

    Attributes:
        pixels: uint8 `[rows * columns, 3 * patch * patch]`; a patch is its three channels one after the other, and each
            channel its frames where there are several.
        rows: patches from top to bottom.
        columns: patches from left to right.
    """

    pixels: Pixels
    rows: int
    columns: int


def check_form(image: Pixels, field: str) -> None:
    """Refuse an image that is hardly more than a line.

    Raises:
        InputError: one side is over `LONGEST_FORM` times as long as the other.
    """
    height, width = image.shape[:2]
    if max(height, width) > LONGEST_FORM * min(height, width):
        message = f"This image has {width} x {height} pixels; one side may be {LONGEST_FORM} times the other at most."
        raise InputError(Fault(field, message, "image"))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """The image in another size, by Pillow's bicubic filter."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def crop_square(image: Pixels, size: int) -> Pixels:
    """The middle of an image whose shorter side is first made `size` pixels long, `[size, size, 3]`."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    tall, wide = (size if side == shorter else int(size * side / shorter) for side in (height, width))
    top, left = (round((side - size) / 2) for side in (tall, wide))  # half a pixel goes to the even number
    if max(tall, wide) <= _LONG_FORM * size:
        return resize(image, tall, wide)[top : top + size, left : left + size]
    # Of a long one the rest would take hundreds of megabytes. Pillow may take the two directions in the other order,
    # and round in between.
    scale, down = width / wide, height / tall
    box = (left * scale, top * down, (left + size) * scale, (top + size) * down)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))


def fitting_size(
    height: int, width: int, *, factor: int, least: int, most: int, n_frames: int = 1, n_counted: int = 1
) -> tuple[int, int]:
    """The nearest height and width that are multiples of `factor` and have `least` to `most` pixels together.

    The form is kept as well as the multiples let it be (Qwen2-VL, Wang et al. 2024, section 2.1).

    Args:
        height: of the picture.
        width: of the picture.
        factor: what both become multiples of.
        least: pixels of all frames.
        most: pixels of all frames.
        n_frames: of a video.
        n_counted: how many of them count where the multiples are compared with the limits.
    """
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if n_counted * tall * wide > most:
        shrink = math.sqrt(n_frames * height * width / most)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif n_counted * tall * wide < least:
        grow = math.sqrt(least / (n_frames * height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def frame_size(n_frames: int, height: int, width: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
    """What the frames of a video are resized to, whose pixels are counted together.

    As transformers' processor of Qwen3-VL has it: frames count in pairs, a half pair up or down to the next even
    number of pairs, and a side that is shorter than a token is made as long as one first. A lone frame is a pair.
    """
    n_frames = max(2, n_frames)
    if min(height, width) < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    n_counted = 2 * round(n_frames / 2)
    return fitting_size(height, width, factor=factor, least=least, most=most, n_frames=n_frames, n_counted=n_counted)


def cut(image: Pixels, patch: int, merge: int = 1) -> Patches:
    """Cut an image into patches, from the top left on; what is left over at the right and below is no patch's.

    Args:
        image: what is cut.
        patch: side of a patch, in pixels.
        merge: patches come in squares of this many by this many, the squares line by line, and so the patches in each.
    """
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    whole = image[: rows * patch, : columns * patch]
    squares = whole.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    pixels = np.ascontiguousarray(squares.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(rows * columns, -1)
    return Patches(pixels, rows, columns)


def levels(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """What each of the 256 values of each channel becomes, float32 `[3, 256]`: `(value / 255 - mean) / std`.

    Every step is rounded to float32, as processors of images do.
    """
    shares = np.arange(256, dtype=np.float32) / np.float32(255)
    means, stds = (np.asarray(numbers, dtype=np.float32)[:, None] for numbers in (mean, std))
    return np.asarray((shares - means) / stds, dtype=np.float32)


def read_processor(checkpoint: Checkpoint) -> Config:
    """`preprocessor_config.json`, which says how images are made what a tower sees.

    Raises:
        CheckpointError: it is not there.
    """
    return Config(checkpoint.json(PROCESSOR), PROCESSOR)


def check_processor(processor: Config) -> None:
    """Compare what a processor's file asks for with what is done here.

    Raises:
        CheckpointError: another filter or another scale than bicubic and 1/255.
    """
    asked = {key: processor[key] for key, served in _RESCALED.items() if processor.get(key, served) != served}
    for key in ("resample", "interpolation"):
        if processor.get(key, _BICUBIC[0]) not in _BICUBIC:
            asked[key] = processor[key]
    if asked:
        raise CheckpointError(f"{processor.where} asks for image processing that is not served: {asked}")
