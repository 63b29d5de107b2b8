"""States of pictures and sounds: made once for each array, bounded in memory, never another array's."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.towers.states import TowerStates
from fundament.core import Array


class Tower:
    """Makes of each array a state of a hundred numbers, its first one, and tells which arrays it was given."""

    def __init__(self, capacity_bytes: int = 10_000) -> None:
        self.states: TowerStates[int] = TowerStates(capacity_bytes)
        self.given: list[float] = []

    def look(self, *arrays: Array) -> list[float]:
        by_key = {id(array): array for array in arrays}

        def make(missing: Sequence[int]) -> list[Tensor]:
            numbers = [float(by_key[key][0]) for key in missing]
            self.given += numbers
            return [torch.full((100,), number) for number in numbers]

        found = self.states.look(by_key, make)
        return [float(found[id(array)][0]) for array in arrays]


def picture(number: float) -> Array:
    return np.full(4, number)


def test_each_array_is_read_once() -> None:
    tower, one, two, three = Tower(), picture(1), picture(2), picture(3)
    assert tower.look(one, two) == [1, 2]
    assert tower.look(three, one) == [3, 1]
    assert tower.look(two) == [2]
    assert tower.look() == []
    assert tower.given == [1, 2, 3]


def test_what_was_made_of_an_array_goes_with_it() -> None:
    tower, other = Tower(), picture(0)
    for number in range(1, 50):  # a place in memory is soon another array's
        assert tower.look(picture(number)) == [number]
    assert tower.look(other) == [0]
    assert tower.states.n_bytes == 400


def test_what_was_not_used_for_longest_makes_room() -> None:
    tower, query = Tower(capacity_bytes=3 * 400), picture(0)
    documents = [picture(number) for number in range(1, 10)]
    for document in documents:
        tower.look(document, query)
        assert tower.states.n_bytes <= 3 * 400
    assert tower.given.count(0) == 1
    assert tower.look(documents[0]) == [1]
    assert tower.given.count(1) == 2


def test_what_is_larger_than_the_room_is_made_again() -> None:
    tower, one = Tower(capacity_bytes=399), picture(1)
    assert tower.look(one) == tower.look(one) == [1]
    assert tower.given == [1, 1]
    assert tower.states.n_bytes == 0


def test_what_is_kept_of_a_batch_is_no_view_of_all_of_it() -> None:
    states, one, two = TowerStates[int](10_000), picture(1), picture(2)
    made = torch.arange(200.0).split(100)
    states.look({1: one, 2: two}, lambda _: made)
    again = states.look({1: one, 2: two}, lambda _: [])
    assert [state.untyped_storage().nbytes() for state in again.values()] == [400, 400]
    assert torch.equal(torch.cat([*again.values()]), torch.cat(made))
