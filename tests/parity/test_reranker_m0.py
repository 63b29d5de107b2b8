"""jina-reranker-m0 against transformers' Qwen2-VL with the head put on by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from fundament.backbone.towers.images import Patches
from fundament.backbone.vision_ranker import VisionRanker
from fundament.core import Media, Rerank
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from tests.checkpoints import load, resave, texts
from tests.checkpoints import qwen_vl as tiny
from tests.checkpoints.clip import picture, png
from tests.checkpoints.qwen_vl import qwen_vl

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES = [(56, 56), (60, 200), (140, 85)]
TEXTS = ["a", "\nthe", *texts([1, 3, 12])]

Side = str | tuple[int, int]
"""A text, or the size of a picture."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionRanker:
    return loaded(qwen_vl(tmp_path_factory.mktemp("m0"), "m0"))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return tiny.network("m0", tiny.tensors("m0"))


def loaded(directory: Path, *, context: int = 1024, dtype: torch.dtype = torch.float32) -> VisionRanker:
    model = load(directory, "qwen_vl", context=context, dtype=dtype, kind="reranker", modalities=("text", "image"))
    assert isinstance(model, VisionRanker)
    # Pictures of the published size would take longer than they tell.
    model.prompt.sizes = replace(model.prompt.sizes, most=tiny.MOST)
    return model


def sent(side: Side) -> str | Media:
    return side if isinstance(side, str) else png(picture(*side))


def scores(model: VisionRanker, query: Side, documents: Sequence[Side]) -> Tensor:
    call = Rerank(query=sent(query), documents=[*map(sent, documents)])
    items = model.prepare(call)
    return torch.from_numpy(finish(model, call, items, model.forward(items)).scores)


def expected(network: nn.Module, query: Side, document: Side) -> Tensor:
    """One pair as the publisher's code reads it."""
    pictures = [picture(*side) for side in (document, query) if not isinstance(side, str)]
    slots = [side if isinstance(side, str) else IMAGE for side in (document, query)]
    prompt = f"**Document**:\n{slots[0]}\n**Query**:\n{slots[1]}"
    given: dict[str, Tensor] = {}
    if pictures:
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": tiny.LEAST, "longest_edge": tiny.MOST})
        given = dict(processor(images=[Image.fromarray(pixels) for pixels in pictures], return_tensors="pt"))
        pieces = prompt.split("<|image_pad|>")
        counts = [int(grid.prod()) // 4 for grid in given["image_grid_thw"]]
        prompt = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
    ids = torch.tensor([[*tiny.tokenizer().encode(prompt).ids, 100]])
    kinds = (ids == tiny.IDS["image_token_id"]).long()
    head = tiny.head("m0")
    with torch.inference_mode():
        hidden = network(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **given
        ).last_hidden_state[0, -1]
        inner = F.relu(F.linear(hidden, head["score.0.weight"], head["score.0.bias"]))
        return torch.sigmoid(F.linear(inner, head["score.2.weight"], head["score.2.bias"]) - 2.65)[0]


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float64, "in which no two probabilities near one are equal"
    torch.testing.assert_close(found, wanted.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("query", ["the search", "", (56, 84)])
def test_scores_equal_transformers(model: VisionRanker, network: nn.Module, query: Side) -> None:
    documents: list[Side] = [*TEXTS, *SIZES]
    found = scores(model, query, documents)
    assert_same(found, torch.stack([expected(network, query, document) for document in documents]))
    assert found.std() > 0.01


sides = st.one_of(
    st.text(max_size=20).filter(lambda text: "<|" not in text),
    st.tuples(st.integers(20, 120), st.integers(20, 120)),
)


@settings(deadline=None, max_examples=20)
@given(query=sides, one=sides, company=st.lists(sides, max_size=6), place=st.integers(0, 6))
def test_a_pair_alone_equals_the_pair_in_mixed_company(
    model: VisionRanker, query: Side, one: Side, company: list[Side], place: int
) -> None:
    place = min(place, len(company))
    call = Rerank(query=sent(query), documents=[sent(one)])
    items = model.prepare(call)
    others = model.prepare(Rerank(query="another caller's", documents=[*map(sent, company)])) if company else []
    arrays = model.forward([*others[:place], *items, *others[place:]])
    among = finish(model, call, items, [arrays[place]]).scores
    assert_same(torch.from_numpy(among), scores(model, query, [one]))


def test_a_query_that_is_a_picture_is_read_once_whatever_the_batches(
    model: VisionRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents: list[Side] = ["the search", (60, 90), "in", (56, 56), (70, 70)]
    alone = torch.cat([scores(model, (140, 85), [document]) for document in documents])
    seen, vision = [], model.model.vision

    def counted(images: Sequence[Patches]) -> list[Tensor]:
        seen.extend(len(image.pixels) for image in images)
        return vision(images)

    counted.shape = vision.shape  # type: ignore[attr-defined]
    monkeypatch.setattr(model.model, "vision", counted)
    query = sent((140, 85))
    items = model.prepare(Rerank(query=query, documents=[*map(sent, documents), query]))
    batches = [items[:2], *([item] for item in items[2:])]
    found = torch.from_numpy(np.concatenate([array for batch in batches for array in model.forward(batch)]))
    assert_same(found[:, None][:-1], alone[:, None])
    inside = [sum(part.shape[0] for name, part in item.features.items() if name[:6] == "pixels") for item in items]
    n_query = len(items[0].features["pixels0"])
    assert sorted(seen) == sorted([n_query, *(n - n_query for n in inside[:-1] if n > n_query)])
    costs = [item.n_tokens - len(item.features["ids"]) for item in items]
    assert costs == [n_query, *(n - n_query for n in inside[1:])]


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_documents_keep_their_scores_and_their_order(model: VisionRanker, seed: int) -> None:
    documents: list[Side] = [*TEXTS, *SIZES, "a", SIZES[0]]
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    expected = scores(model, "the search", documents)
    found = scores(model, "the search", [documents[place] for place in order])
    assert_same(found, expected[order])
    best = [documents[place] for place in expected.argsort(descending=True, stable=True)]
    assert [documents[order[place]] for place in found.argsort(descending=True, stable=True)] == best


def test_counts_leave_the_score_token_out(model: VisionRanker) -> None:
    call = Rerank(query="the", documents=["in", png(picture(56, 84)), "in"])
    items = model.prepare(call)
    assert items[0] is items[2]
    n_text = len(tiny.tokenizer().encode("**Document**:\nin\n**Query**:\nthe").ids)
    assert items[0].n_counted == n_text == len(items[0].features["ids"]) - 1
    assert items[0].features["ids"][-1] == 100
    assert items[1].n_media == {"image": 6}


def test_a_text_that_spells_the_mark_of_an_image_holds_none(model: VisionRanker) -> None:
    assert torch.isfinite(scores(model, IMAGE, [IMAGE, (56, 56)])).all()


def test_long_texts_are_cut_and_counted(tmp_path: Path, network: nn.Module) -> None:
    model = loaded(qwen_vl(tmp_path, "m0"), context=512 + 40)
    call = Rerank(query="b " * 400, documents=["a " * 100, "a"], max_query_tokens=7, max_document_tokens=5)
    items = model.prepare(call)
    made = finish(model, call, items, model.forward(items))
    assert made.n_truncated == 1
    assert_same(
        torch.from_numpy(made.scores), torch.stack([expected(network, "b b b b", doc) for doc in ("a a a", "a")])
    )
    with pytest.raises(TooLongError, match="Document 1 has 200 tokens and exceeds the model's maximum of 40"):
        model.prepare(Rerank(query="b", documents=["a", "a " * 100], truncate=False))
    with pytest.raises(TooLongError, match="The query has 600 tokens and exceeds the model's maximum of 512"):
        model.prepare(Rerank(query="b " * 300, documents=["a"], truncate=False))
    for query, document in (("b", "a " * 100_000), ("b " * 100_000, "a")):
        with pytest.raises(TooLongError, match="has more than"):
            model.prepare(Rerank(query=query, documents=[document], truncate=False))
    whole = model.prepare(Rerank(query="b" * 600, documents=["a" * 600]))
    assert len(whole[0].features["ids"]) == 512 + 40
    assert whole[0].n_truncated == 1


def test_a_long_text_leaves_room_for_a_query_that_is_a_picture(tmp_path: Path) -> None:
    model = loaded(qwen_vl(tmp_path, "m0"), context=1_000)
    model.prompt.sizes = replace(model.prompt.sizes, least=28 * 28 * 700, most=28 * 28 * 800)
    shown = png(picture(1_000, 600))
    [item] = model.prepare(Rerank(query=shown, documents=["a " * 400]))
    n_tokens = item.n_media["image"]
    assert n_tokens > 700
    assert item.n_truncated == 1
    assert 990 - 32 < len(item.features["ids"]) <= 1_000
    assert item.features["slots"][0][0] + n_tokens + 1 < len(item.features["ids"])  # the picture and its end are whole
    with pytest.raises(TooLongError, match=rf"Document 0 has 400 tokens and exceeds .* of {1_000 - n_tokens - 32} "):
        model.prepare(Rerank(query=shown, documents=["a " * 200], truncate=False))


def test_a_picture_that_leaves_no_room_for_a_text_refuses_it(tmp_path: Path) -> None:
    model = loaded(qwen_vl(tmp_path, "m0"), context=510)
    model.prompt.sizes = replace(model.prompt.sizes, least=28 * 28 * 480, most=28 * 28 * 500)
    with pytest.raises(TooLongError, match="Document 0 has 1 tokens and exceeds the model's maximum of 0"):
        model.prepare(Rerank(query=png(picture(700, 600)), documents=["a"], truncate=False))


def test_images_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    model = loaded(qwen_vl(tmp_path, "m0"), context=530)
    model.prompt.sizes = replace(model.prompt.sizes, least=28 * 28 * 300, most=28 * 28 * 400)
    with pytest.raises(TooLongError, match="A pair with images has"):
        model.prepare(Rerank(query=png(picture(200, 200)), documents=[png(picture(200, 210))]))
    with pytest.raises(InputError, match="201 pixels"):
        model.prepare(Rerank(query="a", documents=[png(picture(201, 1))]))


def test_newer_names_load_the_same(tmp_path: Path, model: VisionRanker) -> None:
    other = loaded(qwen_vl(tmp_path, "m0", newer_names=True))
    documents: list[Side] = ["the search", (60, 90)]
    assert_same(scores(other, "what", documents), scores(model, "what", documents))


def test_the_processors_own_limits_are_not_read(tmp_path: Path) -> None:
    unlimited = {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 1, "longest_edge": 2}}
    model = load(qwen_vl(tmp_path, "m0", processor=unlimited), "qwen_vl", kind="reranker")
    assert isinstance(model, VisionRanker)
    assert (model.prompt.sizes.least, model.prompt.sizes.most) == (3_136, 602_112)


@pytest.mark.parametrize(("size", "n_tokens"), [((1200, 1600), 768), ((224, 224), 64)])
def test_pictures_have_the_officially_recorded_numbers_of_tokens(
    tmp_path: Path, size: tuple[int, int], n_tokens: int
) -> None:
    model = load(qwen_vl(tmp_path, "m0"), "qwen_vl", kind="reranker")
    assert isinstance(model, VisionRanker)
    rows, columns = model.prompt.sizes.grid(model.prompt.sizes.patches(np.zeros((*size, 3), np.uint8), "image"))
    assert rows * columns == n_tokens


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("score.2.bias", None, r"not in the checkpoint: score\.2\.bias"),
        ("score.0.weight", torch.zeros(2, tiny.HIDDEN), "score.0.weight should have the shape"),
        ("score.4.weight", torch.zeros(2), r"not known to the model: score\.4"),
        ("visual.blocks.0.mlp.fc1.bias", None, r"not in the checkpoint: visual\.blocks\.0\.mlp\.fc1\.bias"),
        ("multi_vector_projector.weight", torch.zeros(2), "not known to the model: multi_vector_projector"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, change: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(resave(qwen_vl(tmp_path, "m0"), **{name: change}))
