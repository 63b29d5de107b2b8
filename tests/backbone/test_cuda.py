"""The same numbers on a GPU as on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fundament.backbone.attention import Scoring, attend
from fundament.backbone.device import Placement
from fundament.backbone.packed import pack
from fundament.core import Embed, Model, Rerank
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import embedded
from tests.checkpoints import jina_bert, llama, load, qwen, qwen_reranker, texts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [3, 20, 20, 70, 300]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention(kv_heads: int, causal: bool, window: int | None) -> None:
    window = window if causal else None
    rows = [np.zeros(length, dtype=np.int64) for length in LENGTHS]
    on_cpu, on_gpu = pack(rows, CPU), pack(rows, CUDA)
    q, k, v = (torch.randn(len(on_cpu.ids), heads, 64) for heads in (4, kv_heads, kv_heads))
    scoring = Scoring(causal=causal, window=window)
    expected = attend(q, k, v, on_cpu, scoring)[: on_cpu.n_tokens]
    there = [part[: on_gpu.n_tokens].to(CUDA, torch.bfloat16) for part in (q, k, v)]
    found = attend(there[0], there[1], there[2], on_gpu, scoring)
    torch.testing.assert_close(found.float().cpu(), expected, atol=0.03, rtol=0.03)


def model_of(name: str, directory: Path, placement: Placement) -> Model[Any, Any]:
    match name:
        case "bert":
            return load_model(embedded(), placement)
        case "jina_bert":
            where = jina_bert.jina_bert(directory)
            return load(where, "jina_bert", dtype=placement.dtype, device=placement.device.type)
        case _:
            where = llama.save(directory, qwen.QWEN3, qwen.weights(qwen.QWEN3))
            return llama.load(where, llama.spec("qwen", context=512), placement)


@pytest.mark.parametrize("name", ["bert", "jina_bert", "qwen"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.99)])
def test_vectors(tmp_path: Path, name: str, dtype: torch.dtype, least: float) -> None:
    call = Embed(inputs=texts([3, 40, 1, 17, 40]))
    vectors = []
    for placement in (Placement(CPU, torch.float32), Placement(CUDA, dtype)):
        model = model_of(name, tmp_path, placement)
        items = model.prepare(call)
        vectors.append(torch.from_numpy(finish(model, call, items, model.forward(items)).vectors))
    assert F.cosine_similarity(*vectors).min() > least


@pytest.mark.parametrize("config", [qwen_reranker.LISTWISE, qwen_reranker.HYBRID], ids=["all", "windows"])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_scores_of_rows_that_share_a_beginning(
    tmp_path: Path, config: llama.Config, dtype: torch.dtype, off: float
) -> None:
    directory = qwen_reranker.write(tmp_path, config, projector=True)
    call = Rerank(query="what the search finds", documents=texts([3, 40, 1, 17, 90] * 6))
    context = 2_600  # several blocks, which share a beginning
    on_cpu, on_gpu = (
        qwen_reranker.load(directory, "listwise", context=context, placement=placement)
        for placement in (Placement(CPU, torch.float32), Placement(CUDA, dtype))
    )
    expected = qwen_reranker.rank(on_cpu, call).scores
    for _ in range(2):  # the second time its keys are kept
        np.testing.assert_allclose(qwen_reranker.rank(on_gpu, call).scores, expected, atol=off)
