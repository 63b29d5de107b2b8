"""The embedded model over HTTP, beside the same weights served by infinity; each loaded in turn, the others held still.

    python -m venv infinity
    infinity/bin/pip install 'infinity-emb[server,torch,optimum]' 'click==8.1.7' 'typer==0.12.5'
    python benchmarks/peers.py --infinity infinity/bin/infinity_emb

infinity runs with the settings that measured best for it: batches of 64, bfloat16 where that is faster, no cache
of vectors, tokens of `usage` estimated. `onnx` is its optimum engine on an export of the same weights in float32, made
once with the `optimum-cli` beside it and optimised at its level O2.
"""

import argparse
import base64
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import orjson
import torch

import corpus
import process
from contest import machine, rounds, table
from fundament.backbone.device import speeds
from load import Outcome, Target, load
from process import Server

US = "fundament"
MODEL = corpus.model().spec.id
LEAST_COSINE = 0.999
LEAST_RATIO = 1.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load: clients, each with so many inputs in a request."""

    n_clients: int
    n_inputs: int

    @property
    def name(self) -> str:
        """As the tables say it."""
        return f"{self.n_clients} x {self.n_inputs} {'query' if self.short else 'passages'}"

    @property
    def short(self) -> bool:
        """Whether a request takes milliseconds."""
        return self.n_inputs == 1


CELLS = (Cell(1, 1), Cell(8, 1), Cell(64, 1), Cell(1, 64), Cell(4, 64))


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server and where its embeddings are."""

    server: Server
    path: str

    @property
    def target(self) -> Target:
        """Where requests go."""
        return Target(self.server.port, self.path)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """What it answers, `[texts, dim]`."""
        url = f"http://127.0.0.1:{self.server.port}{self.path}"
        body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        answer = httpx.post(url, json=body, timeout=120, trust_env=False).raise_for_status().json()
        return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]])


def infinity(command: Path, engine: str, scratch: Path) -> Server:
    """A started infinity server: its torch engine, the same compiled, or its optimum engine."""
    options = ["--batch-size", "64", "--device", "cpu", "--no-vector-disk-cache", "--no-lengths-via-tokenize"]
    cwd = corpus.model().directory
    if engine == "onnx":
        cwd = scratch / "onnx"
        if not cwd.exists():
            export(command.with_name("optimum-cli"), cwd)
        # The optimum engine pools as it guesses from the repository's name, which a directory does not have.
        options += ["--engine", "optimum", "--pooling-method", "mean"]
    else:
        dtype = "bfloat16" if speeds().get(torch.bfloat16, 0) > 1 else "float32"
        options += ["--engine", "torch", "--dtype", dtype, "--no-bettertransformer"]
        options += ["--compile" if engine == "compiled" else "--no-compile"]
    port = process.free_port()
    # Its optimum engine finds the ONNX file of a local model only where the path is relative.
    options += ["--model-id", ".", "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(scratch / "hub"), "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    arguments = [str(command), "v2", *options, "--log-level", "warning"]
    return Server(arguments, port=port, cwd=cwd, env=quiet)


def export(command: Path, directory: Path) -> None:
    """Write the embedded model as ONNX.

    Raises:
        SystemExit: the exporter fails.
    """
    arguments = ["--task", "feature-extraction", "--library", "transformers", "--optimize", "O2"]
    done = subprocess.run(
        [str(command), "export", "onnx", "--model", str(corpus.model().directory), *arguments, str(directory)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} did not export the model:\n{done.stderr[-3000:]}")


def agree(contestants: dict[str, Contestant]) -> None:
    """Check that all serve the same model, which also warms them.

    Raises:
        SystemExit: one answers other vectors.
    """
    texts = corpus.texts(64)
    vectors = {name: contestant.vectors(texts) for name, contestant in contestants.items()}
    for name, found in vectors.items():
        scaled = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (found, vectors[US])]
        least = float((scaled[0] * scaled[1]).sum(axis=1).min())
        if least < LEAST_COSINE:
            raise SystemExit(f"{name} answers other vectors: cosine {least:.4f} with {US}")


def race(contestants: dict[str, Contestant], cell: Cell, encoding: str, n_rounds: int, seconds: float) -> None:
    """One cell of the comparison, as a table."""
    texts = corpus.queries(1_000) if cell.short else corpus.texts(16 * cell.n_inputs)
    inputs = [texts[start : start + cell.n_inputs] for start in range(0, len(texts), cell.n_inputs)]
    made = [orjson.dumps({"model": MODEL, "input": some, "encoding_format": encoding}) for some in inputs]

    # A long request's rate is known from few of them, and where they are answered in bunches from fewer still.
    lasting = seconds if cell.short else 3 * seconds

    def turn(contestant: Contestant) -> Outcome:
        contestant.server.resume()
        try:
            return load(contestant.target, made, n_clients=cell.n_clients, seconds=lasting, short=cell.short)
        finally:
            contestant.server.pause()

    turns: dict[str, Callable[[], Outcome]] = {name: partial(turn, one) for name, one in contestants.items()}
    found = rounds(turns, n_rounds)
    rate = {name: median(lap.rate for lap in laps) for name, laps in found.items()}
    p99 = {name: median(lap.p99 for lap in laps) for name, laps in found.items()}
    table(
        f"{cell.name}, {encoding}, median of {n_rounds} rounds",
        ("", "requests/s", "p50 ms", "p99 ms", "failed", "generator's core"),
        [
            (
                name,
                f"{rate[name]:,.2f}" if rate[name] < 10 else f"{rate[name]:,.0f}",
                f"{1000 * median(lap.p50 for lap in laps):,.1f}",
                f"{1000 * p99[name]:,.1f}",
                f"{sum(lap.n_failed for lap in laps)}",
                f"{max(lap.share for lap in laps):.1%}",
            )
            for name, laps in found.items()
        ],
    )
    others = [name for name in contestants if name != US]
    if others:
        best, quickest = max(rate[name] for name in others), min(p99[name] for name in others)
        met = rate[US] >= LEAST_RATIO * best and p99[US] <= quickest
        print(
            f"{US} over the best: {rate[US] / best:.2f}x requests/s, target >= {LEAST_RATIO}x; "
            f"{p99[US] / quickest:.2f}x p99, target <= 1x: {'met' if met else 'MISSED'}"
        )


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infinity", type=Path, help="path of the infinity_emb command in its own environment")
    parser.add_argument("--engines", nargs="+", choices=("torch", "compiled", "onnx"), default=["torch", "onnx"])
    parser.add_argument("--encoding", choices=("base64", "float"), default="base64")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=3, help="of each contestant in each round; three times that with passages"
    )
    asked = parser.parse_args()
    print(machine())
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contestants = {US: Contestant(stack.enter_context(process.fundament()), "/v1/embeddings")}
        for engine in asked.engines if asked.infinity else ():
            # Made absolute without following links: a virtual environment's Python is one.
            server = infinity(asked.infinity.absolute(), engine, scratch)
            contestants[f"infinity {engine}"] = Contestant(stack.enter_context(server), "/embeddings")
        agree(contestants)
        for contestant in contestants.values():
            contestant.server.pause()
        for cell in CELLS:
            race(contestants, cell, asked.encoding, asked.rounds, asked.seconds)


if __name__ == "__main__":
    main()
