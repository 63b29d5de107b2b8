"""What a started server does when clients go, queues fill, signals come and ports are taken."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import torchscript
from tests.contract.schemas import conforms
from tests.faults import mortal
from tests.served import MODEL, PATIENCE_SECONDS, Served, serving, wait_until, working

N_ROWS, N_TOKENS = 120, 202  # a second or more of one thread
SMALL = {"threads": 1, "max_batch_tokens": 512}  # little batches: what waits is easily seen


class Caller:
    """A client that sends rows and reads the answer later, or hangs up before it."""

    def __init__(self, server: Served) -> None:
        url = httpx.URL(server.url)
        self.connection = socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_SECONDS)
        words = ["word"] * (N_TOKENS - 2)
        texts = [" ".join([*words[:place], "other", *words[place + 1 :]]) for place in range(N_ROWS)]
        body = json.dumps({"model": MODEL, "input": texts, "embedding_type": "ubinary"}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)
        wait_until(lambda: rows_waiting(server) > N_ROWS / 2, "rows in the queue")

    def answer(self) -> bytes:
        """Everything that the server sends."""
        with self.connection, self.connection.makefile("rb") as file:
            return file.read()

    def hang_up(self) -> None:
        self.connection.close()


def rows_waiting(server: Served) -> float:
    return server.metrics().get("fundament_rows_waiting", 0)


def endless(folder: Path, *, n_tokens: int) -> dict[str, object]:
    """Settings that serve a program which never comes back from rows of that many tokens."""
    directory = torchscript.endless(folder / "endless", n_tokens=n_tokens)
    return {"models": f"elser-v2={directory}", "allow_torchscript": True}


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """Time that a process has computed."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def left_behind(server: Served) -> list[str]:
    """Threads that were busy when the server ended."""
    return [event["threads"] for event in server.events() if event["event"] == "threads left behind"]


def refuses_connections(server: Served) -> bool:
    try:
        httpx.get(f"{server.url}/live")
    except httpx.TransportError:
        return True
    return False


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of one thread, small batches and a short queue."""
    with serving(tmp_path_factory.mktemp("small"), max_waiting_rows=8, **SMALL) as server:
        yield server


def test_the_rows_of_a_client_that_has_gone_are_dropped(small: Served) -> None:
    before = small.metrics().get("fundament_tokens_total", 0)
    Caller(small).hang_up()
    wait_until(lambda: rows_waiting(small) == 0, "an empty queue")
    assert small.embed("x").status_code == 200
    after = small.metrics()
    assert after["fundament_tokens_total"] - before < N_ROWS * N_TOKENS
    assert after["fundament_failed_rows_total"] == 0
    assert not [event for event in small.events() if event.get("inputs") == N_ROWS]
    assert [event for event in small.events() if event.get("status") == 499]


def test_a_full_queue_says_when_to_try_again_and_recovers(small: Served) -> None:
    caller = Caller(small)
    refused = small.embed(["x", "y"])
    caller.hang_up()
    conforms(refused)
    assert refused.status_code == 503
    assert refused.json()["code"] == "SERVICE_UNAVAILABLE"
    assert "full" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    wait_until(lambda: rows_waiting(small) == 0, "an empty queue")
    assert small.embed(["x", "y"]).status_code == 200


def test_an_empty_queue_takes_a_call_of_any_size(small: Served) -> None:
    served = small.embed([f"x {number}" for number in range(50)])
    assert served.status_code == 200
    assert len(served.json()["data"]) == 50


def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    with serving(tmp_path, drain_seconds=PATIENCE_SECONDS, **SMALL) as server:
        caller = Caller(server)
        server.signal(signal.SIGTERM)
        closing = wait_until(lambda: (found := server.http.get("/ready")).is_error and found, "/ready to say 503")
        conforms(closing)
        assert closing.status_code == 503
        assert "closing" in closing.json()["detail"]
        # Load balancers have not all looked away yet: it still serves, on new connections too, and keeps none.
        late = httpx.get(f"{server.url}/v1/models")
        assert (late.status_code, late.headers["connection"]) == (200, "close")
        server.signal(signal.SIGTERM)  # a second one ends the wait
        wait_until(lambda: refuses_connections(server), "the port to close")
        head, _, body = caller.answer().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(json.loads(body)["data"]) == N_ROWS
        assert server.exit_code() == 0
    [event] = [event for event in server.events() if event["event"] == "closing"][:1]
    assert event["running"] >= 1
    assert not left_behind(server)
    assert "Traceback" not in server.log()


def test_a_terminal_that_closes_ends_the_server_in_good_order(tmp_path: Path) -> None:
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` the server would inherit that it is ignored
    try:
        with serving(tmp_path, **SMALL) as server:
            caller = Caller(server)
            server.signal(signal.SIGHUP)
            assert caller.answer().startswith(b"HTTP/1.1 200")
            assert server.exit_code() == 0
    finally:
        signal.signal(signal.SIGHUP, ours)


def test_work_past_the_deadline_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, drain_seconds=0, shutdown_seconds=0, **SMALL) as server:
        caller = Caller(server)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        head, _, body = caller.answer().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in head
        assert json.loads(body)["detail"] == "The server is closing."
    assert "Traceback" not in server.log()
    assert len(server.events()) == len(server.log().splitlines())  # every line is JSON


def test_a_forward_pass_without_end_is_left_behind(tmp_path: Path) -> None:
    given = endless(tmp_path, n_tokens=4) | {"max_batch_tokens": 4, "threads": 1, "shutdown_seconds": 1}
    with serving(tmp_path, drain_seconds=0, **given) as server:
        asked = {"model": "elser-v2", "input": ["a b", "a"]}
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.http.post, "/v1/embeddings", json=asked)
            wait_until(lambda: rows_waiting(server) == 1, "the first row to run")
            server.signal(signal.SIGTERM)
            assert server.exit_code() == 0
            assert answer.result().json()["detail"] == "The server is closing."
    assert left_behind(server) == ["elser-v2-0"]
    assert "Traceback" not in server.log()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the kernel's own count")
@pytest.mark.parametrize("kind", ["server", "worker"])
def test_a_load_without_end_is_left_behind(tmp_path: Path, kind: str) -> None:
    given = endless(tmp_path, n_tokens=512) | {"shutdown_seconds": 1}
    with ExitStack() as stack:
        if kind == "server":
            process = stack.enter_context(serving(tmp_path, until_ready=False, drain_seconds=0, **given)).process
        else:
            process = stack.enter_context(working(tmp_path, **given))
        log = tmp_path / f"{kind}.log"
        wait_until(lambda: '"event":"working"' in log.read_text() or kind == "server", "the worker's start")
        before = processor_seconds(process)
        wait_until(lambda: processor_seconds(process) > before + 1, "the load to run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert "threads left behind" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_signal_while_the_model_loads_ends_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, until_ready=False, drain_seconds=0) as server:
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
    assert "Traceback" not in server.log()


def test_localhost_is_every_address_of_the_name_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with serving(tmp_path, host="localhost", preload=False, drain_seconds=PATIENCE_SECONDS) as server:
        port = httpx.URL(server.url).port
        addresses = {address[0] for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        for address in addresses:
            socket.create_connection((address, port)).close()
        server.signal(signal.SIGINT)  # the connection of `server.http` is open and idle
        assert server.exit_code() == 0
    assert "Traceback" not in server.log()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refusal(folder: Path, *options: str) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-m", "fundament", "serve", *options]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert ran.returncode == 1
    assert ran.stdout == ""
    return ran.stderr.strip()


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path: Path, taken_port: int) -> None:
    assert refusal(tmp_path, "--port", str(taken_port)) == (
        f"fundament: cannot listen on 127.0.0.1 port {taken_port}: address already in use. Choose another with --port."
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_said_in_one_sentence(tmp_path: Path, host: str) -> None:
    said = refusal(tmp_path, "--port", "0", "--host", host)
    assert said.startswith("fundament: ")
    assert host in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_an_idle_connection_is_kept(server: Served) -> None:
    url = httpx.URL(server.url)
    connection = HTTPConnection(url.host, url.port, timeout=PATIENCE_SECONDS)
    for pause in (0, 6):  # uvicorn's own is five seconds
        time.sleep(pause)
        connection.request("GET", "/live")
        assert connection.getresponse().read()
        connection.auto_open = 0  # from now on the same one, or none
    connection.close()


def test_a_server_whose_model_has_died_ends_with_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, program=[mortal.__file__]) as server:
        assert server.embed("live").is_success
        answer = server.embed("die")
        assert answer.status_code == 503
        assert "the driver has gone" in answer.json()["detail"]
        assert server.exit_code() == 1
        assert "has stopped: SystemExit('the driver has gone'). Start the server anew." in server.log()


def test_a_death_is_told_by_the_exit_code_where_a_thread_is_left_behind(tmp_path: Path) -> None:
    given = endless(tmp_path, n_tokens=4) | {"max_batch_tokens": 4, "shutdown_seconds": 1, "drain_seconds": 0}
    given["models"] = f"{MODEL},{given['models']}"
    with serving(tmp_path, program=[mortal.__file__], threads=1, **given) as server, ThreadPoolExecutor() as pool:
        asked = {"model": "elser-v2", "input": ["a b", "a"]}
        busy = pool.submit(server.http.post, "/v1/embeddings", json=asked)
        wait_until(lambda: rows_waiting(server) == 1, "the first row to run")
        assert server.embed("die").status_code == 503
        assert server.exit_code() == 1
        assert busy.result().status_code == 503
    assert left_behind(server) == ["elser-v2-0"]
