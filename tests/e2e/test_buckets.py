"""Batch jobs whose input lies in a bucket, on a real S3 server."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.test_batch import ended, rows, submit
from tests.served import MODEL, Served, serving
from tests.servers import s3


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[httpx.Client]:
    """An S3 server with the buckets `listed` and `other`, each with an object `texts/lines.jsonl`."""
    lines = b"".join(json.dumps({"custom_id": f"line-{n}", "input": f"text {n}"}).encode() + b"\n" for n in range(300))
    with s3() as url, httpx.Client(base_url=url, timeout=30) as http:
        for bucket in ("listed", "other"):
            assert http.put(f"/{bucket}").is_success
            assert http.put(f"/{bucket}/texts/lines.jsonl", content=lines).is_success
        assert http.put("/listed/large.jsonl", content=b" " * 1_000_001).is_success
        yield http


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bucket_server: httpx.Client) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", str(bucket_server.base_url).rstrip("/"))
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        listed = "s3://listed,s3://absent"
        with serving(tmp_path_factory.mktemp("server"), INPUT_BUCKETS=listed, MAX_JOB_MB=1) as server:
            yield server


def test_an_input_in_a_listed_bucket(server: Served) -> None:
    made = submit(server.http, input_url="s3://listed/texts/lines.jsonl")
    job = ended(server.http, f"/v1/batch/{made['batch_id']}")
    assert job["status"] == "completed", job
    output = rows(server.http.get(f"/v1/batch/{made['batch_id']}/output"))
    assert [row["custom_id"] for row in output] == [f"line-{n}" for n in range(300)]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://listed/none.jsonl", "no object 'none.jsonl' in s3://listed"),
        ("s3://absent/lines.jsonl", "or no such bucket"),
        ("s3://listed/../other/texts/lines.jsonl", "cannot be an object's name"),
        ("s3://listed/large.jsonl", "larger than 1 MB"),
    ],
)
def test_an_object_that_cannot_be_read_fails_the_job_with_its_reason(server: Served, url: str, said: str) -> None:
    job = ended(server.http, f"/v1/batch/{submit(server.http, input_url=url)['batch_id']}")
    assert job["status"] == "failed"
    assert said in job["error"]
    assert job["output_url"] is None


@pytest.mark.parametrize(
    "url",
    ["s3://other/texts/lines.jsonl", "gs://listed/texts/lines.jsonl", "s3://listed", "s3://listed/", "s3://a@listed/x"],
)
def test_any_other_bucket_is_refused_at_once(server: Served, url: str) -> None:
    answer = server.http.post("/v1/batch/embeddings", json={"model": MODEL, "input_url": url})
    assert answer.status_code == 422
    assert "input_buckets" in answer.text


def test_a_webhook_is_never_in_a_bucket(server: Served) -> None:
    asked = {"model": MODEL, "input": ["x"], "webhook_url": "s3://listed/texts/lines.jsonl"}
    assert server.http.post("/v1/batch/embeddings", json=asked).status_code == 422
