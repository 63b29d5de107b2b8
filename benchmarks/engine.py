"""The engine beside sentence-transformers; batches side by side beside one over all cores; batches large and small.

python benchmarks/engine.py                             tokens per second, a short run
python benchmarks/engine.py --texts 2000 --rounds 5     the same, as the targets are stated
python benchmarks/engine.py --threads                   how many batches should run side by side, by model size
python benchmarks/engine.py --budget                    what max_batch_tokens costs and brings
"""

import argparse
import asyncio
import tempfile
from functools import partial
from pathlib import Path
from random import Random
from shutil import copy
from statistics import median

import torch
from transformers import BertConfig, BertModel

import corpus
from contest import formats, machine, n_cores, quantile, rounds, table, verdict
from direct import DirectEngine, Reference, batcher_of, effort, event_loop, through
from fundament.backbone.device import place
from fundament.core import Embed, Item, Model, Priority
from fundament.engine.batcher import Batcher
from fundament.engine.loading import load_model
from fundament.engine.local import threads_of
from fundament.engine.weights import Local, from_argument

BUDGETS = (256, 512, 1_024, 2_048, 4_096, 8_192)


def throughput(texts: list[str], n_rounds: int) -> None:
    """Tokens per second of the engine and of sentence-transformers, one call with all texts each."""
    engines = {f"engine {dtype}": DirectEngine(dtype) for dtype in formats()}
    kept = [dtype for dtype in formats() if dtype != "float16"]  # which the other computes in, too
    peers = {f"sentence-transformers {dtype}": Reference(getattr(torch, dtype)) for dtype in kept}
    contestants = {**engines, **peers}
    for contestant in contestants.values():
        contestant.embed(texts[:64])
    n_tokens = sum(map(corpus.count, texts))
    found = rounds({name: partial(effort, partial(one.embed, texts)) for name, one in contestants.items()}, n_rounds)
    rate = {name: n_tokens / median(lap.seconds for lap in laps) for name, laps in found.items()}
    # Per second of a core, which other work on the machine disturbs less than the clock.
    thrift = {name: n_tokens / median(lap.core_seconds for lap in laps) for name, laps in found.items()}
    base = rate["sentence-transformers float32"]
    table(
        f"{len(texts):,} texts, {n_tokens:,} tokens, median of {n_rounds} rounds",
        ("", "tokens/s", "best", "x st float32", "tokens/core s", "x st float32"),
        [
            (
                name,
                f"{rate[name]:,.0f}",
                f"{n_tokens / min(lap.seconds for lap in laps):,.0f}",
                f"{rate[name] / base:.2f}",
                f"{thrift[name]:,.0f}",
                f"{thrift[name] / thrift['sentence-transformers float32']:.2f}",
            )
            for name, laps in found.items()
        ],
    )
    for dtype in formats():
        over, target = rate[f"engine {dtype}"] / base, 2.6 if dtype == "bfloat16" else 1.6
        verdict(f"engine {dtype} over sentence-transformers float32", over, ">=", target, "x")
    for engine in engines.values():
        engine.close()


def side_by_side(texts: list[str], n_rounds: int, shapes: list[str]) -> None:
    """One batch over all cores, or several with fewer cores each, on models of growing size."""
    placement = place("cpu", "auto")
    counts = [n for n in (1, 2, 4, 8, 16) if n <= n_cores()]
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for local in [corpus.model(), *(random_bert(Path(scratch), shape) for shape in shapes)]:
            model = load_model(local, placement)
            lines += _counts_of(local.spec.id, model, texts, n_rounds, counts)
            del model
    table(
        f"Batches side by side, {placement.dtype_name}, {len(texts):,} texts, median of {n_rounds} rounds",
        ("model", "weights MB", "side by side", "chosen", "tokens/s", "x one", "64 passages ms", "lone query ms"),
        lines,
    )


def _counts_of(name: str, model: Model, texts: list[str], n_rounds: int, counts: list[int]) -> list[tuple[str, ...]]:
    bulk, query = _items(model, texts), _items(model, corpus.queries(1))
    batchers = {str(n): batcher_of(model, n_threads=n) for n in counts}
    with event_loop() as loop:

        def lap(batcher: Batcher) -> tuple[float, float, float]:
            seconds = loop.run(through(batcher, bulk))[1]
            passages = median(loop.run(through(batcher, bulk[:64]))[1] for _ in range(3))
            return seconds, passages, median(loop.run(through(batcher, query))[1] for _ in range(20))

        for batcher in batchers.values():
            loop.run(through(batcher, bulk[:32]))
        found = rounds({n: partial(lap, batcher) for n, batcher in batchers.items()}, n_rounds)
    for batcher in batchers.values():
        batcher.close()
    n_tokens = sum(item.n_tokens for item in bulk)
    rate = {n: n_tokens / median(lap[0] for lap in laps) for n, laps in found.items()}
    chosen = str(threads_of(model.n_bytes, n_cores()))
    return [
        (
            name,
            f"{model.n_bytes / 1e6:.0f}",
            n,
            "yes" if n == chosen else "",
            f"{rate[n]:,.0f}",
            f"{rate[n] / rate['1']:.2f}",
            f"{1000 * median(lap[1] for lap in laps):.0f}",
            f"{1000 * median(lap[2] for lap in laps):.1f}",
        )
        for n, laps in found.items()
    ]


def budgets(texts: list[str], n_rounds: int) -> None:
    """Throughput, and how long a lone query waits while others keep the model busy, by tokens of a batch."""
    model = load_model(corpus.model(), place("cpu", "auto"))
    bulk, query = _items(model, texts), _items(model, corpus.queries(1))
    n_threads = threads_of(model.n_bytes, n_cores())
    batchers = {f"{n:,}": batcher_of(model, n_threads=n_threads, max_batch_tokens=n) for n in BUDGETS}
    with event_loop() as loop:

        def lap(batcher: Batcher) -> tuple[float, list[float], list[float]]:
            seconds = loop.run(through(batcher, bulk))[1]
            return seconds, loop.run(behind(batcher, bulk, query)), loop.run(beside(batcher, bulk, query))

        for batcher in batchers.values():
            loop.run(through(batcher, bulk[:32]))
        found = rounds({name: partial(lap, batcher) for name, batcher in batchers.items()}, n_rounds)
    for batcher in batchers.values():
        batcher.close()
    n_tokens = sum(item.n_tokens for item in bulk)
    lines = []
    for name, laps in found.items():
        waits = [[1000 * wait for lap in laps for wait in lap[place]] for place in (1, 2)]
        cells = [f"{quantile(wait, share):.0f}" for wait in waits for share in (0.5, 0.95)]
        lines.append((name, f"{n_tokens / median(lap[0] for lap in laps):,.0f}", *cells))
    table(
        f"Tokens of a batch, {n_threads} side by side, {len(texts):,} texts, median of {n_rounds} rounds\n"
        "A query's milliseconds behind a background call with all texts, and beside 4 callers x 64 passages",
        ("max_batch_tokens", "tokens/s", "behind p50", "p95", "beside p50", "p95"),
        lines,
    )


async def behind(batcher: Batcher, bulk: list[Item], query: list[Item]) -> list[float]:
    """Seconds of each of many interactive queries, one every 20 ms, while a background call is under way."""
    running = asyncio.ensure_future(through(batcher, bulk, Priority.BACKGROUND))
    waits = []
    while not running.done():
        await asyncio.sleep(0.02)
        waits.append((await through(batcher, query))[1])
    await running
    return waits


async def beside(batcher: Batcher, bulk: list[Item], query: list[Item], n_queries: int = 10) -> list[float]:
    """The same while four interactive callers with 64 rows each come again and again."""

    async def caller(number: int) -> None:
        start = 64 * number
        while True:
            await through(batcher, (bulk + bulk)[start % len(bulk) :][:64])
            start += 256

    callers = [asyncio.ensure_future(caller(number)) for number in range(4)]
    waits = []
    for _ in range(n_queries):
        await asyncio.sleep(0.02)
        waits.append((await through(batcher, query))[1])
    for running in callers:
        running.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await through(batcher, query)  # the rows that the callers left behind are done with
    return waits


def random_bert(scratch: Path, shape: str) -> Local:
    """A BERT of random weights: `768x12` is hidden size times layers, the size of BERT base."""
    hidden, n_layers = map(int, shape.split("x"))
    directory = scratch / shape
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    BertModel(config, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(directory)
    copy(corpus.model().directory / "tokenizer.json", directory)
    return from_argument(f"bert {shape}={directory}", scratch)


def _items(model: Model, texts: list[str]) -> list[Item]:
    items = model.prepare(Embed(inputs=texts))
    Random(3).shuffle(items)
    return items


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, help="how many texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", action="store_true", help="compare batches side by side")
    parser.add_argument(
        "--shapes", nargs="*", default=["768x12"], help="with --threads: random models, hidden size x layers"
    )
    parser.add_argument("--budget", action="store_true", help="compare sizes of batches")
    asked = parser.parse_args()
    print(machine())
    if asked.threads:
        side_by_side(corpus.texts(max(64, asked.texts or 128)), asked.rounds, asked.shapes)
    elif asked.budget:
        budgets(corpus.texts(asked.texts or 400), asked.rounds)
    else:
        throughput(corpus.texts(asked.texts or 400), asked.rounds)


if __name__ == "__main__":
    main()
