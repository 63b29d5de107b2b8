"""What HTTP costs: the server beside the engine that it serves, in one process each, loaded in turns.

    python benchmarks/server.py
    python benchmarks/server.py --only rate crowd --rounds 5 --seconds 15

rate    4 clients x 64 passages: the share of the engine's own rate that is left, in base64 and in float
crowd   64 clients x 1 query beside one client: what gathering rows brings
added   one query on an idle server beside a call of the engine
gap     how long the event loop stands still while a body of 5 MB is read and tokenized
start   from exec to the first answer, and the memory held
both    a small and a large model of one process, each alone and both at once
"""

import argparse
import asyncio
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median

import orjson

import corpus
import process
from contest import machine, quantile, rounds, table, verdict
from direct import DirectEngine
from engine import random_bert
from load import Client, Outcome, Target, load, request_of, steady_rate
from process import Server

EMBEDDINGS = "/v1/embeddings"
N_PASSAGES = 64
LARGE = "768x12"


def bodies(inputs: Sequence[Sequence[str]], encoding: str) -> list[bytes]:
    """One request body for each list of texts."""
    model = corpus.model().spec.id
    return [orjson.dumps({"model": model, "input": texts, "embedding_type": encoding}) for texts in inputs]


def passages(n: int) -> list[list[str]]:
    """`n` lists of 64 passages."""
    texts = corpus.texts(n * N_PASSAGES)
    return [texts[start : start + N_PASSAGES] for start in range(0, len(texts), N_PASSAGES)]


def query_bodies(n: int) -> list[bytes]:
    """`n` bodies with one query each."""
    return bodies([[query] for query in corpus.queries(n)], "base64")


def rate(n_rounds: int, seconds: float) -> None:
    """Passages per second of the engine, and of the server in both encodings."""
    n_clients, lists = 4, passages(16)
    engine = DirectEngine()
    with process.fundament() as server:
        target = Target(server.port, EMBEDDINGS)

        def over_http(encoding: str) -> Outcome:
            made = bodies(lists, encoding)
            return load(target, made, n_clients=n_clients, seconds=seconds, short=False)

        def in_process() -> float:
            return engine.runner.run(_in_turn(engine, lists, n_clients, seconds))

        for _ in range(2):
            engine.embed(lists[0])
            load(target, bodies(lists, "base64"), n_clients=1, seconds=0, short=False)
        laps: dict[str, Callable[[], float | Outcome]] = {
            "engine, in process": in_process,
            "server, base64": partial(over_http, "base64"),
            "server, float": partial(over_http, "float"),
        }
        found = rounds(laps, n_rounds)
    engine.close()
    per_second = {
        name: N_PASSAGES * median(lap.rate if isinstance(lap, Outcome) else lap for lap in laps)
        for name, laps in found.items()
    }
    base = per_second["engine, in process"]
    table(
        f"{n_clients} clients x {N_PASSAGES} passages of 10 to 256 tokens, median of {n_rounds} rounds",
        ("", "passages/s", "of the engine's", "generator's core"),
        [(name, f"{per_second[name]:,.0f}", f"{per_second[name] / base:.0%}", _share(found[name])) for name in found],
    )
    verdict("server with base64 over the engine", 100 * per_second["server, base64"] / base, ">=", 90, "%")
    verdict("server with float over the engine", 100 * per_second["server, float"] / base, ">=", 75, "%")


async def _in_turn(engine: DirectEngine, lists: Sequence[Sequence[str]], n_clients: int, seconds: float) -> float:
    calls: Iterator[Sequence[str]] = cycle(lists)
    completed: list[float] = []
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - started < seconds or len(completed) < 4 * n_clients:
            await engine.run(next(calls))
            completed.append(time.perf_counter())

    await asyncio.gather(*(client() for _ in range(n_clients)))
    # Once the first client has stopped, fewer are under way: what the others still finish does not count.
    return steady_rate(completed[: len(completed) - n_clients + 1], n_clients)


def _share(laps: Sequence[float | Outcome]) -> str:
    shares = [lap.share for lap in laps if isinstance(lap, Outcome)]
    return f"{max(shares):.1%}" if shares else ""


def crowd(n_rounds: int, seconds: float) -> None:
    """Requests per second of one client, 8, 16 and 64, each with one short query at a time."""
    made = query_bodies(1_000)
    with process.fundament() as server:
        target = Target(server.port, EMBEDDINGS)
        load(target, made, n_clients=8, seconds=1, short=False)

        def lap(n_clients: int) -> tuple[Outcome, float]:
            used = server.core_seconds
            outcome = load(target, made, n_clients=n_clients, seconds=seconds, short=True)
            return outcome, (server.core_seconds - used) / outcome.n

        measured = rounds({str(n): partial(lap, n) for n in (1, 8, 16, 64)}, n_rounds)
    found = {n: [outcome for outcome, _ in laps] for n, laps in measured.items()}
    per_second = {n: median(lap.rate for lap in laps) for n, laps in found.items()}
    table(
        f"Clients x 1 query, base64, median of {n_rounds} rounds",
        ("clients", "requests/s", "x one", "p50 ms", "p99 ms", "core ms each", "failed", "generator's core"),
        [
            (
                n,
                f"{per_second[n]:,.0f}",
                f"{per_second[n] / per_second['1']:.2f}",
                f"{1000 * median(lap.p50 for lap in laps):.1f}",
                f"{1000 * median(lap.p99 for lap in laps):.1f}",
                f"{1000 * median(used for _, used in measured[n]):.2f}",
                f"{sum(lap.n_failed for lap in laps)}",
                _share(laps),
            )
            for n, laps in found.items()
        ],
    )
    verdict("64 clients over one request at a time", per_second["64"] / per_second["1"], ">=", 3, "x")


def added(n_rounds: int, seconds: float) -> None:
    """Milliseconds of one query over HTTP and by calling the engine, each after a pause."""
    queries = corpus.queries(200)
    made = bodies([[query] for query in queries], "base64")
    engine = DirectEngine()
    n = max(20, int(seconds / 0.02))
    with process.fundament() as server:
        client = Client(server.port)
        requests = [request_of(Target(server.port, EMBEDDINGS), body) for body in made]

        def over_http() -> list[float]:
            return [_after_a_pause(partial(client.ask, requests[i % len(requests)])) for i in range(n)]

        async def calls() -> list[float]:
            waits = []
            for i in range(n):
                await asyncio.sleep(0.01)
                started = time.perf_counter()
                await engine.run([queries[i % len(queries)]])
                waits.append(time.perf_counter() - started)
            return waits

        def in_process() -> list[float]:
            return engine.runner.run(calls())

        over_http()
        in_process()
        found = rounds({"engine, in process": in_process, "server": over_http}, n_rounds)
        client.close()
    engine.close()
    halves = {name: median(median(lap) for lap in laps) for name, laps in found.items()}
    table(
        f"One query at a time, 10 ms apart, {n} in each of {n_rounds} rounds",
        ("", "p50 ms", "p99 ms"),
        [
            (name, f"{1000 * halves[name]:.2f}", f"{1000 * quantile([w for lap in laps for w in lap], 0.99):.2f}")
            for name, laps in found.items()
        ],
    )
    verdict("added by HTTP, p50", 1000 * (halves["server"] - halves["engine, in process"]), "<", 2, " ms")


def _after_a_pause(ask: Callable[[], float]) -> float:
    time.sleep(0.01)
    return ask()


def gap(n_rounds: int, seconds: float) -> None:
    """The longest time that the event loop stands still, seen from inside and from outside."""
    model, some = corpus.model().spec.id, corpus.texts(500)
    shuffled = Random(4)
    many: list[str] = []
    while sum(map(len, many)) < 5_000_000:
        many += shuffled.sample(some, len(some))
    kinds: dict[str, object] = {
        "no body (the noise of this machine)": None,
        f"{len(many):,} passages": {"model": model, "input": many},
        "one text": {"model": model, "input": " ".join(many), "truncate": True},
    }
    with Server([sys.executable, str(Path(__file__).with_name("heartbeat.py"))]) as server:
        target = Target(server.port, EMBEDDINGS)
        warm = Client(server.port)
        warm.ask(request_of(target, query_bodies(1)[0]))
        warm.close()
        _probe(target, None, 0.1)  # the first `/live` of a server takes longer than all others

        def lap(value: object) -> Gap:
            began = time.perf_counter()
            outside = _probe(target, None if value is None else orjson.dumps(value), seconds)
            ended = time.perf_counter()
            time.sleep(0.5)
            noted = [tuple(map(float, line)) for line in re.findall(r"gap (\S+) (\S+) (\S+)", server.log)]
            within = [(ms, waited) for at, ms, waited in noted if began <= at <= ended]
            longest, own = max(within, default=(0.0, 0.0)), max((ms - waited for ms, waited in within), default=0.0)
            return Gap(longest[0], own, outside)

        found = rounds({kind: partial(lap, value) for kind, value in kinds.items()}, n_rounds)
    table(
        f"5 MB bodies, the client leaves after {seconds:g} s, longest of {n_rounds} rounds (median)",
        ("", "loop's gap ms", "had a core ms", "GET /live ms"),
        [
            (kind, *(_worst([getattr(lap, name) for lap in laps]) for name in ("inside", "own", "outside")))
            for kind, laps in found.items()
        ],
    )
    longest = max(lap.inside for kind, laps in found.items() if kinds[kind] for lap in laps)
    verdict("event loop's longest gap", longest, "<", 50, " ms")


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest gaps of one body, in milliseconds.

    Attributes:
        inside: of the event loop, by its own clock.
        own: the same less the time for which the machine had no core for it.
        outside: until `GET /live` is answered.
    """

    inside: float
    own: float
    outside: float


def _worst(values: Sequence[float]) -> str:
    return f"{max(values):.1f} ({median(values):.1f})"


def _probe(target: Target, body: bytes | None, seconds: float) -> float:
    """The slowest of many `GET /live` while the body is sent and worked on, in milliseconds."""
    live = f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n\r\n".encode()
    prober, sender = Client(target.port), Client(target.port)
    sending = None
    if body is not None:
        sending = threading.Thread(target=sender.send, args=(request_of(target, body),))
        sending.start()
    slowest, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        slowest = max(slowest, prober.ask(live))
        time.sleep(0.001)
    if sending is not None:
        sending.join()
    sender.close()
    prober.close()
    return 1000 * slowest


def start(n_rounds: int, _: float) -> None:
    """Seconds from exec to the first answered embedding, and the memory held then."""
    lines = []
    for _round in range(n_rounds):
        with process.fundament() as server:
            listening = time.perf_counter() - server.started
            client = Client(server.port)
            client.ask(request_of(Target(server.port, EMBEDDINGS), query_bodies(1)[0]))
            answered = time.perf_counter() - server.started
            client.close()
            if client.status != 200:
                raise SystemExit(f"the first request was answered with {client.status}")
            lines.append((listening, answered, server.core_seconds, server.resident_bytes / 1e6))
    listening, answered, used, held = (median(column) for column in zip(*lines, strict=True))
    table(
        f"Start, median of {n_rounds}",
        ("", "listens s", "first answer s", "core seconds", "resident MB"),
        [("fundament serve", f"{listening:.2f}", f"{answered:.2f}", f"{used:.2f}", f"{held:.0f}")],
    )
    verdict("first answer", answered, "<", 4, " s")


def both(n_rounds: int, seconds: float) -> None:
    """Requests per second of two models of one process: the other one idle, and both loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        random_bert(Path(scratch), LARGE)
        options = ("--model", corpus.model().spec.id, "--model", f"large={Path(scratch) / LARGE}")
        with process.fundament(*options) as server:
            target = Target(server.port, EMBEDDINGS)
            kinds = {
                "small, a query": (query_bodies(1_000), True),
                "small, 64 passages": (bodies(passages(16), "base64"), False),
                "large, 16 passages": ([_of_large(texts[:16]) for texts in passages(4)], False),
            }

            def lap(*names: str) -> list[Outcome]:
                with ThreadPoolExecutor() as threads:
                    working = [
                        threads.submit(load, target, made, n_clients=1, seconds=seconds, short=short)
                        for made, short in map(kinds.__getitem__, names)
                    ]
                    return [work.result() for work in working]

            query, small, large = kinds
            together = [(query,), (small,), (large,), (query, large), (small, large)]
            laps = {" and ".join(names): partial(lap, *names) for names in together}
            for one in laps.values():
                one()
            found = rounds(laps, n_rounds)
    table(
        f"one client each, a BERT of {LARGE} and random weights as the large model, median of {n_rounds} rounds",
        ("loaded", "of it", "requests/s", "p50 ms", "p99 ms"),
        [
            (
                loaded,
                name,
                f"{median(lap[place].rate for lap in found[loaded]):,.2f}",
                f"{1000 * median(lap[place].p50 for lap in found[loaded]):,.1f}",
                f"{1000 * median(lap[place].p99 for lap in found[loaded]):,.1f}",
            )
            for loaded, names in zip(found, together, strict=True)
            for place, name in enumerate(names)
        ],
    )


def _of_large(texts: Sequence[str]) -> bytes:
    return orjson.dumps({"model": "large", "input": texts, "embedding_type": "base64"})


PARTS = {
    "rate": (rate, 6.0),
    "crowd": (crowd, 4.0),
    "added": (added, 3.0),
    "gap": (gap, 3.0),
    "start": (start, 0.0),
    "both": (both, 4.0),
}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of each contestant in each round")
    asked = parser.parse_args()
    print(machine())
    for name in asked.only:
        part, seconds = PARTS[name]
        part(asked.rounds, asked.seconds or seconds)


if __name__ == "__main__":
    main()
