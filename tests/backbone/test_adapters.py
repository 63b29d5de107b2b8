"""Adapters on disk: what is read, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from fundament.catalog import Task
from fundament.core import Embed
from fundament.errors import CheckpointError, InputError
from tests.checkpoints import eurobert, llama

CONFIG = eurobert.V5_NANO
SPEC = llama.spec("eurobert", tasks=llama.TASKS)
LORA = "base_model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    llama.save(tmp_path, CONFIG, llama.tensors(CONFIG))
    llama.save_adapters(tmp_path, CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["embed_tokens"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2]]},
    ],
)
def test_only_plain_lora_is_served(directory: Path, settings: llama.Config) -> None:
    llama.save_adapter(directory, "clustering", llama.adapter(CONFIG, rank=4, seed=3), **settings)
    with pytest.raises(CheckpointError, match=f"only plain LoRA is served, not {{'{next(iter(settings))}'"):
        llama.load(directory, SPEC)


def test_targets_must_be_named(directory: Path) -> None:
    llama.save_adapter(directory, "clustering", llama.adapter(CONFIG, rank=4, seed=3), target_modules="all-linear")
    with pytest.raises(CheckpointError, match="target_modules should be a list"):
        llama.load(directory, SPEC)


def test_adapter_tensors_missing_and_unknown_are_listed(directory: Path) -> None:
    path = directory / "adapters" / "clustering" / "adapter_model.safetensors"
    extra = "base_model.model.layers.0.self_attn.q_norm.lora_A.weight"
    llama.resave(path, **{LORA: None, extra: torch.zeros(4, 32)})
    with pytest.raises(CheckpointError) as caught:
        llama.load(directory, SPEC)
    assert "clustering" in caught.value.detail
    assert "layers.1.up.down" in caught.value.detail or LORA in caught.value.detail
    assert extra in caught.value.detail


def test_targets_that_the_file_lacks_are_listed(directory: Path) -> None:
    """An adapter of queries and values alone is not served: the three projections are one product here."""
    terms = {
        name: tensor
        for name, tensor in llama.adapter(CONFIG, rank=4, seed=3).items()
        if ".q_proj." in name or ".v_proj." in name
    }
    llama.save_adapter(directory, "clustering", terms, target_modules=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match="not in the checkpoint: "):
        llama.load(directory, SPEC)


def test_an_adapter_may_target_some_modules(directory: Path) -> None:
    whole = llama.adapter(CONFIG, rank=2, seed=3)
    terms = {name: tensor for name, tensor in whole.items() if ".mlp.down_proj." in name}
    llama.save_adapter(directory, "clustering", terms, r=2, lora_alpha=1, target_modules=["down_proj"])
    model = llama.load(directory, SPEC)
    asked = [("the other", "clustering"), ("x", "clustering")]
    network = eurobert.network(CONFIG, llama.merged(llama.tensors(CONFIG), terms, scale=0.5))
    expected = llama.reference(network, llama.rows(model, asked))
    torch.testing.assert_close(llama.vectors(model, asked), expected, atol=1e-5, rtol=1e-5)


def test_ranks_must_be_as_told(directory: Path) -> None:
    llama.save_adapter(directory, "clustering", llama.adapter(CONFIG, rank=4, seed=3), r=8, lora_alpha=8)
    with pytest.raises(CheckpointError, match="shape"):
        llama.load(directory, SPEC)


def test_a_task_without_its_adapter_is_refused(directory: Path) -> None:
    for path in (directory / "adapters" / "clustering").iterdir():
        path.unlink()
    (directory / "adapters" / "clustering").rmdir()
    with pytest.raises(CheckpointError, match=r"not \['clustering'\], which tasks of 'tiny' need"):
        llama.load(directory, SPEC)


def test_adapters_that_no_task_chooses_are_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="'tiny' has no task that chooses one of them"):
        llama.load(directory, llama.spec("eurobert"))


def test_merged_weights_serve_the_one_task_that_they_name(tmp_path: Path) -> None:
    weights = llama.tensors(CONFIG)
    model = llama.load(llama.save(tmp_path, CONFIG | {"task_names": ["retrieval"]}, weights), SPEC)
    asked = [("the other", "retrieval.query"), ("the other", "retrieval.passage")]
    expected = llama.reference(eurobert.network(CONFIG, weights), llama.rows(model, asked))
    torch.testing.assert_close(llama.vectors(model, asked), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"takes 'retrieval\.query', 'retrieval\.passage' here, .* lacks its"):
        model.prepare(Embed(inputs=["a"], task="clustering"))


@pytest.mark.parametrize("told", [list(llama.ADAPTERS), ["separation"], [], None])
def test_merged_weights_of_an_unknown_task_are_refused(tmp_path: Path, told: list[str] | None) -> None:
    llama.save(tmp_path, CONFIG, llama.tensors(CONFIG))
    config = {key: value for key, value in (CONFIG | {"task_names": told}).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not tell which"):
        llama.load(tmp_path, SPEC)


def test_tasks_of_prompts_alone_need_no_adapters(tmp_path: Path) -> None:
    llama.save(tmp_path, CONFIG, llama.tensors(CONFIG))
    tasks = MappingProxyType({"retrieval.query": Task("Query: ")})
    model = llama.load(tmp_path, llama.spec("eurobert", tasks=tasks))
    prompted = llama.vectors(model, [("the other", "retrieval.query")])
    assert torch.equal(prompted, llama.vectors(model, [("Query: the other", None)]))


@pytest.mark.parametrize(("told", "other"), [(["retrieval"], False), (["clustering"], True), ([], False)])
def test_weights_with_a_merged_task_are_served_under_its_id_alone(tmp_path: Path, told: list[str], other: bool) -> None:
    llama.save(tmp_path, CONFIG | {"task_names": told}, llama.tensors(CONFIG))
    spec = replace(llama.spec("eurobert"), id="nano-retrieval", repo="somebody/nano-retrieval")
    if other:
        with pytest.raises(CheckpointError, match=r"is not 'nano-retrieval': .*\['clustering'\] is merged"):
            llama.load(tmp_path, spec)
    else:
        llama.load(tmp_path, spec)
