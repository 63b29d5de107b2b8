"""A server started as users start it: a process of its own, spoken to over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny

MODEL = "all-minilm-l6-v2"
PATIENCE_SECONDS = 60  # how long a test waits for something before it fails; nothing is timed by it


def wait_until(happened: Callable[[], Any], what: str) -> Any:
    """The first true value of `happened`, which is asked again and again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := happened()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}"
        time.sleep(0.01)
    return value


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[bytes]
    log_file: Path
    http: httpx.Client
    url: str = ""

    def log(self) -> str:
        """Everything that it has written so far."""
        return self.log_file.read_text()

    def events(self) -> list[dict[str, Any]]:
        """Its log lines."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]

    def embed(self, given: object, **fields: object) -> httpx.Response:
        """Ask for embeddings."""
        return self.http.post("/v1/embeddings", json={"model": MODEL, "input": given, **fields})

    def metrics(self) -> dict[str, float]:
        """What `/metrics` shows, summed over labels, by sample name."""
        return metrics_of(self.http.get("/metrics").text)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


def metrics_of(page: str) -> dict[str, float]:
    """Samples of a page in Prometheus' text format, summed over labels, by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


@contextmanager
def serving(
    folder: Path,
    *,
    until_ready: bool = True,
    dims: Mapping[str, int] = MappingProxyType({}),
    program: Sequence[str] = ("-m", "fundament"),
    **settings: object,
) -> Iterator[Served]:
    """Start a server on a free port, with settings of the environment; it has ended afterwards.

    Args:
        folder: its data directory.
        until_ready: wait for its models.
        dims: length of the vectors of models that tiny checkpoints stand for.
        program: what Python runs as the command `fundament`, where there are no dims.
        settings: by their names in `Settings`.
    """
    if dims:
        program = [tiny.__file__, json.dumps(dict(dims))]
    given = {"PORT": 0, "LOG_FORMAT": "json", "DATA_DIR": folder, **settings}
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, "serve"], env=_environment(given), cwd=folder, stdout=log, stderr=log
        )
    with httpx.Client(timeout=PATIENCE_SECONDS) as http:
        server = Served(process, log_file, http)
        try:
            server.url = wait_until(lambda: _address(server), "the server's start")
            http.base_url = server.url
            if until_ready:
                wait_until(lambda: http.get("/ready").is_success, "the model")
            yield server
        finally:
            process.kill()
            process.wait()


def _address(server: Served) -> str | None:
    assert server.process.poll() is None, server.log()
    return next((event["url"] for event in server.events() if event["event"] == "serving"), None)


@contextmanager
def working(
    folder: Path, name: str = "worker", program: Sequence[str] = ("-m", "fundament"), **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker of batch jobs on a folder that a server has, or has had; it has ended afterwards."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, "worker"],
            env=_environment({"LOG_FORMAT": "json", "DATA_DIR": folder, **settings}),
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment(given: dict[str, object]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUNDAMENT_")}
    return environment | {f"FUNDAMENT_{name}".upper(): str(value) for name, value in given.items()}
