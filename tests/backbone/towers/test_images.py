"""How pictures are cut and sized before a tower reads them."""

import numpy as np
import pytest

from fundament.backbone.towers import images
from fundament.backbone.towers.images import crop_square


@pytest.mark.parametrize("size", [(30, 900), (900, 30), (7, 61), (33, 100)])
def test_the_middle_of_a_long_picture_is_what_it_is_of_the_whole(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns, colours = np.indices((*size, 3))
    picture = (128 + 120 * np.sin(rows / 5 + columns / 7 + colours)).astype(np.uint8)
    middle = crop_square(picture, 32)
    monkeypatch.setattr(images, "_LONG_FORM", 1_000)
    whole = crop_square(picture, 32)
    assert middle.shape == whole.shape == (32, 32, 3)
    assert np.abs(middle.astype(int) - whole).max() <= 1
