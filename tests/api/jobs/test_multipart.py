"""Forms with a file: what they may hold, and that what is refused leaves nothing behind."""

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.inprocess import Api, running

FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n"one"\r\n'
END = b"--b--\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Api]:
    with running(folder, worker=False, preload=False) as api:
        yield api


def part(name: str, value: bytes = b"") -> bytes:
    """A field as a form writes it."""
    return b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)


def send(api: Api, pieces: Sequence[bytes], boundary: str = "b") -> httpx.Response:
    """Send a form in pieces, without its length."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    head = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return api.run(api.client.post("/v1/files", content=body(), headers=head))


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "file-" in path.name]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([part("purpose", b"all") * 2, FILE, END], "purpose: It is there twice. Give one."),
        ([part("purpose"), FILE, part("purpose", b"batch"), END], "purpose: It is there twice. Give one."),
        ([FILE, FILE, END], "file: It is there twice. Give one."),
        ([FILE, *(part(str(n)) for n in range(300_000)), END], "body: The form has more than 64 parts."),
        ([FILE, part("purpose", b"x" * 65_537), END], "purpose: It is longer than 65,536 bytes."),
        ([FILE, END, *[b"x" * 1_000_000] * 5], "body: What the form holds beside its file is too long."),
        ([*[b"\r\n" * 500_000] * 5, FILE, END], "body: What the form holds beside its file is too long."),
        ([FILE, part("purpose", b"ba\0tch"), END], "purpose: It holds a NUL character."),
        ([FILE.replace(b"x.jsonl", b"x\0"), END], "file: It holds a NUL character."),
        ([part("purpose", b"batch"), END], "file: Field required"),
    ],
)
def test_what_a_form_may_not_hold(api: Api, folder: Path, pieces: Sequence[bytes], said: str) -> None:
    before = kept(folder)
    answer = send(api, pieces)
    assert (answer.status_code, answer.json()["detail"]) == (422, said)
    assert kept(folder) == before


def test_a_boundary_that_no_parser_takes(api: Api) -> None:
    answer = send(api, [END], boundary="b" * 300)
    assert answer.status_code == 422
    assert "Boundary length" in answer.json()["detail"]


def test_what_nobody_asked_for_is_passed_over(api: Api) -> None:
    nameless = b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n"
    answer = send(api, [part("tags[]", b"a\0") * 2, part(""), nameless, part("x", b"x" * 100_000), FILE, END])
    assert (answer.status_code, answer.json()["bytes"]) == (200, 5)


def test_a_form_of_as_many_parts_as_may_be_is_read(api: Api, folder: Path) -> None:
    before = kept(folder)
    answer = send(api, [*(part(str(n), b"x" * 60_000) for n in range(62)), FILE, part("purpose", b"batch"), END])
    assert (answer.status_code, answer.json()["bytes"]) == (200, 5)
    assert len(kept(folder)) == len(before) + 1
