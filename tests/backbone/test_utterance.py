"""Tokens to text while they come: whole characters, stops that lie across tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundament.backbone.utterance import Utterance


def decode(ids: Sequence[int]) -> str:
    """Each id is a byte."""
    return bytes(ids).decode(errors="replace")


def say(text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    utterance = Utterance(decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(utterance.add(byte))
        if utterance.stopped:
            break
    return [*pieces, utterance.rest()], utterance.stopped


def test_a_character_comes_when_it_is_whole() -> None:
    assert say("aé🙂b")[0] == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    utterance = Utterance(decode)
    assert [utterance.add(0xF0), utterance.add(0x9F), utterance.rest()] == ["", "", "\ufffd"]


@settings(deadline=None)
@given(said=st.binary(max_size=60) | st.text("é🙂\ufffd", max_size=20).map(str.encode))
def test_any_bytes_are_said_as_they_are_decoded_together(said: bytes) -> None:
    utterance = Utterance(decode)
    assert "".join([*map(utterance.add, said), utterance.rest()]) == decode(said)


def test_bytes_that_are_no_characters_are_not_decoded_again_and_again() -> None:
    sizes = []

    def counted(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    utterance = Utterance(counted)
    assert sum(bool(utterance.add(0xFF)) for _ in range(1_000)) == 125
    assert max(sizes) <= 24


def test_what_may_be_a_stop_waits() -> None:
    assert say("one END", ["END."])[0] == ["o", "n", "e", " ", "", "", "", "END"]
    assert say("one ENd", ["END."])[0] == ["o", "n", "e", " ", "", "", "ENd", ""]


@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [("abcdef", ["cd"], "ab"), ("aab", ["ab"], "a"), ("abab c", ["abc", "b c"], "aba"), ("🙂é", ["é"], "🙂")],
)
def test_an_answer_ends_before_its_stop(text: str, stop: list[str], said: str) -> None:
    pieces, stopped = say(text, stop)
    assert ("".join(pieces), stopped) == (said, True)


@settings(deadline=None)
@given(text=st.text("abé🙂", max_size=12), stop=st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_that_is_complete(text: str, stop: list[str]) -> None:
    pieces, stopped = say(text, stop)
    ends = [text.find(each) + len(each) for each in stop if each in text]
    said = "".join(pieces)
    assert stopped == bool(ends)
    if not ends:
        assert said == text
    else:
        whole = text[: min(ends)]
        assert said == whole[: min(whole.find(each) for each in stop if each in whole)]
