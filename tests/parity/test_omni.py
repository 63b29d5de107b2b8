"""jina-embeddings-v5-omni against transformers' classes, put together by hand."""

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

from fundament import media
from fundament.backbone.omni import OmniEmbedder
from fundament.backbone.towers.images import Patches, frame_size
from fundament.backbone.towers.sounds import log_mel, mel_bands
from fundament.catalog import CATALOG
from fundament.core import Embed, Group, Input, Media, MediaLimits
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from tests.checkpoints import assert_same_alone, llama, load, resave
from tests.checkpoints import omni as tiny
from tests.checkpoints.clip import picture, png
from tests.checkpoints.omni import IDS, Size, omni
from tests.media import files

Pixels = NDArray[np.uint8]

SPEC = CATALOG["jina-embeddings-v5-omni-small"]
SIZES: tuple[Size, ...] = ("small", "nano")
ASKED = list(SPEC.tasks)
IMAGE, VIDEO = (1_024, 20_480), (2_048, 81_920)
LOUD = np.random.default_rng(0).normal(size=21_000).astype(np.float32)


def tone(n: int) -> Media:
    return Media("audio", files.wav(0.3 * np.sin(np.arange(n) / 7), rate=16_000))


def clip_of(n: int, *, sound: bool = False) -> Media:
    return Media("video", files.video([30 + 9 * i for i in range(n)], width=64, height=96, tone=sound))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("omni")
    return {size: omni(root / size, size) for size in SIZES}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, OmniEmbedder]:
    return {size: loaded(directory) for size, directory in directories.items()}


@pytest.fixture(scope="module")
def networks() -> dict[tuple[str, str], nn.Module]:
    return {(size, task): tiny.network(size, task) for size in SIZES for task in llama.ADAPTERS}


def loaded(directory: Path, dtype: torch.dtype = torch.float32, context: int = 2048) -> OmniEmbedder:
    kept = {name: getattr(SPEC, name) for name in ("tasks", "default_task", "modalities", "groups")}
    model = load(directory, "omni", dtype=dtype, context=context, **{**kept, "dim": tiny.HIDDEN})
    assert isinstance(model, OmniEmbedder)
    # Pictures of the published sizes would take longer than they tell.
    model.reader.limits = replace(model.reader.limits, image=IMAGE, video=VIDEO)
    return model


def vectors(model: OmniEmbedder, asked: Sequence[tuple[Input, str]]) -> Tensor:
    rows = [model.prepare(Embed(inputs=[value], task=task))[0] for value, task in asked]
    return torch.from_numpy(np.stack(model.forward(rows)))


# By hand: the parts of an input as ids and states, one after the other.


def processor(limits: tuple[int, int]) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def smart_resize() -> Callable[..., tuple[int, int]]:
    """How transformers' processor of Qwen3-VL sizes frames; its module itself needs torchvision."""
    directory = Path(str(transformers.__file__)).parent / "models" / "qwen3_vl"
    tree = ast.parse((directory / "video_processing_qwen3_vl.py").read_text())
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "smart_resize"]
    found: dict[str, Any] = {"math": math}
    exec(compile(tree, "smart_resize", "exec"), found)
    resize: Callable[..., tuple[int, int]] = found["smart_resize"]
    return resize


def resized(frame: Pixels, n_frames: int) -> Pixels:
    height, width = smart_resize()(max(2, n_frames), *frame.shape[:2], 2, 32, *VIDEO)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def merged(size: Size, task: str, frames: Sequence[Pixels], limits: tuple[int, int]) -> Tensor:
    """What the language model is given of a picture of one frame or two."""
    read = [processor(limits)(images=[Image.fromarray(frame)], return_tensors="pt") for frame in frames]
    both = [one["pixel_values"].view(-1, 3, 2, 256) for one in read]
    pixels = torch.stack([both[0][:, :, 0], both[-1][:, :, 0]], dim=2).flatten(1)
    with torch.inference_mode():
        states = tiny.vision_network()(pixels, read[0]["image_grid_thw"]).last_hidden_state
    stem, own = f"mergers.{task.replace('-', '_')}", tiny.parts(size)
    x = F.layer_norm(states, states.shape[-1:], own[f"{stem}.norm.weight"], own[f"{stem}.norm.bias"], 1e-6)
    x = F.linear(x.view(-1, 4 * x.shape[1]), own[f"{stem}.linear_fc1.weight"], own[f"{stem}.linear_fc1.bias"])
    return F.linear(F.gelu(x), own[f"{stem}.linear_fc2.weight"], own[f"{stem}.linear_fc2.bias"])


def heard(size: Size, task: str, samples: np.ndarray) -> Tensor:
    """What the language model is given of a sound."""
    extractor = WhisperFeatureExtractor(feature_size=tiny.MELS)
    loudest = np.abs(samples).max()
    read = extractor(samples / max(loudest, 1), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    n_frames = read["attention_mask"].sum()
    with torch.inference_mode():
        states = tiny.audio_network()(read["input_features"][0, :, :n_frames], n_frames[None]).last_hidden_state
    stem, own = f"audio_projectors.{task.replace('-', '_')}", tiny.parts(size)
    return F.linear(states, own[f"{stem}.weight"], own[f"{stem}.bias"])


def embedded(size: Size, task: str, value: str | Media, prompt: str) -> Tensor:
    """One part of an input, embedded."""
    tokenizer = llama.tokenizer(ends=False)

    def look(ids: list[int]) -> Tensor:
        return tiny.embeddings(size, task, torch.tensor(ids, dtype=torch.long))

    def around(kind: str, states: Tensor) -> Tensor:
        if kind == "vision" and size == "nano":
            return states
        return torch.cat((look([IDS[f"{kind}_start"]]), states, look([IDS[f"{kind}_end"]])))

    if isinstance(value, str):
        return look(tokenizer.encode(prompt + value).ids)
    if value.kind == "image":
        return around("vision", merged(size, task, [*media.pictures(value)], IMAGE))
    samples = media.sound(value, 16_000)
    sound = [] if samples is None else [around("audio", heard(size, task, samples))]
    if value.kind == "audio":
        return sound[0]
    frames = [frame for frame, _ in media.frames(value, 32)]
    parts = [*sound]
    for first in range(0, len(frames), 2):
        last = min(first + 1, len(frames) - 1)
        if size == "small":
            parts.append(look(tokenizer.encode(f"<{(first / 24 + last / 24) / 2:.1f} seconds>").ids))
        pair = [resized(frames[place], len(frames)) for place in (first, last)]
        parts.append(around("vision", merged(size, task, pair, (1, VIDEO[1]))))
    return torch.cat(parts)


def expected(networks: dict, size: Size, value: Input, task: str) -> Tensor:
    adapter, prompt = SPEC.tasks[task].adapter, SPEC.tasks[task].prompt
    assert adapter is not None
    parts = []
    for part in value.parts if isinstance(value, Group) else [value]:
        parts.append(embedded(size, adapter, part, prompt))
        prompt = "" if isinstance(part, str) else prompt
    end = llama.tokenizer(ends=True).token_to_id(llama.END)
    parts.append(tiny.embeddings(size, adapter, torch.tensor([end])))
    return tiny.last_state(networks[size, adapter], torch.cat(parts), causal=size == "small")


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-4)


INPUTS: list[Input] = [
    "what the search finds",
    png(picture(64, 96)),
    png(picture(200, 70)),
    tone(16_000),
    tone(2_345),
    Media("audio", files.wav(3 * LOUD, rate=16_000)),
    clip_of(4),
    clip_of(5, sound=True),
    clip_of(1),
    Group(["the", png(picture(64, 64)), " search", tone(900)]),
    Group([clip_of(2), png(picture(80, 64))]),
    Group([png(picture(80, 64)), tone(900), "the", png(picture(80, 64)), tone(900)]),
]


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_input_equals_transformers(models: dict[str, OmniEmbedder], networks: dict, size: Size) -> None:
    asked = [(value, ASKED[place % len(ASKED)]) for place, value in enumerate(INPUTS)]
    asked += [(value, task) for value in (INPUTS[2], INPUTS[4]) for task in ASKED]
    wanted = torch.stack([expected(networks, size, value, task) for value, task in asked])
    assert_same(vectors(models[size], asked), wanted)


def test_small_files_that_become_large_rows_are_refused(models: dict[str, OmniEmbedder]) -> None:
    model, image = models["small"], png(picture(64, 96))
    [item] = model.prepare(Embed(inputs=[image]))
    most = sum(array.nbytes for array in item.features.values()) + item.features["pixels0"].nbytes // 2
    file = replace(image, limits=MediaLimits(call_bytes=most))
    model.prepare(Embed(inputs=[file, file, "a text", Group(["with a text", file])]))  # once in memory
    with pytest.raises(InputError, match="MB decoded"):
        model.prepare(Embed(inputs=[file, replace(file, content=png(picture(66, 96)).content)]))


def test_frames_are_sized_as_transformers_does() -> None:
    reference, limits = smart_resize(), (131_072, 12_845_056)
    for form in [(720, 1280), (1080, 1920), (480, 640), (64, 64), (24, 640), (16, 16), (2160, 31)]:
        for n_frames in range(2, 33):
            found = frame_size(n_frames, *form, factor=32, least=limits[0], most=limits[1])
            assert found == reference(n_frames, *form, 2, 32, *limits), (form, n_frames)


@pytest.mark.parametrize("size", [(64, 96), (200, 70), (33, 300), (500, 500)])
def test_what_the_tower_is_given_equals_transformers_bit_for_bit(
    models: dict[str, OmniEmbedder], size: tuple[int, int]
) -> None:
    model, image = models["small"], picture(*size)
    [item] = model.prepare(Embed(inputs=[png(image)]))
    read = processor(IMAGE)(images=[Image.fromarray(image)], return_tensors="pt")
    [[_, rows, columns]] = read["image_grid_thw"].tolist()
    assert item.features["pixels0"].shape == (rows * columns, 3 * 16 * 16)  # once, though the tower reads two frames
    patches = Patches(item.features["pixels0"], rows, columns)
    assert torch.equal(model.vision.embedding.numbers([patches]), read["pixel_values"])


@pytest.mark.parametrize("n", [400, 16_000, 16_001, 480_000, 500_000])
def test_frames_of_sounds_equal_whispers(n: int) -> None:
    samples = np.random.default_rng(n).normal(scale=0.1, size=n).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=128)
    read = extractor(samples, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
    n_frames = int(read["attention_mask"].sum())
    np.testing.assert_array_equal(log_mel(samples, 128), read["input_features"][0, :, :n_frames])
    np.testing.assert_allclose(mel_bands(128), extractor.mel_filters.T, atol=1e-7)


values = st.one_of(
    st.text(min_size=1, max_size=15),
    st.tuples(st.integers(20, 90), st.integers(20, 90)).map(lambda size: png(picture(*size))),
    st.integers(400, 5_000).map(tone),
    st.integers(1, 4).map(clip_of),
)
rows = st.tuples(values, st.sampled_from(ASKED))


@settings(deadline=None, max_examples=10)
@given(asked=st.lists(rows, min_size=2, max_size=6), size=st.sampled_from(SIZES))
def test_a_row_alone_equals_the_row_in_mixed_company(
    models: dict[str, OmniEmbedder], asked: list[tuple[Input, str]], size: Size
) -> None:
    assert_same_alone(partial(vectors, models[size]), asked, atol=5e-5, rtol=1e-4)


def test_counts_order_and_files_sent_twice(models: dict[str, OmniEmbedder]) -> None:
    model = models["small"]
    group = Group([png(picture(64, 64)), "the"])
    call = Embed(inputs=[png(picture(64, 96)), "the", tone(16_000), group, Group(list(group.parts)), tone(16_000)])
    items = model.prepare(call)
    assert items[2] is items[5]
    assert items[3] is items[4]
    assert [item.n_media for item in items[:4]] == [{"image": 6}, {}, {"audio": 25}, {"image": 4}]
    assert [item.n_counted for item in items] == [len(item.features["ids"]) for item in items]
    made = finish(model, call, items, model.forward(items))
    assert made.n_media == {"image": 14, "audio": 50}
    turned = model.prepare(Embed(inputs=[Group([*reversed(group.parts)])]))
    assert not np.array_equal(turned[0].features["ids"], items[3].features["ids"])


def test_a_file_of_several_groups_is_decoded_and_read_once(
    models: dict[str, OmniEmbedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["small"]
    shown, heard = png(picture(64, 96)), tone(16_000)
    inputs = [Group([shown, "the"]), shown, Group([heard, shown, heard]), Group(["search", heard])]
    alone = torch.cat([vectors(model, [(value, "clustering")]) for value in inputs])
    decoded: list[str] = []
    seen: list[int] = []
    for name in ("pictures", "sound"):
        read = getattr(media, name)
        monkeypatch.setattr(media, name, lambda *asked, read=read, name=name: decoded.append(name) or read(*asked))
    for name in ("vision", "audio"):
        tower = getattr(model, name)

        def counted(parts: Sequence, tower: Callable = tower) -> list[Tensor]:
            seen.append(len(parts))
            return tower(parts)

        counted.merge = model.vision.merge  # type: ignore[attr-defined]
        monkeypatch.setattr(model, name, counted)
    items = model.prepare(Embed(inputs=inputs, task="clustering"))
    assert decoded == ["pictures", "sound"]
    assert_same(torch.from_numpy(np.stack([model.forward([item])[0] for item in items])), alone)
    assert seen == [1, 1]
    assert [item.n_tokens - len(item.features["ids"]) for item in items] == [24, 0, 50, 0]


def test_the_published_sizes_of_images(directories: dict[str, Path]) -> None:
    model = load(directories["small"], "omni", dim=tiny.HIDDEN, tasks=SPEC.tasks, context=4096)
    assert isinstance(model, OmniEmbedder)
    for size, n in (((64, 64), 256), ((1300, 1300), 1225)):
        [item] = model.prepare(Embed(inputs=[png(picture(*size))], task="clustering"))
        assert item.n_media == {"image": n}


@pytest.mark.parametrize(("tower", "marks"), [("visual", ""), ("vision_tower", ".weight")])
def test_other_names_load_the_same(tmp_path: Path, models: dict[str, OmniEmbedder], tower: str, marks: str) -> None:
    other = loaded(omni(tmp_path, "small", tower=tower, marks=marks))
    asked = [(value, "clustering") for value in INPUTS[:4]]
    assert_same(vectors(other, asked), vectors(models["small"], asked))


def test_what_cannot_be_read_is_refused(directories: dict[str, Path], models: dict[str, OmniEmbedder]) -> None:
    short = loaded(directories["small"], context=20)
    with pytest.raises(TooLongError, match="Input 1 has"):
        short.prepare(Embed(inputs=["a", tone(16_000)]))
    with pytest.raises(InputError, match="A PDF is several images"):
        models["small"].prepare(Embed(inputs=[Group([Media("pdf", files.pdf([b""]))])]))
    with pytest.raises(InputError, match="not longer than"):
        models["small"].prepare(Embed(inputs=[tone(100)]))


def test_a_sound_of_more_than_is_read_is_refused_or_cut(models: dict[str, OmniEmbedder]) -> None:
    model, long, whole = models["nano"], tone(40 * 16_000), tone(30 * 16_000)
    with pytest.raises(InputError, match=r"takes 40 seconds, and the model reads 30\. Use 'truncate: true'"):
        model.prepare(Embed(inputs=[long]))
    with pytest.raises(InputError, match="takes 40 seconds"):
        model.prepare(Embed(inputs=[Group(["a", long])]))
    cut = model.prepare(Embed(inputs=[long, Group(["a", long]), whole], truncate=True))
    assert [item.n_truncated for item in cut] == [1, 1, 0]
    first, _, second = model.forward(cut)
    assert_same(torch.from_numpy(first), torch.from_numpy(second))
    [padded] = model.prepare(Embed(inputs=[tone(30 * 16_000 + 9_000)]))  # as encoders write thirty seconds
    assert padded.n_truncated == 0


def test_each_page_of_a_pdf_is_a_row(models: dict[str, OmniEmbedder]) -> None:
    items = models["nano"].prepare(Embed(inputs=[Media("pdf", files.many_pages(3))]))
    assert len(items) == 3


def test_an_id_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names token 5000"):
        loaded(resave(omni(tmp_path, "nano"), config={"audio_token_id": 5000}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mergers.clustering.norm.bias", None, r"not in the checkpoint: mergers\.clustering\.norm\.bias"),
        ("mergers.coding.norm.bias", torch.zeros(2), r"not known to the model: mergers\.coding"),
        ("audio_tower.layers.1.fc1.bias", None, r"not in the checkpoint: audio_tower\.layers\.1\.fc1\.bias"),
        ("audio_tower.proj.weight", torch.zeros(2), r"not known to the model: audio_tower\.proj"),
        ("vision_tower.pos_embed.weight", torch.zeros(48, 24), "pos_embed.weight should have the shape"),
        ("language_model.layers.0.more.weight", torch.zeros(2), "not known to the model: language_model"),
        ("other.weight", torch.zeros(2), "not known to the model: other"),
        ("task_token_embeddings.clustering", torch.zeros(3, 32), "should have the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(resave(omni(tmp_path, "small"), **{name: change}))


ADAPTER = "base_model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ADAPTER, None, r"not in the checkpoint: .*layers\.1\.mlp\.up_proj"),
        (ADAPTER.replace(".1.", ".7."), torch.zeros(96, 4), r"not known to the model: .*layers\.7\.mlp\.up_proj"),
        (ADAPTER, torch.zeros(96, 3), "should have the shape"),
    ],
)
def test_adapters_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    [path] = omni(tmp_path, "small").glob("adapters/clustering/*.safetensors")
    tensors = load_file(path)
    assert ADAPTER in tensors
    save_file({key: tensor for key, tensor in (tensors | {name: change}).items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)
