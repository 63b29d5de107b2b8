"""What is kept by a key: bounded in memory, what was used last."""

from fundament.backbone.lru import LRU


def test_what_was_used_longest_ago_makes_room() -> None:
    kept = LRU[int, str](capacity_bytes=100)
    kept.put(1, "one", 40)
    kept.put(2, "two", 40)
    assert kept.get(1) == "one"
    kept.put(3, "three", 40)
    assert kept.get(2) is None
    assert kept.get(1) == "one"
    assert kept.n_bytes == 80


def test_a_key_has_one_value() -> None:
    kept = LRU[int, str](capacity_bytes=100)
    kept.put(1, "one", 40)
    kept.put(1, "another", 60)
    assert kept.get(1) == "another"
    assert kept.n_bytes == 60


def test_what_is_larger_than_the_room_is_not_kept() -> None:
    kept = LRU[int, str](capacity_bytes=100)
    kept.put(1, "one", 40)
    kept.put(2, "two", 101)
    assert kept.get(2) is None
    assert kept.get(1) == "one"
    assert kept.n_bytes == 40


def test_what_is_no_longer_wanted_goes() -> None:
    kept = LRU[int, str](capacity_bytes=100)
    kept.put(1, "one", 40)
    kept.put(2, "two", 40)
    kept.drop(lambda value: value == "one")
    assert kept.get(1) is None
    assert kept.get(2) == "two"
    assert kept.n_bytes == 40
