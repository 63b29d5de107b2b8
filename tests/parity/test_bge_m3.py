"""The heads of bge-m3 against the arithmetic of its publisher, written here, over transformers' hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor, nn

from fundament.backbone.packed import Packed
from fundament.backbone.token_heads import HeadedEmbedder
from fundament.core import Embed, Model, MultiVectors, Output, SparseVectors
from fundament.engine.local import finish
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError, InputError
from tests.checkpoints import assert_same_alone, load, texts
from tests.checkpoints.bge_m3 import bge_m3
from tests.checkpoints.xlm_roberta import POSITIONS, xlm_roberta
from tests.parity.test_xlm_roberta import hidden_states, reference

CONTEXT = POSITIONS - 2
TEXTS = ["", "a", "the the what", "Ω 東京 search", *texts([1, 2, 5, 12]), "a" * 400]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bge_m3(tmp_path_factory.mktemp("bge-m3"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory, "xlm_roberta", context=CONTEXT, outputs=("dense", "sparse", "multi"))


@pytest.fixture(scope="module")
def backbone(directory: Path) -> nn.Module:
    return reference(directory, {})


def run(model: Model, inputs: list[str], output: Output, **fields: Any) -> Any:
    call = Embed(inputs=inputs, output=output, truncate=True, **fields)
    items = model.prepare(call)
    return finish(model, call, items, model.forward(items))


def ids_of(directory: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return ids if len(ids) <= CONTEXT else [*ids[: CONTEXT - 1], ids[-1]]


def head(directory: Path, name: str, states: Tensor) -> Tensor:
    tensors = torch.load(directory / name, weights_only=True)
    return states @ tensors["weight"].T + tensors["bias"]


def test_weights_equal_the_publishers_arithmetic(directory: Path, model: Model, backbone: nn.Module) -> None:
    made = run(model, TEXTS, "sparse")
    assert isinstance(made, SparseVectors)
    name = Tokenizer.from_file(str(directory / "tokenizer.json")).id_to_token
    for text, weights in zip(TEXTS, made.weights, strict=True):
        ids = ids_of(directory, text)
        numbers = head(directory, "sparse_linear.pt", hidden_states(backbone, torch.tensor(ids).numpy()))[:, 0].relu()
        most: dict[str, float] = {}
        for i, number in zip(ids, numbers.tolist(), strict=True):
            if i not in (0, 1, 2, 3) and number > most.get(name(i), 0):
                most[name(i)] = number
        assert weights == pytest.approx(most, abs=1e-5)
        assert list(weights.values()) == sorted(weights.values(), reverse=True)


def test_token_vectors_equal_the_publishers_arithmetic(directory: Path, model: Model, backbone: nn.Module) -> None:
    made = run(model, TEXTS, "multi", name_tokens=True)
    assert isinstance(made, MultiVectors)
    assert made.tokens is not None
    for text, vectors, tokens in zip(TEXTS, made.vectors, made.tokens, strict=True):
        states = hidden_states(backbone, torch.tensor(ids_of(directory, text)).numpy())
        expected = head(directory, "colbert_linear.pt", states[1:])
        torch.testing.assert_close(torch.from_numpy(vectors), expected, atol=1e-5, rtol=1e-5)
        assert len(tokens) == len(vectors)
        assert tokens[-1] == "</s>"


def test_dense_vectors_are_the_first_tokens(directory: Path, model: Model, backbone: nn.Module) -> None:
    expected = [hidden_states(backbone, torch.tensor(ids_of(directory, text)).numpy())[0] for text in TEXTS]
    made = torch.from_numpy(run(model, TEXTS, "dense").vectors)
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=1e-5)


OUTPUTS_OF: tuple[Output, ...] = ("dense", "sparse", "multi")
OUTPUTS = st.sampled_from(OUTPUTS_OF)


@settings(deadline=None, max_examples=30)
@given(asked=st.lists(st.tuples(st.text(max_size=120), OUTPUTS), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(model: Model, asked: list[tuple[str, Output]]) -> None:
    """Whatever its neighbours ask for."""

    def forward(asked: list[tuple[str, Output]]) -> list[Tensor]:
        items = [model.prepare(Embed(inputs=[text], output=output, truncate=True))[0] for text, output in asked]
        assert len({item.mate for item in items}) == 1
        arrays = zip(asked, model.forward(items), strict=True)
        by_id = (array[:, array[0].argsort()] if output == "sparse" else array for (_, output), array in arrays)
        return [*map(torch.from_numpy, by_id)]

    assert_same_alone(forward, asked)


def test_rows_of_all_outputs_run_through_the_backbone_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(model, HeadedEmbedder)
    items = [item for output in OUTPUTS_OF for item in model.prepare(Embed(inputs=TEXTS[:3], output=output))]
    ran, transformer = [], model.dense.transformer

    def count(packed: Packed) -> Tensor:
        ran.append(packed.n_tokens)
        return transformer(packed)

    count.device = transformer.device  # type: ignore[attr-defined]
    monkeypatch.setattr(model.dense, "transformer", count)
    model.forward(items)
    assert ran == [sum(item.n_tokens for item in items)]


def test_a_directory_of_ones_own_gives_what_its_files_can(directory: Path, tmp_path: Path) -> None:
    assert from_argument(f"mine={directory}", tmp_path).spec.outputs == ("dense", "sparse", "multi")
    plain = xlm_roberta(tmp_path / "plain")
    assert from_argument(f"mine={plain}", tmp_path).spec.outputs == ("dense",)
    with pytest.raises(InputError, match="no head for sparse vectors"):
        load(plain, "xlm_roberta", context=CONTEXT).prepare(Embed(inputs=["a"], output="sparse"))


@pytest.mark.parametrize(
    "found",
    [
        {"weight": torch.zeros(1, 5), "bias": torch.zeros(1)},
        {"weight": torch.zeros(2, 48), "bias": torch.zeros(2)},
        {"weight": torch.zeros(1, 48)},
        {"weight": "w", "bias": "b"},
        [1],
    ],
)
def test_a_head_that_does_not_fit_is_refused(found: Any, tmp_path: Path) -> None:
    torch.save(found, bge_m3(tmp_path) / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match="sparse_linear"):
        load(tmp_path, "xlm_roberta", context=CONTEXT)


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
def test_a_head_without_the_other_is_refused(name: str, tmp_path: Path) -> None:
    (bge_m3(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; put it there"):
        load(tmp_path, "xlm_roberta", context=CONTEXT)
