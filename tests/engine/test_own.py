"""Directories of the operator's own: what they are served as, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fundament.catalog import CATALOG
from fundament.core import Embed
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import Local, from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import eurobert, jina_v3, llama, qwen
from tests.checkpoints.clip import clip
from tests.checkpoints.cross_encoder import bert_ranker
from tests.checkpoints.jina_vlm import jina_vlm
from tests.checkpoints.omni import omni
from tests.checkpoints.qwen_vl import qwen_vl
from tests.conftest import FLOAT32
from tests.hub import WIDTH


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_of_ones_own_is_served_by_what_its_config_says(own: Path, tmp_path: Path) -> None:
    local = from_argument(f"mine={own}", tmp_path)
    assert (local.spec.id, local.spec.family, local.spec.dim, local.spec.context) == ("mine", "bert", WIDTH, 512)
    assert local.n_bytes == (own / "model.safetensors").stat().st_size
    model = load_model(local, FLOAT32)
    items = model.prepare(call := Embed(inputs=["a cat"]))
    assert finish(model, call, items, model.forward(items)).vectors.shape == (1, WIDTH)


def test_a_family_that_is_not_known_is_said(own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", model_type="perceiver", architectures=["PerceiverModel"])
    with pytest.raises(CheckpointError, match=r"no known family: .*'perceiver'.*PerceiverModel.*Known are .*bert"):
        from_argument(f"mine={own}", tmp_path)


MEDIA: dict[str, Callable[[Path], Path]] = {
    "jina-clip-v1": lambda directory: clip(directory, "v1"),
    "jina-clip-v2": clip,
    "jina-embeddings-v4": lambda directory: qwen_vl(directory, "v4"),
    "jina-reranker-m0": lambda directory: qwen_vl(directory, "m0"),
    "jina-embeddings-v5-omni-small": lambda directory: omni(directory, "small"),
    "jina-vlm": jina_vlm,
}


@pytest.mark.parametrize("model", MEDIA)
def test_what_reads_more_than_texts_is_served_under_its_models_id_only(model: str, tmp_path: Path) -> None:
    directory = MEDIA[model](tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=rf"--model {model}={directory}\b.*--alias mine=ID"):
        from_argument(f"mine={directory}", tmp_path)
    assert from_argument(f"{model}={directory}", tmp_path) == Local(CATALOG[model], directory)


def v5(directory: Path, config: llama.Config, tensors: dict[str, Tensor]) -> Path:
    llama.save(directory, config, tensors)
    llama.save_adapters(directory, config)
    return directory


WITH_ADAPTERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "woven": ("jina-embeddings-v3", jina_v3.woven),
    "port": ("jina-embeddings-v3", jina_v3.port),
    "small": ("jina-embeddings-v5-text-small", lambda path: v5(path, qwen.V5_SMALL, qwen.weights(qwen.V5_SMALL))),
    "nano": ("jina-embeddings-v5-text-nano", lambda path: v5(path, eurobert.V5_NANO, llama.tensors(eurobert.V5_NANO))),
}


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_what_has_an_adapter_for_each_task_is_served_under_its_models_id_only(name: str, tmp_path: Path) -> None:
    model, write = WITH_ADAPTERS[name]
    directory = write(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=rf"an adapter for each task: .* --model {model}={directory}\. .*--alias"):
        from_argument(f"mine={directory}", tmp_path)
    assert from_argument(f"{model}={directory}", tmp_path) == Local(CATALOG[model], directory)


def test_an_adapter_that_no_model_of_the_family_has_is_refused(own: Path, tmp_path: Path) -> None:
    llama.save_adapter(own, "mine", {"base_model.model.x.lora_A.weight": torch.zeros(4, 2)})
    with pytest.raises(CheckpointError, match="has adapters, and no model of family bert is served with such"):
        from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_said(own: Path, tmp_path: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; is it a model directory"):
        from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model"])
def test_a_vocabulary_of_another_form_has_a_way_out(own: Path, tmp_path: Path, name: str) -> None:
    (own / "tokenizer.json").rename(own / name)
    with pytest.raises(CheckpointError, match=rf"has no tokenizer\.json, and {name} .*\.save_pretrained\('{own}'\)"):
        from_argument(f"mine={own}", tmp_path)


ROUTES = {"query": ["query_0_SparseStaticEmbedding"], "document": ["document_0_MLMTransformer", "1_SpladePooling"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": {"base_model_name_or_path": "x/y"}}, r"has no config\.json: .* for x/y\. Merge"),
        ({"modules.json": [{"type": "st.StaticEmbedding", "path": ""}]}, r"table of vectors \(StaticEmbedding\)"),
        ({"modules.json": [{"type": "st.Transformer", "path": "0_T"}]}, "model is in 0_T: give --model that directory"),
        (
            {"modules.json": [{"type": "st.Router", "path": ""}], "router_config.json": {"structure": ROUTES}},
            'is a Router, and its model is in document_0_MLMTransformer.* write "" for its name',
        ),
        ({"modules.json": [{"type": "st.Router", "path": ""}]}, "a Router of several models, which is not served"),
        ({"modules.json": [{"type": "st.Other", "path": ""}]}, r"has no config\.json; is it a model directory"),
    ],
)
def test_what_is_no_model_with_its_config_is_called_what_it_is(
    tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    for name, told in files.items():
        (tmp_path / name).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=words):
        from_argument(f"mine={tmp_path}", tmp_path)


def test_the_setting_that_makes_a_model_unknown_is_said(own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", position_embedding_type="relative_key")
    with pytest.raises(CheckpointError, match="not served is its position_embedding_type 'relative_key'"):
        from_argument(f"mine={own}", tmp_path)


def test_a_qwen_that_looks_both_ways_is_refused_and_one_without_a_table_reads_on(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    llama.save(own, qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (own / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100_000}))
    assert from_argument(f"mine={own}", tmp_path).spec.context == 100_000
    edit(own / "config.json", is_causal=False)
    with pytest.raises(CheckpointError, match=r"config\.json asks for attention both ways, which is not served"):
        from_argument(f"mine={own}", tmp_path)
    edit(own / "config.json", is_causal=True, architectures=None)
    from_argument(f"mine={own}", tmp_path)


@pytest.mark.parametrize(
    ("file", "said", "words"),
    [
        ("config_sentence_transformers.json", {"prompts": {"query": "people: "}}, "puts prompts before texts"),
        ("tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]}, "leaves out types"),
    ],
)
def test_what_would_change_a_rerankers_scores_is_refused(
    tmp_path: Path, file: str, said: dict[str, Any], words: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    bert_ranker(own)
    told = json.loads((own / file).read_text()) if (own / file).exists() else {}
    (own / file).write_text(json.dumps(told | said))
    with pytest.raises(CheckpointError, match=words):
        from_argument(f"mine={own}", tmp_path)


def test_layers_behind_the_pooling_are_refused(own: Path, tmp_path: Path) -> None:
    kinds = ["models.Transformer", "models.Pooling", "models.Normalize"]
    (own / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.{kind}"} for kind in kinds]))
    from_argument(f"mine={own}", tmp_path)
    (own / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.LSTM"}]))
    for name in ("mine", "all-minilm-l6-v2"):
        with pytest.raises(CheckpointError, match="modules that are not served: LSTM"):
            from_argument(f"{name}={own}", tmp_path)


def test_a_directory_under_a_catalogue_id_is_no_other_model(own: Path, tmp_path: Path) -> None:
    given = f"all-minilm-l6-v2={own}"
    (own / "modules.json").write_text(json.dumps([{"type": "custom_st.Transformer"}]))  # some have
    from_argument(given, tmp_path)
    score = "sentence_transformers.cross_encoder.modules.LogitScore"  # as sentence-transformers saves Qwen3-Reranker
    (own / "modules.json").write_text(json.dumps([{"type": score}]))
    from_argument(f"qwen3-reranker-0.6b={own}", tmp_path)
    (own / "modules.json").unlink()
    lowering = own / "sentence_bert_config.json"
    lowering.write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(CheckpointError, match="do_lower_case, which is not served"):
        from_argument(given, tmp_path)
    lowering.unlink()
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(CheckpointError, match="attention to earlier tokens alone"):
        from_argument(given, tmp_path)
