"""Base64 and data URIs, as strict as they must be and no stricter."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundament.errors import InputError
from fundament.media import sources
from tests.media.files import RED, plain

MOST = 10_000
PNG = plain(RED)
TEXT = base64.b64encode(PNG).decode()


@settings(deadline=None)
@given(content=st.binary(min_size=1, max_size=200))
def test_what_base64_stands_for(content: bytes) -> None:
    plain_text, safe = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    wrapped = base64.encodebytes(content).decode()
    for text in (plain_text, safe, wrapped, plain_text.rstrip("="), f"data:image/png;base64,{plain_text}"):
        assert sources.read(text, "here", MOST) == content


def test_base64_in_lines_may_be_as_large_as_without() -> None:
    content = bytes(1_000_000)
    for end in ("\n", "\r\n"):
        text = base64.encodebytes(content).decode().replace("\n", end)
        assert sources.read(text, "here", len(content)) == content


@settings(deadline=None)
@given(text=st.text(max_size=50))
def test_any_other_text_is_refused_or_read(text: str) -> None:
    try:
        assert sources.read(text, "here", MOST)
    except InputError as error:
        assert error.faults[0].field == "here"


@pytest.mark.parametrize(
    ("uri", "content"),
    [
        (f"data:image/png;base64,{TEXT}", PNG),
        (f"DATA:image/PNG;name=a.png;BASE64,{TEXT}", PNG),
        (f"  data:;base64,{TEXT}", PNG),
        (f"data:application/octet-stream;base64,{TEXT}", PNG),
        ("data:image/svg+xml,%3Csvg%20/%3E", b"<svg />"),
    ],
)
def test_data_uris(uri: str, content: bytes) -> None:
    assert sources.read(uri, "here", MOST) == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a URL, nor a data URI, nor base64"),
        ("cat.png", "neither a URL"),
        ("a text with words", "neither a URL"),
        ("data:image/png;base64,", "neither a URL"),
        (TEXT[:40] + "*" + TEXT[40:], "neither a URL"),
        ("é" * 8, "neither a URL"),
        ("file:///etc/passwd", "scheme is 'file'; use http or https"),
        ("s3://bucket/key", "scheme is 's3'"),
        ("A" * 20_000, "larger than the 0.01 MB allowed"),
        (base64.b64encode(bytes(MOST + 1)).decode(), "larger than the 0.01 MB allowed"),
        ("data:image/svg+xml," + "a" * (MOST + 1), "larger than the 0.01 MB allowed"),
    ],
)
def test_what_is_no_file(text: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        sources.read(text, "here", MOST)
    assert words in refusal.value.faults[0].message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"data:image/png;base64,{TEXT}", "image"),
        ("data:application/pdf;base64,AAAA", "pdf"),
        ("data:audio/wav;base64,AAAA", "audio"),
        ("data:video/mp4;codecs=avc1;base64,AAAA", "video"),
        ("data:text/plain,hello", None),
        ("data: see below", None),
        ("The data:image/png scheme", None),
        ("https://example.com/x.png", None),
    ],
)
def test_a_data_uri_says_what_it_holds(text: str, kind: str | None) -> None:
    assert sources.kind_of_data_uri(text) == kind


def test_urls_are_fetched_whatever_their_case() -> None:
    assert all(map(sources.is_url, ("http://a/b", "HTTPS://a/b", "\n https://a")))
    assert not any(map(sources.is_url, ("ftp://a", TEXT, "data:image/png;base64,http://", "")))
