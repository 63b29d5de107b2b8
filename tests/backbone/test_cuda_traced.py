"""Every family on a GPU that is not there: loaded onto CUDA and run, with the CPU's kernels behind its operators.

What this proves: that every operator finds its tensors on one device, in formats and shapes that go together; that
none is one that CPUs alone have; where the host waits for the device; and that what the code does on a GPU (other
kernels, other bounds, nothing filled up) gives the numbers that it gives on a CPU. What it does not: that a GPU's
kernels compute what they document, within their limits; nor memory, streams and speed. `test_cuda.py` compares numbers
where there is a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from fundament.backbone import attention, causal, checkpoint, linear
from fundament.backbone.attention import Scoring, attend
from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear
from fundament.backbone.omni import OmniEmbedder
from fundament.backbone.packed import pack
from fundament.backbone.picture_writer import PictureWriter
from fundament.catalog import CATALOG, EMBEDDED
from fundament.core import Embed, Generate, Group, Input, Media, Message, Model, Rerank
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import Local, embedded
from fundament.models import families
from tests import checkpoints
from tests.checkpoints import eurobert, jina_v3, llama, omni, qwen, qwen_reranker, qwen_vl, splade, texts
from tests.checkpoints.bge_m3 import bge_m3
from tests.checkpoints.clip import WIDTH, clip, picture, png
from tests.checkpoints.colbert import DIM, colbert_v1, colbert_v2
from tests.checkpoints.cross_encoder import (
    bert_ranker,
    distilbert_ranker,
    jina_bert_ranker,
    llama_ranker,
    roberta_ranker,
    xlm_roberta_ranker,
)
from tests.checkpoints.dense import distilbert
from tests.checkpoints.jina_bert import jina_bert
from tests.checkpoints.jina_vlm import jina_vlm
from tests.checkpoints.mpnet import mpnet
from tests.checkpoints.t5 import t5
from tests.checkpoints.xlm_roberta import xlm_roberta
from tests.conftest import FLOAT32
from tests.media import files
from tests.tracing import CUDA, Gpu, gpu

DTYPES = (torch.float32, torch.bfloat16)
WAYS = {
    "float32": (torch.float32, False),
    "float32, one kernel for all rows": (torch.float32, True),  # GPUs have none, but so its use is seen exactly
    "bfloat16": (torch.bfloat16, False),
}
"""A number format, and whether the kernel for rows of any lengths takes whatever there is."""

VARLEN, FUSED = "torch_attn._varlen_attn.default", "aten.scaled_dot_product_attention.default"

TEXTS = texts([1, 3, 3, 12, 30, 40, 40, 2])  # bundled, alone, and two of one length
PICTURES = [png(picture(56, 56)), png(picture(90, 200))]
SOUNDS = [Media("audio", files.wav(0.3 * np.sin(np.arange(n) / 7), rate=16_000)) for n in (9_000, 21_000)]
VIDEO = Media("video", files.video([30, 60, 90, 120], width=64, height=96, tone=True))


def each(
    *tasks: str | None, inputs: Sequence[Input] = TEXTS, outputs: Sequence[Any] = ("dense",), **fields: Any
) -> list[Embed]:
    """A call of each task and output."""
    return [
        Embed(inputs=inputs, task=task, output=output, truncate=True, **fields) for task in tasks for output in outputs
    ]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model.

    Attributes:
        write: its directory.
        load: the directory, onto a device.
        calls: rows of all of them go through it together, as far as they may.
        n_downloads: how often results leave for the host: once of each kind.
        n_nonzero: how often the host asks how many numbers are not zero.
    """

    write: Callable[[Path], Path]
    load: Callable[[Path, Placement], Model[Any, Any]]
    calls: Sequence[Embed | Rerank]
    n_downloads: int = 1
    n_nonzero: int = 0


def of(family: str, **facts: Any) -> Callable[[Path, Placement], Model[Any, Any]]:
    """How a model of a family is loaded; `facts` are the catalogue's that differ."""
    return lambda directory, placement: checkpoints.load(
        directory, family, dtype=placement.dtype, device=str(placement.device), **facts
    )


def facts_of(model: str, *names: str) -> dict[str, Any]:
    return {name: getattr(CATALOG[model], name) for name in names}


def minilm(_: Path) -> Path:
    local = embedded()
    assert local is not None
    return local.directory


def load_v3(directory: Path, placement: Placement) -> Model[Any, Any]:
    return load_model(Local(jina_v3.spec(), directory), placement)


def written(config: llama.Config, *, adapters: bool = False) -> Callable[[Path], Path]:
    """How a Qwen or EuroBERT is written."""

    def write(directory: Path) -> Path:
        norms_and_biases = config["model_type"] in ("qwen2", "qwen3") or config is qwen.V5_SMALL
        llama.save(directory, config, qwen.weights(config) if norms_and_biases else llama.tensors(config))
        if adapters:
            llama.save_adapters(directory, config)
        return directory

    return write


def load_llama(family: str, **facts: Any) -> Callable[[Path, Placement], Model[Any, Any]]:
    return lambda directory, placement: llama.load(directory, llama.spec(family, **facts), placement)


def load_ranker(family: str, context: int = 8_192) -> Callable[[Path, Placement], Model[Any, Any]]:
    return lambda directory, placement: qwen_reranker.load(directory, family, context=context, placement=placement)


def load_omni(directory: Path, placement: Placement) -> Model[Any, Any]:
    facts = facts_of("jina-embeddings-v5-omni-small", "tasks", "default_task", "modalities", "groups")
    model = of("omni", context=2048, dim=omni.HIDDEN, **facts)(directory, placement)
    assert isinstance(model, OmniEmbedder)
    # Pictures of the published sizes would take longer than they tell.
    model.reader.limits = replace(model.reader.limits, image=(1_024, 20_480), video=(2_048, 81_920))
    return model


def masked(kind: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        splade.splade(directory, kind)
        return directory

    return write


LATE = Embed(inputs=TEXTS[:3], late_chunking="inputs")
SIDES = [*each(None, outputs=("multi",), role="query"), *each(None, outputs=("multi",), role="document")]
PAIRS = [Rerank(query="what the search finds", documents=TEXTS)]
BLOCKS = [Rerank(query="what the search finds", documents=TEXTS * 4)]
SEEN = [Rerank(query=query, documents=[*TEXTS, *PICTURES]) for query in ("what the search finds", PICTURES[0])]
ALL_MEDIA = [*TEXTS[:4], *PICTURES, *SOUNDS, VIDEO, Group(["the search", PICTURES[0], SOUNDS[0]])]
V3, V4, V5 = (list(CATALOG[f"jina-embeddings-{name}"].tasks) for name in ("v3", "v4", "v5-omni-small"))
OMNI = each(V5[0], V5[-1], inputs=ALL_MEDIA)  # of two adapters

PAIR = {"context": 128, "kind": "reranker", "dim": 0}
CLIP = {"dim": WIDTH, "modalities": ("text", "image", "pdf")}
TOKENS = {"context": 128, "dim": DIM, "outputs": ("multi",)}
SPARSE = of("splade", context=splade.POSITIONS - 2, outputs=("sparse",))

KINDS = {
    "bert": Kind(minilm, lambda directory, placement: load_model(Local(EMBEDDED, directory), placement), each(None)),
    "bert, pairs": Kind(bert_ranker, of("bert", **PAIR), PAIRS),
    "jina_bert": Kind(jina_bert, of("jina_bert"), [*each(None), LATE], n_downloads=2),
    "jina_bert, code": Kind(
        lambda directory: jina_bert(directory, mlp="up_gated_layer", qk_norm=True, inner_residual=True),
        of("jina_bert"),
        each(None),
    ),
    "jina_bert, tokens": Kind(colbert_v1, of("jina_bert", **TOKENS), SIDES),
    "jina_bert, pairs": Kind(jina_bert_ranker, of("jina_bert", **PAIR), PAIRS),
    **{
        f"distilbert, {pooling} and a dense layer": Kind(
            partial(distilbert, pooling=pooling), of("distilbert", context=128, dim=24), each(None)
        )
        for pooling in ("mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    },
    "distilbert, pairs": Kind(distilbert_ranker, of("distilbert", **PAIR), PAIRS),
    "eurobert, pairs": Kind(lambda directory: llama_ranker(directory, "eurobert"), of("eurobert", **PAIR), PAIRS),
    "qwen, pairs": Kind(lambda directory: llama_ranker(directory, "qwen3"), of("qwen", **PAIR), PAIRS),
    "xlm_roberta": Kind(xlm_roberta, of("xlm_roberta", context=128), each(None)),
    "xlm_roberta, three outputs": Kind(
        bge_m3,
        of("xlm_roberta", context=128, outputs=("dense", "sparse", "multi")),
        each(None, outputs=("dense", "sparse", "multi")),
        n_downloads=3,
    ),
    "xlm_roberta, tokens": Kind(colbert_v2, of("xlm_roberta", **TOKENS), SIDES),
    "xlm_roberta, pairs": Kind(xlm_roberta_ranker, of("xlm_roberta", **PAIR), PAIRS),
    "xlm_roberta, pairs of bytes": Kind(roberta_ranker, of("xlm_roberta", **PAIR), PAIRS),
    "xlm_roberta, woven adapters": Kind(
        jina_v3.woven, load_v3, [*each(None, *V3), replace(LATE, task=V3[0])], n_downloads=2
    ),
    "xlm_roberta, adapters": Kind(jina_v3.port, load_v3, each(None, *V3)),
    "eurobert, adapters": Kind(
        written(eurobert.V5_NANO, adapters=True), load_llama("eurobert", tasks=llama.TASKS), each(*llama.TASKS)
    ),
    "qwen, 2": Kind(written(qwen.QWEN2), load_llama("qwen"), each(None)),
    "qwen, 3 with a window": Kind(written(qwen.QWEN3 | {"use_sliding_window": True}), load_llama("qwen"), each(None)),
    "qwen, adapters": Kind(
        written(qwen.V5_SMALL, adapters=True), load_llama("qwen", tasks=llama.TASKS), each(*llama.TASKS)
    ),
    "qwen, yes or no": Kind(
        lambda directory: qwen_reranker.write(directory, qwen_reranker.GENERATIVE), load_ranker("qwen"), PAIRS
    ),
    "listwise": Kind(
        lambda directory: qwen_reranker.write(directory, qwen_reranker.LISTWISE, projector=True),
        load_ranker("listwise", context=2_600),  # several blocks, which share a beginning
        BLOCKS,
    ),
    "listwise, windows": Kind(
        lambda directory: qwen_reranker.write(directory, qwen_reranker.HYBRID, projector=True),
        load_ranker("listwise"),
        PAIRS,
    ),
    "mpnet": Kind(mpnet, of("mpnet", context=256), each(None)),
    "t5": Kind(t5, of("t5"), each(None)),
    "t5, gated": Kind(lambda directory: t5(directory, gated=True), of("t5"), each(None)),
    **{
        f"splade, {kind}": Kind(masked(kind), SPARSE, each(None, outputs=("sparse",)), n_downloads=2, n_nonzero=1)
        for kind in ("bert", "distilbert", "roberta")
    },
    "clip, 1": Kind(
        lambda directory: clip(directory, "v1"), of("clip", **CLIP), each(None, inputs=[*TEXTS, *PICTURES])
    ),
    "clip, 2": Kind(
        lambda directory: clip(directory, "v2"), of("clip", **CLIP), each(None, inputs=[*TEXTS, *PICTURES])
    ),
    "qwen_vl, v4": Kind(
        lambda directory: qwen_vl.qwen_vl(directory, "v4"),
        of(
            "qwen_vl",
            dim=qwen_vl.HIDDEN,
            **facts_of("jina-embeddings-v4", "tasks", "default_task", "outputs", "modalities", "late_chunking"),
        ),
        [*each(*V4, inputs=[*TEXTS, *PICTURES], outputs=("dense", "multi")), replace(LATE, task=V4[0])],
    ),
    "qwen_vl, m0": Kind(
        lambda directory: qwen_vl.qwen_vl(directory, "m0"),
        of("qwen_vl", context=1024, kind="reranker", modalities=("text", "image")),
        SEEN,
    ),
    "omni, small": Kind(lambda directory: omni.omni(directory, "small"), load_omni, OMNI),
    "omni, nano": Kind(lambda directory: omni.omni(directory, "nano"), load_omni, OMNI),
}
"""The family's name first. jina_vlm writes, so it has a test of its own."""

ALL_KINDS = KINDS | {
    "jina_vlm": Kind(jina_vlm, of("jina_vlm", context=2048, kind="chat", modalities=("text", "image")), calls=())
}

UNTRACED = {"torchscript"}  # a program, which has its operators inside


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with gpu(monkeypatch) as found:
        yield found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_runs_on_one_device_and_waits_for_it_at_the_end(
    name: str, way: str, there: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, (dtype, any_rows) = KINDS[name], WAYS[way]
    if any_rows:
        monkeypatch.setattr(attention, "has_varlen", lambda q: q.is_cuda)
        monkeypatch.setattr(causal, "has_varlen", lambda q: q.is_cuda)
    directory = kind.write(tmp_path)
    here = kind.load(directory, FLOAT32)
    rounded = kind.load(directory, Placement(torch.device("cpu"), dtype))
    with there.on():
        model = kind.load(directory, Placement(CUDA, dtype))
    asked = [(call, here.prepare(call)) for call in kind.calls]
    rows = [(item, isinstance(call, Embed) and call.output == "sparse") for call, items in asked for item in items]
    found: dict[int, np.ndarray] = {}
    errors: list[tuple[float, float]] = []  # that of a format's rounding, with the GPU's code and with the CPU's
    for mate in dict.fromkeys(item.mate for item, _ in rows):
        together = [(item, sparse) for item, sparse in rows if item.mate == mate]
        items = [item for item, _ in together]
        for _ in range(2 if isinstance(kind.calls[0], Rerank) else 1):  # then the beginnings of prompts are kept
            with there.on() as waits:
                arrays = model.forward(items)
            assert waits.found == +Counter(download=kind.n_downloads, nonzero=kind.n_nonzero)
        expected = zip(here.forward(items), rounded.forward(items), strict=True)
        for array, (exact, near), (item, sparse) in zip(arrays, expected, together, strict=True):
            assert array.dtype == exact.dtype
            if dtype == torch.float32:
                np.testing.assert_allclose(array, exact, rtol=1e-4, atol=1e-4)
            elif sparse:  # how many weights there are is a matter of rounding
                assert len(array) == 2
            else:
                errors.append(tuple(float(np.square(numbers - exact).sum()) for numbers in (array, near)))
            found[id(item)] = array
    for call, items in asked:
        finish(model, call, items, [found[id(item)] for item in items])
    on_gpu, on_cpu = np.sqrt(np.sum(errors, axis=0)) if errors else (0, 0)
    assert on_gpu <= 2 * on_cpu


def test_a_model_that_writes_runs_on_one_device(there: Gpu, tmp_path: Path) -> None:
    load = ALL_KINDS["jina_vlm"].load
    directory = jina_vlm(tmp_path)
    talks = [
        Generate(messages=[Message("user", [*PICTURES, "what"])], temperature=1.0, top_p=0.9, seed=3),
        Generate(messages=[Message("user", [*PICTURES, "what"])], temperature=0.0),
        Generate(messages=[Message("user", ["the search"])], temperature=0.0),
    ]
    here = load(directory, FLOAT32)
    assert isinstance(here, PictureWriter)
    rows = [here.prepare(talk)[0] for talk in talks]
    written = [here.begin(talk, row) for talk, row in zip(talks, rows, strict=True)]
    for _ in range(4):
        here.step(written, [answer.n_ahead for answer in written])
    for dtype in DTYPES:
        with there.on():
            model = load(directory, Placement(CUDA, dtype))
        assert isinstance(model, PictureWriter)
        with there.on() as waits:
            answers = [model.begin(talk, row) for talk, row in zip(talks, rows, strict=True)]
        assert not waits.found
        for n in range(1, 5):
            with there.on() as waits:
                chunks = model.step(answers, [answer.n_ahead for answer in answers])
            assert [chunk is not None and chunk.n_written for chunk in chunks] == [n] * len(talks)
            # Whether all scores are numbers, and the tokens: fake tensors give a list's numbers one by one.
            assert waits.found == {"scalar": 1 + len(talks)}
        if dtype == torch.float32:
            for answer, like in zip(answers, written, strict=True):
                np.testing.assert_array_equal(answer.ids, like.ids)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_model_loads_without_its_numbers(name: str, tmp_path: Path) -> None:
    """As `fundament doctor` loads it."""
    kind = ALL_KINDS[name]
    kind.load(kind.write(tmp_path), Placement(torch.device("meta"), torch.bfloat16))


@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_loaded_model_lies_in_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is written over would change what the model says, or end the process."""
    monkeypatch.setattr(checkpoint, "_SMALL_ELEMENTS", 200)  # else tiny models are copied whole
    monkeypatch.setattr(linear, "onednn_lays_out", lambda dtype: False)  # as on a processor that oneDNN does not know
    kind = ALL_KINDS[name]
    directory = kind.write(tmp_path)
    model = kind.load(directory, FLOAT32)
    assert model.n_bytes
    assert str(directory.resolve()) not in Path("/proc/self/maps").read_text()


def test_every_family_is_traced() -> None:
    assert {name.partition(",")[0] for name in ALL_KINDS} | UNTRACED == set(families())


@pytest.mark.parametrize("name", ["bert", "qwen, adapters", "qwen, yes or no"])
def test_rows_of_all_lengths_go_through_one_kernel(name: str, there: Gpu, tmp_path: Path) -> None:
    kind = KINDS[name]
    directory = kind.write(tmp_path)
    with there.on():
        model = kind.load(directory, Placement(CUDA, torch.bfloat16))
    items = [item for call in kind.calls for item in model.prepare(call)]
    with there.on() as waits:
        model.forward(items)
    n_layers = 6 if name == "bert" else 3
    assert waits.operators[VARLEN] == n_layers
    assert waits.operators[FUSED] == 0


@pytest.mark.parametrize(
    ("head_dim", "capability", "n_calls"),
    [(64, (8, 0), 1), (72, (9, 0), 1), (256, (12, 0), 1), (64, (7, 5), 0), (60, (9, 0), 0), (264, (9, 0), 0)],
)
def test_what_the_kernel_does_not_take_runs_row_by_row(
    head_dim: int, capability: tuple[int, int], n_calls: int, there: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with there.on() as waits:
        packed = pack([np.zeros(n, dtype=np.int64) for n in (3, 20, 70)], CUDA)
        q = torch.empty(93, 4, head_dim, device=CUDA, dtype=torch.float16)
        assert attend(q, q, q, packed, Scoring()).shape == (93, 4 * head_dim)
    assert waits.operators[VARLEN] == n_calls


def test_what_would_fail_on_a_gpu_fails_here(there: Gpu) -> None:
    with there.on() as waits:
        x = torch.zeros(3, 4, device=CUDA, dtype=torch.bfloat16)
        with pytest.raises(FakeTensorDeviceMismatchError):
            x + torch.zeros(3, 4)
        with pytest.raises(AssertionError, match="of one format"):
            F.linear(x, torch.zeros(5, 4, device=CUDA))
        with pytest.raises(RuntimeError, match="must have same reduction dim"):
            F.linear(x, torch.zeros(5, 3, device=CUDA, dtype=x.dtype))
        with pytest.raises(AssertionError, match="the host's memory"):
            x.numpy()
        with pytest.raises(AssertionError, match="a GPU has no mkldnn"):
            Linear(torch.zeros(5, 4))
        assert not waits.found
        assert x.float().cpu().numpy().shape == (3, 4)
        assert x[0, 0].item() == 0
        assert waits.found == {"download": 1, "scalar": 1}
