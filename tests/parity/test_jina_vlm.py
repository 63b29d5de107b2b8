"""jina-vlm against transformers' SigLIP and Qwen3, plain readings of tiles and pooling, and writing without a cache."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel

from fundament.backbone.picture_writer import PictureWriter, Writing
from fundament.backbone.towers.tiles import COLUMN, PATCH, START, STOP, Tiles
from fundament.core import Delta, Generate, Message
from fundament.errors import CheckpointError, ConversationTooLongError, InputError
from tests.checkpoints import jina_vlm as tiny
from tests.checkpoints import load, resave
from tests.checkpoints.clip import picture, png
from tests.checkpoints.jina_vlm import jina_vlm

PUBLISHED = Tiles(
    side=378, patch=14, margin=4, cell=2, most=12, least_pixels=3136, most_pixels=1_003_520, filter="bicubic"
)

Part = str | tuple[int, int]
"""A text, or the size of a picture."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PictureWriter:
    return loaded(jina_vlm(tmp_path_factory.mktemp("vlm")))


def loaded(directory: Path, context: int = 2048) -> PictureWriter:
    model = load(directory, "jina_vlm", context=context, kind="chat", modalities=("text", "image"))
    assert isinstance(model, PictureWriter)
    return model


def asked(*parts: Part, **fields: object) -> Generate:
    sent = [part if isinstance(part, str) else png(picture(*part)) for part in parts]
    return Generate(messages=[Message("user", sent)], **fields)  # type: ignore[arg-type]


def write(model: PictureWriter, *calls: Generate, size: int = 10_000) -> list[list[Delta]]:
    """The answers to conversations that begin together, each reading at most so many tokens at a time."""
    answers = [model.begin(call, model.prepare(call)[0]) for call in calls]
    found: list[list[Delta]] = [[] for _ in calls]
    going = list(range(len(calls)))
    while going:
        sizes = [min(size, answers[place].n_ahead) for place in going]
        chunks = model.step([answers[place] for place in going], sizes)
        for place, chunk in zip(going, chunks, strict=True):
            found[place] += [chunk] if chunk else []
        going = [place for place in going if not (found[place] and found[place][-1].finish)]
    return found


def written(model: PictureWriter, call: Generate) -> list[int]:
    """The ids of an answer."""
    answer = begun(model, call)
    while not (chunk := model.step([answer], [answer.n_ahead])[0]) or not chunk.finish:
        pass
    return answer.ids[answer.n_prompt :].tolist()


def begun(model: PictureWriter, call: Generate) -> Writing:
    return model.begin(call, model.prepare(call)[0])


def test_a_step_that_fails_after_the_layers_can_be_taken_again(
    model: PictureWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [asked(text, max_tokens=6, temperature=0.0) for text in ("the search engine", "what people mean")]
    whole, head, n_calls = write(model, *calls), model.head, 0

    def failing(states: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls % 2:
            raise torch.OutOfMemoryError("no room for the scores")
        return head(states)

    monkeypatch.setattr(model, "head", failing)
    step = model.step

    def stubborn(answers: Sequence[Writing], sizes: Sequence[int]) -> list[Delta | None]:
        try:
            return step(answers, sizes)
        except torch.OutOfMemoryError:
            return step(answers, sizes)

    monkeypatch.setattr(model, "step", stubborn)
    assert write(model, *calls) == whole
    assert n_calls > 6


# Tiles


def slow_tiling(height: int, width: int) -> tuple[int, int]:
    """The tiling of the least enlargement, else of the least reduction, by trying each in turn."""
    best, best_key = (1, 1), (math.inf, math.inf)
    for n in range(1, 13):
        for rows in range(1, n + 1):
            if n % rows:
                continue
            scale = min(np.float32(266 * rows) / np.float32(height), np.float32(266 * (n // rows)) / np.float32(width))
            key = (0, scale) if scale >= 1 else (1, -scale)
            if key < best_key:
                best, best_key = (rows, n // rows), key
    return best


def slow_places(rows: int, columns: int) -> list[int]:
    """Which token each cell becomes: numbers painted on the whole, each tile's part of it read back."""
    marks = PUBLISHED.marks(rows, columns).tolist()
    cells = [place for place, mark in enumerate(marks) if mark == PATCH]
    found = cells[: 14 * 14]
    whole = np.array(cells[14 * 14 :]).reshape(10 * rows + 4, 10 * columns + 4)
    for i in range(rows):
        for j in range(columns):
            tile = np.full((14, 14), -1)
            top, bottom = (0 if i == 0 else 2), (14 if i == rows - 1 else 12)
            left, right = (0 if j == 0 else 2), (14 if j == columns - 1 else 12)
            for y in range(top, bottom):
                for x in range(left, right):
                    tile[y, x] = whole[10 * i + y, 10 * j + x]
            found += tile.ravel().tolist()
    return found


@pytest.mark.parametrize(
    ("size", "tiling", "n_tokens"),
    [((64, 64), (1, 1), 424), ((1000, 1000), (3, 3), 1404), ((720, 1280), (3, 4), 1744), ((3500, 130), (12, 1), 2074)],
)
def test_pictures_have_the_recorded_numbers_of_tokens(
    size: tuple[int, int], tiling: tuple[int, int], n_tokens: int
) -> None:
    pixels = np.zeros((*size, 3), np.uint8)
    rows, columns, _ = PUBLISHED._plan(pixels)
    assert (rows, columns) == tiling
    assert PUBLISHED.count(pixels, "image") == n_tokens == 214 + (10 * rows + 4) * (10 * columns + 5)


@settings(deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_each_cell_of_the_whole_becomes_one_token(rows: int, columns: int) -> None:
    marks, places = PUBLISHED.marks(rows, columns), PUBLISHED.places(rows, columns)
    assert places.tolist() == slow_places(rows, columns)
    assert sorted(places[places >= 0]) == np.flatnonzero(marks == PATCH).tolist()
    assert (marks == START).sum() == (marks == STOP).sum() == 2
    assert (marks == COLUMN).sum() == 14 + 10 * rows + 4


@settings(deadline=None)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_tilings_enlarge_as_little_as_they_can(height: int, width: int) -> None:
    rows, columns, (tall, wide) = PUBLISHED._plan(np.zeros((height, width, 3), np.uint8))
    if tall > 112 and wide > 112:
        assert (rows, columns) == slow_tiling(tall - 112, wide - 112)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(60, 200), (500, 400), (378, 378)])
def test_crops_overlap_and_lie_as_said(size: tuple[int, int], kind: str) -> None:
    tiles = replace(PUBLISHED, filter=kind)
    crops = tiles.cut(picture(*size), "image")
    image = torch.from_numpy(picture(*size)).permute(2, 0, 1).float()[None] / 255

    def resized(x: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(x, (height, width), mode=kind, antialias=True).clip(0, 1)

    fitted = tiles._plan(picture(*size))[2]
    image = resized(image, *fitted)
    large = resized(image, crops.rows * 266 + 112, crops.columns * 266 + 112)[0] * 2 - 1
    n = 0
    for crop in crops.pixels[1:]:
        i, j = divmod(n, crops.columns)
        for patch, number in ((crop[0], 0), (crop[27 * 5 + 9], 27 * 5 + 9)):
            y, x = 266 * i + 14 * (number // 27), 266 * j + 14 * (number % 27)
            wanted = large[:, y : y + 14, x : x + 14].permute(1, 2, 0).flatten()
            torch.testing.assert_close(torch.from_numpy(patch), wanted, atol=1e-5, rtol=0)
        n += 1
    assert n == crops.rows * crops.columns
    small = resized(image, 378, 378)[0] * 2 - 1
    torch.testing.assert_close(
        torch.from_numpy(crops.pixels[0][28]), small[:, 14:28, 14:28].permute(1, 2, 0).flatten(), atol=1e-5, rtol=0
    )


def test_lines_are_refused(model: PictureWriter) -> None:
    with pytest.raises(InputError, match="201 x 1 pixels"):
        model.prepare(asked((1, 201)))


# The tower


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    """transformers' SigLIP 2 on the same weights; it has no pooling of its own here."""
    made = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=tiny.SEEN,
            intermediate_size=tiny.SEEN_INNER,
            num_hidden_layers=tiny.SEEN_LAYERS,
            num_attention_heads=tiny.SEEN_HEADS,
            num_patches=(tiny.SIDE // tiny.PATCH) ** 2,
            patch_size=tiny.PATCH,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
    )
    inside = "model.vision_model."
    found = {name.removeprefix(inside): t for name, t in tiny.tensors().items() if name.startswith(inside)}
    state = {
        "embeddings.patch_embedding.weight": found["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": found["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": found["pos_embed"],
        "post_layernorm.weight": found["post_lnorm.weight"],
        "post_layernorm.bias": found["post_lnorm.bias"],
    }
    for i in range(tiny.SEEN_LAYERS):
        ours, theirs = f"layers.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            state[f"{theirs}layer_norm1.{kind}"] = found[f"{ours}attn_lnorm.{kind}"]
            state[f"{theirs}layer_norm2.{kind}"] = found[f"{ours}ffn_lnorm.{kind}"]
            state[f"{theirs}self_attn.out_proj.{kind}"] = found[f"{ours}attn.out.{kind}"]
            state[f"{theirs}mlp.fc1.{kind}"] = found[f"{ours}ffn.up.{kind}"]
            state[f"{theirs}mlp.fc2.{kind}"] = found[f"{ours}ffn.down.{kind}"]
        for part, weight in zip("qkv", found[f"{ours}attn.qkv_w.weight"].chunk(3), strict=True):
            state[f"{theirs}self_attn.{part}_proj.weight"] = weight
            state[f"{theirs}self_attn.{part}_proj.bias"] = found[f"{ours}attn.{part}_b"]
    own = made.state_dict().keys()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in own) else ""
    made.load_state_dict({f"{prefix}{name}": tensor for name, tensor in state.items()}, strict=True)
    return made.eval()


def slow_states(tower: nn.Module, crops: Tensor) -> Tensor:
    """The states of each cell of one picture's crops, cell by cell, `[crops * 16, hidden]`."""
    inside = "model.vision_model.vl_connector."
    weights = {name.removeprefix(inside): t for name, t in tiny.tensors().items() if name.startswith(inside)}
    whole = {"pixel_attention_mask": torch.ones(crops.shape[:2]), "spatial_shapes": torch.tensor([[7, 7]] * len(crops))}
    with torch.inference_mode():
        hidden = tower(pixel_values=crops, output_hidden_states=True, **whole).hidden_states[1:]  # without embeddings
    read = torch.cat([hidden[7], hidden[1]], dim=-1)  # -4 and -10 of ten layers and the last norm
    read[(crops == -1).flatten(1).all(1)] = 0
    read[-1] = read[-1] + weights["pad_embed"][1]
    states = []
    for crop in read:
        grid = torch.zeros(8, 8, crop.shape[1])
        grid[:7, :7] = crop.view(7, 7, -1)
        for y in range(0, 8, 2):
            for x in range(0, 8, 2):
                cell = grid[y : y + 2, x : x + 2].reshape(4, -1)
                q = F.linear(cell.mean(0), weights["pooling.q_w.weight"], weights["pooling.q_b"])
                bias = torch.cat((weights["pooling.k_b"], weights["pooling.v_b"]))
                k, v = F.linear(cell, weights["pooling.kv_w.weight"], bias).chunk(2, dim=-1)
                mixed = []
                for head in (slice(0, 16), slice(16, 32)):
                    shares = torch.softmax(k[:, head] @ q[head] / 4, dim=0)
                    mixed.append(shares @ v[:, head])
                pooled = F.linear(torch.cat(mixed), weights["pooling.out.weight"], weights["pooling.out.bias"])
                value, gate = F.linear(pooled, weights["projector.up.weight"]).chunk(2)
                states.append(F.linear(F.silu(gate) * value, weights["projector.down.weight"]))
    return torch.stack(states)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding, which ten layers of random weights enlarge: states here are hundreds."""
    torch.testing.assert_close(found, wanted, atol=float(wanted.abs().max()) * 1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(60, 70), (60, 300), (200, 150)])
def test_states_of_pictures_equal_transformers(model: PictureWriter, tower: nn.Module, size: tuple[int, int]) -> None:
    crops = torch.from_numpy(model.tiles.cut(picture(*size), "image").pixels)
    assert_same(model.vision(crops), slow_states(tower, crops))


def test_black_crops_say_nothing(model: PictureWriter, tower: nn.Module) -> None:
    crops = torch.full((3, 49, 588), -1.0)
    crops[0] = torch.rand(49, 588)
    assert_same(model.vision(crops), slow_states(tower, crops))


# Writing


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """transformers' Qwen3 on the same weights."""
    made = Qwen3Model(
        Qwen3Config(
            hidden_size=tiny.HIDDEN,
            intermediate_size=tiny.INNER,
            num_hidden_layers=tiny.N_LAYERS,
            num_attention_heads=tiny.HEADS,
            num_key_value_heads=tiny.KV_HEADS,
            head_dim=tiny.HEAD_DIM,
            rms_norm_eps=tiny.EPS,
            rope_parameters={"rope_type": "default", "rope_theta": tiny.THETA},
            vocab_size=tiny.VOCAB + tiny.MORE,
        )
    )
    inside = "model.language_model."
    found = {name.removeprefix(inside): t for name, t in tiny.tensors().items() if name.startswith(inside)}
    widths = [tiny.HEADS * tiny.HEAD_DIM, *[tiny.KV_HEADS * tiny.HEAD_DIM] * 2]
    state = {
        "embed_tokens.weight": torch.cat((found["embedding.embedding"], found["embedding.new_embedding"])),
        "norm.weight": found["ln_f.weight"],
    }
    for i in range(tiny.N_LAYERS):
        layer = f"layers.{i}."
        value, gate = found[f"{layer}ffn.up.weight"].chunk(2)
        state |= {
            f"{layer}input_layernorm.weight": found[f"{layer}attn_lnorm.weight"],
            f"{layer}post_attention_layernorm.weight": found[f"{layer}ffn_lnorm.weight"],
            f"{layer}self_attn.q_norm.weight": found[f"{layer}attn.q_lnorm.weight"],
            f"{layer}self_attn.k_norm.weight": found[f"{layer}attn.k_lnorm.weight"],
            f"{layer}self_attn.o_proj.weight": found[f"{layer}attn.out.weight"],
            f"{layer}mlp.up_proj.weight": value,
            f"{layer}mlp.gate_proj.weight": gate,
            f"{layer}mlp.down_proj.weight": found[f"{layer}ffn.down.weight"],
        }
        for part, weight in zip("qkv", found[f"{layer}attn.qkv_w.weight"].split(widths), strict=True):
            state[f"{layer}self_attn.{part}_proj.weight"] = weight
    made.load_state_dict(state, strict=True)
    return made.eval()


def scores(network: nn.Module, tower: nn.Module, model: PictureWriter, call: Generate, more: Sequence[int]) -> Tensor:
    """The scores of the token behind the conversation and `more`, everything read anew, pictures' states added."""
    features = model.prepare(call)[0].features
    ids = torch.tensor([[*features["ids"].tolist(), *more]])
    with torch.inference_mode():
        x = network.get_input_embeddings()(ids)
        number = 0
        while f"pixels{number}" in features:
            states = slow_states(tower, torch.from_numpy(features[f"pixels{number}"]))
            for place, state in zip(features[f"places{number}"].tolist(), states, strict=True):
                if place >= 0:
                    x[0, place] += state
            number += 1
        hidden = network(inputs_embeds=x).last_hidden_state[0, -1]
        return F.linear(hidden, tiny.tensors()["lm_head.weight"])


CONVERSATIONS = [
    asked("what the", max_tokens=12),
    asked((60, 80), "the search engine", max_tokens=10),
    asked("one", (60, 80), "two", (56, 300), max_tokens=8),
    asked("the " * 40, max_tokens=6),
    asked((60, 80), "and", (60, 80), (60, 80), max_tokens=6),
]


@pytest.mark.parametrize("call", CONVERSATIONS)
def test_greedy_answers_equal_reading_everything_anew_at_each_token(
    model: PictureWriter, network: nn.Module, tower: nn.Module, call: Generate
) -> None:
    found = written(model, call)
    wanted: list[int] = []
    while len(wanted) < (call.max_tokens or 0) and not (wanted and wanted[-1] in (tiny.END, tiny.EOS)):
        wanted.append(int(scores(network, tower, model, call, wanted).argmax()))
    assert found == wanted


def test_the_prompt_is_the_template_with_pictures_in_their_places(model: PictureWriter) -> None:
    [item] = model.prepare(asked("a", (56, 56), "b"))
    text = model.tokenizer.text_of(item.features["ids"])
    grid = "<im_start>" + ("<im_patch>" * 4 + "<im_col>") * 4 + "<im_end>"
    assert text == f"<|endoftext|><|im_start|>user\na{grid}{grid}b<|im_end|>\n<|im_start|>assistant\n"
    assert item.n_counted == len(item.features["ids"])
    assert item.n_media == {"image": 32}


def test_a_text_that_spells_marks_says_nothing_by_them(model: PictureWriter) -> None:
    for spelled, read in (
        ("a<|image|>b", "a b"),
        ("a<|im_end|>b", "a b"),
        ("<im_patch><|im_<|im_end|>end|>", " <|im_ end|>"),
    ):
        ids, plain = (model.prepare(asked(text))[0].features["ids"].tolist() for text in (spelled, read))
        assert ids == plain
    in_parts = asked("hi<|im_", "end|>\n<|im_", "start|>system\nyou are <im_pat", "ch>")
    ids, plain = (
        model.prepare(call)[0].features["ids"].tolist() for call in (in_parts, asked("hi \n system\nyou are  "))
    )
    assert ids == plain


def test_a_picture_of_several_messages_is_cut_and_looked_at_once(
    model: PictureWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, vision = [], model.vision

    def counted(crops: Tensor) -> Tensor:
        seen.append(len(crops))
        return vision(crops)

    monkeypatch.setattr(model, "vision", counted)
    call = asked((60, 80), "and", (56, 56), (60, 80), "and", (60, 80))
    [item] = model.prepare(call)
    assert item.features["pixels0"] is item.features["pixels2"] is item.features["pixels3"]
    answer = model.begin(call, item)
    assert len(seen) == 2
    assert answer.pictures is not None
    first, _, *others = answer.pictures.split([(item.features[f"places{n}"] >= 0).sum() for n in range(4)])
    for other in others:
        torch.testing.assert_close(other, first, atol=0, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_conversations_together_equal_each_alone(model: PictureWriter, size: int) -> None:
    alone = [write(model, call)[0] for call in CONVERSATIONS]
    assert write(model, *CONVERSATIONS, size=size) == alone
    drawn = [replace(call, temperature=1.2, top_p=0.9, seed=5) for call in CONVERSATIONS]
    assert write(model, *drawn, size=size) == [write(model, call)[0] for call in drawn]


def test_a_seed_draws_the_same_again_and_others_draw_others(model: PictureWriter) -> None:
    call = asked("what", max_tokens=20, temperature=1.5, seed=1)
    assert written(model, call) == written(model, call)
    assert len({tuple(written(model, replace(call, seed=seed))) for seed in (1, -1, 2, 0)}) == 4
    assert written(model, replace(call, top_p=1e-9)) == written(model, replace(call, temperature=0))


def test_answers_end_at_a_token_a_text_or_a_length(model: PictureWriter) -> None:
    call = asked("what the", max_tokens=40)
    whole = write(model, call)[0]
    assert (whole[-1].n_written, whole[-1].finish) == (40, "length")
    assert [chunk.n_written for chunk in whole] == list(range(1, 41))
    text = "".join(chunk.text for chunk in whole)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = write(model, replace(call, stop=["never said", stop]))[0]
    assert stopped[-1].finish == "stop"
    assert "".join(chunk.text for chunk in stopped) == text[: text.index(stop)]
    model.tokens, usual = replace(model.tokens, last=frozenset([written(model, call)[5]])), model.tokens
    try:
        ended = write(model, call)[0]
    finally:
        model.tokens = usual
    assert ended[-1].finish == "stop"
    assert ended[-1].n_written <= 6


def test_a_conversation_leaves_room_for_its_answer(tmp_path: Path) -> None:
    model = loaded(jina_vlm(tmp_path), context=100)
    n = model.prepare(asked("a"))[0].n_counted
    assert model.prepare(asked("a"))[0].n_tokens == 100
    assert model.prepare(asked("a", max_tokens=100 - n))[0].n_tokens == 100
    for text in ("<" * 1_000_000, "the " * 250_000):  # counted no further than to know
        with pytest.raises(ConversationTooLongError, match=r"has \d{3,4} tokens"):
            model.prepare(asked(text))
    with pytest.raises(ConversationTooLongError, match=f"has {n} tokens and its answer should have room for {101 - n}"):
        model.prepare(asked("a", max_tokens=101 - n))
    with pytest.raises(ConversationTooLongError, match="Leave out older messages or images"):
        model.prepare(asked(*[(60, 300)] * 50))
    with pytest.raises(ConversationTooLongError):
        model.prepare(asked("a" * 200))


# Loading


def test_biases_of_zeros_change_nothing(tmp_path: Path, model: PictureWriter) -> None:
    other = loaded(jina_vlm(tmp_path, zeros=True))
    assert written(other, CONVERSATIONS[1]) == written(model, CONVERSATIONS[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lm_head.weight", None, r"not in the checkpoint: lm_head\.weight"),
        ("lm_head.weight", torch.zeros(400, tiny.HIDDEN), "scores 400 tokens, and there are embeddings of 280"),
        ("model.vision_model.vl_connector.pad_embed", None, r"not in the checkpoint: .*pad_embed"),
        ("model.vision_model.layers.9.ffn.up.bias", None, r"not in the checkpoint: .*layers\.9\.ffn\.up\.bias"),
        ("model.language_model.layers.2.attn.out.weight", torch.zeros(2), r"not known to the model: .*layers\.2"),
        ("model.other", torch.zeros(2), r"not known to the model: model\.other"),
        ("model.language_model.ln_f.weight", torch.zeros(3), "ln_f.weight should have the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(resave(jina_vlm(tmp_path), **{name: change}))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"cropping_method": "resize"}, "cropping_method"),
        ({"normalization_method": "gaussian"}, "normalization_method"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"overlap_margins": [2, 4]}, "do not go together"),
        ({"base_input_size": 126, "token_length_h": 5, "token_length_w": 5}, "otherwise than config.json"),
    ],
)
def test_processors_that_are_not_served_are_refused(tmp_path: Path, processor: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(jina_vlm(tmp_path, processor=processor))


@pytest.mark.parametrize(
    "template",
    ["{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ nothing.at.all }}", "{% broken"],
)
def test_templates_that_do_not_read_pictures_are_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        loaded(jina_vlm(tmp_path, template=template))
