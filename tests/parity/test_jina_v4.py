"""jina-embeddings-v4 against transformers' Qwen2.5-VL with each task's adapter merged by hand."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from fundament.backbone.mrope import Slot, positions
from fundament.backbone.towers.images import Patches
from fundament.backbone.vision_embedder import VisionEmbedder
from fundament.catalog import CATALOG
from fundament.core import Embed, Group, Input, Item, MultiVectors, Output
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from tests.checkpoints import assert_same_alone, load, resave, texts
from tests.checkpoints import qwen_vl as tiny
from tests.checkpoints.clip import picture, png
from tests.checkpoints.qwen_vl import qwen_vl

Pixels = NDArray[np.uint8]

SPEC = CATALOG["jina-embeddings-v4"]
ASKED = list(SPEC.tasks)
PICTURES = [picture(56, 56), picture(200, 90), picture(70, 301), picture(140, 140)]
TEXTS = ["a", "\n<|image_pad|>", *texts([1, 3, 12])]
PROMPT = ("<|im_start|>user\n<|vision_start|>", "<|vision_end|>Describe the image.<|im_end|>\n")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_vl(tmp_path_factory.mktemp("v4"), "v4")


@pytest.fixture(scope="module")
def model(directory: Path) -> VisionEmbedder:
    return loaded(directory)


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Of each adapter, transformers' class with it merged in, and the projector's weight and bias."""
    found = {}
    for task in tiny.TASKS:
        state = tiny.merged(task)
        weight, bias = (state.pop(f"multi_vector_projector.{kind}") for kind in ("weight", "bias"))
        found[task] = (tiny.network("v4", state), weight, bias)
    return found


def loaded(directory: Path, dtype: torch.dtype = torch.float32, **facts: object) -> VisionEmbedder:
    kept = {name: getattr(SPEC, name) for name in ("tasks", "default_task", "outputs", "modalities", "late_chunking")}
    model = load(directory, "qwen_vl", dtype=dtype, **{"dim": tiny.HIDDEN, "context": 512, **kept, **facts})
    assert isinstance(model, VisionEmbedder)
    return model


def run(model: VisionEmbedder, asked: Sequence[tuple[Input, str]], output: Output = "dense") -> list[Tensor]:
    """What each input becomes, all of them in one batch."""
    rows = [row for value, task in asked for row in model.prepare(Embed(inputs=[value], task=task, output=output))]
    return [torch.from_numpy(array) for array in model.forward(rows)]


def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": tiny.LEAST, "longest_edge": tiny.MOST})


def states(network: nn.Module, value: str | Pixels, prompt: str) -> tuple[Tensor, list[int]]:
    """transformers' hidden states of a text or an image, and its ids."""
    tokenizer = tiny.tokenizer()
    with torch.inference_mode():
        if isinstance(value, str):
            ids = torch.tensor([tokenizer.encode(prompt + value).ids])
            kinds = torch.zeros_like(ids)
            places, _ = network.get_rope_index(ids, kinds, None, None, attention_mask=torch.ones_like(ids))
            # Not by ids: a text that spells the mark of an image holds none.
            embedded = network.get_input_embeddings()(ids)
            hidden = network.language_model(inputs_embeds=embedded, position_ids=places).last_hidden_state[0]
            return hidden, ids[0].tolist()
        read = processor()(images=[Image.fromarray(value)], return_tensors="pt")
        n = int(read["image_grid_thw"].prod()) // 4
        ids = torch.tensor([tokenizer.encode("<|image_pad|>".join([PROMPT[0], *[""] * (n - 1), PROMPT[1]])).ids])
        kinds = (ids == tiny.IDS["image_token_id"]).long()
        hidden = network(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            **read,
        ).last_hidden_state[0]
        return hidden, ids[0].tolist()


def expected(network: nn.Module, value: str | Pixels, task: str) -> Tensor:
    hidden, ids = states(network, value, SPEC.tasks[task].prompt)
    if isinstance(value, str):
        return hidden.mean(0)
    first, last = ids.index(tiny.IDS["vision_start_token_id"]), ids.index(tiny.IDS["vision_end_token_id"])
    return hidden[first : last + 1].mean(0)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_every_task_equals_transformers(model: VisionEmbedder, networks: dict) -> None:
    values: list[str | Pixels] = [*TEXTS, *PICTURES]
    asked = [(value, task) for task in ASKED for value in values]
    found = run(model, [(value if isinstance(value, str) else png(value), task) for value, task in asked])
    for (value, task), vector in zip(asked, found, strict=True):
        assert_same(vector, expected(networks[SPEC.tasks[task].adapter][0], value, task))


def test_multi_vectors_equal_transformers_with_the_projectors_adapter(model: VisionEmbedder, networks: dict) -> None:
    asked = [(value, task) for value in ("the search", PICTURES[1]) for task in ASKED]
    found = run(model, [(value if isinstance(value, str) else png(value), task) for value, task in asked], "multi")
    for (value, task), vectors in zip(asked, found, strict=True):
        network, weight, bias = networks[SPEC.tasks[task].adapter]
        hidden, _ = states(network, value, SPEC.tasks[task].prompt)
        assert_same(vectors, F.normalize(F.linear(hidden, weight, bias), dim=-1))


def test_the_tokens_of_multi_vectors_are_named(model: VisionEmbedder) -> None:
    call = Embed(inputs=["the in", png(PICTURES[0])], task="text-matching", output="multi", name_tokens=True)
    items = model.prepare(call)
    made = finish(model, call, items, model.forward(items))
    assert isinstance(made, MultiVectors)
    assert made.tokens is not None
    assert made.tokens[0] == ["Q", "u", "e", "r", "y", ":", "Ġthe", "Ġ", "in"]
    assert made.tokens[1].count("<|image_pad|>") == 4
    assert [len(vectors) for vectors in made.vectors] == [len(tokens) for tokens in made.tokens]
    assert all(vectors.shape[1] == tiny.PROJECTED for vectors in made.vectors)


def test_late_chunking_pools_each_text_of_one_row(model: VisionEmbedder, networks: dict) -> None:
    parts = ["the search", " finds", " what people mean"]
    call = Embed(inputs=parts, task="retrieval.passage", late_chunking="inputs")
    items = model.prepare(call)
    made = torch.from_numpy(finish(model, call, items, model.forward(items)).vectors)  # type: ignore[union-attr]
    hidden, _ = states(networks["retrieval"][0], "".join(parts), "Passage: ")
    tokenizer = tiny.tokenizer()
    n_prompt = len(tokenizer.encode("Passage: ").ids)
    ends = np.cumsum([n_prompt, *(len(tokenizer.encode(part).ids) for part in parts)])
    # The prompt's last blank joins `the`: one token that ends in the first part.
    joined = len(tokenizer.encode("Passage: the").ids) - n_prompt - len(tokenizer.encode("the").ids)
    ends[1:] += joined
    starts = [ends[0] + joined, *ends[1:-1]]
    wanted = [hidden[start:stop].mean(0) for start, stop in zip(starts, ends[1:], strict=True)]
    assert_same(made, torch.stack(wanted))


def test_late_chunking_refuses_images(model: VisionEmbedder) -> None:
    with pytest.raises(InputError, match="late_chunking: Late chunking reads all inputs as one text"):
        model.prepare(Embed(inputs=["a", png(PICTURES[0])], task="code.query", late_chunking="inputs"))


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 200 * min(size))


@settings(deadline=None, max_examples=60)
@given(size=sizes)
def test_what_the_tower_is_given_equals_transformers_bit_for_bit(model: VisionEmbedder, size: tuple[int, int]) -> None:
    image = picture(*size)
    patches = model.prompt.sizes.patches(image, "image")
    read = processor()(images=[Image.fromarray(image)], return_tensors="pt")
    assert read["image_grid_thw"].tolist() == [[1, patches.rows, patches.columns]]
    wanted = read["pixel_values"].view(len(patches.pixels), 3, 2, -1)
    numbers = model.model.vision.embedding.numbers([patches]).view(len(patches.pixels), 3, -1)
    assert torch.equal(wanted[:, :, 0], numbers)
    assert torch.equal(wanted[:, :, 1], numbers)


@settings(deadline=None, max_examples=30)
@given(grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 4)), max_size=4))
def test_positions_equal_transformers(networks: dict, grids: list[tuple[int, int, int]]) -> None:
    ids, slots = [1, 2], []
    for rows, columns, after in grids:
        slots.append(Slot(len(ids) + 1, rows, columns))
        ids += [258, *[260] * (rows * columns), 259, *[3] * after]
    given = torch.tensor([ids])
    wanted, _ = networks["code"][0].get_rope_index(
        given,
        (given == 260).long(),
        torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns, _ in grids]) if grids else None,
        attention_mask=torch.ones_like(given),
    )
    np.testing.assert_array_equal(positions(len(ids), slots), wanted[:, 0].numpy())


values = st.one_of(
    st.text(min_size=1, max_size=20),
    st.tuples(st.integers(20, 150), st.integers(20, 150)).map(lambda size: png(picture(*size))),
)
asked = st.tuples(values, st.sampled_from(ASKED))


@settings(deadline=None, max_examples=25)
@given(several=st.lists(asked, min_size=2, max_size=7), output=st.sampled_from(("dense", "multi")))
def test_a_row_alone_equals_the_row_in_mixed_company(
    model: VisionEmbedder, several: list[tuple[Input, str]], output: Output
) -> None:
    assert_same_alone(partial(run, model, output=output), several, atol=2e-5, rtol=1e-4)


def test_counts_and_a_file_sent_twice(model: VisionEmbedder) -> None:
    call = Embed(inputs=[png(PICTURES[0]), "the", png(PICTURES[0])], task="text-matching")
    items = model.prepare(call)
    assert items[0] is items[2]
    n_text = len(tiny.tokenizer().encode("Query: the").ids)
    n_around = len(tiny.tokenizer().encode("".join(PROMPT)).ids)
    assert [item.n_counted for item in items] == [n_around + 4, n_text, n_around + 4]
    made = finish(model, call, items, model.forward(items))
    assert (made.n_tokens, made.n_media) == (2 * (n_around + 4) + n_text, {"image": 8})
    again = model.prepare(Embed(inputs=call.inputs, task="text-matching", output="multi"))
    assert again[0] is again[2]


def test_the_pixels_of_one_picture_are_read_once_in_a_batch(
    model: VisionEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [item] = model.prepare(Embed(inputs=[png(PICTURES[1])], task="code.query"))
    other = Item(features=item.features, n_tokens=item.n_tokens)
    seen: list[int] = []
    vision = model.model.vision

    def counted(images: Sequence[Patches]) -> list[Tensor]:
        seen.append(len(images))
        return vision(images)

    counted.shape = vision.shape  # type: ignore[attr-defined]
    monkeypatch.setattr(model.model, "vision", counted)
    first, second = model.forward([item, other])
    np.testing.assert_array_equal(first, second)
    assert seen == [1]


@pytest.mark.parametrize("changes", [{"newer_names": True}, {"folders": True}])
def test_other_names_load_the_same(tmp_path: Path, model: VisionEmbedder, changes: dict) -> None:
    other = loaded(qwen_vl(tmp_path, "v4", **changes))
    asked = [("the search", "code.query"), (png(PICTURES[1]), "text-matching")]
    for found, wanted in zip(run(other, asked), run(model, asked), strict=True):
        assert_same(found, wanted)


def test_bfloat16_is_close(directory: Path, model: VisionEmbedder) -> None:
    asked = [(value, "retrieval.query") for value in (*TEXTS, *map(png, PICTURES))]
    rounded = loaded(directory, torch.bfloat16)
    found, wanted = torch.stack(run(rounded, asked)), torch.stack(run(model, asked))
    assert torch.cosine_similarity(found, wanted).min() > 0.98


def test_too_long_inputs_are_refused(directory: Path) -> None:
    short = loaded(directory, context=40)
    with pytest.raises(TooLongError, match="Input 1 has"):
        short.prepare(Embed(inputs=["a", "the " * 60], task="code.query"))
    with pytest.raises(InputError, match="This image has 48 tokens and exceeds the model's maximum of 40"):
        short.prepare(Embed(inputs=["a", png(PICTURES[2])], task="code.query"))
    with pytest.raises(InputError, match="201 pixels"):
        short.prepare(Embed(inputs=[png(picture(201, 1))], task="code.query"))
    with pytest.raises(InputError, match="cannot make one of several parts"):
        short.prepare(Embed(inputs=[Group(["a"])], task="code.query"))


ADAPTER = "base_model.model.model.layers.1.mlp.up_proj.lora_B.code.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ADAPTER, None, r"lacks 1 tensors: layers\.1\.mlp\.up_proj\.lora_B of code"),
        (ADAPTER.replace(".1.", ".2."), torch.zeros(96, 4), "does not know: .*layers.2.mlp.up_proj"),
        (ADAPTER.replace("code", "coding"), torch.zeros(96, 4), "does not know: .*coding"),
        (ADAPTER, torch.zeros(96, 3), r"should have the shape \[96, 4\]"),
        ("base_model.model.multi_vector_projector.lora_A.retrieval.weight", None, "multi_vector_projector.lora_A"),
    ],
)
def test_adapters_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    path = qwen_vl(tmp_path, "v4") / "adapters" / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in (load_file(path) | {name: change}).items() if tensor is not None}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)


def test_missing_adapters_are_named(tmp_path: Path) -> None:
    (qwen_vl(tmp_path, "v4") / "adapters").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors in .*adapters/retrieval"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visual.blocks.1.attn.qkv.bias", None, r"not in the checkpoint: visual\.blocks\.1\.attn\.qkv\.bias"),
        ("visual.merger.more.weight", torch.zeros(2), r"not known to the model: visual\.merger\.more"),
        ("model.layers.0.self_attn.q_proj.bias", None, "not in the checkpoint: model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(2), "not known to the model: model.layers.2"),
        ("multi_vector_projector.bias", None, r"not in the checkpoint: multi_vector_projector\.bias"),
        ("score.weight", torch.zeros(2), "not known to the model: score"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(resave(qwen_vl(tmp_path, "v4"), **{name: change}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_pixels": None}, r"preprocessor_config\.json does not say max_pixels"),
        ({"image_mean": None}, "does not say image_mean"),
        ({"patch_size": 16}, r"\{'patch_size': 16\} does not go with"),
        ({"resample": 2}, "'resample': 2"),
        ({"rescale_factor": 0.5}, "'rescale_factor': 0.5"),
    ],
)
def test_another_image_processing_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(qwen_vl(tmp_path, "v4", processor=changes))


def test_limits_in_the_newer_keys_are_read(tmp_path: Path) -> None:
    size = {"shortest_edge": 784, "longest_edge": 7840}
    other = loaded(qwen_vl(tmp_path, "v4", processor={"min_pixels": None, "max_pixels": None, "size": size}))
    assert (other.prompt.sizes.least, other.prompt.sizes.most) == (784, 7840)


def test_an_id_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names token 280, and the language model has 280 tokens"):
        loaded(resave(qwen_vl(tmp_path, "v4"), config={"image_token_id": 280}))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"use_sliding_window": True}, "use_sliding_window is not served"),
        ("text_config", {"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "type .*yarn"),
        ("text_config", {"rope_scaling": {"mrope_section": [2, 3, 4]}}, "the sum 8"),
        ("text_config", {"rope_scaling": {}}, "does not say mrope_section"),
        ("vision_config", {"window_size": 50}, "window_size 50 is no multiple of 28"),
        ("vision_config", {"out_hidden_size": 32}, "pictures' states have 32 numbers"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, part: str, change: dict, message: str) -> None:
    path = qwen_vl(tmp_path, "v4") / "config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)
