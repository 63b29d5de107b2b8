"""Rows that ask for adapters beside the same rows on weights with an adapter merged into them.

python benchmarks/adapters.py                  all layers
python benchmarks/adapters.py --layers 4       quicker; a layer costs the same wherever it is

One thread, in time on its core. *one* is 64 rows that all ask for one adapter, *mixed* is the same rows with the
model's adapters in turn, as when callers with different tasks meet in a batch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from time import thread_time

import numpy as np
import torch

import corpus
from contest import machine, rounds, table, verdict
from fundament.backbone.linear import LowRank
from fundament.backbone.packed import BASE, Packed, pack
from fundament.backbone.transformer import Adapter, Shape, Transformer, adaptable, parameters

N_ROWS = 64
MOST_RATIO = 1.15

SHAPES = {  # name → shape, rank and number of adapters, as published
    "jina-embeddings-v3": (
        Shape(
            vocab=1000,
            hidden=1024,
            intermediate=4096,
            n_layers=24,
            n_heads=16,
            n_kv_heads=16,
            head_dim=64,
            norm_eps=1e-5,
            positions="rotary",
            n_types=1,
            embedding_norm=True,
        ),
        4,
        5,
    ),
    "jina-embeddings-v5-text-nano": (
        Shape(
            vocab=1000,
            hidden=768,
            intermediate=3072,
            n_layers=12,
            n_heads=12,
            n_kv_heads=12,
            head_dim=64,
            norm="rms",
            norm_eps=1e-5,
            pre_norm=True,
            positions="rotary",
            qkv_bias=False,
            out_bias=False,
            gated=True,
            activation="silu",
            up_bias=False,
            down_bias=False,
        ),
        32,
        4,
    ),
}


def weights(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights that keep the scale of what they multiply."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(size, generator=draw) / size[-1] ** 0.5).to(dtype)
        for name, size in parameters(shape).items()
    }


def adapter(shape: Shape, rank: int, dtype: torch.dtype) -> Adapter:
    """Random terms of every linear layer; queries, keys and values have one each."""
    terms = {}
    for name, (n_out, n_in) in adaptable(shape).items():
        if not name.startswith("layers."):
            continue
        outs = shape.qkv_widths if name.endswith("qkv") else (n_out,)
        down = torch.randn(len(outs) * rank, n_in) / n_in**0.5
        terms[name] = LowRank(down.to(dtype), tuple(torch.randn(out, rank).to(dtype) / rank for out in outs))
    return terms


def seconds(model: Transformer, packed: Packed) -> float:
    """One forward pass, in seconds on its core."""
    started = thread_time()
    model(replace(packed, kept={}))
    return thread_time() - started


def batch(lengths: Sequence[int], adapters: Sequence[int]) -> Packed:
    """Rows of these lengths in the order in which an embedder lays them."""
    order = sorted(range(len(lengths)), key=lambda place: (adapters[place], lengths[place]))
    rows = [np.arange(lengths[place]) % 1000 for place in order]
    return pack(rows, torch.device("cpu"), [adapters[place] for place in order])


def compare(name: str, n_layers: int, n_rounds: int, dtype: torch.dtype) -> None:
    """Print a model's three times."""
    shape, rank, n_adapters = SHAPES[name]
    shape = replace(shape, n_layers=n_layers or shape.n_layers)
    adapters = [adapter(shape, rank, dtype) for _ in range(n_adapters)]
    merged = Transformer(shape, weights(shape, dtype))
    apart = Transformer(shape, weights(shape, dtype), adapters)
    lengths = [corpus.count(text) for text in corpus.texts(N_ROWS)]
    contestants = {
        "merged": (merged, batch(lengths, [BASE] * N_ROWS)),
        "one": (apart, batch(lengths, [0] * N_ROWS)),
        "mixed": (apart, batch(lengths, [place % n_adapters for place in range(N_ROWS)])),
    }
    for model, packed in contestants.values():
        seconds(model, packed)
    found = rounds({each: partial(seconds, *parts) for each, parts in contestants.items()}, n_rounds)
    took = {each: median(laps) for each, laps in found.items()}
    table(
        f"{name}, {shape.n_layers} layers, random weights, {str(dtype).removeprefix('torch.')}, {N_ROWS} rows, "
        f"{sum(lengths):,} tokens, median of {n_rounds}",
        ("", "ms", "x merged"),
        [(each, f"{1e3 * value:,.1f}", f"{value / took['merged']:.3f}") for each, value in took.items()],
    )
    for each in ("one", "mixed"):
        verdict(f"{name}, {each}", took[each] / took["merged"], "<=", MOST_RATIO, "x")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in SHAPES:
        compare(name, asked.layers, asked.rounds, getattr(torch, asked.dtype))


if __name__ == "__main__":
    main()
