"""Balances and limits under many requests at once, over several server processes with one store."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.accounts.keys import bearer, id_of, make_key, read_key
from tests.served import MODEL, PATIENCE_SECONDS, Served, serving, wait_until
from tests.servers import database_on

N_ASKED, N_ALLOWED, N_TOKENS = 200, 100, 6
TEXT = "hello there my friend"
TIERS = {
    "none": {},
    "requests": {"requests_per_minute": N_ALLOWED},
    "tokens": {"tokens_per_minute": N_ALLOWED * N_TOKENS + 1},
    "at_once": {"concurrency": 5},
}


def start(stack: ExitStack, folder: Path, n: int, **settings: Any) -> list[Served]:
    """Servers that share what the settings say; they start side by side."""
    common = {"auth": True, "threads": 1, "tiers": json.dumps(TIERS), **settings}
    servers = []
    for number in range(n):
        (own := folder / str(number)).mkdir(parents=True)
        servers.append(stack.enter_context(serving(own, until_ready=False, **common)))
    for server in servers:
        wait_until(lambda server=server: server.http.get("/ready").is_success, "the model")
    return servers


@pytest.fixture(scope="module")
def four(
    postgres_url: str, postgres_template: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Served], str]]:
    """Four processes on one PostgreSQL and one Redis, and the store's URL."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
    with ExitStack() as stack:
        url = stack.enter_context(database_on(postgres_url, like=postgres_template))
        folder = tmp_path_factory.mktemp("four")
        yield start(stack, folder, 4, store_url=url, redis_url=redis_url), url


def ask(servers: Sequence[Served], key: str, *, embed: bool) -> Counter[int]:
    """Send all requests at once, to the servers in turn; how often each status came."""

    async def one(http: httpx.AsyncClient, server: Served) -> int:
        if embed:
            body = {"model": MODEL, "input": TEXT}
            return (await http.post(f"{server.url}/v1/embeddings", json=body)).status_code
        return (await http.get(f"{server.url}/v1/me")).status_code

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=N_ASKED)
        async with httpx.AsyncClient(headers=bearer(key), limits=limits, timeout=PATIENCE_SECONDS * 2) as http:
            return await asyncio.gather(*(one(http, servers[n % len(servers)]) for n in range(N_ASKED)))

    return Counter(asyncio.run(all_of_them()))


def written(server: Served, key: str) -> tuple[int, int]:
    usage = server.http.get("/v1/me", headers=bearer(key)).json()["usage"]
    return sum(line["requests"] for line in usage), sum(line["tokens"] for line in usage)


def spends_exactly_its_balance(servers: Sequence[Served], key: str) -> None:
    assert ask(servers, key, embed=True) == {200: N_ALLOWED, 403: N_ASKED - N_ALLOWED}
    wait_until(lambda: written(servers[-1], key) == (N_ALLOWED, N_ALLOWED * N_TOKENS), "usage to be written")


def test_a_balance_for_100_requests_on_sqlite(tmp_path: Path) -> None:
    store_url = f"sqlite:///{tmp_path / 'shared.db'}"
    key = make_key(tmp_path, store_url, tier="none", balance=N_ALLOWED * N_TOKENS)
    with ExitStack() as stack:
        spends_exactly_its_balance(start(stack, tmp_path, 4, store_url=store_url), key)
    assert read_key(key, tmp_path, store_url).balance == 0


def test_a_balance_for_100_requests_on_postgres(four: tuple[list[Served], str], tmp_path: Path) -> None:
    servers, store_url = four
    key = make_key(tmp_path, store_url, tier="none", balance=N_ALLOWED * N_TOKENS)
    spends_exactly_its_balance(servers, key)
    assert read_key(key, tmp_path, store_url).balance == 0


@pytest.mark.parametrize("tier", ["requests", "tokens"])
def test_a_minutes_limit_is_exact(four: tuple[list[Served], str], tmp_path: Path, tier: str) -> None:
    servers, store_url = four
    key = make_key(tmp_path, store_url, tier=tier)  # new, so that its minute begins with these requests
    found = ask(servers, key, embed=tier == "tokens")
    assert found == {200: N_ALLOWED, 429: N_ASKED - N_ALLOWED}


def test_requests_at_once_are_exact(four: tuple[list[Served], str], tmp_path: Path) -> None:
    servers, store_url = four
    key, limit, n_asked = make_key(tmp_path, store_url, tier="at_once"), 5, 40
    callers = [Slow(servers[number % len(servers)], key) for number in range(n_asked)]
    try:
        wait_until(lambda: sum(caller.is_answered() for caller in callers) >= n_asked - limit, "refusals")
        refused = [caller for caller in callers if caller.is_answered()]
        running = [caller for caller in callers if caller not in refused]
        assert len(running) == limit
        assert {caller.status() for caller in refused} == {429}
        running[0].go_on()
        assert running[0].status() == 200
        # Its place is free as soon as its answer is there.
        assert servers[0].http.get("/v1/me", headers=bearer(key)).status_code == 200
        for caller in running[1:]:
            caller.go_on()
            assert caller.status() == 200
    finally:
        for caller in callers:
            caller.close()


def test_a_key_revoked_in_one_process_stops_in_all(four: tuple[list[Served], str], tmp_path: Path) -> None:
    servers, store_url = four
    admin = bearer(make_key(tmp_path, store_url, tier="none", admin=True))
    key = make_key(tmp_path, store_url, tier="none")

    def status(server: Served) -> int:
        return server.http.get("/v1/me", headers=bearer(key)).status_code

    assert [status(server) for server in servers] == [200] * 4
    assert servers[0].http.delete(f"/v1/admin/keys/{id_of(key)}", headers=admin).status_code == 200
    for server in servers:
        wait_until(lambda server=server: status(server) == 401, "the key to stop")
    assert [status(server) for server in servers] == [401] * 4


class Slow:
    """A request that is under way: its head is sent, of its body only the beginning."""

    def __init__(self, server: Served, key: str) -> None:
        url = httpx.URL(server.url)
        self._connection = socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_SECONDS)
        body = json.dumps({"model": MODEL, "input": TEXT}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._connection.sendall(head.encode() + body[:5])
        self._rest = body[5:]

    def is_answered(self) -> bool:
        """Whether the server has said something."""
        self._connection.setblocking(False)
        try:
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self._connection.settimeout(PATIENCE_SECONDS)

    def go_on(self) -> None:
        """Send the rest of the body."""
        self._connection.sendall(self._rest)

    def status(self) -> int:
        """The status of the answer, once it is whole where the request is."""
        with self._connection.makefile("rb") as file:
            first = file.readline()
            if b" 200 " in first:
                file.read()
        return int(first.split()[1])

    def close(self) -> None:
        self._connection.close()
