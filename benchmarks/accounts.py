"""What keys, limits, balances and usage cost: the door alone, then whole servers in turns.

    python benchmarks/accounts.py
    python benchmarks/accounts.py --only server --rounds 7 --seconds 10
    python benchmarks/accounts.py --only limits --redis-url redis://127.0.0.1:6379/0

door    per request in this process, around an application that answers at once
limits  core time per request of limits alone, 100 requests per second of one caller and of 1,000
server  short queries: requests per second and core time of each
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from limits.storage import MemoryStorage

import corpus
from contest import machine, rounds, table, verdict
from fundament.accounts.visits import Accounts, current_visit
from fundament.api.auth import AccountMiddleware
from fundament.config import Settings
from fundament.limits import Limits, MemoryLimits, limits_of, new_lease
from fundament.store import keys, migrate
from fundament.store.database import Database, locate
from load import Outcome, Target, load
from process import Server

EMBEDDINGS = "/v1/embeddings"
_MANY = 10**12
TIERS = {"none": {}, "large": {"requests_per_minute": 10**6, "tokens_per_minute": _MANY, "concurrency": 10**4}}
_WITHOUT_WRITING = (
    "from fundament.accounts import ledger; ledger._WRITE_SECONDS = 1e9; from fundament.cli import app; app()"
)


async def new_key(store: Database, tier: str, balance: int | None) -> str:
    """A key in a store."""
    async with store.write() as connection:
        return (await keys.create(connection, "bench", tier=tier, balance=balance))[1]


def door(n_rounds: int, seconds: float) -> None:
    """Milliseconds of the door per request, one after the other."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        found = runner.run(_doors(Path(folder), n_rounds, seconds))
    base = median(found["no keys"])
    table(
        f"The door, around an application that answers at once, median of {n_rounds} rounds",
        ("", "ms each", "more"),
        [(name, f"{median(laps):.3f}", f"{median(laps) - base:.3f}") for name, laps in found.items()],
    )
    verdict("a key and its limits", median(found["key, limits"]) - base, "<", 0.3, " ms")


async def _doors(folder: Path, n_rounds: int, seconds: float) -> dict[str, list[float]]:
    url = locate("", folder)
    migrate.prepare(url)
    store = Database(url)
    plain = {"none": await new_key(store, "none", None), "large": await new_key(store, "large", None)}
    paid = await new_key(store, "large", _MANY)
    open_, guarded = (
        Accounts(store, limits_of(""), Settings(auth=auth, tiers=TIERS, data_dir=folder)) for auth in (False, True)
    )
    writing = asyncio.ensure_future(guarded.ledger.keep())
    laps = {
        "no keys": partial(_door, open_, "", seconds),
        "key": partial(_door, guarded, plain["none"], seconds),
        "key, limits": partial(_door, guarded, plain["large"], seconds),
        "key, limits, balance": partial(_door, guarded, paid, seconds),
    }
    found: dict[str, list[float]] = {name: [] for name in laps}
    for _ in range(n_rounds):
        for name, lap in laps.items():
            found[name].append(await lap())
    writing.cancel()
    await store.close()
    return found


async def _door(accounts: Accounts, key: str, seconds: float) -> float:
    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        visit = current_visit.get()
        assert visit is not None
        await visit.bill("model").admit(10)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        del message

    middleware = AccountMiddleware(application, accounts)
    headers = [(b"authorization", f"Bearer {key}".encode())]
    started, n = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds / 10:
        for _ in range(10):
            scope = {"type": "http", "path": EMBEDDINGS, "headers": headers, "client": ("127.0.0.1", 1), "state": {}}
            await middleware(scope, send, send)
        n += 10
        await asyncio.sleep(0)
    return 1000 * taken / n


class Untouched(MemoryLimits):
    """Limits in the library's storage as it is, with a timer that walks all callers."""

    def __init__(self) -> None:
        super().__init__()
        self._storage = MemoryStorage()


def limits(n_rounds: int, seconds: float, redis_url: str) -> None:
    """Milliseconds of core time of one request's limits, while 100 come per second, the loop's waiting included."""
    places = {"memory": MemoryLimits, "memory, the storage's own timer": Untouched}
    if redis_url:
        places["Redis"] = partial(limits_of, redis_url)
    cases = [(name, n_callers) for name in places for n_callers in (1, 1_000)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(n_rounds):
        for name, n_callers in cases:
            with asyncio.Runner() as runner:
                found[name, n_callers].append(runner.run(_paced(places[name], n_callers, seconds)))
    table(
        f"Limits alone, 100 requests per second, median of {n_rounds} rounds",
        ("", "callers", "core ms each"),
        [(name, f"{n_callers:,}", f"{median(laps):.2f}") for (name, n_callers), laps in found.items()],
    )


async def _paced(make: Callable[[], Limits], n_callers: int, seconds: float) -> float:
    counted, tier = make(), Settings(tiers=TIERS).tiers["large"]

    async def request(number: int) -> None:
        who, lease = str(number % n_callers), new_lease()
        await counted.enter(who, tier, lease)
        await counted.spend(who, tier, 10)
        await counted.leave(who, lease)

    for number in range(10_000):
        await request(number)
    used, n = time.process_time(), round(100 * seconds)
    for number in range(n):
        await request(number)
        await asyncio.sleep(0.01)
    used = time.process_time() - used
    await counted.close()
    return 1000 * used / n


def server(n_rounds: int, seconds: float) -> None:
    """Requests per second and core time of servers with and without accounts."""
    model = corpus.model().spec.id
    bodies = [
        orjson.dumps({"model": model, "input": [text], "embedding_type": "base64"}) for text in corpus.queries(1_000)
    ]
    with ExitStack() as stack:

        def started(name: str, *, auth: bool, balance: int | None = None, writes: bool = True) -> tuple[Server, str]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=name)))
            key = _key_in(folder, balance) if auth else ""
            program = ["-m", "fundament"] if writes else ["-c", _WITHOUT_WRITING]
            settings = {"FUNDAMENT_TIERS": json.dumps(TIERS), "FUNDAMENT_DATA_DIR": str(folder)}
            options = ["serve", "--port", "0", *(["--auth"] if auth else [])]
            return stack.enter_context(Server([sys.executable, *program, *options], env=settings)), key

        servers = {
            "no keys": started("open", auth=False),
            "no keys, usage never written": started("quiet", auth=False, writes=False),
            "keys, limits": started("keys", auth=True),
            "keys, limits, balance": started("paid", auth=True, balance=_MANY),
        }

        def lap(name: str, n_clients: int) -> tuple[Outcome, float]:
            process, key = servers[name]
            for other, _ in servers.values():
                (other.resume if other is process else other.pause)()
            used = process.core_seconds
            outcome = load(
                Target(process.port, EMBEDDINGS, key), bodies, n_clients=n_clients, seconds=seconds, short=True
            )
            return outcome, 1000 * (process.core_seconds - used) / outcome.n

        for name in servers:
            lap(name, 8)
        for n_clients in (8, 64):
            _show(rounds({name: partial(lap, name, n_clients) for name in servers}, n_rounds), n_clients)
        for process, _ in servers.values():
            process.resume()


def _show(found: dict[str, list[tuple[Outcome, float]]], n_clients: int) -> None:
    rates = {name: [outcome.rate for outcome, _ in laps] for name, laps in found.items()}

    def ratio(name: str, other: str) -> float:
        return median(one / two for one, two in zip(rates[name], rates[other], strict=True))

    table(
        f"{n_clients} clients x 1 query, median of {len(rates['no keys'])} rounds",
        ("", "requests/s", "of no keys", "core ms each", "failed"),
        [
            (
                name,
                f"{median(rates[name]):,.0f}",
                f"{ratio(name, 'no keys'):.1%}",
                f"{median(core for _, core in laps):.2f}",
                str(sum(outcome.n_failed for outcome, _ in laps)),
            )
            for name, laps in found.items()
        ],
    )
    verdict("usage written over never written", 100 * ratio("no keys", "no keys, usage never written"), ">=", 98, "%")


def _key_in(folder: Path, balance: int | None) -> str:
    url = locate("", folder)
    migrate.prepare(url)

    async def make() -> str:
        store = Database(url)
        key = await new_key(store, "large", balance)
        await store.close()
        return key

    return asyncio.run(make())


PARTS = {"door": door, "limits": limits, "server": server}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of one lap")
    parser.add_argument("--redis-url", default="", help="of a Redis that may be written to")
    given = parser.parse_args(arguments)
    print(machine())
    for name in given.only:
        more = {"redis_url": given.redis_url} if name == "limits" else {}
        PARTS[name](given.rounds, given.seconds, **more)


if __name__ == "__main__":
    main()
