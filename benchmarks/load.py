"""A load generator that is not the limit: raw sockets, one thread, answers counted and not read.

Short requests go through `wrk` where it is installed. Long ones never do: it stops on the second and forgets what is
under way, which at a few requests per second is a good part of the whole.
"""

import re
import resource
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from contest import quantile


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and the key that they bring."""

    port: int
    path: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load came to.

    Attributes:
        rate: requests per second.
        p50: half of all requests took no longer, in seconds.
        p99: 99 of 100 took no longer, in seconds.
        n: requests answered.
        n_failed: answers other than 200.
        share: of one core, what the generator itself used.
    """

    rate: float
    p50: float
    p99: float
    n: int
    n_failed: int
    share: float


def request_of(target: Target, body: bytes) -> bytes:
    """The bytes of a POST request that keeps its connection open."""
    head = (
        f"POST {target.path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        + (f"Authorization: Bearer {target.key}\r\n" if target.key else "")
        + "\r\n"
    )
    return head.encode() + body


def steady_rate(completed: Sequence[float], n_clients: int) -> float:
    """Requests per second between the end of everybody's first request and the last completion.

    Args:
        completed: when each request was done, in seconds, in order.
        n_clients: requests that were under way at any time; answers may come in bunches of that size.
    """
    return (len(completed) - n_clients) / (completed[-1] - completed[n_clients - 1])


def load(target: Target, bodies: Sequence[bytes], *, n_clients: int, seconds: float, short: bool) -> Outcome:
    """Keep `n_clients` requests under way, each client sending the next as soon as it is answered.

    Args:
        target: where to.
        bodies: sent one after the other, again and again.
        n_clients: connections.
        seconds: how long, at least; there are two answers for every client in any case.
        short: whether a request takes milliseconds.
    """
    if short and shutil.which("wrk"):
        return _wrk(target, bodies, n_clients, seconds)
    return _sockets(target, bodies, n_clients, seconds)


class Client:
    """One connection with at most one request under way."""

    def __init__(self, port: int, timeout: float | None = 60) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = 0.0
        self._head = b""
        self._n_left: int | None = None
        self.status = 0

    def send(self, request: bytes) -> None:
        """Send a request."""
        self.sent, self._head, self._n_left = time.perf_counter(), b"", None
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Take what has arrived; True once the answer is whole.

        Raises:
            ConnectionError: the server closed the connection, or sends an answer without a length.
        """
        arrived = self.socket.recv(1 << 18)
        if not arrived:
            raise ConnectionError("the server closed the connection")
        if self._n_left is None:
            self._head += arrived
            head, found, rest = self._head.partition(b"\r\n\r\n")
            if not found:
                return False
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            if length is None:
                raise ConnectionError(f"an answer without a length: {head[:200]!r}")
            self.status = int(head[9:12])
            self._n_left = int(length.group(1)) - len(rest)
        else:
            self._n_left -= len(arrived)
        return self._n_left <= 0

    def ask(self, request: bytes) -> float:
        """Send a request, wait for its answer; seconds that it took."""
        self.send(request)
        while not self.receive():
            pass
        return time.perf_counter() - self.sent

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def _sockets(target: Target, bodies: Sequence[bytes], n_clients: int, seconds: float) -> Outcome:
    requests = cycle([request_of(target, body) for body in bodies])
    waiting = selectors.DefaultSelector()
    clients = [Client(target.port) for _ in range(n_clients)]
    completed: list[float] = []
    latencies: list[float] = []
    n_failed = 0
    started, used = time.perf_counter(), time.process_time()
    for client in clients:
        waiting.register(client.socket, selectors.EVENT_READ, client)
        client.send(next(requests))
    while time.perf_counter() - started < seconds or len(completed) < 2 * n_clients:
        for key, _ in waiting.select():
            client = key.data
            if client.receive():
                now = time.perf_counter()
                completed.append(now)
                latencies.append(now - client.sent)
                n_failed += client.status != 200
                client.send(next(requests))
    share = (time.process_time() - used) / (time.perf_counter() - started)
    waiting.close()
    for client in clients:
        client.close()
    late = latencies[n_clients:]
    return Outcome(
        rate=steady_rate(completed, n_clients),
        p50=quantile(late, 0.5),
        p99=quantile(late, 0.99),
        n=len(completed),
        n_failed=n_failed,
        share=share,
    )


_SCRIPT = """
local requests, place = {{}}, 0
init = function(_)
  local headers = {{["Content-Type"] = "application/json"}}
  if "{key}" ~= "" then headers["Authorization"] = "Bearer {key}" end
  for body in io.lines("{bodies}") do
    requests[#requests + 1] = wrk.format("POST", "{path}", headers, body)
  end
end
request = function()
  place = place % #requests + 1
  return requests[place]
end
done = function(summary, latency, _)
  local failed = summary.errors.status + summary.errors.read + summary.errors.timeout
  io.write(string.format("\\nfound %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), failed))
end
"""


def _wrk(target: Target, bodies: Sequence[bytes], n_clients: int, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        lines, script = Path(scratch) / "bodies", Path(scratch) / "load.lua"
        lines.write_bytes(b"\n".join(bodies))
        script.write_text(_SCRIPT.format(bodies=lines, path=target.path, key=target.key))
        whole = max(1, round(seconds))
        url = f"http://127.0.0.1:{target.port}"
        command = ["wrk", "-t1", f"-c{n_clients}", f"-d{whole}s", "--timeout", "30s", "-s", str(script), url]
        before = _children_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        share = (_children_seconds() - before) / whole
    found = re.search(r"found (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if found is None:
        raise SystemExit(f"wrk did not say what it found:\n{done.stdout}{done.stderr}")
    n, microseconds, p50, p99, n_failed = map(int, found.groups())
    return Outcome(rate=n / microseconds * 1e6, p50=p50 / 1e6, p99=p99 / 1e6, n=n, n_failed=n_failed, share=share)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended, so running servers do not count
    return used.ru_utime + used.ru_stime
