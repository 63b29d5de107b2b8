"""Sparse vectors as ids over weights."""

import numpy as np

from fundament.backbone.sparse import heaviest, named, sparse


def test_the_heaviest_comes_first_and_nothing_weighs_nothing() -> None:
    array = sparse(np.array([7, 3, 5, 9]), np.array([0.5, 2.0, 0.0, 2.0], dtype=np.float32))
    assert named(array, str) == {"3": 2.0, "9": 2.0, "7": 0.5}
    assert list(named(array, str)) == ["3", "9", "7"]


def test_of_a_token_that_repeats_the_heaviest_counts() -> None:
    array = heaviest(np.array([4, 2, 4, 2]), np.array([0.5, -1.0, 2.0, 0.25], dtype=np.float32))
    assert named(array, str) == {"4": 2.0, "2": 0.25}


def test_what_is_not_a_number_stays_for_the_batcher_to_see() -> None:
    ids, weights = np.array([1, 2, 3]), np.array([0.5, np.nan, -1], dtype=np.float32)
    for array in (sparse(ids, weights), heaviest(ids, weights)):
        assert sorted(array[0].tolist()) == [1, 2]
        assert not np.isfinite(array).all()
