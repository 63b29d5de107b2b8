"""XLM-RoBERTa in each of its layouts against the classes of transformers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model, XLMRobertaConfig, XLMRobertaModel

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.packed import pack
from fundament.backbone.sentence import read_context
from fundament.core import Embed, Model
from fundament.errors import CheckpointError
from fundament.models import family_of
from tests.checkpoints import assert_same_alone, embed, load, resave, texts, unigram
from tests.checkpoints.xlm_roberta import POSITIONS, flash_tensors, renamed, xlm_roberta

CONTEXT = POSITIONS - 2

LAYOUTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock, behind a prefix": {"prefix": "roberta."},
    "stock, pickled": {"pickled": True},
    "stock, mean": {"pooling": "mean_tokens"},
    "flash, absolute": {"names": "flash", "prefix": "roberta."},
    "flash, rotary": {"names": "flash", "positions": "rotary", "pooling": "mean_tokens", "prefix": "roberta."},
    "flash, rotary, bare": {"names": "flash", "positions": "rotary", "pooling": None, "rotary_emb_base": 500.0},
    "port, rotary": {"names": "port", "positions": "rotary", "pooling": None},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("xlm_roberta")
    return {name: xlm_roberta(root / name, **options) for name, options in LAYOUTS.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Model]:
    return {name: load(path, "xlm_roberta", context=CONTEXT) for name, path in directories.items()}


def reference(directory: Path, options: dict[str, Any]) -> nn.Module:
    """transformers' class with the same weights, handed over in the class's own names, every one of them used."""
    config = json.loads((directory / "config.json").read_text())
    rotary = options.get("positions") == "rotary"
    tensors = flash_tensors(unigram().get_vocab_size(), table=not rotary)
    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    if rotary:
        base = config.get("rotary_emb_base", 20000.0)
        keys |= {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
        model: nn.Module = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**keys))
    else:
        model = XLMRobertaModel(XLMRobertaConfig(**keys))
    model.load_state_dict(renamed(tensors, "port" if rotary else "stock"), strict=True)
    return model.eval()


@torch.inference_mode()
def hidden_states(model: nn.Module, ids: Any) -> Tensor:
    return model(torch.from_numpy(ids)[None]).last_hidden_state[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_float32_equals_transformers(name: str, directories: dict[str, Path], models: dict[str, Model]) -> None:
    model, options = models[name], LAYOUTS[name]
    inputs = ["", "a", "<pad>", "a <pad><pad> b", *texts([1, 2, 3, 3, 5, 9, 12]), "a" * 400]
    items = model.prepare(Embed(inputs=inputs, truncate=True))
    rows = [item.features["ids"] for item in items]
    assert len(rows[-1]) == CONTEXT, "the last position of the table is in use"
    other = reference(directories[name], options)
    expected = [hidden_states(other, row) for row in rows]
    found = model.transformer(pack(rows, torch.device("cpu")))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    first = options.get("pooling", "cls_token") == "cls_token"
    pooled = torch.stack([row[0] if first else row.mean(0) for row in expected])
    torch.testing.assert_close(embed(model, inputs), pooled, atol=1e-5, rtol=1e-5)


def test_transformers_reads_the_flash_names_as_we_do(directories: dict[str, Path], models: dict[str, Model]) -> None:
    """The builder's own renaming stands against the reading that transformers has for the published file."""
    name = "flash, rotary"
    config = json.loads((directories[name] / "config.json").read_text())
    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    other, loaded = JinaEmbeddingsV3Model.from_pretrained(
        directories[name], config=JinaEmbeddingsV3Config(**keys), output_loading_info=True
    )
    assert not loaded["missing_keys"]
    row = models[name].prepare(Embed(inputs=texts([9])))[0].features["ids"]
    vector = hidden_states(other.eval(), row).mean(0)
    torch.testing.assert_close(embed(models[name], texts([9]))[0], vector, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(models: dict[str, Model], inputs: list[str]) -> None:
    for name in ("stock", "flash, rotary"):
        assert_same_alone(partial(embed, models[name]), inputs)


FLASH = {"names": "flash", "positions": "rotary"}
PORT = {"names": "port", "positions": "rotary"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "embeddings.position_embeddings.weight"),
        ({}, "encoder.layer.1.attention.self.value.bias"),
        (FLASH, "encoder.layers.1.mixer.Wqkv.bias"),
        (FLASH, "emb_ln.weight"),
        (PORT, "layers.1.post_mlp_layernorm.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not in the checkpoint: {name};"):
        load(resave(xlm_roberta(tmp_path, **options), **{name: None}), "xlm_roberta", context=CONTEXT)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "classifier.out_proj.weight"),
        (FLASH, "embeddings.position_embeddings.weight"),
        (FLASH, "lm_head.bias"),
        (PORT, "layers.2.mlp.fc1.weight"),
    ],
)
def test_an_extra_tensor_is_named(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not known to the model: {name}$"):
        load(resave(xlm_roberta(tmp_path, **options), **{name: torch.zeros(2)}), "xlm_roberta", context=CONTEXT)


@pytest.mark.parametrize(
    ("options", "name", "shape"),
    [
        ({}, "embeddings.position_embeddings.weight", (POSITIONS - 1, 48)),
        (FLASH, "encoder.layers.0.mixer.Wqkv.weight", (96, 48)),
        (PORT, "layers.1.self_attn.k_proj.weight", (48, 24)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, options: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.* should have the shape"):
        load(resave(xlm_roberta(tmp_path, **options), **{name: torch.zeros(shape)}), "xlm_roberta", context=CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({**FLASH, "rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ({**FLASH, "rotary_emb_scale_base": 512.0}, "rotary_emb_scale_base"),
        ({**FLASH, "rotary_emb_dim": 4}, "rotary_emb_dim"),
        ({**PORT, "rope_parameters": {"rope_type": "yarn", "rope_theta": 20000.0}}, "yarn"),
        ({**PORT, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({**PORT, "rotary_emb_base": 10000.0}, "disagree"),
        ({**PORT, "rope_theta": 10000.0}, "disagree"),
    ],
)
def test_positions_of_another_kind_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(xlm_roberta(tmp_path, **options), "xlm_roberta", context=CONTEXT)


@pytest.mark.parametrize(("options", "usual"), [(FLASH, 10_000.0), (PORT, 20_000.0)])
def test_the_base_of_the_rotations_is_the_publishers_where_the_config_has_none(
    tmp_path: Path, options: dict[str, Any], usual: float
) -> None:
    silent = xlm_roberta(tmp_path / "silent", **options, rotary_emb_base=None, rope_parameters=None)
    model = load(silent, "xlm_roberta", context=CONTEXT)
    assert model.transformer.shape.rope_theta == usual


def test_other_names_are_refused(tmp_path: Path) -> None:
    other = resave(xlm_roberta(tmp_path), **{"encoder.layer.0.attention.self.query.weight": None})
    with pytest.raises(CheckpointError, match="no tensor is named"):
        load(other, "xlm_roberta", context=CONTEXT)


def test_a_pooling_is_asked_for_where_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1_Pooling"):
        load(xlm_roberta(tmp_path, pooling=None), "xlm_roberta", context=CONTEXT)


def test_a_position_table_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="positions for 128 tokens, tiny reads 129"):
        load(xlm_roberta(tmp_path), "xlm_roberta", context=CONTEXT + 1)


@pytest.mark.parametrize("options", [{}, FLASH, PORT])
def test_the_context_is_what_the_table_holds_after_its_offset(tmp_path: Path, options: dict[str, Any]) -> None:
    assert read_context(Checkpoint(xlm_roberta(tmp_path, **options))) == CONTEXT


@pytest.mark.parametrize("options", [{}, FLASH, PORT])
def test_the_family_is_known_by_its_config(tmp_path: Path, options: dict[str, Any]) -> None:
    assert family_of(json.loads((xlm_roberta(tmp_path, **options) / "config.json").read_text())) == "xlm_roberta"


def test_safetensors_go_before_a_pickled_file(tmp_path: Path) -> None:
    both = xlm_roberta(tmp_path)
    (both / "pytorch_model.bin").write_bytes(b"not a file of PyTorch")
    assert embed(load(both, "xlm_roberta", context=CONTEXT), ["a"]).isfinite().all()


def test_the_size_of_a_pickled_file_is_that_of_its_tensors(directories: dict[str, Path]) -> None:
    pickled, mapped = Checkpoint(directories["stock, pickled"]), Checkpoint(directories["stock"])
    assert pickled.n_elements == mapped.n_elements


@pytest.mark.parametrize("content", [b"", b"not a file of PyTorch", b"PK\x03\x04"])
def test_a_broken_pickled_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = xlm_roberta(tmp_path, pickled=True) / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a whole file"):
        load(tmp_path, "xlm_roberta", context=CONTEXT)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_a_pickled_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = xlm_roberta(tmp_path / "model", pickled=True)
    torch.save({"embeddings.word_embeddings.weight": Trap()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a whole file of PyTorch tensors"):
        load(directory, "xlm_roberta", context=CONTEXT)
    assert not Path("sprung").exists()


def test_a_pickled_file_of_other_things_is_refused(tmp_path: Path) -> None:
    path = xlm_roberta(tmp_path, pickled=True) / "pytorch_model.bin"
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="something else than tensors"):
        load(tmp_path, "xlm_roberta", context=CONTEXT)


def test_a_padding_token_behind_every_position_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(resave(xlm_roberta(tmp_path), config={"pad_token_id": CONTEXT + 1}))
    with pytest.raises(CheckpointError, match="leaves no position"):
        read_context(checkpoint)
