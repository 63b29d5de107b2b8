"""One query and many documents through a cross-encoder, beside sentence-transformers' CrossEncoder on the same files.

python benchmarks/rerank.py                             100 documents of about 128 tokens
python benchmarks/rerank.py --documents 1000 --rounds 3

The model has the shape of the small MS MARCO cross-encoders and random weights.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from shutil import copy
from statistics import median

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification

import corpus
from contest import formats, machine, n_cores, rounds, table, verdict
from direct import effort, event_loop
from fundament.backbone.device import Dtype
from fundament.core import Rerank
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.engine.weights import Local, from_argument
from fundament.telemetry import Metrics

PEER = "sentence-transformers float32"
TARGETS: dict[Dtype, float] = {"bfloat16": 2.2, "float16": 1.5, "float32": 1.5}  # times the peer
SPREAD = 16  # tokens by which documents are longer or shorter than the mean
LARGEST_ERROR = 0.02


class Ranker:
    """The engine with the cross-encoder, called from ordinary code."""

    def __init__(self, local: Local, dtype: Dtype) -> None:
        self.model = local.spec.id
        self.engine = LocalEngine({self.model: local}, EngineOptions(dtype=dtype), Metrics())
        self.runner = event_loop()
        self.runner.run(self.engine.load(self.model))

    def rank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Probabilities, `[documents]`."""
        return self.runner.run(self.engine.run(self.model, Rerank(query=query, documents=documents))).scores

    def close(self) -> None:
        """End its threads."""
        self.runner.run(self.engine.close())
        self.runner.close()


class Peer:
    """sentence-transformers with the same weights, on all cores, with its own defaults."""

    def __init__(self, directory: Path) -> None:
        self.model = CrossEncoder(str(directory), device="cpu")

    def rank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Probabilities, `[documents]`."""
        # PyTorch counts threads per calling thread, and one that never asked takes over what the engine's threads set.
        torch.set_num_threads(n_cores())
        return self.model.predict([(query, document) for document in documents], show_progress_bar=False)


def random_cross_encoder(directory: Path) -> Path:
    """A directory that both sides read."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1_536,
        max_position_embeddings=512,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.1)  # so that scores differ
    model.save_pretrained(directory)
    copy(corpus.model().directory / "tokenizer.json", directory)
    told = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    return directory


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="of a document, on the mean")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    print(machine())
    random = Random(3)
    lengths = [random.randint(asked.tokens - SPREAD, asked.tokens + SPREAD) for _ in range(asked.documents)]
    [query], documents = corpus.queries(1), [corpus.text_of(length, random) for length in lengths]
    with tempfile.TemporaryDirectory() as scratch:
        directory = random_cross_encoder(Path(scratch))
        local = from_argument(f"cross-encoder={directory}", directory)
        engines: dict[str, Ranker] = {f"engine {dtype}": Ranker(local, dtype) for dtype in formats()}
        contestants: dict[str, Ranker | Peer] = {**engines, PEER: Peer(directory)}
        scores = {name: contestant.rank(query, documents) for name, contestant in contestants.items()}
        turns: dict[str, Callable[[], object]] = {
            name: partial(effort, partial(one.rank, query, documents)) for name, one in contestants.items()
        }
        found = rounds(turns, asked.rounds)
        for engine in engines.values():
            engine.close()
    seconds = {name: median(lap.seconds for lap in laps) for name, laps in found.items()}
    errors = {name: float(np.abs(some - scores[PEER]).max()) for name, some in scores.items()}
    table(
        f"1 query, {asked.documents:,} documents of about {asked.tokens} tokens, median of {asked.rounds} rounds",
        ("", "ms", "documents/s", f"x {PEER}", "largest error"),
        [
            (
                name,
                f"{1000 * taken:,.0f}",
                f"{asked.documents / taken:,.0f}",
                f"{seconds[PEER] / taken:.2f}",
                f"{errors[name]:.1e}",
            )
            for name, taken in seconds.items()
        ],
    )
    for dtype in formats():
        verdict(f"engine {dtype} over {PEER}", seconds[PEER] / seconds[f"engine {dtype}"], ">=", TARGETS[dtype], "x")
    verdict("largest difference of a score", max(errors.values()), "<=", LARGEST_ERROR)


if __name__ == "__main__":
    main()
