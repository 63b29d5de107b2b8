"""Rerankers on a language model beside a plain transformers loop on the same random weights, and their memory.

python benchmarks/listwise.py                        speed of both kinds, then memory for 8, 16, 100 and 1,000 documents
python benchmarks/listwise.py --layers 2             the same with fewer layers, where the machine would need hours
python benchmarks/listwise.py --documents 8 16       memory for fewer documents

The model has the shape of Qwen3 with 0.6 B parameters, in bfloat16. The loops read the prompts as the model cards do:
the listwise one in a single row, the one that answers yes or no in batches padded on the left, with the logits of the
last place alone. Activations do not add up over layers, so memory with fewer layers is that of all but for the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import corpus
from contest import machine, n_cores, rounds, table, verdict
from direct import effort, event_loop
from fundament.backbone import generative
from fundament.backbone.decoder import PREFIX_BYTES
from fundament.backbone.device import Placement
from fundament.backbone.lru import LRU
from fundament.catalog import ModelSpec
from fundament.core import Rerank
from fundament.engine.loading import load_model
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.engine.weights import Local
from fundament.models import listwise
from fundament.telemetry import Metrics

DIM = 512
LOOP_BATCH = 8
DOCUMENT_CHARACTERS = 2_000
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", listwise.DOCUMENT_MARK, listwise.QUERY_MARK)
LEAST_RATIO = 1.3
MOST_BYTES = 6 * 1024**3


def random_model(scratch: Path, n_layers: int) -> dict[str, Local]:
    """Both kinds of reranker on one file of random weights, with the embedded model's tokenizer."""
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=131_072,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    first = scratch / "generative"
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(first)
    tokenizer = Tokenizer.from_file(str(corpus.model().directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(first / "tokenizer.json"))
    second = scratch / "listwise"
    second.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        os.link(first / name, second / name)
    told = json.loads((first / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(told | {"architectures": ["JinaForRanking"]}))
    projector = {f"projector.{i}.weight": torch.randn(DIM, n).bfloat16() / n**0.5 for i, n in ((0, 1024), (2, DIM))}
    save_file(projector, second / "projector.safetensors")
    return {name: local(scratch / name) for name in ("generative", "listwise")}


def local(directory: Path) -> Local:
    """The reranker in a directory that `random_model` made."""
    kind = directory.name
    spec = ModelSpec(
        id=kind,
        family="listwise" if kind == "listwise" else "qwen",
        kind="reranker",
        name=kind,
        released=date(2026, 1, 1),
        licence="none",
        context=131_072,
        dim=DIM if kind == "listwise" else 0,
    )
    return Local(spec, directory)


def listwise_loop(directory: Path) -> Callable[[Rerank], list[float]]:
    """The whole prompt through `Qwen3Model`, then the projector."""
    model = Qwen3Model.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    projector = load_file(directory / "projector.safetensors")
    marks = [tokenizer.token_to_id(mark) for mark in (listwise.DOCUMENT_MARK, listwise.QUERY_MARK)]

    def rank(call: Rerank) -> list[float]:
        torch.set_num_threads(n_cores())
        prompt = listwise.prompt(call.query, call.documents)
        ids = torch.tensor(tokenizer.encode(prompt, add_special_tokens=False).ids)
        with torch.inference_mode():
            states = model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            inner = F.relu(F.linear(states, projector["projector.0.weight"]))
            vectors = F.linear(inner, projector["projector.2.weight"]).float()
        return F.cosine_similarity(vectors[ids == marks[0]], vectors[ids == marks[1]]).tolist()

    return rank


def generative_loop(directory: Path) -> Callable[[Rerank], list[float]]:
    """Prompts in batches padded on the left through `Qwen3ForCausalLM`."""
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding(direction="left")
    answers = [tokenizer.token_to_id(word) for word in ("no", "yes")]

    def rank(call: Rerank) -> list[float]:
        torch.set_num_threads(n_cores())
        body = partial(generative.BODY.format, instruction=generative.INSTRUCTION, query=call.query)
        prompts = [f"{generative.HEAD}{body(document=text)}{generative.TAIL}" for text in call.documents]
        found: list[float] = []
        for start in range(0, len(prompts), LOOP_BATCH):
            batch = tokenizer.encode_batch(prompts[start : start + LOOP_BATCH], add_special_tokens=False)
            ids, mask = (torch.tensor([getattr(row, name) for row in batch]) for name in ("ids", "attention_mask"))
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
            found += torch.log_softmax(logits[:, answers].float(), dim=1)[:, 1].exp().tolist()
        return found

    return rank


def compare(name: str, model: Local, call: Rerank, loop: Callable[[Rerank], list[float]], n_rounds: int) -> None:
    """Documents per second of both sides, after a look at whether they say the same."""
    engine = LocalEngine({name: model}, EngineOptions(device="cpu", dtype="bfloat16"), Metrics())
    with event_loop() as runner:

        def ours() -> None:
            # Nothing is left from the call before, as if each had another query.
            reranker = engine.memory.loaded[name].model
            reranker.decoder.prefixes = LRU(PREFIX_BYTES)
            runner.run(engine.run(name, call))

        scores = runner.run(engine.run(name, call)).scores
        apart = max(abs(mine - other) for mine, other in zip(scores, loop(call), strict=True))
        found = rounds({"engine": partial(effort, ours), "loop": partial(effort, partial(loop, call))}, n_rounds)
        runner.run(engine.close())
    rate = {side: len(call.documents) / median(lap.seconds for lap in laps) for side, laps in found.items()}
    table(
        f"{name}: {len(call.documents)} documents, bfloat16, scores at most {apart:.3f} apart, median of {n_rounds}",
        ("", "documents/s"),
        [(side, f"{value:.2f}") for side, value in rate.items()],
    )
    verdict(f"{name}: engine over transformers", rate["engine"] / rate["loop"], ">=", LEAST_RATIO, "x")


def remember(directory: Path, n: int) -> None:
    """Rank once in this process, block by block as the engine does, and print what memory it took at most."""
    model = load_model(local(directory), Placement(torch.device("cpu"), torch.bfloat16))
    model.forward(model.prepare(Rerank(query="a", documents=["b"])))
    draw = Random(5)
    texts = [corpus.text_of(700, draw)[:DOCUMENT_CHARACTERS] for _ in range(n)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    started = time.perf_counter()
    call = Rerank(query=corpus.queries(1)[0], documents=texts)
    items = model.prepare(call)
    ranking = model.finish(call, items, [model.forward([item])[0] for item in items])
    assert len(ranking.scores) == n
    seconds = time.perf_counter() - started
    n_tokens = max(len(item.features["ids"]) for item in items)
    print(json.dumps({"bytes": status("VmHWM") - before, "tokens": n_tokens, "seconds": seconds, "rows": len(items)}))


def status(name: str) -> int:
    """A size of this process, as the kernel tells it, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def memory(directory: Path, sizes: Sequence[int], n_layers: int) -> None:
    """Peak memory beyond the weights, each number of documents in a process of its own."""
    lines, most = [], 0
    for n in sizes:
        command = [sys.executable, __file__, "--remember", str(directory), "--documents", str(n)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        most = max(most, told["bytes"])
        lines.append(
            (
                f"{n:,}",
                f"{told['rows']}",
                f"{told['tokens']:,}",
                f"{told['bytes'] / 1024**2:,.0f}",
                f"{told['seconds']:,.0f}",
            )
        )
    table(
        f"listwise, documents of {DOCUMENT_CHARACTERS:,} characters, {n_layers} layers; activations do not add up",
        ("documents", "blocks", "tokens of the longest", "MiB beyond the weights", "seconds"),
        lines,
    )
    verdict("most memory beyond the weights", most / 1024**3, "<=", MOST_BYTES / 1024**3, " GiB")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--documents", type=int, nargs="*", default=[8, 16, 100, 1000], help="numbers to measure memory of"
    )
    parser.add_argument("--remember", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.layers < 2:
        parser.error("--layers: two at least, because the last one is run for few tokens")
    if asked.remember:
        remember(asked.remember, asked.documents[0])
        return
    print(f"{machine()}, {asked.layers} layers")
    with tempfile.TemporaryDirectory() as scratch:
        models = random_model(Path(scratch), asked.layers)
        draw, query = Random(4), corpus.queries(1)[0]
        if asked.rounds:
            for name, loop, n in (("generative", generative_loop, 20), ("listwise", listwise_loop, 16)):
                call = Rerank(query=query, documents=[corpus.text_of(128, draw) for _ in range(n)])
                compare(name, models[name], call, loop(models[name].directory), asked.rounds)
        memory(models["listwise"].directory, asked.documents, asked.layers)


if __name__ == "__main__":
    main()
