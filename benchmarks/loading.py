"""How long does a model of 0.6 B parameters take to load from a warm disk, and how much memory at its peak?

python benchmarks/loading.py                 jina-embeddings-v5-text-small's layout, and bge-m3's
python benchmarks/loading.py --layers 2      small, to see that the program works

Random checkpoints are written into a temporary directory (4 GB) and each is loaded by a process of its own. The peak is
the kernel's count of resident pages (VmHWM) less what the process held before, over the size of the loaded weights.
Pages of a mapped file count: a container's limit counts them too. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shutil import copy
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import corpus
from contest import formats, machine, table, verdict
from fundament.backbone.device import Placement
from fundament.catalog import CATALOG
from fundament.engine.loading import load_model
from fundament.engine.weights import Local

ADAPTERS = ("retrieval", "text-matching", "clustering", "classification")
RANK = 32


def random(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one million different numbers, over and over: what they are does not matter here."""
    numbers = torch.randn(2**20).mul_(0.02).to(dtype)

    def one(shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        return numbers.repeat(-(-size // len(numbers)))[:size].reshape(shape).clone()

    return {name: one(shape) for name, shape in shapes.items()}


def qwen3(directory: Path, n_layers: int) -> None:
    """jina-embeddings-v5-text-small's layout: Qwen3 in bfloat16 in safetensors, and four adapters beside it."""
    hidden, inner, heads, kv, head_dim, vocab = 1024, 3072, 16, 8, 128, 151_936
    config = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "model_type": "jina_embeddings_v5",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 3_500_000.0,
        "vocab_size": vocab,
    }
    projections = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv * head_dim, hidden),
        "self_attn.v_proj": (kv * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {
        "self_attn.q_norm": head_dim,
        "self_attn.k_norm": head_dim,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
    terms: dict[str, tuple[int, ...]] = {}
    for i in range(n_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"layers.{i}.{name}.weight": (size,) for name, size in norms.items()}
        for name, (n_out, n_in) in projections.items():
            stem = f"base_model.model.layers.{i}.{name}"
            terms |= {f"{stem}.lora_A.weight": (RANK, n_in), f"{stem}.lora_B.weight": (n_out, RANK)}
    write(directory, config)
    save_file(random(shapes, torch.bfloat16), directory / "model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings["target_modules"] = [name.rpartition(".")[2] for name in projections]
    for adapter in ADAPTERS:
        folder = directory / "adapters" / adapter
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file(random(terms, torch.bfloat16), folder / "adapter_model.safetensors")


def bge_m3(directory: Path, n_layers: int) -> None:
    """bge-m3's layout: XLM-RoBERTa in float32 in PyTorch's own format, and two heads beside it."""
    hidden, inner, vocab, n_positions = 1024, 4096, 250_002, 8194
    config = {
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        "pad_token_id": 1,
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": n_positions,
        "num_attention_heads": 16,
        "num_hidden_layers": n_layers,
        "type_vocab_size": 1,
        "vocab_size": vocab,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.position_embeddings.weight": (n_positions, hidden),
        "embeddings.token_type_embeddings.weight": (1, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (hidden, hidden)}
    linear |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    for i in range(n_layers):
        for name, shape in linear.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{kind}": (hidden,) for kind in ("weight", "bias")}
    write(directory, config)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    torch.save(random(shapes, torch.float32), directory / "pytorch_model.bin")
    for name, n_out in (("sparse_linear.pt", 1), ("colbert_linear.pt", hidden)):
        torch.save(random({"weight": (n_out, hidden), "bias": (n_out,)}, torch.float32), directory / name)


CHECKPOINTS = {"jina-embeddings-v5-text-small": (qwen3, 28), "bge-m3": (bge_m3, 24)}


def write(directory: Path, config: Mapping[str, Any]) -> None:
    """What is not weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    copy(corpus.model().directory / "tokenizer.json", directory)


def kernel_bytes(name: str) -> int:
    """A line of the process's own status, as `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def load(model: str, directory: Path, dtype: str) -> None:
    """Load once, in this process; print what it took."""
    for path in directory.rglob("*.*"):  # the disk is warm
        if path.is_file():
            with path.open("rb") as file:
                for _ in iter(partial(file.read, 2**24), b""):
                    pass
    torch.ones(8, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)  # the libraries are there
    before = kernel_bytes("VmRSS")
    started = time.perf_counter()
    loaded = load_model(Local(CATALOG[model], directory), Placement(torch.device("cpu"), getattr(torch, dtype)))
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, loaded.n_bytes, kernel_bytes("VmHWM") - before]))


def measure(model: str, directory: Path, dtype: str) -> tuple[float, int, int]:
    """Seconds, bytes of the weights, bytes at the peak, of a process of its own."""
    options = ["--load", model, str(directory), dtype]
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    seconds, n_bytes, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, n_bytes, peak


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="in place of a model's own number")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        model, directory, dtype = asked.load
        load(model, Path(directory), dtype)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        for model, (make, n_layers) in CHECKPOINTS.items():
            directory = Path(scratch) / model
            make(directory, asked.layers or n_layers)
            found = {dtype: [measure(model, directory, dtype) for _ in range(asked.rounds)] for dtype in formats()}
            table(
                f"{model}'s layout, random weights, warm disk, median of {asked.rounds}",
                ("", "seconds", "weights", "peak"),
                [
                    (
                        dtype,
                        f"{median(lap[0] for lap in laps):.2f}",
                        f"{laps[0][1] / 1e9:.2f} GB",
                        f"{peak(laps):.2f} GB",
                    )
                    for dtype, laps in found.items()
                ],
            )
            for dtype, laps in found.items():
                verdict(f"{model}, {dtype}: seconds", median(lap[0] for lap in laps), "<=", 3, "s")
                verdict(f"{model}, {dtype}: peak over weights", peak(laps) * 1e9 / laps[0][1], "<=", 1.3, "x")


def peak(laps: list[tuple[float, int, int]]) -> float:
    """The highest peak of all rounds, in GB."""
    return max(lap[2] for lap in laps) / 1e9


if __name__ == "__main__":
    main()
