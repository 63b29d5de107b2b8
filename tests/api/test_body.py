"""How bodies are read."""

import gc
import json
import re
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import fundament.app  # noqa: F401 - which brings every body
from fundament.api.body import Body, read_json
from fundament.errors import InputError


def test_threads_that_read_at_once_leave_the_garbage_collector_on() -> None:
    def read() -> None:
        for _ in range(50_000):
            read_json(b"[1, 2, 3]")

    threads, interval = [threading.Thread(target=read) for _ in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gc.isenabled()
    finally:
        sys.setswitchinterval(interval)
        gc.enable()


@given(
    st.lists(
        st.sampled_from([r"\\", r"\"", r"\n", r"\ud83d", r"\uDBFF", r"\uDE00", r"\udfff", r"\u00e9", "u", "d83d", "é"])
    )
)
def test_halves_of_characters_that_stand_alone_are_replaced_and_nothing_else(pieces: list[str]) -> None:
    text = '"' + "".join(pieces) + '"'
    assert read_json(text.encode()) == re.sub("[\ud800-\udfff]", "\ufffd", json.loads(text))


def bodies(of: type[Body]) -> Iterator[type[Body]]:
    for body in of.__subclasses__():
        yield body
        yield from bodies(body)


@pytest.mark.parametrize("body", [*bodies(Body)])
@pytest.mark.parametrize("wrong", [5, {}, [], None])
def test_a_list_of_what_is_wrong_is_refused_by_few_faults(body: type[Body], wrong: object) -> None:
    """Each fault takes its time and its memory, and a body has room for millions."""
    for field in body.model_fields:
        try:
            body.model_validate({field: [wrong] * 1_000})
        except ValidationError as error:
            assert error.error_count() < 50, field
        except InputError as error:
            assert len(error.faults) == 1
