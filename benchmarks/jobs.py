"""What batch jobs cost, and what they cost others.

    python benchmarks/jobs.py
    python benchmarks/jobs.py --only rate --lines 2000
    python benchmarks/jobs.py --only workers --store-url postgresql://USER:PASSWORD@HOST/DATABASE

rate     lines per second of a job, in base64 and in float, beside the engine's own rate on the same texts
memory   what the server holds while a job runs, above what it holds idle
queries  p50 and p99 of single queries on an idle server, and while a job runs
workers  one worker and two on the same job, on PostgreSQL; its schema is brought up to date first
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import orjson

import corpus
from contest import machine, quantile, table, verdict
from direct import DirectEngine
from load import Client, Target, request_of
from process import Server

_CHUNK_LINES, _CALLS_AT_A_TIME = 256, 4  # as a worker takes them
_PROGRAM = str(Path(sys.executable).with_name("fundament"))


@contextmanager
def served(*, worker: bool = True, store_url: str = "", folder: Path | None = None) -> Iterator[Server]:
    """A server with a data directory of its own."""
    with ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = {"FUNDAMENT_DATA_DIR": str(where), "FUNDAMENT_WORKER": str(worker), "FUNDAMENT_STORE_URL": store_url}
        yield stack.enter_context(Server([_PROGRAM, "serve", "--port", "0"], cwd=where, env=env))


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
) -> Any:
    """One request."""
    url = f"http://127.0.0.1:{server.port}{path}"
    request = Request(url, body, {"Content-Type": content_type}, method=method)
    with urlopen(request, timeout=60) as answer:
        return orjson.loads(answer.read())


def submit(server: Server, texts: Sequence[str], **fields: object) -> str:
    """Hand texts in; the job's id."""
    lines = b"\n".join(orjson.dumps({"input": text}) for text in texts)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    sent = ask(server, "POST", "/v1/files", head + lines + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")
    body = orjson.dumps({"model": corpus.model().spec.id, "input_file_id": sent["id"], **fields})
    return str(ask(server, "POST", "/v1/batch/embeddings", body)["id"])


def watch(server: Server, job: str, seen: Callable[[], None] = lambda: None) -> float:
    """Wait for a job's end; how long it took from its first line on, in seconds."""
    started = time.perf_counter()
    while True:
        now = ask(server, "GET", f"/v1/batch/{job}")
        if now["status"] == "validating":
            started = time.perf_counter()
        elif now["status"] == "completed":
            return time.perf_counter() - started
        elif now["status"] != "in_progress":
            raise SystemExit(f"the job is {now['status']}: {now['error']}")
        seen()
        time.sleep(0.25)  # seldom: each look costs the server a millisecond


def rate(n_lines: int, n_rounds: int, _: str) -> None:
    """A job's rate beside the engine's."""
    texts = corpus.texts(n_lines)
    engine = DirectEngine()

    async def calls() -> None:
        room = asyncio.Semaphore(_CALLS_AT_A_TIME)

        async def call(start: int) -> None:
            async with room:
                await engine.run(texts[start : start + _CHUNK_LINES])

        await asyncio.gather(*(call(start) for start in range(0, n_lines, _CHUNK_LINES)))

    found: dict[str, list[float]] = {"engine": [], "base64": [], "float": []}
    with served() as server:
        watch(server, submit(server, texts[:500]))
        engine.embed(texts[:500])
        for _round in range(n_rounds):
            server.pause()
            started = time.perf_counter()
            engine.runner.run(calls())
            found["engine"].append(time.perf_counter() - started)
            server.resume()
            for encoding in ("base64", "float"):
                found[encoding].append(watch(server, submit(server, texts, embedding_type=encoding)))
    engine.close()
    best = {name: n_lines / min(seconds) for name, seconds in found.items()}
    lines = [[name, f"{each:,.0f}", f"{each / best['engine']:.1%}"] for name, each in best.items()]
    table(f"{n_lines:,} lines, best of {n_rounds}", ["", "lines/s", "of the engine"], lines)
    for encoding in ("base64", "float"):
        verdict(f"job in {encoding} over engine", 100 * best[encoding] / best["engine"], ">=", 95, " %")


def memory(n_lines: int, _: int, __: str) -> None:
    """Memory while a job runs."""
    with served() as server:
        watch(server, submit(server, corpus.texts(500)))
        idle, most = server.resident_bytes, 0

        def seen() -> None:
            nonlocal most
            most = max(most, server.resident_bytes)

        watch(server, submit(server, corpus.texts(n_lines)), seen)
    table("resident memory", ["", "MB"], [["idle", f"{idle / 1e6:,.0f}"], ["most", f"{most / 1e6:,.0f}"]])
    verdict(f"{n_lines:,} lines above idle", (most - idle) / 1e6, "<=", 200, " MB")


def queries(n_lines: int, n_rounds: int, _: str) -> None:
    """Single queries beside a job."""
    model = corpus.model().spec.id
    bodies = [orjson.dumps({"model": model, "input": query}) for query in corpus.queries(200 * n_rounds)]

    def laps(server: Server) -> list[float]:
        client = Client(server.port)
        target = Target(server.port, "/v1/embeddings")
        try:
            return [client.ask(request_of(target, body)) for body in bodies]
        finally:
            client.close()

    with served() as server:
        watch(server, submit(server, corpus.texts(500)))
        idle = laps(server)
        job = submit(server, corpus.texts(n_lines))
        while ask(server, "GET", f"/v1/batch/{job}")["request_counts"]["completed"] == 0:
            time.sleep(0.25)
        busy = laps(server)
        if ask(server, "GET", f"/v1/batch/{job}")["status"] == "in_progress":
            ask(server, "DELETE", f"/v1/batch/{job}")
        else:
            print("the job ended before the queries did: raise --lines")
    rows = [
        [name, f"{1000 * quantile(found, 0.5):.1f}", f"{1000 * quantile(found, 0.99):.1f}"]
        for name, found in (("idle", idle), ("beside a job", busy))
    ]
    table(f"{len(bodies)} queries, one after the other", ["server", "p50 ms", "p99 ms"], rows)


def workers(n_lines: int, _: int, store_url: str) -> None:
    """One worker beside two."""
    if not store_url:
        print("\nworkers: name a PostgreSQL with --store-url")
        return
    texts = corpus.texts(n_lines)
    env = {**os.environ, "FUNDAMENT_STORE_URL": store_url}
    subprocess.run([_PROGRAM, "db", "upgrade"], env=env, check=True, capture_output=True)
    found = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            server = stack.enter_context(served(worker=False, store_url=store_url, folder=Path(name)))
            for _number in range(count):
                own = {**env, "FUNDAMENT_DATA_DIR": name, "FUNDAMENT_THREADS": "1"}
                worker = subprocess.Popen([_PROGRAM, "worker"], env=own, cwd=name, stderr=subprocess.DEVNULL)
                stack.callback(worker.wait)
                stack.callback(worker.terminate)
            watch(server, submit(server, corpus.texts(2000)))
            found[count] = watch(server, submit(server, texts))
    rows = [[str(count), f"{seconds:.1f}", f"{n_lines / seconds:,.0f}"] for count, seconds in found.items()]
    table("one core for each worker", ["workers", "seconds", "lines/s"], rows)
    print(f"two workers take {found[2] / found[1]:.2f} of the time of one")


PARTS = {"rate": (rate, 20_000), "memory": (memory, 50_000), "queries": (queries, 50_000), "workers": (workers, 10_000)}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lines", type=int, help="of each job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store-url", default="", help="a PostgreSQL for `workers`")
    asked = parser.parse_args()
    print(machine())
    for name in asked.only:
        part, n_lines = PARTS[name]
        part(asked.lines or n_lines, asked.rounds, asked.store_url)


if __name__ == "__main__":
    main()
