"""The catalogue's promises, checked on every entry, and the pages that are made from it."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
from pydantic import TypeAdapter

from fundament.catalog import CATALOG, EMBEDDED, ModelSpec, find, short_id
from fundament.catalog.entries import _REVISIONS
from fundament.config import Settings

SPECS = [pytest.param(spec, id=spec.id) for spec in CATALOG.values()]
DOCS = Path(__file__).parent.parent / "docs"

# What the public API's requests say of its models: the values of `task`, the one where a request names none, and the
# largest `dimensions` (None where the request has no such field).
SEARCH = {"retrieval.query", "retrieval.passage"}
V5 = SEARCH | {"text-matching", "clustering", "classification"}
PAIRS = ("nl2code", "qa", "code2code", "code2nl", "code2completion")
CODE = {f"{pair}.{role}" for pair in PAIRS for role in ("query", "passage")}
API_EMBEDDINGS: dict[str, tuple[set[str], str | None, int | None]] = {
    **{f"jina-embeddings-v2-base-{subject}": (set(), None, None) for subject in ("en", "zh", "de", "es", "code")},
    "jina-embeddings-v3": (SEARCH | {"text-matching", "classification", "separation"}, None, 1024),
    "jina-embeddings-v4": (SEARCH | {"text-matching", "code.query", "code.passage"}, "text-matching", 2048),
    "jina-embeddings-v5-text-small": (V5, "text-matching", 1024),
    "jina-embeddings-v5-text-nano": (V5, "text-matching", 768),
    "jina-embeddings-v5-omni-small": (V5, "text-matching", 1024),
    "jina-embeddings-v5-omni-nano": (V5, "text-matching", 768),
    "jina-code-embeddings-0.5b": (CODE, "nl2code.query", 896),
    "jina-code-embeddings-1.5b": (CODE, "nl2code.query", 1536),
    "jina-clip-v1": (set(), None, None),
    "jina-clip-v2": ({"retrieval.query"}, None, 1024),
    "jina-colbert-v1-en": (set(), None, None),
    "jina-colbert-v2": (set(), None, 128),
    "elser-v2": (SEARCH, None, None),
}
API_RERANKERS = (
    "jina-reranker-v1-tiny-en",
    "jina-reranker-v1-turbo-en",
    "jina-reranker-v1-base-en",
    "jina-reranker-v2-base-multilingual",
    "jina-reranker-v3",
    "jina-reranker-m0",
)


@pytest.mark.parametrize("spec", SPECS)
def test_an_entry_is_sound(spec: ModelSpec) -> None:
    for name, annotation in get_type_hints(ModelSpec).items():
        value = getattr(spec, name)
        assert TypeAdapter(annotation).validate_python(value) == value
    assert CATALOG[spec.id] is spec
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", spec.id)
    assert spec.family.isidentifier()
    assert spec.family.islower()
    assert spec.repo == "" or re.fullmatch(r"[\w.-]+/[\w.-]+", spec.repo)
    assert spec.revision is None or re.fullmatch(r"[0-9a-f]{40}", spec.revision)
    assert spec.description.endswith(".")
    assert date(2021, 1, 1) < spec.released < date.today()
    assert spec.context > 0
    assert spec.n_parameters > 10_000_000
    assert spec.modalities[0] == "text"
    assert set(spec.modalities) <= {"text", "image", "pdf", "video", "audio"}


@pytest.mark.parametrize("spec", SPECS)
def test_dimensions_and_tasks_agree_with_themselves(spec: ModelSpec) -> None:
    assert spec.dim > 0 or spec.kind != "embedding"
    assert spec.shortest_dim is None or 0 < spec.shortest_dim < spec.dim
    if spec.dims:
        assert (min(spec.dims), max(spec.dims)) == (spec.shortest_dim, spec.dim)
    assert spec.default_task is None or spec.default_task in spec.tasks
    for task in spec.tasks.values():
        # A word that runs into the text would be another token than the one trained with.
        assert task.prompt == "" or task.prompt[-1] in " \n:"
    assert not (spec.late_chunking and "late_chunking" in spec.refusals)
    for reason in spec.refusals.values():
        assert reason[0].islower()
        assert not reason.endswith(".")


def test_names_are_said_once() -> None:
    names = [name for spec in CATALOG.values() for name in (spec.id, *spec.aliases)]
    assert len(names) == len(set(names))
    repos = [spec.repo for spec in CATALOG.values() if spec.repo]
    assert len(repos) == len(set(repos))
    assert [spec.id for spec in CATALOG.values() if not spec.repo] == ["elser-v2"]


@pytest.mark.parametrize("model", API_EMBEDDINGS)
def test_embedding_models_take_what_the_api_takes(model: str) -> None:
    spec = CATALOG[model]
    tasks, default_task, most = API_EMBEDDINGS[model]
    assert spec.kind == "embedding"
    assert set(spec.tasks) == tasks
    assert spec.default_task == default_task
    assert (spec.dim if spec.shortest_dim else None) == most


@pytest.mark.parametrize("model", API_RERANKERS)
def test_rerankers_of_the_api_are_rerankers(model: str) -> None:
    assert CATALOG[model].kind == "reranker"


def test_commits_are_known_but_for_two_old_models_and_those_of_one_task() -> None:
    unknown = {spec.id for spec in CATALOG.values() if spec.repo and spec.revision is None}
    tasks = ("retrieval", "text-matching", "clustering", "classification")
    of_one_task = {f"jina-embeddings-v5-text-{size}-{task}" for size in ("small", "nano") for task in tasks}
    assert unknown == {"jina-embedding-t-en-v1", "jina-embedding-l-en-v1"} | of_one_task
    known = [spec.revision for spec in CATALOG.values() if spec.revision]
    assert len(known) == len(set(known))
    assert not _REVISIONS.keys() - CATALOG.keys()


def test_only_two_models_chunk_late() -> None:
    assert [spec.id for spec in CATALOG.values() if spec.late_chunking] == ["jina-embeddings-v3", "jina-embeddings-v4"]


def test_adapters_bear_the_names_in_the_checkpoints() -> None:
    def adapters(model: str) -> dict[str, str | None]:
        return {name: task.adapter for name, task in CATALOG[model].tasks.items()}

    assert adapters("jina-embeddings-v3") == {name: name for name in CATALOG["jina-embeddings-v3"].tasks}
    for model in ("jina-embeddings-v4", "jina-embeddings-v5-text-small", "jina-embeddings-v5-omni-nano"):
        assert adapters(model) == {name: name.partition(".")[0] for name in CATALOG[model].tasks}
    assert set(adapters("jina-code-embeddings-0.5b").values()) == {None}


@pytest.mark.parametrize(
    ("model", "task", "prompt"),
    [
        ("jina-embeddings-v3", "retrieval.query", "Represent the query for retrieving evidence documents: "),
        ("jina-embeddings-v3", "retrieval.passage", "Represent the document for retrieval: "),
        *(("jina-embeddings-v3", task, "") for task in ("separation", "classification", "text-matching")),
        ("jina-clip-v2", "retrieval.query", "Represent the query for retrieving evidence documents: "),
        ("jina-embeddings-v4", "text-matching", "Query: "),
        ("jina-embeddings-v4", "code.passage", "Passage: "),
        ("jina-embeddings-v5-text-nano", "retrieval.query", "Query: "),
        ("jina-embeddings-v5-text-nano", "text-matching", "Document: "),
        ("jina-embeddings-v5-text-small-retrieval", "retrieval.query", "Query: "),
        ("jina-embeddings-v5-text-nano-clustering", "clustering", "Document: "),
        (
            "qwen3-embedding-0.6b",
            "retrieval.query",
            "Instruct: Given a search query, retrieve relevant documents or passages that directly answer or address "
            "the query\nQuery:",
        ),
        ("qwen3-embedding-8b", "retrieval.passage", ""),
        ("bge-m3", "retrieval.query", ""),
    ],
)
def test_prompts_are_the_published_ones(model: str, task: str, prompt: str) -> None:
    assert CATALOG[model].tasks[task].prompt == prompt


@pytest.mark.parametrize("model", ["jina-code-embeddings-0.5b", "jina-code-embeddings-1.5b"])
def test_code_is_asked_for_in_the_published_words(model: str) -> None:
    words = {
        "nl2code.query": "Find the most relevant code snippet given the following query:\n",
        "nl2code.passage": "Candidate code snippet:\n",
        "qa.query": "Find the most relevant answer given the following question:\n",
        "qa.passage": "Candidate answer:\n",
        "code2code.query": "Find an equivalent code snippet given the following code snippet:\n",
        "code2code.passage": "Candidate code snippet:\n",
        "code2nl.query": "Find the most relevant comment given the following code snippet:\n",
        "code2nl.passage": "Candidate comment:\n",
        "code2completion.query": "Find the most relevant completion given the following start of code snippet:\n",
        "code2completion.passage": "Candidate completion:\n",
    }
    assert {name: task.prompt for name, task in CATALOG[model].tasks.items()} == words


def test_the_instructions_of_tasks() -> None:
    words = {
        "retrieval.query": "Given a search query, retrieve relevant documents or passages that directly answer or "
        "address the query",
        "text-matching": "Represent this text for finding semantically similar texts",
        "classification": "Represent this text for classification",
        "separation": "Represent this text for clustering",
        "clustering": "Represent this text for clustering",
        "code.query": "Given a natural language description, retrieve relevant code that implements the description",
        "scientific.query": "Given a scientific question, retrieve relevant research papers that directly answer or "
        "address the question",
        "qa.query": "Given a question, retrieve passages that contain the answer to the question",
        "bitext": "Represent this text for finding its translation",
        "summarization.query": "Given a summary, retrieve the original document that it summarizes",
    }
    for size in ("0.6b", "4b", "8b"):
        tasks = CATALOG[f"qwen3-embedding-{size}"].tasks
        prompts = {name: task.prompt for name, task in tasks.items() if not name.endswith(".passage")}
        assert prompts == {name: f"Instruct: {text}\nQuery:" for name, text in words.items()}
        assert not any(task.prompt for name, task in tasks.items() if name.endswith(".passage"))


@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("jina-embeddings-v3", "Get them: fundament pull jina-embeddings-v3 --accept-licence"),
        ("jina-embeddings-v2-base-en", "Get them: fundament pull jina-embeddings-v2-base-en"),
        ("elser-v2", "None are public: serve a directory of yours, --model elser-v2=DIR"),
    ],
)
def test_how_weights_come_onto_a_machine_is_told_whole(model: str, way: str) -> None:
    assert CATALOG[model].way_in == way


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("jina-embeddings-v3", "jina-embeddings-v3"),
        ("jinaai/jina-embeddings-v3", "jina-embeddings-v3"),
        ("jina-ai/jina-embeddings-v3", "jina-embeddings-v3"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3-embedding-0.6b"),
        ("sentence-transformers/all-MiniLM-L6-v2", EMBEDDED.id),
        ("clip", "jina-clip-v1"),
        ("jinaai/CLIP", "jina-clip-v1"),
        ("Own-Model", "Own-Model"),
        ("team/Own-Model", "Own-Model"),
        ("", ""),
    ],
)
def test_short_id(said: str, meant: str) -> None:
    assert short_id(said) == meant


@pytest.mark.parametrize("spec", SPECS)
def test_a_repository_means_its_own_model(spec: ModelSpec) -> None:
    assert short_id(spec.repo or spec.id) == spec.id


@pytest.mark.parametrize(
    ("model", "forbidden"),
    [("jina-embeddings-v3", True), ("jina-embeddings-v4", True), ("jina-clip-v1", False), ("bge-m3", False)],
)
def test_licences_that_forbid_commercial_use_are_known(model: str, forbidden: bool) -> None:
    assert CATALOG[model].non_commercial is forbidden


def test_the_catalogue_does_not_load_torch() -> None:
    program = "import sys, fundament.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["models.md", "settings.md"])
def test_pages_are_up_to_date(generate: ModuleType, page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run: make docs"


def test_the_models_page_lists_each_model_once(generate: ModuleType) -> None:
    page = generate.models_page()
    for model in CATALOG:
        assert page.count(f"| `{model}`") == 1


def test_the_settings_page_lists_each_setting_once(generate: ModuleType) -> None:
    page = generate.settings_page()
    for name in Settings.model_fields:
        assert page.count(f"| `{name}` |") == 1
    assert "| `models` | `--model` | `FUNDAMENT_MODELS` | none |" in page
    assert "| `aliases` | `--alias` | `FUNDAMENT_ALIASES` | none |" in page
    assert "| `preload` | `--preload` `--lazy` | `FUNDAMENT_PRELOAD` | `true` |" in page


def test_precedence_is_what_the_settings_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.toml"
    file.write_text('models = ["from-the-file"]\nport = 1\nthreads = 1\n', encoding="utf-8")
    monkeypatch.setenv("FUNDAMENT_CONFIG", str(file))
    monkeypatch.setenv("FUNDAMENT_MODELS", "one, mine=/srv/models/mine")
    monkeypatch.setenv("FUNDAMENT_PORT", "2")
    settings = Settings(port=3)
    assert settings.models == ["one", "mine=/srv/models/mine"]
    assert (settings.port, settings.threads) == (3, 1)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("jina-ai/jina-embeddings-v3", True),
        ("jinaai/jina-embeddings-v3", True),
        ("jina_ai/Jina-Embeddings-v3", True),
        ("acme/jina-embeddings-v3", False),
        ("/jina-embeddings-v3", True),
    ],
)
def test_another_owners_model_is_not_the_catalogues(name: str, known: bool) -> None:
    served = {"jina-embeddings-v3": CATALOG["jina-embeddings-v3"]}
    assert (find(name, served) is not None) == known


def test_a_model_goes_by_its_whole_name_first() -> None:
    served = {name: replace(EMBEDDED, id=name) for name in ("mine", "team/mine")}
    assert [find(name, served) for name in ("mine", "team/mine", "other/mine")] == [
        served["mine"],
        served["team/mine"],
        served["mine"],
    ]
