"""Bodies that no client means well: a clear refusal or a right answer, never a 5xx, and the next request works."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from tests.served import MODEL, Served, metrics_of

JSON = {"Content-Type": "application/json"}
MEGABYTE = 1_000_000


def body(text: str) -> bytes:
    """A request whose `input` is this JSON text."""
    return f'{{"model":"{MODEL}","input":{text}}}'.encode()


@pytest.fixture(autouse=True)
def _the_next_request_works(client: httpx.Client) -> Iterator[None]:
    yield
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "still here"})
    assert response.status_code == 200
    page = metrics_of(client.get("/metrics").text)
    assert page["fundament_rows_waiting"] == 0
    assert page["fundament_failed_rows_total"] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"   ", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"model=x&input=y", "not valid JSON"),
        (b"\x00\x00\x00", "not valid JSON"),
        (body('"x"') + b"trailing", "not valid JSON"),
        (b'{"input": "\xff"}', "it is not UTF-8 at byte 11"),
        (body("NaN"), "not valid JSON"),
        (body("Infinity"), "not valid JSON"),
        (body("1e999"), "not valid JSON"),
        (body('"\x00"'), "not valid JSON"),  # a bare control character
        (body('"x"').replace(b"x", b"\xff\xfe"), "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"input":' * 100_000, "not valid JSON"),
        (body("[" * 100_000 + "]" * 100_000), "not valid JSON"),
        (b"null", "should be an object"),
        (b"[]", "should be an object"),
        (b'"text"', "should be an object"),
        (b"17", "should be an object"),
        (body("[" * 500 + "]" * 500), "string or an object"),
        (body('{"text":' * 500 + '"x"' + "}" * 500), "string"),
        (body("null"), "string or an object"),
        (body("1.5"), "string or an object"),
        (body("true"), "string or an object"),
        (body("99999999999999999999999"), "string or an object"),
        (body('["x",{"text":null}]'), "exactly one of text"),
        (body('["x",["y"]]'), "string or an object"),
        (body("[[]]"), "string or an object"),
        (body('"x","dimensions":' + "9" * 400), "not valid JSON"),
        (body('"x","dimensions":' + "9" * 40), "integer"),
        (body('"x","dimensions":-1'), "greater than 0"),
        (body('"x","embedding_type":{"float":1}'), "float"),
        (body('"x","model":"no-such-model"'), "not found"),  # the last of two keys holds
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_a_body_that_cannot_be_served_is_refused_in_words(client: httpx.Client, content: bytes, words: str) -> None:
    response = client.post("/v1/embeddings", content=content, headers=JSON)
    assert response.status_code == (400 if words == "not found" else 422)
    assert words in response.json()["detail"]
    assert len(response.content) < 2_000


@pytest.mark.parametrize(
    "text",
    [r'"a\u0000b"', '""', '"\u202e\ufeff\u0300"', '"' + "\U0001f469\u200d" * 100 + '"', r'"\ud83d\ude42"', '["",""]'],
)
def test_a_strange_text_has_a_vector(client: httpx.Client, text: str) -> None:
    response = client.post("/v1/embeddings", content=body(text), headers=JSON)
    assert response.status_code == 200
    assert len(response.json()["data"][0]["embedding"]) == 384


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r'"an emoji \ud83d"', '"an emoji \ufffd"'),
        (r'"\uDE42 \ud83d\ude42 \ud800\ud83d\ude42\udc00"', '"\ufffd \U0001f642 \ufffd\U0001f642\ufffd"'),
        (r'["\\ud83d", "\ud83d"]', r'["\\ud83d", "\ufffd"]'),
        (r'["\\\ud83d", "\\ud83d\ude00", "\\\\\udc00"]', r'["\\\ufffd", "\\ud83d\ufffd", "\\\\\ufffd"]'),
    ],
)
def test_half_a_character_reads_as_the_sign_for_what_cannot_be_read(client: httpx.Client, sent: str, read: str) -> None:
    found = [client.post("/v1/embeddings", content=body(text), headers=JSON) for text in (sent, read)]
    assert found[0].status_code == 200
    assert found[0].json() == found[1].json()


def test_the_last_of_two_equal_keys_holds(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", content=b'{"input":7,"model":"x",' + body('"x"')[1:], headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "", "a/b/c"]
)
def test_a_body_of_another_type_is_refused(client: httpx.Client, content_type: str) -> None:
    response = client.post("/v1/embeddings", content=body('"x"'), headers={"Content-Type": content_type})
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"])
def test_json_is_read_under_every_name_of_its_type(client: httpx.Client, content_type: str) -> None:
    response = client.post("/v1/embeddings", content=body('"x"'), headers={"Content-Type": content_type})
    assert response.status_code == 200


def test_too_many_inputs_are_refused(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": ["x"] * 100_000})
    assert response.status_code == 422
    assert "at most 10000" in response.json()["detail"]


def test_a_text_of_ten_megabytes_is_refused_or_cut(client: httpx.Client) -> None:
    text = "word " * (2 * MEGABYTE)
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": text})
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": text, "truncate": True})
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] == 256
    assert response.headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(client: httpx.Client, chunked: bool) -> None:
    whole = body('"' + "x" * (33 * MEGABYTE) + '"')
    content: Any = (whole[start : start + MEGABYTE] for start in range(0, len(whole), MEGABYTE)) if chunked else whole
    response = client.post("/v1/embeddings", content=content, headers=JSON)
    assert response.status_code == 413
    assert "larger than 32 MB" in response.json()["detail"]


def test_a_body_just_under_the_limit_is_read(client: httpx.Client) -> None:
    filler = " " * (32 * MEGABYTE - 100)
    response = client.post("/v1/embeddings", content=filler.encode() + body('"x"'), headers=JSON)
    assert response.status_code == 200


def test_a_body_that_ends_early_harms_nobody(server: Served) -> None:
    before = server.metrics()["fundament_requests_total"]
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{", b"\x16\x03\x01\x00garbage"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert server.metrics()["fundament_requests_total"] >= before


def test_wrong_bodies_are_echoed_as_valid_json(client: httpx.Client) -> None:
    for value in ["\u0000", '"', "\\", "\u2028", "</script>", "é" * 500]:
        response = client.post("/v1/embeddings", json={"model": MODEL, "input": "x", "dimensions": value})
        fault = json.loads(response.content)["errors"][0]
        assert fault["input"].removesuffix("…") == value[:100]


def test_a_byte_order_mark_is_no_part_of_a_body(client: httpx.Client) -> None:
    marked = client.post("/v1/embeddings", content=b"\xef\xbb\xbf" + body('"x"'), headers=JSON)
    assert marked.json() == client.post("/v1/embeddings", content=body('"x"'), headers=JSON).json()


def test_a_packed_body_is_refused_in_words(client: httpx.Client) -> None:
    packed = client.post(
        "/v1/embeddings", content=gzip.compress(body('"x"')), headers={**JSON, "Content-Encoding": "gzip"}
    )
    assert packed.status_code == 415
    assert "'gzip'" in packed.json()["detail"]


@pytest.mark.parametrize(
    "offer",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
        b"connection: upgrade\r\nupgrade: websocket",
    ],
)
def test_a_client_that_offers_another_protocol_is_answered_in_this_one(client: httpx.Client, offer: bytes) -> None:
    content = body('"x"')
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
        % len(content)
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=20) as connection:
        whole, plain = head + offer + b"\r\n\r\n" + content, head + b"\r\n" + content
        n = whole.index(b"\r\n\r\n") + 4
        # On one connection: without an offer, the body after the head, the head in two pieces, and all at once.
        for parts in ((plain,), (whole[:n], whole[n:]), (whole[: n - 9], whole[n - 9 :]), (whole,)):
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05)
            answer = HTTPResponse(connection, method="POST")
            answer.begin()
            assert answer.status == 200
            assert len(json.loads(answer.read())["data"]) == 1


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/v1/batch/embeddings", {"input": [1] * 50_000}),
        (
            "/v1/batches",
            {"input_file_id": "f", "endpoint": "/v1/embeddings", "metadata": {str(n): 1 for n in range(50_000)}},
        ),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": [1] * 50_000}),
    ],
)
def test_a_body_that_is_wrong_all_over_gets_a_short_answer(
    client: httpx.Client, path: str, given: dict[str, Any]
) -> None:
    answer = client.post(path, json={"model": MODEL, **given})
    assert answer.status_code == 422
    assert len(answer.content) < 2_000


@pytest.mark.parametrize("levels", range(245, 260))
def test_a_document_that_no_answer_can_repeat_is_refused(client: httpx.Client, levels: int) -> None:
    nested = '{"a":' * levels + "1" + "}" * levels
    content = f'{{"model":"{MODEL}","query":"q","documents":["a",{{"text":"x","meta":{nested}}}]}}'
    answer = client.post("/v1/rerank", content=content, headers=JSON)
    if answer.status_code != 200:
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("documents -> 1: It is nested too deeply")
