"""Sentences, windows and the means of parts: pure functions, held to what they say."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundament.backbone.chunking import cut, merge, sentences, windows


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Berlin is big. It is old! Is it?", ["Berlin is big.", " It is old!", " Is it?"]),
        ("It has 3.85 million.", ["It has 3.85 million."]),
        ("See e.g. this one. Yes", ["See e.g. this one.", " Yes"]),
        ('He said "No." Then… (Gone!) End', ['He said "No."', " Then…", " (Gone!)", " End"]),
        ("東京は首都です。人口は？多い！", ["東京は首都です。", "人口は？", "多い！"]),
        ("Title\n\nText one\r\nText two.\n", ["Title", "\n\nText one", "\r\nText two.\n"]),
        ("हाँ। नहीं।", ["हाँ।", " नहीं।"]),
        ("هل؟ نعم", ["هل؟", " نعم"]),
        ("Привет. мир. Мир", ["Привет. мир.", " Мир"]),
        (" \n ", []),
        ("", []),
        ("...", ["..."]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


@given(text=st.text(st.sampled_from("aB.!?。 \n\t)»é") | st.characters(codec="utf-8"), max_size=60))
def test_sentences_joined_are_the_text(text: str) -> None:
    found = sentences(text)
    assert "".join(found) == (text if text.strip() else "")
    assert all(sentence.strip() for sentence in found)


@pytest.mark.parametrize("text", ["." * 200_000, "\n" * 200_000, ". " * 100_000, " \n" * 100_000 + "x", ".)" * 100_000])
def test_a_long_text_of_one_kind_is_divided(text: str) -> None:
    assert "".join(sentences(text)) == (text if text.strip() else "")


@given(n_tokens=st.integers(1, 3_000), room=st.integers(32, 600))
def test_windows_take_every_token_once_and_from_inside(n_tokens: int, room: int) -> None:
    found = windows(n_tokens, room)
    assert [place for window in found for place in range(window.first, window.last)] == list(range(n_tokens))
    for window in found:
        assert 0 <= window.start <= window.first < window.last <= window.stop <= n_tokens
        assert window.stop - window.start == min(room, n_tokens)
    for one, following in pairwise(found):
        assert one.stop - following.start >= room // 4
        assert one.last == following.first
        assert min(one.stop - one.last, following.first - following.start) >= room // 8 - 1


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30),
    room=st.integers(32, 80),
    seed=st.integers(0, 9),
)
def test_means_over_windows_are_the_means_over_the_parts(lengths: list[int], room: int, seed: int) -> None:
    borders = np.cumsum([0, *lengths])
    states = np.random.default_rng(seed).standard_normal((int(borders[-1]), 3)).astype(np.float32)
    rows = []
    for window in windows(len(states), room):
        parts, inside = cut(borders, window.first, window.last)
        means = np.stack([states[a:b].mean(axis=0) for a, b in pairwise(inside)])
        rows.append((parts, inside, means))
    expected = np.stack([states[a:b].mean(axis=0) for a, b in pairwise(borders)])
    np.testing.assert_allclose(merge(len(lengths), rows), expected, atol=1e-5)
