"""jina-clip against a plain reading of EVA02, transformers' encoder for the text of v2, and a plain one for v1's."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from fundament.catalog import CATALOG
from fundament.core import Embed, Group, Input, Item
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError
from fundament.models.clip import ClipEmbedder
from tests.checkpoints import assert_same_alone, load, resave, texts, unigram
from tests.checkpoints import clip as tiny
from tests.checkpoints.clip import Version, clip, picture, png
from tests.checkpoints.xlm_roberta import renamed

Pixels = NDArray[np.uint8]

PICTURES = [picture(56, 56), picture(200, 90), picture(57, 301), picture(1, 3), picture(20, 20)]
TEXTS = ["a", *texts([1, 3, 12])]
VERSIONS: tuple[Version, ...] = ("v1", "v2")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("clip")
    return {version: clip(root / version, version) for version in VERSIONS}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, ClipEmbedder]:
    return {version: loaded(directory) for version, directory in directories.items()}


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> ClipEmbedder:
    model = load(directory, "clip", dim=tiny.WIDTH, dtype=dtype, modalities=("text", "image", "pdf"))
    assert isinstance(model, ClipEmbedder)
    return model


def vectors(model: ClipEmbedder, inputs: Sequence[Input]) -> Tensor:
    """Vectors of any inputs, each a caller's own, each tower's rows as one batch."""
    call = Embed(inputs=inputs, truncate=True)
    items = [item for value in inputs for item in model.prepare(Embed(inputs=[value], truncate=True))]
    arrays: dict[int, np.ndarray] = {}
    for mate in {item.mate for item in items}:
        places = [place for place, item in enumerate(items) if item.mate == mate]
        arrays |= zip(places, model.forward([items[place] for place in places]), strict=True)
    return torch.from_numpy(finish(model, call, items, [arrays[place] for place in range(len(items))]).vectors)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


# EVA02, read plainly: one image at a time, rotations pair by pair, no parameter moved.


def processed(image: Pixels) -> Tensor:
    """What the publisher's processor makes of an image, float32 `[3, size, size]`."""
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = (
        tiny.IMAGE if side == short else int(tiny.IMAGE * side / short) for side in (height, width)
    )
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = round((new_width - tiny.IMAGE) / 2.0), round((new_height - tiny.IMAGE) / 2.0)
    square = np.asarray(resized.crop((left, top, left + tiny.IMAGE, top + tiny.IMAGE)))
    numbers = torch.from_numpy(square.copy()).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = (torch.tensor(told, dtype=torch.float32)[:, None, None] for told in (tiny.MEAN, tiny.STD))
    return numbers.sub_(mean).div_(std)


def plain_eva02(weights: dict[str, Tensor], image: Pixels, *, grid_trained: int) -> Tensor:
    grid, heads = tiny.IMAGE // tiny.PATCH, tiny.WIDTH // tiny.HEAD

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def turned(x: Tensor) -> Tensor:
        """`[heads, tokens, head]`: each pair of neighbours turns by its own angle, the first token by none."""
        out = x.clone()
        n_pairs = tiny.HEAD // 2
        for token in range(1, x.shape[1]):
            row, column = divmod(token - 1, grid)
            for pair in range(n_pairs):
                place = row if pair < n_pairs // 2 else column
                turn = pair % (n_pairs // 2)
                angle = torch.tensor(place / grid * grid_trained * 10000.0 ** (-2 * turn / n_pairs))
                a, b = x[:, token, 2 * pair], x[:, token, 2 * pair + 1]
                out[:, token, 2 * pair] = a * angle.cos() - b * angle.sin()
                out[:, token, 2 * pair + 1] = b * angle.cos() + a * angle.sin()
        return out

    patches = F.conv2d(
        processed(image)[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], tiny.PATCH
    )
    x = torch.cat((weights["cls_token"][0], patches[0].flatten(1).T)) + weights["pos_embed"][0]
    for i in range(tiny.LAYERS):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.norm1")
        q = y @ weights[f"{block}.attn.q_proj.weight"].T + weights[f"{block}.attn.q_bias"]
        k = y @ weights[f"{block}.attn.k_proj.weight"].T
        v = y @ weights[f"{block}.attn.v_proj.weight"].T + weights[f"{block}.attn.v_bias"]
        q, k, v = (part.view(len(x), heads, tiny.HEAD).transpose(0, 1) for part in (q, k, v))
        scores = turned(q) @ turned(k).transpose(1, 2) * tiny.HEAD**-0.5
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        mixed = norm(mixed, f"{block}.attn.inner_attn_ln")
        x = x + mixed @ weights[f"{block}.attn.proj.weight"].T + weights[f"{block}.attn.proj.bias"]
        y = norm(x, f"{block}.norm2")
        gate = F.silu(y @ weights[f"{block}.mlp.w1.weight"].T + weights[f"{block}.mlp.w1.bias"])
        inner = gate * (y @ weights[f"{block}.mlp.w2.weight"].T + weights[f"{block}.mlp.w2.bias"])
        inner = norm(inner, f"{block}.mlp.ffn_ln")
        x = x + inner @ weights[f"{block}.mlp.w3.weight"].T + weights[f"{block}.mlp.w3.bias"]
    return norm(x, "norm")[0]


def plain_jina_bert(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The text tower of v1, one text at a time: post-norm, ALiBi, GEGLU with its gate first; the mean of all tokens."""
    n_heads, eps = tiny.SIZES["num_attention_heads"], 1e-12

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "emb_ln")
    places = torch.arange(len(ids))
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / n_heads) for head in range(n_heads)])
    bias = -slopes[:, None, None] * (places[:, None] - places).abs()
    for i in range(tiny.SIZES["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        qkv = F.linear(x, weights[f"{layer}.mixer.Wqkv.weight"], weights[f"{layer}.mixer.Wqkv.bias"])
        q, k, v = (part.view(len(ids), n_heads, -1).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        mixed = F.linear(mixed, weights[f"{layer}.mixer.out_proj.weight"], weights[f"{layer}.mixer.out_proj.bias"])
        x = norm(x + mixed, f"{layer}.norm1")
        gate, up = F.linear(x, weights[f"{layer}.mlp.gated_layers.weight"]).chunk(2, dim=-1)
        down = F.linear(F.gelu(gate) * up, weights[f"{layer}.mlp.wo.weight"], weights[f"{layer}.mlp.wo.bias"])
        x = norm(x + down, f"{layer}.norm2")
    return x.mean(0)


@pytest.mark.parametrize(("version", "grid_trained"), [("v1", 4), ("v2", 16)])
def test_images_equal_a_plain_reading(models: dict[str, ClipEmbedder], version: Version, grid_trained: int) -> None:
    weights = tiny.vision_tensors()
    expected = [plain_eva02(weights, image, grid_trained=grid_trained) for image in PICTURES]
    assert_same(vectors(models[version], [png(image) for image in PICTURES]), torch.stack(expected))


def test_texts_of_v2_equal_transformers_with_the_adapter_merged(models: dict[str, ClipEmbedder]) -> None:
    vocab = unigram().get_vocab_size()
    network = JinaEmbeddingsV3Model(
        JinaEmbeddingsV3Config(
            **tiny.SIZES,
            vocab_size=vocab,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            rope_parameters={"rope_theta": 20000.0, "rope_type": "default"},
        ),
        add_pooling_layer=False,
    ).eval()
    network.load_state_dict(renamed(tiny.merged_text(vocab), "port"), strict=True)
    model = models["v2"]
    expected = []
    for item in model.prepare(Embed(inputs=TEXTS)):
        with torch.inference_mode():
            expected.append(
                network(input_ids=torch.from_numpy(item.features["ids"])[None]).last_hidden_state[0].mean(0)
            )
    assert_same(vectors(model, TEXTS), torch.stack(expected))


def test_texts_of_v1_equal_a_plain_reading(models: dict[str, ClipEmbedder]) -> None:
    model = models["v1"]
    weights = tiny.text_tensors("v1", len(model.text.transformer.tokens))
    items = model.prepare(Embed(inputs=TEXTS))
    expected = [plain_jina_bert(weights, torch.from_numpy(item.features["ids"])) for item in items]
    assert_same(vectors(model, TEXTS), torch.stack(expected))


@pytest.mark.parametrize("image", [*PICTURES, picture(512, 300), picture(59, 11)], ids=lambda image: str(image.shape))
def test_what_the_tower_is_given_equals_the_processors_numbers_bit_for_bit(
    models: dict[str, ClipEmbedder], image: Pixels
) -> None:
    model = models["v2"]
    (item,) = model.prepare(Embed(inputs=[png(image)]))
    numbers = model.vision.embedding.numbers([model.patches_of(item)])
    squares = processed(image).unfold(1, tiny.PATCH, tiny.PATCH).unfold(2, tiny.PATCH, tiny.PATCH)
    assert torch.equal(numbers, squares.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1))


inputs = st.one_of(
    st.text(min_size=1, max_size=20).filter(str.strip),
    st.tuples(st.integers(1, 80), st.integers(1, 80)).map(lambda size: png(picture(*size))),
)


@settings(deadline=None, max_examples=25)
@given(several=st.lists(inputs, min_size=2, max_size=9), version=st.sampled_from(["v1", "v2"]))
def test_a_row_alone_equals_the_row_in_mixed_company(
    models: dict[str, ClipEmbedder], several: list[Input], version: str
) -> None:
    assert_same_alone(partial(vectors, models[version]), several, atol=2e-5)


def test_order_usage_and_a_file_sent_twice(models: dict[str, ClipEmbedder]) -> None:
    model, first, second = models["v2"], png(picture(30, 40)), png(picture(40, 30))
    call = Embed(inputs=[first, "what people mean", second, png(picture(30, 40))])
    items = model.prepare(call)
    assert items[0] is items[3]
    assert items[0] is not items[2]
    assert [item.mate for item in items] == ["image", None, "image", "image"]
    n_each = 1 + (tiny.IMAGE // tiny.PATCH) ** 2
    made = finish(model, call, items, [np.zeros(tiny.WIDTH, np.float32)] * 4)
    assert made.n_media == {"image": 3 * n_each}
    assert made.n_tokens == 3 * n_each + items[1].n_counted


def test_the_prefix_of_queries_changes_texts_and_no_image(directories: dict[str, Path]) -> None:
    tasks = CATALOG["jina-clip-v2"].tasks
    model = load(directories["v2"], "clip", dim=tiny.WIDTH, tasks=tasks)
    assert isinstance(model, ClipEmbedder)

    def rows(task: str | None) -> list[Item]:
        return model.prepare(Embed(inputs=["mean", png(PICTURES[0])], task=task))

    plain, asked = rows(None), rows("retrieval.query")
    expected = model.prepare(Embed(inputs=[f"{tiny.PREFIX}mean"]))[0]
    np.testing.assert_array_equal(asked[0].features["ids"], expected.features["ids"])
    assert len(asked[0].features["ids"]) > len(plain[0].features["ids"])
    np.testing.assert_array_equal(asked[1].features["pixels"], plain[1].features["pixels"])


def test_bfloat16_is_close(directories: dict[str, Path], models: dict[str, ClipEmbedder]) -> None:
    asked = [*TEXTS, *map(png, PICTURES)]
    for version in VERSIONS:
        rounded = loaded(directories[version], torch.bfloat16)
        assert torch.cosine_similarity(vectors(models[version], asked), vectors(rounded, asked)).min() > 0.99


def test_several_parts_as_one_input_are_refused(models: dict[str, ClipEmbedder]) -> None:
    with pytest.raises(InputError, match="input -> 1: This model makes a vector of each input"):
        models["v2"].prepare(Embed(inputs=["a", Group(["a", "b"])]))


def test_an_image_that_is_a_line_is_refused(models: dict[str, ClipEmbedder]) -> None:
    with pytest.raises(InputError, match="1 x 201 pixels"):
        models["v2"].prepare(Embed(inputs=[png(picture(201, 1))]))


NAMES = {
    "v1": "text_model.transformer.encoder.layers.1.mlp.wo.bias",
    "v2": "text_model.transformer.roberta.encoder.layers.1.mlp.fc2.parametrizations.weight.0.lora_A",
}


@pytest.mark.parametrize(
    ("version", "name", "change", "message"),
    [
        (
            "v2",
            "vision_model.blocks.1.attn.q_bias",
            None,
            r"not in the checkpoint: vision_model\.blocks\.1\.attn\.q_bias",
        ),
        ("v2", "vision_model.head.weight", torch.zeros(2), r"not known to the model: vision_model\.head\.weight"),
        ("v2", "visual_projection.weight", torch.zeros(2), "not known to the model: visual_projection"),
        ("v2", NAMES["v2"], None, rf"not in the checkpoint: {NAMES['v2']}"),
        ("v1", NAMES["v1"], None, rf"not in the checkpoint: {NAMES['v1']}"),
        ("v1", "text_model.pooler.weight", torch.zeros(2), r"not known to the model: text_model\.pooler"),
        ("v1", "vision_model.pos_embed", torch.zeros(1, 18, 64), "pos_embed should have the shape"),
        (
            "v1",
            "text_model.transformer.encoder.layers.0.mlp.gated_layers.weight",
            None,
            "neither of the known text towers",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, version: Version, name: str, change: Tensor | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(resave(clip(tmp_path, version), **{name: change}))


def test_saved_tables_of_the_rotations_are_ignored(tmp_path: Path, models: dict[str, ClipEmbedder]) -> None:
    directory = resave(clip(tmp_path), **{"vision_model.rope.freqs_cos": torch.zeros(3)})
    assert_same(vectors(loaded(directory), [png(PICTURES[1])]), vectors(models["v2"], [png(PICTURES[1])]))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"subln": False}, "asks for a tower that is not served: {'subln': False}"),
        ("vision_config", {"intp_freq": False}, "needs intp_freq"),
        ("text_config", {"proj_type": "mlp"}, "text_config: {'proj_type': 'mlp'} is not served"),
        ("text_config", {"pooler_type": "cls_pooler"}, "'cls_pooler'"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, part: str, change: dict, message: str) -> None:
    path = clip(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("key", ["lora_alpha", "lora_rank", "lora_adaptations"])
def test_a_config_that_leaves_the_adapter_out_is_refused(tmp_path: Path, key: str) -> None:
    path = clip(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["hf_model_config_kwargs"][key]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"does not say {key}"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "squash"}, "resize_mode 'squash' is not served"),
        ({"interpolation": "bilinear"}, "'interpolation': 'bilinear'"),
        ({"size": 224}, "size 224 is not the image_size"),
        ({"mean": None}, "mean"),
    ],
)
def test_another_image_processing_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = clip(tmp_path) / "preprocessor_config.json"
    told = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)
