"""EuroBERT and jina-embeddings-v5-text-nano against transformers' own class in float32."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.packed import pack
from fundament.errors import CheckpointError
from fundament.models import families, family
from tests.checkpoints import assert_same_alone, eurobert, llama

TEXTS = ["the other", "x", "", "in the inner city", "naïve 東京 🙂", "the " * 70, "in", "in the inner citY"]
ASKED = [(text, task) for text in TEXTS[:5] for task in (*llama.TASKS, None)]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def save(directory: Path, config: llama.Config, **how: object) -> Path:
    """With a pooling, which EuroBERT proper has no usual one of."""
    llama.save(directory, config, llama.tensors(config), **how)
    if config["model_type"] == "eurobert":
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return directory


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("config", [eurobert.EUROBERT, eurobert.EUROBERT | {"num_key_value_heads": 4}])
def test_equals_the_reference(tmp_path: Path, config: llama.Config, prefix: str, ends: bool) -> None:
    model = llama.load(save(tmp_path, config, ends=ends, prefix=prefix), llama.spec("eurobert"))
    asked = [(text, None) for text in TEXTS if text or ends]
    network = eurobert.network(config, llama.tensors(config))
    assert_same(llama.vectors(model, asked), llama.reference(network, llama.rows(model, asked)))


def test_a_masked_language_models_head_is_not_needed(tmp_path: Path) -> None:
    config = eurobert.EUROBERT
    directory = save(tmp_path, config, prefix="model.")
    plain = llama.vectors(llama.load(directory, llama.spec("eurobert")), [("the other", None)])
    llama.resave(directory / "model.safetensors", **{"lm_head.weight": torch.ones(llama.VOCAB, 32)})
    assert torch.equal(plain, llama.vectors(llama.load(directory, llama.spec("eurobert")), [("the other", None)]))


def test_every_token_sees_every_other(tmp_path: Path) -> None:
    model = llama.load(save(tmp_path, eurobert.EUROBERT), llama.spec("eurobert"))
    row = np.arange(12)
    changed = row.copy()
    changed[7] = 99
    states, others = (model.transformer(pack([ids], torch.device("cpu"))) for ids in (row, changed))
    assert ((states - others).abs().amax(dim=1) > 1e-3).all()


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tmp_path_factory.mktemp("nano"), eurobert.V5_NANO)
    llama.save_adapters(directory, eurobert.V5_NANO)
    return directory


@pytest.fixture(scope="module")
def v5(nano: Path) -> TextEmbedder:
    return llama.load(nano, llama.spec("eurobert", tasks=llama.TASKS))


def test_each_task_equals_peft_on_the_same_directory(nano: Path, v5: TextEmbedder) -> None:
    network = llama.adapted(eurobert.network(eurobert.V5_NANO, llama.tensors(eurobert.V5_NANO)), nano)
    expected = llama.task_reference(network, llama.rows(v5, ASKED), [task for _, task in ASKED])
    assert_same(llama.vectors(v5, ASKED), expected)


@settings(deadline=None, max_examples=25)
@given(asked=st.lists(llama.asked(llama.TASKS), min_size=2, max_size=11))
def test_a_row_alone_equals_the_row_in_any_company(v5: TextEmbedder, asked: list[tuple[str, str | None]]) -> None:
    assert_same_alone(partial(llama.vectors, v5), asked)


@pytest.mark.parametrize("config", [eurobert.EUROBERT, eurobert.V5_NANO])
def test_config_is_recognised_by_one_family(config: llama.Config) -> None:
    assert [name for name in families() if family(name).recognises(config)] == ["eurobert"]


def test_rope_theta_has_no_default(tmp_path: Path) -> None:
    directory = save(tmp_path, eurobert.EUROBERT)
    config = {key: value for key, value in eurobert.EUROBERT.items() if key != "rope_theta"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="should say one rope_theta, and says none"):
        llama.load(directory, llama.spec("eurobert"))


def test_biases_are_not_known(tmp_path: Path) -> None:
    directory = save(tmp_path, eurobert.EUROBERT)
    llama.resave(directory / "model.safetensors", **{"layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"not known to the model: layers\.0\.self_attn\.q_proj\.bias"):
        llama.load(directory, llama.spec("eurobert"))


def test_eurobert_proper_must_say_its_pooling(tmp_path: Path) -> None:
    directory = llama.save(tmp_path, eurobert.EUROBERT, llama.tensors(eurobert.EUROBERT))
    with pytest.raises(CheckpointError, match=r"has no 1_Pooling/config\.json"):
        llama.load(directory, llama.spec("eurobert"))
