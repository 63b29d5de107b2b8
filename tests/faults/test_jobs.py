"""Batch jobs while servers and workers die, disks fill, buckets fall silent and lines are poisoned."""

import json
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from fundament.store.database import connected, locate
from tests.faults import mortal, nameless
from tests.faults.deadly import DEATH
from tests.inprocess import running
from tests.relay import Relay, relay
from tests.served import MODEL, PATIENCE_SECONDS, Served, serving, wait_until, working
from tests.servers import bucket_on, database_on

WORDS = ["the", "cat", "sits", "on", "a", "mat", "while", "dogs", "run", "over", "hills", "and", "rivers"]
# Every row alone in its batch: then its bits do not depend on what else waits when it runs.
ALONE = {"MAX_BATCH_TOKENS": 1, "JOB_LEASE_SECONDS": 1, "SHUTDOWN_SECONDS": 1}


def lines(count: int) -> bytes:
    """JSONL whose every 97th line is poisoned."""
    rng = random.Random(count)
    written = []
    for number in range(count):
        body: dict[str, Any] = {"input": " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))}
        if number % 97 == 50:
            body = {"input": {"image": "x"}}
        written.append(json.dumps({"custom_id": f"line-{number}", "body": body}))
    return "\n".join(written).encode()


def submit(server: Served, body: bytes) -> str:
    """Hand a file in; the job's id."""
    sent = server.http.post("/v1/files", files={"file": ("lines.jsonl", body)}, data={"purpose": "batch"})
    assert sent.is_success, sent.text
    made = server.http.post("/v1/batch/embeddings", json={"model": MODEL, "input_file_id": sent.json()["id"]})
    assert made.status_code == 202, made.text
    return str(made.json()["id"])


def status(http: httpx.Client, job: str) -> dict[str, Any]:
    answer = http.get(f"/v1/batch/{job}")
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


def watch(http: httpx.Client, job: str, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job once it is so far; patience begins anew with every line that is done."""
    seen: dict[str, Any] = {}
    while not (seen and enough(seen)):
        before = seen
        seen = wait_until(lambda: (now := status(http, job)) != before and now, "progress of the job")  # noqa: B023
    return seen


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    """The job once it has ended."""
    return watch(http, job, lambda now: now["status"] not in ("validating", "in_progress"))


def results(http: httpx.Client, job: str) -> tuple[bytes, bytes]:
    return http.get(f"/v1/batch/{job}/output").content, http.get(f"/v1/batch/{job}/errors").content


def undisturbed(server: Served, body: bytes) -> tuple[bytes, bytes]:
    """What a job gives that nothing disturbs."""
    job = submit(server, body)
    assert ended(server.http, job)["status"] == "completed"
    return results(server.http, job)


def whole(output: bytes, errors: bytes, count: int) -> None:
    """No line lost, none twice, each side in the order of the input."""
    good = [json.loads(line)["custom_id"] for line in output.splitlines()]
    bad = [json.loads(line)["custom_id"] for line in errors.splitlines()]
    assert good == [f"line-{number}" for number in range(count) if number % 97 != 50]
    assert bad == [f"line-{number}" for number in range(count) if number % 97 == 50]


def kill(rng: random.Random, server: Served, worker: subprocess.Popen[bytes], job: str, until: float) -> None:
    """Kill a server and a worker, in any order, once a job has got so far: at its own pace, so always in its midst."""
    watch(server.http, job, lambda now: _done(now) >= until)
    for process in rng.sample([server.process, worker], 2):
        process.send_signal(signal.SIGKILL)
        process.wait()


def _done(job: dict[str, Any]) -> int:
    return int(job["request_counts"]["completed"] + job["request_counts"]["failed"])


def test_a_job_outlives_a_kill(tmp_path: Path) -> None:
    body = lines(1000)
    with serving(tmp_path, **ALONE) as server, working(tmp_path, **ALONE) as worker:
        expected = undisturbed(server, body)
        whole(*expected, 1000)
        job = submit(server, body)
        kill(random.Random(1), server, worker, job, 350)
    with serving(tmp_path, **ALONE) as server:
        assert ended(server.http, job)["status"] == "completed"
        assert _done(status(server.http, job)) == 1000
        assert results(server.http, job) == expected


@pytest.mark.slow
def test_a_large_job_outlives_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    body, rng, n_kills = lines(20_000), random.Random(2), 20
    with serving(tmp_path, **ALONE) as server:
        expected = undisturbed(server, body)
        whole(*expected, 20_000)
        job = submit(server, body)
    for number in range(n_kills):
        until = rng.uniform(number, number + 1) / (n_kills + 1) * 20_000
        with serving(tmp_path, **ALONE) as server, working(tmp_path, **ALONE) as worker:
            kill(rng, server, worker, job, until)
    with serving(tmp_path, **ALONE) as server:
        assert ended(server.http, job)["status"] == "completed"
        assert _done(status(server.http, job)) == 20_000
        assert results(server.http, job) == expected


def test_a_line_that_kills_its_process_fails_alone(tmp_path: Path) -> None:
    texts = ["x"] * 262
    texts[258] = "die"
    body = {"model": MODEL, "input": texts}
    with running(tmp_path, worker=False, preload=False) as api:
        job = str(api.run(api.client.post("/v1/batch/embeddings", json=body)).json()["batch_id"])
    command = [sys.executable, "-m", "tests.faults.deadly", str(tmp_path), job]
    n_deaths = 0
    while (code := subprocess.run(command, check=False, timeout=PATIENCE_SECONDS).returncode) == DEATH:
        n_deaths += 1
        assert n_deaths < 10
    assert code == 0
    assert n_deaths == 5  # three over the chunk, two over the line
    with running(tmp_path, worker=False, preload=False) as api:
        found = api.run(api.client.get(f"/v1/batch/{job}")).json()
        output, errors = (api.run(api.client.get(f"/v1/batch/{job}/{kind}")).text for kind in ("output", "errors"))
    assert (found["status"], found["stats"]["completed"], found["stats"]["failed"]) == ("completed", 261, 1)
    [error] = [json.loads(line) for line in errors.splitlines()]
    assert (error["custom_id"], "died" in error["error"]["message"]) == ("258", True)
    good = [json.loads(line)["custom_id"] for line in output.splitlines()]
    assert good == [str(number) for number in range(262) if number != 258]


def test_a_worker_whose_model_has_died_ends_and_counts_as_dead_over_its_chunk(tmp_path: Path) -> None:
    body = {"model": MODEL, "input": ["x", "die", "y"]}
    with running(tmp_path, worker=False, preload=False) as api:
        job = str(api.run(api.client.post("/v1/batch/embeddings", json=body)).json()["batch_id"])
    short = {"JOB_LEASE_SECONDS": 0.2}
    with working(tmp_path, program=[mortal.__file__], **short) as worker:
        assert worker.wait(PATIENCE_SECONDS) == 1
    log = (tmp_path / "worker.log").read_text()
    assert "has stopped: SystemExit('the driver has gone'). Start the server anew." in log
    with connected(locate("", tmp_path)) as connection:
        assert connection.execute(text("SELECT n_tries FROM job_chunks")).all() == [(1,)]
    with serving(tmp_path, **short) as server:
        wait_until(lambda: server.http.get(f"/v1/batch/{job}").json()["status"] == "completed", "the job's end")


def test_a_name_that_nobody_answers_for_keeps_no_other_job_waiting(tmp_path: Path) -> None:
    with serving(tmp_path, worker=False) as server, working(tmp_path, program=[nameless.__file__]):
        jobs = []
        for given in ({"input_url": "http://nobody.invalid/x"}, {"input": ["x"]}):
            jobs.append(server.http.post("/v1/batch/embeddings", json={"model": MODEL, **given}).json()["batch_id"])
        reading = lambda: server.http.get(f"/v1/batch/{jobs[0]}").json()["status"] != "pending"  # noqa: E731
        wait_until(reading, "the name to be asked for")
        wait_until(lambda: server.http.get(f"/v1/batch/{jobs[1]}").json()["status"] == "completed", "the other job")


def test_a_full_disk_fails_the_job_and_keeps_what_was_written(tmp_path: Path) -> None:
    texts = ["the cat", "a dog", "some hills", "the sea"]
    body = b"\n".join(json.dumps({"input": texts}).encode() for _ in range(8000))
    with serving(tmp_path) as server:
        job = submit(server, body)
        watch(server.http, job, lambda now: _done(now) > 0)
        # From now on no file of this process may be larger: less than a chunk's output, more than all other files.
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        found = ended(server.http, job)
        assert found["status"] == "failed"
        assert "file too large" in found["error"]
        output, _ = results(server.http, job)
        rows = [json.loads(line)["custom_id"] for line in output.splitlines()]
        assert 0 < len(rows) == found["request_counts"]["completed"] < 8000
        assert rows == sorted(rows, key=int)
        assert server.embed("still here").is_success


def test_two_workers_on_postgresql_share_a_job(postgres_url: str, postgres_template: str, tmp_path: Path) -> None:
    body = lines(6000)
    with database_on(postgres_url, like=postgres_template) as url:
        shared = {"STORE_URL": url, "WORKER": False}
        with serving(tmp_path, **shared) as server, working(tmp_path, "one", STORE_URL=url):
            with working(tmp_path, "two", STORE_URL=url):
                for name in ("one", "two"):
                    wait_until(lambda: '"working"' in (tmp_path / f"{name}.log").read_text(), name)  # noqa: B023
                job = submit(server, body)
                assert ended(server.http, job)["status"] == "completed"
            whole(*results(server.http, job), 6000)
            with connected(locate(url, tmp_path)) as connection:
                shares = connection.execute(text("SELECT worker, count(*) FROM job_chunks GROUP BY worker")).all()
    assert len(shares) == 2, shares
    assert sum(count for _, count in shares) == 24


def test_machines_that_share_a_bucket_share_a_job_and_one_dies(
    postgres_url: str, postgres_template: str, s3_url: str, tmp_path: Path
) -> None:
    body, folders = lines(2000), [tmp_path / name for name in ("server", "one", "two")]
    for folder in folders:
        folder.mkdir()
    with database_on(postgres_url, like=postgres_template) as url, bucket_on(s3_url) as files:
        shared = {**ALONE, "STORE_URL": url, "FILES_URL": f"{files}/shared"}
        with serving(folders[0], **shared, WORKER=False) as server, working(folders[1], **shared) as victim:
            with working(folders[2], **shared):
                for folder in folders[1:]:
                    wait_until(lambda: '"working"' in (folder / "worker.log").read_text(), folder.name)  # noqa: B023
                expected = undisturbed(server, body)
                whole(*expected, 2000)
                job = submit(server, body)
                watch(server.http, job, lambda now: _done(now) >= 700)
                victim.send_signal(signal.SIGKILL)
                assert ended(server.http, job)["status"] == "completed"
            assert results(server.http, job) == expected
            with connected(locate(url, tmp_path)) as connection:
                shares = connection.execute(text("SELECT DISTINCT worker FROM job_chunks")).all()
    assert len(shares) == 2
    assert not [folder for folder in folders if (folder / "jobs").exists() or (folder / "files").exists()]


def test_machines_that_share_no_files_leave_each_others_jobs_alone(
    postgres_url: str, postgres_template: str, tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with database_on(postgres_url, like=postgres_template) as url:
        shared = {**ALONE, "STORE_URL": url}
        with serving(folders[0], **shared) as one, serving(folders[1], **shared) as two:
            handed_in = [(server, submit(server, lines(300))) for server in (one, two) for _ in range(3)]
            for server, job in handed_in:
                assert ended(server.http, job)["status"] == "completed"
                whole(*results(server.http, job), 300)
            job = handed_in[0][1]
            assert one.http.get(status(one.http, job)["output_url"]).is_success
            assert (status(two.http, job)["status"], status(two.http, job)["output_url"]) == ("completed", None)
            there = two.http.get(f"/v1/batch/{job}/output")
            upload = one.http.post("/v1/files", files={"file": ("lines.jsonl", lines(1))}).json()["id"]
            made = two.http.post("/v1/batch/embeddings", json={"model": MODEL, "input_file_id": upload})
    for answer in (there, made):
        assert answer.status_code == 404
        assert "on another machine" in answer.json()["detail"]


@pytest.fixture
def way(s3_url: str) -> Iterator[Relay]:
    """The way to the S3 server."""
    with relay(s3_url) as way:
        yield way


def test_a_job_waits_for_its_bucket(s3_url: str, way: Relay, tmp_path: Path) -> None:
    body = lines(2000)
    with bucket_on(s3_url, through=way.url) as files, serving(tmp_path, **ALONE, FILES_URL=files) as server:
        expected = undisturbed(server, body)
        whole(*expected, 2000)
        job = submit(server, body)
        watch(server.http, job, lambda now: _done(now) >= 700)
        way.cut()
        wait_until(lambda: "job waits" in server.log(), "a chunk that cannot be kept")
        assert status(server.http, job)["status"] == "in_progress"
        assert server.embed("still here").is_success
        way.mend()
        assert ended(server.http, job)["status"] == "completed"
        assert _done(status(server.http, job)) == 2000
        assert results(server.http, job) == expected
        assert "unexpected error" not in server.log()


def test_a_download_that_breaks_off_is_never_taken_for_whole(s3_url: str, way: Relay, tmp_path: Path) -> None:
    with bucket_on(s3_url, through=way.url) as files, serving(tmp_path, FILES_URL=files) as server:
        sent = server.http.post("/v1/files", files={"file": ("lines.jsonl", bytes(100_000_000))})
        with server.http.stream("GET", f"/v1/files/{sent.json()['id']}/content") as answer:
            pieces = answer.iter_bytes(1000)
            next(pieces)
            way.cut()
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        way.mend()
        assert server.http.get(f"/v1/files/{sent.json()['id']}/content").content == bytes(100_000_000)
