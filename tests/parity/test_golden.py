"""Golden files, made and compared here on those kinds of models whose publishers' code is an installed library."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fundament.catalog import CATALOG, EMBEDDED, ModelSpec, Task
from fundament.core import Model
from fundament.engine.loading import load_model
from fundament.engine.weights import Local, embedded
from tests.checkpoints import qwen_reranker
from tests.checkpoints.colbert import DIM, bert_colbert
from tests.checkpoints.cross_encoder import bert_ranker
from tests.checkpoints.splade import splade
from tests.conftest import FLOAT32
from tests.golden import publishers
from tests.golden.cases import cases
from tests.golden.comparison import differences
from tests.golden.make import make


def minilm(_: Path) -> Path:
    local = embedded()
    assert local is not None
    return local.directory


def bert_splade(directory: Path) -> Path:
    splade(directory, "bert")
    return directory


def yes_or_no(directory: Path) -> Path:
    return qwen_reranker.write(directory, qwen_reranker.GENERATIVE)


# How a directory is written, whose entry it goes by, and what differs from that.
KINDS: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "dense": (minilm, EMBEDDED.id, {"tasks": {"query": Task("query: "), "document": Task()}}),
    "multi": (bert_colbert, "jina-colbert-v1-en", {"family": "bert", "dim": DIM, "context": 300}),
    "sparse": (bert_splade, "elser-v2", {"context": 128}),
    "pairs": (bert_ranker, "bge-reranker-v2-m3", {"family": "bert", "context": 128}),
    "yes or no": (yes_or_no, "qwen3-reranker-0.6b", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Any]]:
    """A loaded model, and the cases of its golden file as they are read back."""
    write, model, differs = KINDS[request.param]
    directory = write(tmp_path_factory.mktemp("golden"))
    spec = replace(CATALOG[model], **differs)
    path = tmp_path_factory.mktemp("made") / f"{model}.json"
    path.write_text(json.dumps(make(spec, str(directory)), ensure_ascii=False))
    return load_model(Local(spec, directory), FLOAT32), json.loads(path.read_text())["cases"]


def test_a_model_answers_as_its_publishers_code(made: tuple[Model, list[Any]]) -> None:
    model, found = made
    assert found
    assert differences(model, found) == []


def test_a_number_that_is_off_is_told_with_its_place(made: tuple[Model, list[Any]]) -> None:
    model, found = made
    case = json.loads(json.dumps(found[-1]))
    last = case["answer"][-1]
    if isinstance(last, dict):
        last[next(iter(last))] += 0.01
    elif isinstance(last, list):
        (last[-1] if isinstance(last[-1], list) else last)[0] += 0.01
    else:
        case["answer"][-1] += 0.01
    (told,) = differences(model, [*found[:-1], case])
    assert told.endswith("input 4 differs by 0.01")


@pytest.mark.parametrize("spec", [spec for spec in CATALOG.values() if spec.kind != "chat"], ids=lambda spec: spec.id)
def test_every_model_has_a_publisher_and_is_asked_for_all_that_it_gives(spec: ModelSpec) -> None:
    assert callable(publishers.publisher_of(spec))
    asked = list(cases(spec))
    assert json.loads(json.dumps(asked)) == asked
    assert {case.get("output") for case in asked} == (set(spec.outputs) if spec.kind == "embedding" else {None})
    assert any("iVBOR" in json.dumps(case) for case in asked) == ("image" in spec.modalities)
