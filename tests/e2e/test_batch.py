"""Batch jobs over HTTP: every dialect, links, webhooks, caps, ends."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.contract.schemas import conforms
from tests.served import MODEL, Served, serving, wait_until
from tests.servers import bucket_on
from tests.website import Website, website

SECRET = b"0123456789abcdef"


@pytest.fixture
def site() -> Iterator[Website]:
    with website() as site:
        yield site


@pytest.fixture(scope="module", params=["directory", "bucket"])
def files_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where files lie; empty for the server's data directory."""
    if request.param == "directory":
        yield ""
        return
    with bucket_on(request.getfixturevalue("s3_url")) as url:
        yield f"{url}/of/the/server"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, files_url: str) -> Iterator[Served]:
    settings = {
        "FILES_URL": files_url,
        "ALLOWED_NETWORKS": "127.0.0.1/32",
        "MAX_INLINE_LINES": 50,
        "MAX_JOB_LINES": 60,
        "MAX_JOB_MB": 1,
        "WEBHOOK_SECRET": f"whsec_{base64.b64encode(SECRET).decode()}",
    }
    with serving(tmp_path_factory.mktemp("server"), **settings) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as http:
        http.event_hooks["response"].append(conforms)
        yield http


def submit(http: httpx.Client, **fields: object) -> dict[str, Any]:
    answer = http.post("/v1/batch/embeddings", json={"model": MODEL, **fields})
    assert answer.status_code == (202 if "input_file_id" in fields else 200), answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(http: httpx.Client, path: str) -> dict[str, Any]:
    """What a path says once its job has ended."""

    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = http.get(path).json()
        waits = ("pending", "processing", "validating", "in_progress", "waiting", "in-progress")
        return None if found["status"] in waits else found

    found: dict[str, Any] = wait_until(look, "the job's end")
    return found


def rows(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/jsonl"
    assert int(answer.headers["content-length"]) == len(answer.content)
    return [json.loads(line) for line in answer.text.splitlines()]


def upload(http: httpx.Client, body: bytes) -> str:
    answer = http.post("/v1/files", files={"file": ("lines.jsonl", body)}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_job_of_the_search_foundation_api(http: httpx.Client) -> None:
    lines = [
        {"custom_id": "one", "body": {"input": "hello"}},
        {"custom_id": "bad", "body": {"input": 5}},
        {"custom_id": "two", "body": {"input": ["a", "b"]}},
        "plain",
    ]
    made = submit(http, input=lines, normalized=True)
    assert made["status"] in ("pending", "processing", "completed")
    job = ended(http, f"/v1/batch/{made['batch_id']}")
    assert job["status"] == "completed"
    stats = job["stats"]
    assert (stats["total"], stats["completed"], stats["failed"]) == (4, 3, 1)
    output = rows(http.get(f"/v1/batch/{made['batch_id']}/output"))
    assert [row["custom_id"] for row in output] == ["one", "two", "3"]
    assert stats["total_tokens"] == sum(row["response"]["body"]["usage"]["total_tokens"] for row in output)
    [error] = rows(http.get(f"/v1/batch/{made['batch_id']}/errors"))
    assert error["custom_id"] == "bad"
    assert error["response"]["status_code"] == 422
    assert made["batch_id"] in [each["batch_id"] for each in http.get("/v1/batches?limit=100").json()]
    assert len(http.get("/v1/batches?limit=1").json()) == 1
    assert http.get("/v1/batches?limit=0").status_code == 422


def test_vectors_are_those_of_the_endpoint_in_every_form(http: httpx.Client) -> None:
    expected = http.post(
        "/v1/embeddings", json={"model": MODEL, "input": "hello", "embedding_type": ["float", "binary"]}
    )
    wanted = expected.json()["data"][0]["embedding"]
    made = submit(
        http, input=["hello", {"body": {"input": "hello", "encoding_format": "base64"}}], embedding_type="binary"
    )
    ended(http, f"/v1/batch/{made['batch_id']}")
    binary, encoded = rows(http.get(f"/v1/batch/{made['batch_id']}/output"))
    assert binary["response"]["body"]["data"][0]["embedding"] == wanted["binary"]
    given = np.frombuffer(base64.b64decode(encoded["response"]["body"]["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(given, wanted["float"], atol=0.01)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"input": []}, 422, "at least 1 item"),
        ({"input": ["x"] * 51}, 422, "at most 50 items"),
        ({"input": "x"}, 422, "valid list"),
        ({}, 422, "exactly one of input, input_url and input_file_id"),
        ({"input": ["x"], "input_url": "http://x.example"}, 422, "exactly one"),
        ({"input": ["x"], "model": "no-such-model"}, 400, "not found"),
        ({"input": ["x"], "dimensions": 1000}, 422, "less than or equal to 384"),
        ({"input": ["x"], "late_chunking": True}, 422, "late_chunking"),
        ({"input_url": "ftp://x.example/f"}, 422, "use http or https"),
        ({"input_url": "s3://bucket/key"}, 422, "input_buckets"),
        ({"input": ["x"], "webhook_url": "file:///etc"}, 422, "use http or https"),
        ({"input_file_id": "file-none"}, 404, "not found or access denied"),
        ({"input": ["x"], "endpoint": "/v1/rerank"}, 422, "should be '/v1/embeddings'"),
        ({"input": ["x"], "completion_window": "1h"}, 422, "completion_window: Input should be '24h'"),
        ({"input_file_id": "file-\0"}, 422, "input_file_id: It should have no NUL characters"),
        ({"input_url": "http://x.example/\0"}, 422, "input_url: It should have no NUL characters"),
        ({"input": ["x"], "webhook_url": "http://x.example/\0"}, 422, "webhook_url: It should have no NUL characters"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    http: httpx.Client, server: Served, fields: dict[str, object], status: int, said: str
) -> None:
    answer = server.http.post("/v1/batch/embeddings", json={"model": MODEL, **fields})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]


def test_an_input_that_is_fetched(http: httpx.Client, site: Website) -> None:
    url = site.say("/lines.jsonl", b'{"input": "one"}\n{"input": "two"}\n')
    job = ended(http, f"/v1/batch/{submit(http, input_url=url)['batch_id']}")
    assert (job["status"], job["stats"]["completed"]) == ("completed", 2)


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"", "no lines"), (b'"x"\n' * 61, "more than 60 lines"), (b" " * 1_000_001, "larger than 1 MB")],
)
def test_an_input_that_is_fetched_and_is_none(http: httpx.Client, site: Website, body: bytes, said: str) -> None:
    url = site.say("/bad.jsonl", body)
    job = ended(http, f"/v1/batch/{submit(http, input_url=url)['batch_id']}")
    assert job["status"] == "failed"
    assert said in job["error"]
    assert job["output_url"] is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [(b",\n" * 400_000, "more than 60 lines"), (b"1,%s\n" % (b"\1" * 200_000), "more than 1 MB as JSONL")],
)
def test_a_csv_file_that_would_grow_too_large_is_refused(http: httpx.Client, rows: bytes, said: str) -> None:
    file = {"file": ("a.csv", b"id,text\n" + rows)}
    made = http.post("/v1/bulk-embeddings", files=file, data={"model": MODEL}).json()
    job = ended(http, f"/v1/bulk-embeddings/{made['_id']}")
    assert job["status"] == "failed"
    assert said in job["error"]


def test_an_address_inside_is_never_fetched(http: httpx.Client) -> None:
    with website("127.0.0.2") as inside:
        url = inside.say("/lines.jsonl", b'"x"\n')
        job = ended(http, f"/v1/batch/{submit(http, input_url=url)['batch_id']}")
        assert inside.asked == []
    assert job["status"] == "failed"
    assert "not public" in job["error"]


def test_links_work_without_a_key_and_only_as_they_are(http: httpx.Client) -> None:
    made = submit(http, input=["one", {"input": 5}])
    job = ended(http, f"/v1/batch/{made['batch_id']}")
    assert len(rows(http.get(job["output_url"]))) == 1
    assert len(rows(http.get(job["error_file_url"]))) == 1
    url = httpx.URL(job["output_url"])
    signature, expires = url.params["signature"], int(url.params["expires"])
    forged = [
        url.copy_set_param("expires", str(expires + 1)),
        url.copy_set_param("expires", "1"),
        url.copy_set_param("expires", "soon"),
        url.copy_set_param("signature", signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        url.copy_set_param("signature", "é"),
        httpx.URL(job["error_file_url"]).copy_set_param("signature", signature),
    ]
    for each in forged:
        assert http.get(each).status_code == 404, each


def test_a_webhook_is_signed_and_tried_again(http: httpx.Client, site: Website) -> None:
    answers = iter([500, 204])

    def page(handler: Any) -> None:
        handler.send_response(next(answers))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    url = site.serve("/hook", page)
    made = submit(http, input=["one"], webhook_url=url)
    job = ended(http, f"/v1/batch/{made['batch_id']}")
    assert job["status"] == "completed"  # whatever becomes of the webhook

    def called() -> dict[str, Any] | None:
        hook: dict[str, Any] = http.get(f"/v1/batch/{made['batch_id']}").json()["webhook"]
        return hook if hook["state"] == "delivered" else None

    hook = wait_until(called, "the second try")
    assert (hook["attempts"], hook["error"], hook["url"]) == (2, None, url)
    first, second = [asked for asked in site.asked if asked.path == "/hook"]
    for asked in (first, second):
        headers = {name.lower(): value for name, value in asked.headers.items()}
        told = json.loads(asked.body)
        assert (told["type"], told["data"]["batch_id"]) == ("batch.completed", made["batch_id"])
        assert told["data"]["stats"]["completed"] == 1
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + asked.body
        expected = base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert headers["content-type"] == "application/json"
        assert hmac.compare_digest(headers["webhook-id"], f"{made['batch_id']}.completed")
    assert len(rows(http.get(json.loads(second.body)["data"]["output_url"]))) == 1


def test_a_webhook_that_leads_inside_is_never_called(http: httpx.Client) -> None:
    with website("127.0.0.2") as inside:
        made = submit(http, input=["one"], webhook_url=f"{inside.url}/hook")

        def tried() -> dict[str, Any] | None:
            hook: dict[str, Any] = http.get(f"/v1/batch/{made['batch_id']}").json()["webhook"]
            return hook if hook["error"] else None

        assert "not public" in wait_until(tried, "a try")["error"]
        assert inside.asked == []


def test_a_job_that_is_not_there(http: httpx.Client) -> None:
    for path in ("/v1/batch/none", "/v1/batch/none/output", "/v1/batch/..%2F..%2Fetc/errors", "/v1/batches/none"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "RESOURCE_NOT_FOUND")


def test_a_job_that_has_ended_cannot_be_cancelled(http: httpx.Client) -> None:
    made = submit(http, input=["one"])
    ended(http, f"/v1/batch/{made['batch_id']}")
    answer = http.delete(f"/v1/batch/{made['batch_id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "CONFLICT_RESOURCE_BUSY")
    assert answer.headers["x-should-retry"] == "false"


def test_the_files_dialect(http: httpx.Client) -> None:
    file = upload(http, b'{"custom_id": "a", "body": {"input": "one"}}\n{"custom_id": "b", "body": {}}\n')
    made = submit(http, input_file_id=file, endpoint="/v1/embeddings", completion_window="24h")
    assert made["status"] in ("validating", "in_progress", "completed")
    assert isinstance(made["created_at"], int)
    job = ended(http, f"/v1/batch/{made['id']}")
    assert (job["status"], job["endpoint"]) == ("completed", "/v1/embeddings")
    assert job["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert [row["custom_id"] for row in rows(http.get(f"/v1/batch/{made['id']}/output"))] == ["a"]
    assert [row["custom_id"] for row in rows(http.get(f"/v1/batch/{made['id']}/errors"))] == ["b"]


def test_uploads(http: httpx.Client) -> None:
    body = b'"x"\n' * 1000
    file = upload(http, body)
    got = http.get(f"/v1/files/{file}").json()
    assert (got["bytes"], got["filename"], got["purpose"]) == (4000, "lines.jsonl", "batch")
    assert http.get(f"/v1/files/{file}/content").content == body
    assert file in [each["id"] for each in http.get("/v1/files").json()["data"]]
    made = submit(http, input_file_id=upload(http, b'"x"\n'))
    assert http.delete(f"/v1/files/{file}").json() == {"id": file, "object": "file", "deleted": True}
    assert http.get(f"/v1/files/{file}").status_code == 404
    assert http.delete(f"/v1/files/{file}").status_code == 404
    assert ended(http, f"/v1/batch/{made['id']}")["status"] == "completed"


def test_uploads_that_are_none(http: httpx.Client) -> None:
    send = http.post
    assert send("/v1/files", files={"file": ("x", bytes(1_000_001))}).status_code == 413
    assert send("/v1/files", json={}).status_code == 415
    assert send("/v1/files", files={"other": ("x", b"x")}).status_code == 422
    assert send("/v1/files", files={"file": ("x", b"x")}, data={"purpose": "fine-tune"}).status_code == 422
    assert send("/v1/files", files=[("file", ("x", b"x")), ("file", ("y", b"y"))]).status_code == 422
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    assert send("/v1/files", content=b"--b\r\nnonsense", headers=head).status_code in (400, 422)
    assert send("/v1/files", content=b"", headers=head).status_code == 400
    assert send("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 415


def test_the_official_openai_client(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": f"text {n}"}}
        for n in range(5)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"custom_id": "bad"}\n')
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=path, purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"mine": "yes"}
        )
        assert batch.object == "batch"
        done = wait_until(
            lambda: (now := client.batches.retrieve(batch.id)).status == "completed" and now, "the batch's end"
        )
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (6, 5, 1)
        assert done.usage is not None
        assert done.usage.input_tokens == done.usage.total_tokens > 0
        assert (done.metadata, done.model) == ({"mine": "yes"}, MODEL)
        output = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert [row["custom_id"] for row in output] == ["0", "1", "2", "3", "4"]
        assert len(output[0]["response"]["body"]["data"][0]["embedding"]) == 384
        [error] = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
        assert error["custom_id"] == "bad"
        result = client.files.retrieve(done.output_file_id)
        assert (result.purpose, result.bytes) == ("batch_output", len(client.files.content(result.id).content))
        assert batch.id in [each.id for each in client.batches.list()]
        made = [done.output_file_id, done.error_file_id]
        assert {*made} <= {each.id for each in client.files.list(purpose="batch_output", limit=1)}
        assert {*made, file.id} <= {each.id for each in client.files.list(limit=1, order="asc")}
        assert client.files.delete(done.output_file_id).deleted
        for lost in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                lost(done.output_file_id)
        assert client.files.retrieve(done.error_file_id).bytes > 0
        assert file.id in [each.id for each in client.files.list(purpose="batch", limit=1)]
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
        bad = client.files.create(file=("x.jsonl", b'{"custom_id": "1", "body": {"input": "x"}}'), purpose="batch")
        failed = client.batches.create(input_file_id=bad.id, endpoint="/v1/embeddings", completion_window="24h")
        ended_ = wait_until(lambda: (now := client.batches.retrieve(failed.id)).status == "failed" and now, "its end")
        assert "names no model" in ended_.errors.data[0].message
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.UnprocessableEntityError):
            client.batches.create(input_file_id=bad.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.UnprocessableEntityError, match="output_expires_after"):
            client.batches.create(
                input_file_id=bad.id,
                endpoint="/v1/embeddings",
                completion_window="24h",
                output_expires_after={"anchor": "created_at", "seconds": 3600},
            )


def test_batches_of_openai_are_a_list_of_their_own(http: httpx.Client) -> None:
    body = {"input_file_id": upload(http, b'"x"'), "endpoint": "/v1/embeddings"}
    first, second = (http.post("/v1/batches", json=body).json()["id"] for _ in range(2))
    made = http.post("/v1/batch/embeddings", json={"model": MODEL, "input_file_id": body["input_file_id"]}).json()["id"]
    ids = [each["batch_id"] for each in http.get("/v1/batches?limit=1000").json()]
    assert made in ids
    assert not {first, second} & {*ids}
    page = http.get(f"/v1/batches?limit=1&order=desc&after={second}").json()
    assert ([each["id"] for each in page["data"]], page["object"]) == ([first], "list")
    page = http.get(f"/v1/batches?order=asc&after={first}").json()
    assert [each["id"] for each in page["data"]] == [second]
    assert http.get("/v1/batches?after=batch_none").status_code == 404


def test_an_upload_that_expires(http: httpx.Client) -> None:
    def send(**fields: str) -> httpx.Response:
        data = {f"expires_after[{name}]": value for name, value in fields.items()}
        return http.post("/v1/files", files={"file": ("x.jsonl", b'"x"')}, data=data)

    made = send(anchor="created_at", seconds="3600").json()
    assert made["expires_at"] == made["created_at"] + 3600
    assert http.get(f"/v1/files/{made['id']}").json() == made
    for refused in ({"seconds": "3600"}, {"anchor": "created_at"}, {"anchor": "created_at", "seconds": "60"}):
        answer = send(**refused)
        assert answer.status_code == 422
        assert "expires_after" in answer.json()["detail"]


@pytest.mark.parametrize("metadata", [{"a": "\0"}, {"\0": "a"}])
def test_metadata_that_cannot_be_kept(http: httpx.Client, metadata: dict[str, str]) -> None:
    body = {"input_file_id": upload(http, b'"x"'), "endpoint": "/v1/embeddings", "metadata": metadata}
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 422
    assert "no NUL characters" in answer.json()["detail"]


@pytest.mark.parametrize(("name", "body"), [("in.csv", b"id,text\na,one\nb,two\n"), ("in.jsonl", b'"one"\n"two"\n')])
def test_the_older_dialect(http: httpx.Client, name: str, body: bytes) -> None:
    answer = http.post(
        "/v1/bulk-embeddings", files={"file": (name, body)}, data={"model": MODEL, "email": "me@example.com"}
    )
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["file_name"], made["model_name"], made["user_email"]) == (name, MODEL, "me@example.com")
    job = ended(http, f"/v1/bulk-embeddings/{made['_id']}")
    assert job["status"] == "completed"
    assert job["used_token_count"] > 0
    assert {"completed_at", "user_email"} <= job.keys()
    assert "error" not in job
    anonymous = http.post("/v1/bulk-embeddings", files={"file": (name, body)}, data={"model": MODEL}).json()
    assert "user_email" not in anonymous
    assert None not in anonymous.values()
    link = http.post(f"/v1/bulk-embeddings/{made['_id']}/download-result").json()["download_url"]
    assert len(rows(http.get(link))) == 2
    assert http.get(f"/v1/batch/{made['_id']}").status_code == 404  # a job answers in its own dialect


def test_the_older_dialect_refuses(http: httpx.Client) -> None:
    file = {"file": ("in.csv", b"text\nx\n")}
    assert http.post("/v1/bulk-embeddings", files=file).status_code == 422
    assert http.post("/v1/bulk-embeddings", files=file, data={"model": "none"}).status_code == 400
    assert http.post("/v1/bulk-embeddings", files=file, data={"model": MODEL, "email": "me"}).status_code == 422
