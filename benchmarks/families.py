"""Larger families beside sentence-transformers on the same random weights and in the same number format.

python benchmarks/families.py                   Qwen3 of 0.6 B parameters, EuroBERT of 0.2 B
python benchmarks/families.py --texts 64        longer

On a GPU (`--device cuda`) the share of the card's measured matrix rate is printed beside.
"""

import argparse
import asyncio
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from shutil import copy
from statistics import median

import torch
from sentence_transformers import SentenceTransformer
from transformers import EuroBertConfig, EuroBertModel, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3Model

import corpus
from contest import machine, matrix_rate, n_cores, rounds, table, verdict
from direct import effort
from fundament.core import Embed
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.engine.weights import from_argument
from fundament.telemetry import Metrics

SHAPES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen3 0.6B": (
        Qwen3Model,
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151_936,
            max_position_embeddings=32_768,
        ),
    ),
    "eurobert 0.2B": (
        EuroBertModel,
        EuroBertConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            vocab_size=128_256,
            max_position_embeddings=8_192,
            rope_theta=1_000_000.0,
        ),
    ),
}


def random_model(scratch: Path, name: str) -> Path:
    """A directory that both sides read: random weights, the embedded model's tokenizer, last-token pooling."""
    kind, config = SHAPES[name]
    directory = scratch / name.replace(" ", "-")
    torch.manual_seed(0)
    kind(config).to(torch.bfloat16).save_pretrained(directory)
    copy(corpus.model().directory / "tokenizer.json", directory)
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True},
    }
    (directory / "1_Pooling").mkdir()
    for file, value in files.items():
        (directory / file).write_text(json.dumps(value))
    return directory


def compare(name: str, scratch: Path, texts: list[str], n_rounds: int, device: str) -> None:
    """Tokens per second of both sides."""
    directory = random_model(scratch, name)
    local = from_argument(f"{name}={directory}", scratch)
    engine = LocalEngine({name: local}, EngineOptions(device=device, dtype="bfloat16"), Metrics())
    reference = SentenceTransformer(str(directory), device=device, model_kwargs={"dtype": torch.bfloat16})

    def ours(runner: asyncio.Runner) -> None:
        runner.run(engine.run(name, Embed(inputs=texts)))

    def theirs() -> None:
        torch.set_num_threads(n_cores())
        reference.encode(texts, show_progress_bar=False)

    with asyncio.Runner() as runner:
        contestants = {"engine": partial(ours, runner), "sentence-transformers": theirs}
        for work in contestants.values():
            work()
        found = rounds({side: partial(effort, work) for side, work in contestants.items()}, n_rounds)
        runner.run(engine.close())
    n_tokens = sum(map(corpus.count, texts))
    rate = {side: n_tokens / median(lap.seconds for lap in laps) for side, laps in found.items()}
    table(
        f"{name} of random weights, bfloat16, {device}, {len(texts)} texts, {n_tokens:,} tokens, median of {n_rounds}",
        ("", "tokens/s"),
        [(side, f"{value:,.0f}") for side, value in rate.items()],
    )
    if device != "cpu":
        weights = sum(parameter.numel() for parameter in reference[0].parameters())
        embedding = SHAPES[name][1].vocab_size * SHAPES[name][1].hidden_size
        share = 2 * (weights - embedding) * rate["engine"] / matrix_rate(torch.device(device), torch.bfloat16)
        print(f"share of the card's measured matrix rate: {share:.1%}")
    target = 1.3 if device == "cpu" else 2.0
    verdict(
        f"{name}: engine over sentence-transformers", rate["engine"] / rate["sentence-transformers"], ">=", target, "x"
    )


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32, help="how many texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        for name in SHAPES:
            compare(name, Path(scratch), corpus.texts(asked.texts), asked.rounds, asked.device)


if __name__ == "__main__":
    main()
