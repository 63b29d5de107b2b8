"""JinaBERT against a plain forward pass written here: one row at a time, one head at a time, in float64."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fundament.backbone.packed import pack
from fundament.core import Embed, Model
from fundament.errors import CheckpointError
from fundament.models import family, family_of
from tests.checkpoints import assert_same_alone, embed, load, resave, texts
from tests.checkpoints.jina_bert import jina_bert

# As the paper gives them: a geometric series for a power of two; else that of the next lower power, then every other
# one of the next higher power's.
SLOPES = {
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    8: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8],
    12: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "english": {},
    "small english, behind a prefix": {"n_heads": 8, "prefix": "bert."},
    "relu": {"feed_forward_type": "reglu", "n_heads": 6},
    "code": {"mlp": "up_gated_layer", "qk_norm": True, "inner_residual": True},
    "code, behind a prefix": {"mlp": "up_gated_layer", "qk_norm": True, "inner_residual": True, "prefix": "bert."},
    "norms of queries and keys only": {"qk_norm": True},
    "second residual only": {"mlp": "up_gated_layer", "inner_residual": True},
    "not gated": {"mlp": "up_layer", "qk_norm": True, "inner_residual": True, "n_heads": 6},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("jina_bert")
    return {name: jina_bert(root / name, **options) for name, options in LAYOUTS.items()}


@pytest.fixture(scope="module")
def english(directories: dict[str, Path]) -> Model:
    return load(directories["english"], "jina_bert")


@pytest.fixture(scope="module")
def code(directories: dict[str, Path]) -> Model:
    return load(directories["code"], "jina_bert")


def slow_forward(directory: Path, options: dict[str, Any], ids: Tensor, visible: int | None = None) -> Tensor:
    """Hidden states `[tokens, hidden]` of one row, of whose tokens the first `visible` are attended to."""
    config = json.loads((directory / "config.json").read_text())
    prefix = options.get("prefix", "")
    tensors = {k.removeprefix(prefix): v.double() for k, v in load_file(directory / "model.safetensors").items()}
    inner, n_heads = config["intermediate_size"], config["num_attention_heads"]
    act = {"geglu": F.gelu, "reglu": F.relu, "original": F.gelu}[config["feed_forward_type"]]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + config["layer_norm_eps"]).sqrt()
        return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    place = torch.arange(len(ids), dtype=torch.float64)
    distance = (place[:, None] - place[None, :]).abs()
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
        if options.get("qk_norm"):
            q, k = norm(f"{layer}.attention.self.layer_norm_q", q), norm(f"{layer}.attention.self.layer_norm_k", k)
        size = q.shape[1] // n_heads
        heads = []
        for head, slope in enumerate(SLOPES[n_heads]):
            own = slice(head * size, (head + 1) * size)
            scores = q[:, own] @ k[:, own].T / size**0.5 - slope * distance
            if visible is not None:
                scores[:, visible:] = float("-inf")
            heads.append(scores.softmax(-1) @ v[:, own])
        attended = linear(f"{layer}.attention.output.dense", torch.cat(heads, dim=1))
        attended = norm(f"{layer}.attention.output.LayerNorm", attended + x)
        if options.get("inner_residual"):
            attended = norm(f"{layer}.layer_norm_1", x + attended)
        match options.get("mlp", "gated_layers"):
            case "gated_layers":
                both = linear(f"{layer}.mlp.gated_layers", attended)
                out = linear(f"{layer}.mlp.wo", act(both[:, :inner]) * both[:, inner:])
                x = norm(f"{layer}.mlp.layernorm", out + attended)
            case "up_gated_layer":
                both = linear(f"{layer}.mlp.up_gated_layer", attended)
                out = linear(f"{layer}.mlp.down_layer", both[:, :inner] * act(both[:, inner:]))
                x = norm(f"{layer}.layer_norm_2", attended + out)
            case "up_layer":
                out = linear(f"{layer}.mlp.down_layer", act(linear(f"{layer}.mlp.up_layer", attended)))
                x = norm(f"{layer}.layer_norm_2", attended + out)
    return x


def compare(model: Model, directory: Path, options: dict[str, Any], inputs: list[str]) -> None:
    items = model.prepare(Embed(inputs=inputs))
    rows = [item.features["ids"] for item in items]
    expected = [slow_forward(directory, options, torch.from_numpy(row)).float() for row in rows]
    hidden = model.transformer(pack(rows, torch.device("cpu")))
    torch.testing.assert_close(hidden, torch.cat(expected), atol=1e-5, rtol=1e-5)
    pooled = torch.stack([row.mean(0) for row in expected])
    torch.testing.assert_close(embed(model, inputs), pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_float32_equals_the_plain_forward(name: str, directories: dict[str, Path]) -> None:
    model = load(directories[name], "jina_bert")
    compare(model, directories[name], LAYOUTS[name], ["", "a", *texts([1, 2, 3, 3, 5, 9, 20])])


@pytest.mark.parametrize(("name", "text"), [("english", "a b " * 600), ("code", "ab" * 600)])
def test_a_row_longer_than_a_block_of_queries_equals_the_plain_forward(
    name: str, text: str, directories: dict[str, Path]
) -> None:
    model = load(directories[name], "jina_bert", context=8192)
    assert 1024 < model.prepare(Embed(inputs=[text]))[0].n_tokens < 2048
    compare(model, directories[name], LAYOUTS[name], [text, "ab"])


def test_bfloat16_is_close_to_float32(directories: dict[str, Path], english: Model) -> None:
    inputs = texts([1, 4, 30])
    halved = load(directories["english"], "jina_bert", dtype=torch.bfloat16)
    assert F.cosine_similarity(embed(halved, inputs), embed(english, inputs)).min() > 0.995


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(english: Model, code: Model, inputs: list[str]) -> None:
    for model in (english, code):
        assert_same_alone(partial(embed, model), inputs)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.token_type_embeddings.weight",
        "encoder.layer.1.attention.self.key.bias",
        "encoder.layer.1.mlp.gated_layers.weight",
        "encoder.layer.0.mlp.layernorm.bias",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not in the checkpoint: {name};"):
        load(resave(jina_bert(tmp_path), **{name: None}), "jina_bert")


@pytest.mark.parametrize("name", ["encoder.layer.1.layer_norm_1.weight", "classifier.weight", "linear.weight"])
def test_an_extra_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not known to the model: {name}$"):
        load(resave(jina_bert(tmp_path), **{name: torch.zeros(2)}), "jina_bert")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings.word_embeddings.weight", (7, 48)),
        ("encoder.layer.0.attention.self.key.weight", (48, 47)),
        ("encoder.layer.0.attention.self.value.bias", (47,)),
        ("encoder.layer.1.mlp.gated_layers.weight", (79, 48)),
        ("encoder.layer.1.mlp.gated_layers.weight", (1, 48)),
        ("encoder.layer.1.mlp.layernorm.weight", ()),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.* should have the shape"):
        load(resave(jina_bert(tmp_path), **{name: torch.zeros(shape)}), "jina_bert")


def test_bert_is_not_taken_for_jina_bert(tmp_path: Path) -> None:
    bert = resave(jina_bert(tmp_path), config={"position_embedding_type": "absolute"})
    config = json.loads((bert / "config.json").read_text())
    assert family_of(config) == "bert"
    with pytest.raises(CheckpointError, match=r"not of family jina_bert .* that is family bert"):
        load(bert, "jina_bert")


def test_jina_bert_is_not_taken_for_bert(tmp_path: Path) -> None:
    config = json.loads((jina_bert(tmp_path) / "config.json").read_text())
    assert family_of(config) == "jina_bert"
    assert not family("bert").recognises(config)
    with pytest.raises(CheckpointError, match=r"not of family bert .* that is family jina_bert"):
        load(tmp_path, "bert")


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"feed_forward_type": "original"}),
        ({}, {"feed_forward_type": "glu"}),
        ({"mlp": "up_gated_layer"}, {"feed_forward_type": "original"}),
        ({"mlp": "up_layer"}, {"feed_forward_type": "geglu"}),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="feed_forward_type"):
        load(jina_bert(tmp_path, **options, **changes), "jina_bert")


def test_another_mlp_is_refused(tmp_path: Path) -> None:
    names = ("intermediate.dense", "output.dense")
    with pytest.raises(CheckpointError, match="mlp has none of gated_layers, up_gated_layer, up_layer"):
        load(
            resave(
                jina_bert(tmp_path),
                **{f"encoder.layer.{i}.mlp.gated_layers.weight": None for i in range(2)},
                **{f"encoder.layer.{i}.{name}.weight": torch.zeros(2) for i in range(2) for name in names},
            ),
            "jina_bert",
        )


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pooling"):
        load(jina_bert(tmp_path, emb_pooler="max"), "jina_bert")


def test_float16_is_refused_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bfloat16 or float32"):
        load(jina_bert(tmp_path), "jina_bert", dtype=torch.float16, device="cuda")


def test_a_missing_config_key_is_named(tmp_path: Path) -> None:
    path = jina_bert(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["layer_norm_eps"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer_norm_eps"):
        load(tmp_path, "jina_bert")


def test_the_head_of_the_masked_language_model_is_left_out(tmp_path: Path, english: Model) -> None:
    with_head = resave(jina_bert(tmp_path), **{"cls.predictions.bias": torch.zeros(60)})
    torch.testing.assert_close(embed(load(with_head, "jina_bert"), ["a b"]), embed(english, ["a b"]))
