"""Arrays of rows that come again: found by what the row is, bounded in memory."""

import numpy as np
import pytest

from fundament.core import Item
from fundament.engine.recurring import Recurring


def row(*ids: int, adapter: int = 0) -> Item:
    return Item(features={"ids": np.array(ids), "adapter": np.array(adapter)}, n_tokens=len(ids))


def vector(number: float) -> np.ndarray:
    return np.full(100, number, dtype=np.float32)


def test_rows_are_found_by_their_features() -> None:
    recurring = Recurring()
    kept = [row(1, 2), row(3)]
    recurring.keep(kept, [vector(1), vector(2)], {})
    asked = [row(3), row(1, 2), row(1, 2, adapter=1), row(2)]
    found = recurring.find(asked)
    assert {place for place, item in enumerate(asked) if id(item) in found} == {0, 1}
    assert found[id(asked[0])][0] == 2
    assert found[id(asked[1])][0] == 1


def test_a_row_of_a_larger_result_is_kept_alone() -> None:
    recurring = Recurring()
    result = np.zeros((1_000, 100), dtype=np.float32)
    recurring.keep([row(1)], [result[3]], {})
    result[3] = 7
    asked = row(1)
    assert recurring.find([asked])[id(asked)].base is None
    assert not recurring.find([asked])[id(asked)].any()


def test_what_was_not_used_for_longest_makes_room() -> None:
    recurring = Recurring(capacity_bytes=3 * 416)  # with the row that a vector is found by
    rows = [row(number) for number in range(4)]
    recurring.keep(rows[:3], [vector(number) for number in range(3)], {})
    recurring.find([row(0)])
    recurring.keep(rows[3:], [vector(3)], {})
    assert [bool(recurring.find([row(number)])) for number in range(4)] == [True, False, True, True]
    assert recurring.n_bytes == 3 * 416


@pytest.mark.parametrize("n", [1, 5])
def test_equal_rows_are_kept_once_and_what_is_too_large_is_not(n: int) -> None:
    recurring = Recurring(capacity_bytes=500)
    recurring.keep([row(1)] * n, [vector(1)] * n, {})
    assert recurring.n_bytes == 416
    recurring.keep([row(2)], [np.zeros(501, dtype=np.int8)], {})
    assert recurring.n_bytes == 416
