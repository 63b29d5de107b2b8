"""T5's encoder against transformers' own."""

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
from transformers import T5Config, T5EncoderModel

from fundament.catalog import CATALOG
from fundament.core import Embed, Model
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError
from fundament.models import family_of
from tests.checkpoints import assert_same_alone, embed, load, resave, texts
from tests.checkpoints.t5 import t5

LAYOUTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gated": {"gated": True},
    "both names": {"names": ("shared", "encoder.embed_tokens")},
    "the encoder's name": {"names": ("encoder.embed_tokens",)},
    "a whole T5": {"decoder": True, "names": ("shared", "encoder.embed_tokens", "decoder.embed_tokens")},
    "distances up to 32": {"relative_attention_max_distance": 32},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("t5")
    return {name: t5(root / name, **options) for name, options in LAYOUTS.items()}


@pytest.fixture(scope="module")
def relu(directories: dict[str, Path]) -> Model:
    return load(directories["relu"], "t5")


@pytest.fixture(scope="module")
def gated(directories: dict[str, Path]) -> Model:
    return load(directories["gated"], "t5")


def reference(directory: Path, rows: list[Tensor]) -> Tensor:
    """Vectors `[rows, dim]`, each row on its own."""
    config = T5Config(**json.loads((directory / "config.json").read_text()))
    model = T5EncoderModel(config).eval()
    tensors = load_file(directory / "model.safetensors")
    tokens = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    assert tokens is not None
    kept = {n: t for n, t in tensors.items() if n.startswith("encoder.")}
    model.load_state_dict(kept | {"shared.weight": tokens, "encoder.embed_tokens.weight": tokens})
    with torch.inference_mode():
        return torch.stack([model(input_ids=row[None]).last_hidden_state[0].mean(0) for row in rows])


def compare(model: Model, directory: Path, inputs: list[str]) -> None:
    rows = [torch.from_numpy(item.features["ids"]) for item in model.prepare(Embed(inputs=inputs))]
    torch.testing.assert_close(embed(model, inputs), reference(directory, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_float32_equals_the_reference(name: str, directories: dict[str, Path]) -> None:
    compare(load(directories[name], "t5"), directories[name], ["", "a", *texts([1, 2, 3, 3, 5, 9, 20, 40])])


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_a_row_longer_than_a_block_of_queries_equals_the_reference(name: str, directories: dict[str, Path]) -> None:
    model, text = load(directories[name], "t5", context=8192), "a b " * 300
    assert 1024 < model.prepare(Embed(inputs=[text]))[0].n_tokens < 2048
    compare(model, directories[name], [text, "ab"])


def test_the_tokenizer_puts_one_token_behind_a_text(relu: Model) -> None:
    [empty] = relu.prepare(Embed(inputs=[""]))
    assert empty.features["ids"].tolist() == [1]


def test_bfloat16_is_close_to_float32(directories: dict[str, Path], relu: Model) -> None:
    inputs = texts([1, 4, 30])
    halved = load(directories["relu"], "t5", dtype=torch.bfloat16)
    assert F.cosine_similarity(embed(halved, inputs), embed(relu, inputs)).min() > 0.995


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(relu: Model, gated: Model, inputs: list[str]) -> None:
    for model in (relu, gated):
        assert_same_alone(partial(embed, model), inputs)


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi.weight",
        "encoder.final_layer_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not in the checkpoint: {name};"):
        load(resave(t5(tmp_path), **{name: None}), "t5")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.2.layer.1.layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.bias",
        "linear.weight",
    ],
)
def test_an_extra_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"not known to the model: {name}$"):
        load(resave(t5(tmp_path), **{name: torch.zeros(2)}), "t5")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("shared.weight", (7, 48)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 3)),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", (48, 63)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.* should have the shape"):
        load(resave(t5(tmp_path), **{name: torch.zeros(shape)}), "t5")


def test_token_embeddings_that_differ_under_two_names_are_refused(tmp_path: Path) -> None:
    directory = t5(tmp_path, names=("shared", "encoder.embed_tokens"))
    tokens = load(directory, "t5").transformer.tokens
    with pytest.raises(CheckpointError, match=r"under shared than under encoder\.embed_tokens"):
        load(resave(directory, **{"encoder.embed_tokens.weight": tokens + 1}), "t5")


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward_proj": "twice-gelu"},
        {"feed_forward_proj": "gated-sine"},
        {"dense_act_fn": "silu"},
        {"is_gated_act": True},
        {"relative_attention_max_distance": 8},
        {"relative_attention_num_buckets": 2},
    ],
)
def test_what_is_not_served_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"is not served|do not divide|are not those of feed_forward_proj"):
        load(t5(tmp_path, **changes), "t5")


def test_float16_is_refused_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bfloat16 or float32"):
        load(t5(tmp_path), "t5", dtype=torch.float16, device="cuda")


def test_a_directory_of_ones_own_is_known_for_t5(tmp_path: Path) -> None:
    directory = t5(tmp_path)
    assert family_of(json.loads((directory / "config.json").read_text())) == "t5"
    spec = from_argument(f"mine={directory}", tmp_path).spec
    assert (spec.family, spec.dim, spec.context) == ("t5", 48, 512)


def test_the_catalogue_s_t5_models_are_served() -> None:
    assert [spec.id for spec in CATALOG.values() if spec.family == "t5"] == [
        f"jina-embedding-{size}-en-v1" for size in "sbl"
    ]
