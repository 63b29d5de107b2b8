"""Qwen2, Qwen3 and jina-embeddings-v5-text-small against transformers' own classes in float32."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.packed import pack
from fundament.catalog import CATALOG, Task
from fundament.core import Embed
from fundament.engine.loading import load_model
from fundament.engine.weights import Local, from_argument
from fundament.errors import CheckpointError, InputError
from fundament.models import families, family
from tests.checkpoints import assert_same_alone, llama, qwen
from tests.conftest import BFLOAT16, FLOAT32

TEXTS = ["the other", "x", "", "in the inner city", "naïve 東京 🙂", "the " * 70, "in", "in the inner citY"]
ASKED = [(text, task) for text in TEXTS[:5] for task in (*llama.TASKS, None) if text or task]
WINDOWS = {"use_sliding_window": True}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("config", [qwen.QWEN2, qwen.QWEN3], ids=["qwen2", "qwen3"])
def test_equals_the_reference(tmp_path: Path, config: llama.Config, prefix: str, ends: bool) -> None:
    weights = qwen.weights(config)
    model = llama.load(llama.save(tmp_path, config, weights, ends=ends, prefix=prefix), llama.spec("qwen"))
    asked = [(text, None) for text in TEXTS if text or ends]
    found = llama.vectors(model, asked)
    assert_same(found, llama.reference(qwen.network(config, weights), llama.rows(model, asked)))


@pytest.mark.parametrize(
    "changes",
    [
        WINDOWS,
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"] * 3},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
    ],
    ids=["windows", "layer types", "no windows", "rope parameters", "own heads", "one head for all"],
)
@pytest.mark.parametrize("config", [qwen.QWEN2, qwen.QWEN3], ids=["qwen2", "qwen3"])
def test_config_is_read(tmp_path: Path, config: llama.Config, changes: llama.Config) -> None:
    config = {key: value for key, value in (config | changes).items() if value is not None}
    weights = qwen.weights(config)
    model = llama.load(llama.save(tmp_path, config, weights), llama.spec("qwen"))
    asked = [(text, None) for text in TEXTS]
    assert_same(llama.vectors(model, asked), llama.reference(qwen.network(config, weights), llama.rows(model, asked)))


def test_windows_and_theta_show_in_the_result(tmp_path: Path) -> None:
    """What the tests above vary changes the vectors, so that they could fail."""
    asked = [(TEXTS[3], None)]
    weights = qwen.weights(qwen.QWEN3)
    plain = llama.vectors(llama.load(llama.save(tmp_path / "a", qwen.QWEN3, weights), llama.spec("qwen")), asked)
    for name, changes in {"b": WINDOWS, "c": {"rope_theta": 5000.0}}.items():
        directory = llama.save(tmp_path / name, qwen.QWEN3 | changes, weights)
        other = llama.vectors(llama.load(directory, llama.spec("qwen")), asked)
        assert (plain - other).abs().max() > 1e-2


def test_a_language_models_head_is_not_needed(tmp_path: Path) -> None:
    weights = qwen.weights(qwen.QWEN3)
    named = {f"model.{name}": weight for name, weight in weights.items()}
    head = {"lm_head.weight": weights["embed_tokens.weight"].clone()}
    model = llama.load(llama.save(tmp_path, qwen.QWEN3, named | head), llama.spec("qwen"))
    bare = llama.load(llama.save(tmp_path / "bare", qwen.QWEN3, weights), llama.spec("qwen"))
    asked = [(text, None) for text in TEXTS]
    assert torch.equal(llama.vectors(model, asked), llama.vectors(bare, asked))


def test_a_later_token_does_not_change_earlier_states(tmp_path: Path) -> None:
    model = llama.load(llama.save(tmp_path, qwen.QWEN3, qwen.weights(qwen.QWEN3)), llama.spec("qwen"))
    row = np.arange(12)
    changed = row.copy()
    changed[7] = 99
    states, others = (model.transformer(pack([ids], torch.device("cpu"))) for ids in (row, changed))
    assert_same(states[:7], others[:7])
    assert ((states[7:] - others[7:]).abs().amax(dim=1) > 1e-3).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = llama.save(tmp_path_factory.mktemp("small"), qwen.V5_SMALL, qwen.weights(qwen.V5_SMALL))
    llama.save_adapters(directory, qwen.V5_SMALL, alpha=6)
    return directory


@pytest.fixture(scope="module")
def v5(small: Path) -> TextEmbedder:
    return llama.load(small, llama.spec("qwen", tasks=llama.TASKS))


def test_each_task_equals_peft_on_the_same_directory(small: Path, v5: TextEmbedder) -> None:
    network = llama.adapted(qwen.network(qwen.V5_SMALL, qwen.weights(qwen.V5_SMALL)), small)
    expected = llama.task_reference(network, llama.rows(v5, ASKED), [task for _, task in ASKED])
    assert_same(llama.vectors(v5, ASKED), expected)


@pytest.mark.parametrize("name", llama.ADAPTERS)
def test_weights_with_an_adapter_merged_are_the_model_with_that_task(
    v5: TextEmbedder, tmp_path: Path, name: str
) -> None:
    """As the repositories of single tasks are published."""
    terms = llama.adapter(qwen.V5_SMALL, rank=4, seed=llama.ADAPTERS.index(name) + 1)
    directory = llama.save(tmp_path, qwen.V5_SMALL, llama.merged(qwen.weights(qwen.V5_SMALL), terms, scale=1.5))
    tasks = {task: Task(its.prompt) for task, its in llama.TASKS.items() if its.adapter == name}
    alone = llama.load(directory, llama.spec("qwen", tasks=tasks))
    asked = [(text, task) for text in TEXTS for task in tasks]
    assert_same(llama.vectors(alone, asked), llama.vectors(v5, asked))


def test_adapters_show_in_the_result(v5: TextEmbedder) -> None:
    found = llama.vectors(v5, [("the other", task) for task in llama.TASKS])
    assert (torch.pdist(found) > 1e-1).all()


@settings(deadline=None, max_examples=25)
@given(asked=st.lists(llama.asked(llama.TASKS), min_size=2, max_size=11))
def test_a_row_alone_equals_the_row_in_any_company(v5: TextEmbedder, asked: list[tuple[str, str | None]]) -> None:
    assert_same_alone(partial(llama.vectors, v5), asked)


CODE = CATALOG["jina-code-embeddings-0.5b"].tasks  # long prompts, no adapters, on Qwen2


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> TextEmbedder:
    directory = llama.save(tmp_path_factory.mktemp("code"), qwen.QWEN2, qwen.weights(qwen.QWEN2), ends=False)
    return llama.load(directory, llama.spec("qwen", tasks=CODE, context=256))


@settings(deadline=None, max_examples=25)
@given(asked=st.lists(llama.asked(CODE).filter(any), min_size=2, max_size=11))
def test_a_row_of_code_alone_equals_the_row_in_any_company(
    code: TextEmbedder, asked: list[tuple[str, str | None]]
) -> None:
    assert_same_alone(partial(llama.vectors, code), asked)


def test_bfloat16_is_close_with_every_task(small: Path, v5: TextEmbedder) -> None:
    rounded = llama.load(small, llama.spec("qwen", tasks=llama.TASKS), BFLOAT16)
    cosines = torch.cosine_similarity(llama.vectors(v5, ASKED), llama.vectors(rounded, ASKED))
    assert cosines.min() > 0.995


def test_a_prompt_comes_before_the_text_and_usage_counts_the_text(v5: TextEmbedder) -> None:
    (plain,), (prompted,) = (v5.prepare(Embed(inputs=["the other"], task=task)) for task in (None, "retrieval.query"))
    assert plain.n_counted == plain.n_tokens
    joined = v5.prepare(Embed(inputs=["Query: the other"]))[0]
    assert prompted.n_tokens == joined.n_tokens > plain.n_tokens
    assert prompted.n_counted == joined.n_tokens - len(["Q", "u", "er", "y", ":"])  # the space goes with the word
    assert np.array_equal(prompted.features["ids"], joined.features["ids"])


def test_a_task_of_another_model_is_refused(v5: TextEmbedder) -> None:
    with pytest.raises(InputError, match=r"takes 'retrieval\.query', .* here, not 'separation'\.") as caught:
        v5.prepare(Embed(inputs=["a"], task="separation"))
    assert caught.value.faults[0].field == "body -> task"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (qwen.QWEN2, "qwen"),
        (qwen.QWEN3, "qwen"),
        (qwen.V5_SMALL, "qwen"),
        (qwen.V5_SMALL | {"is_decoder": True}, "qwen"),
        (qwen.QWEN3 | {"architectures": ["JinaForRanking"]}, "listwise"),
        (qwen.QWEN3 | {"model_type": "qwen2_vl"}, None),
    ],
)
def test_config_is_recognised_by_one_family(config: llama.Config, expected: str | None) -> None:
    assert [name for name in families() if family(name).recognises(config)] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, "one rope_theta, and says none"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "one rope_theta, and says"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1000000.0}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "of type 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 1000000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types should name"),
        ({"layer_types": ["full_attention"]}, "layer_types should name"),
        ({"layer_types": ["sliding_attention"] * 3}, "give no size"),
        ({"hidden_act": "laplace"}, "hidden_act 'laplace' is not served"),
        ({"head_dim": 8}, "shape"),
    ],
)
def test_config_that_is_not_served_is_refused(tmp_path: Path, changes: llama.Config, message: str) -> None:
    directory = llama.save(tmp_path, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (directory / "config.json").write_text(json.dumps(qwen.QWEN3 | changes))
    with pytest.raises(CheckpointError, match=message):
        llama.load(directory, llama.spec("qwen"))


def test_tensors_missing_and_unknown_are_listed(tmp_path: Path) -> None:
    directory = llama.save(tmp_path, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    changes = {"layers.1.self_attn.q_norm.weight": None, "layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    llama.resave(directory / "model.safetensors", **changes)
    with pytest.raises(CheckpointError) as caught:
        llama.load(directory, llama.spec("qwen"))
    assert "layers.1" in caught.value.detail
    assert "q_norm" in caught.value.detail
    assert "layers.0.self_attn.q_proj.bias" in caught.value.detail


def test_another_pooling_of_a_published_model_is_refused(tmp_path: Path) -> None:
    published = replace(llama.spec("qwen"), repo="owner/name")
    directory = llama.save(tmp_path, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (directory / "1_Pooling").mkdir()
    for mode, message in (("pooling_mode_lasttoken", None), ("pooling_mode_mean_tokens", "should pool the last token")):
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
        if message is None:
            assert llama.load(directory, published).pooling == "last"
            continue
        with pytest.raises(CheckpointError, match=message):
            llama.load(directory, published)


def test_a_directory_of_ones_own_pools_as_it_says(tmp_path: Path) -> None:
    directory = llama.save(tmp_path, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    assert llama.load(directory, replace(llama.spec("qwen"), repo="")).pooling == "mean"
    with pytest.raises(CheckpointError, match="should pool the last token"):
        llama.load(directory, llama.spec("qwen"))


@pytest.mark.parametrize("config", [qwen.QWEN2, qwen.QWEN3], ids=["qwen2", "qwen3"])
def test_one_of_ones_own_says_that_it_makes_vectors(tmp_path: Path, config: llama.Config) -> None:
    """Qwen3-Reranker has the same files but for the pooling's: as an embedding model it would rank at random."""
    directory = llama.save(tmp_path / "own", config, qwen.weights(config))
    local = from_argument(f"mine={directory}", tmp_path)
    ways = rf'"pooling_mode": "lasttoken".*--model qwen3-reranker-0\.6b={directory} or .*qwen3-reranker-4b='
    with pytest.raises(CheckpointError, match=ways):
        load_model(local, FLOAT32)
    known = from_argument(f"qwen3-embedding-0.6b={directory}", tmp_path)
    load_model(Local(replace(known.spec, dim=32, context=64), directory), FLOAT32)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert isinstance(model := load_model(local, FLOAT32), TextEmbedder)
    assert model.pooling == "last"


def test_memory_is_counted_with_adapters(small: Path, v5: TextEmbedder) -> None:
    assert v5.n_bytes == sum(
        tensor.nbytes for path in small.rglob("*.safetensors") for tensor in load_file(path).values()
    )
