"""One entry per public model, data only. `/v1/models`, `docs/models.md` and the tests come from it."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from types import MappingProxyType
from typing import Any

from fundament.catalog.spec import ModelSpec, Task

EMBEDDED = ModelSpec(
    id="all-minilm-l6-v2",
    family="bert",
    repo="sentence-transformers/all-MiniLM-L6-v2",
    revision="8b3219a92973c328a8e22fadcfa821b5dc75636a",  # as MTEB measures it
    name="all-MiniLM-L6-v2",
    description="A small English sentence encoder, served when no other model is named.",
    released=date(2021, 8, 30),
    licence="Apache-2.0",
    context=256,
    dim=384,
    n_parameters=22_713_216,
    refusals={"late_chunking": "it was not trained to pool parts of a longer text"},
)


# The commits that are pulled. Where neither source has one, the first pull records what it finds.
_REVISIONS = {
    # Of the publisher's own server, jina-on-prem.
    "jina-embedding-b-en-v1": "32aa658e5ceb90793454d22a57d8e3a14e699516",
    "jina-embeddings-v2-base-en": "322d4d7e2f35e84137961a65af894fda0385eb7a",
    "jina-embeddings-v2-base-zh": "c1ff9086a89a1123d7b5eff58055a665db4fb4b9",
    "jina-embeddings-v2-base-de": "3f9eede875721714945b6a99a3198299243cf2be",
    "jina-embeddings-v2-base-es": "8e2d780d8fd38f81ca9123ee28e4c5a968aaf21e",
    "jina-embeddings-v2-base-code": "516f4baf13dec4ddddda8631e019b5737c8bc250",
    "jina-embeddings-v3": "ab036b023d30b4d1138c4c3bfa9f0c445ab455d6",
    "jina-embeddings-v4": "853c867b65b749f3c3c72a06868140d842e04f06",
    "jina-embeddings-v5-text-small": "dd76d535f5447ca3897a9c893fb1e612ead98192",
    "jina-embeddings-v5-text-nano": "8a7f00aac812071b69403df470f1038ec85f8925",
    "jina-embeddings-v5-omni-small": "05f4151c87083f204159bfa15e53fdb0320ffef1",
    "jina-embeddings-v5-omni-nano": "b0d2521203a610fc5967a7c2d53990bae14d9e23",
    "jina-code-embeddings-0.5b": "4db235132dafbe56a8b9c5f59b59795ecf58a4a7",
    "jina-code-embeddings-1.5b": "39aeb4fb9b60f930934c78ae5d749a46287c248a",
    "jina-colbert-v1-en": "31bb5a4d063a793f4aaaf6ecb9bf4ef1879ddf7d",
    "jina-colbert-v2": "4552c4dc1ffd7d7a635b6a41a1077fe9c9cdd974",
    "jina-clip-v1": "ceb3e44ca4d6eceaa4f3fb58b1c1a5748b3f29b6",
    "jina-clip-v2": "e10d47f5691d0454a0fb5d13f46f2199b74cb436",
    "jina-reranker-v1-tiny-en": "aca45de6945b5dc6399abcd2a9c55ded5dc9111f",
    "jina-reranker-v1-turbo-en": "b8c14f4e723d9e0aab4732a7b7b93741eeeb77c2",
    "jina-reranker-v1-base-en": "a05700294977fa3ecadc070b1f5b2a76e0bf1eef",
    "jina-reranker-v2-base-multilingual": "9cfeff2df7d40d1b78e75e5e9cebec92a99813c9",
    "jina-reranker-v3": "10fb694fc21f7a710a563ff1eb977a460f3868e4",
    "jina-reranker-v3.5": "e8a93f33f0b22108f8c2364f8484ce3422552fbc",
    "jina-reranker-m0": "94bfe0aeb2d4dd7978362699cddd5893d4e0adc8",
    "jina-vlm": "ddfa80b180f87f59873fd1cea352dec51183ab88",
    # Of the models that MTEB measures.
    "jina-embedding-s-en-v1": "5ac6cd473e2324c6d5f9e558a6a9f65abb57143e",
    "jina-embeddings-v2-small-en": "44e7d1d6caec8c883c2d4b207588504d519788d0",
    "bge-m3": "5617a9f61b028005a4858fdac845db406aefb181",
    "qwen3-embedding-0.6b": "b22da495047858cce924d27d76261e96be6febc0",
    "qwen3-embedding-4b": "636cd9bf47d976946cdbb2b0c3ca0cb2f8eea5ff",
    "qwen3-embedding-8b": "4e423935c619ae4df87b646a3ce949610c66241c",
    "bge-reranker-v2-m3": "953dc6f6f85a1b2dbfca4c34a2796e7dde08d41e",
    "qwen3-reranker-0.6b": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "qwen3-reranker-4b": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
}


def _hub(repo: str, released: str, n_parameters: int, description: str, **facts: Any) -> ModelSpec:
    """A model of the hub whose id is its repository's name in lower case."""
    name = repo.rpartition("/")[2]
    return ModelSpec(
        id=name.lower(),
        repo=repo,
        revision=_REVISIONS.get(name.lower()),
        name=name,
        released=date.fromisoformat(released),
        n_parameters=n_parameters,
        description=description,
        **facts,
    )


# What several entries share. A prompt is put before the text as it stands, its last space or line break included.

_APACHE = {"licence": "Apache-2.0"}
_NON_COMMERCIAL = {"licence": "CC-BY-NC-4.0"}
_MATRYOSHKA = {"shortest_dim": 1}  # the API takes any length up to `dim`, not only the lengths trained for
_RERANKER = {"kind": "reranker"}
PAIRS: dict[str, Any] = {  # reads a query and a document as one text
    **_RERANKER,
    "ranks_by": "probability",
    "takes": ("max_doc_length", "max_query_length"),
}
LISTWISE: dict[str, Any] = {  # reads documents together
    **_RERANKER,
    "ranks_by": "cosine",
    "takes": ("instruction", "max_doc_length", "max_query_length", "return_embeddings"),
    "wraps_documents": True,
}

_LATE_CHUNKERS = "use jina-embeddings-v3 or jina-embeddings-v4"
_LAST_TOKEN = {
    "refusals": {
        "late_chunking": f"it pools the last token of a text, so that a part has no vector of its own; {_LATE_CHUNKERS}"
    }
}

_V3_TASKS = {
    "retrieval.query": Task("Represent the query for retrieving evidence documents: ", "retrieval.query"),
    "retrieval.passage": Task("Represent the document for retrieval: ", "retrieval.passage"),
    "text-matching": Task(adapter="text-matching"),
    "classification": Task(adapter="classification"),
    "separation": Task(adapter="separation"),
}
_V4_TASKS = {
    "text-matching": Task("Query: ", "text-matching"),
    "retrieval.query": Task("Query: ", "retrieval"),
    "retrieval.passage": Task("Passage: ", "retrieval"),
    "code.query": Task("Query: ", "code"),
    "code.passage": Task("Passage: ", "code"),
}
_V5_TASKS = {
    "retrieval.query": Task("Query: ", "retrieval"),
    "retrieval.passage": Task("Document: ", "retrieval"),
    "text-matching": Task("Document: ", "text-matching"),
    "clustering": Task("Document: ", "clustering"),
    "classification": Task("Document: ", "classification"),
}
_CODE_TASKS = {
    "nl2code.query": Task("Find the most relevant code snippet given the following query:\n"),
    "nl2code.passage": Task("Candidate code snippet:\n"),
    "qa.query": Task("Find the most relevant answer given the following question:\n"),
    "qa.passage": Task("Candidate answer:\n"),
    "code2code.query": Task("Find an equivalent code snippet given the following code snippet:\n"),
    "code2code.passage": Task("Candidate code snippet:\n"),
    "code2nl.query": Task("Find the most relevant comment given the following code snippet:\n"),
    "code2nl.passage": Task("Candidate comment:\n"),
    "code2completion.query": Task("Find the most relevant completion given the following start of code snippet:\n"),
    "code2completion.passage": Task("Candidate completion:\n"),
}


_INSTRUCT = "Instruct: {}\nQuery:"  # Qwen3's prompt; the text follows the colon directly


def _instruct(instruction: str) -> Task:
    return Task(_INSTRUCT.format(instruction))


_CLUSTER = _instruct("Represent this text for clustering")
_QWEN3_TASKS = {
    "retrieval.query": _instruct(
        "Given a search query, retrieve relevant documents or passages that directly answer or address the query"
    ),
    "retrieval.passage": Task(),
    "text-matching": _instruct("Represent this text for finding semantically similar texts"),
    "classification": _instruct("Represent this text for classification"),
    "separation": _CLUSTER,
    "clustering": _CLUSTER,
    "code.query": _instruct(
        "Given a natural language description, retrieve relevant code that implements the description"
    ),
    "code.passage": Task(),
    "scientific.query": _instruct(
        "Given a scientific question, retrieve relevant research papers that directly answer or address the question"
    ),
    "qa.query": _instruct("Given a question, retrieve passages that contain the answer to the question"),
    "bitext": _instruct("Represent this text for finding its translation"),
    "summarization.query": _instruct("Given a summary, retrieve the original document that it summarizes"),
}

# Embeddings, by generation.

_V1: dict[str, Any] = {"context": 512, **_APACHE}
_EMBEDDINGS_V1 = (
    _hub("jinaai/jina-embedding-t-en-v1", "2023-08-01", 14_000_000, "English, tiny.", family="bert", dim=312, **_V1),
    _hub("jinaai/jina-embedding-s-en-v1", "2023-06-17", 35_330_816, "English, small.", family="t5", dim=512, **_V1),
    _hub("jinaai/jina-embedding-b-en-v1", "2023-06-17", 109_628_544, "English, base.", family="t5", dim=768, **_V1),
    _hub("jinaai/jina-embedding-l-en-v1", "2023-06-17", 330_000_000, "English, large.", family="t5", dim=1024, **_V1),
)

_V2: dict[str, Any] = {"family": "jina_bert", "context": 8192, **_APACHE}
_EMBEDDINGS_V2 = (
    _hub("jinaai/jina-embeddings-v2-small-en", "2023-10-28", 32_690_688, "English, small.", dim=512, **_V2),
    _hub("jinaai/jina-embeddings-v2-base-en", "2023-10-28", 137_368_320, "English.", dim=768, **_V2),
    _hub("jinaai/jina-embeddings-v2-base-zh", "2024-01-09", 161_000_000, "Chinese and English.", dim=768, **_V2),
    _hub("jinaai/jina-embeddings-v2-base-de", "2024-01-15", 161_000_000, "German and English.", dim=768, **_V2),
    _hub("jinaai/jina-embeddings-v2-base-es", "2024-02-14", 161_000_000, "Spanish and English.", dim=768, **_V2),
    _hub("jinaai/jina-embeddings-v2-base-code", "2024-02-05", 161_000_000, "English and code.", dim=768, **_V2),
)

_EMBEDDINGS_V3 = (
    _hub(
        "jinaai/jina-embeddings-v3",
        "2024-09-18",
        572_310_396,
        "Multilingual, with an adapter for each of five tasks.",
        family="xlm_roberta",
        context=8194,  # 8,192 of text and two special tokens: the hosted API counts a cut text so (measured)
        dim=1024,
        tasks=_V3_TASKS,
        task_synonyms={"clustering": "separation"},
        late_chunking=True,
        **_MATRYOSHKA,
        **_NON_COMMERCIAL,
    ),
)

_EMBEDDINGS_V4 = (
    _hub(
        "jinaai/jina-embeddings-v4",
        "2025-06-24",
        3_934_695_552,
        "Texts, images and documents, multilingual; one vector per input or per token.",
        family="qwen_vl",
        context=32768,
        dim=2048,
        tasks=_V4_TASKS,
        bare_tasks=("retrieval", "code"),
        default_task="text-matching",
        outputs=("dense", "multi"),
        modalities=("text", "image", "pdf"),
        late_chunking=True,
        licence="Qwen Research License",
        **_MATRYOSHKA,
    ),
)

_V5: dict[str, Any] = {
    "tasks": _V5_TASKS,
    "task_synonyms": {"separation": "clustering"},
    "default_task": "text-matching",
    **_LAST_TOKEN,
    **_MATRYOSHKA,
    **_NON_COMMERCIAL,
}
_OMNI: dict[str, Any] = {
    "family": "omni",
    "modalities": ("text", "image", "pdf", "video", "audio"),
    "groups": True,
    **_V5,
}
_EMBEDDINGS_V5 = (
    _hub(
        "jinaai/jina-embeddings-v5-text-small",
        "2026-02-18",
        676_790_272,
        "Multilingual, with an adapter for each of four tasks.",
        aliases=("jina-embeddings-v5-small",),  # as Jina's command line calls it
        family="qwen",
        context=32768,
        dim=1024,
        **_V5,
    ),
    _hub(
        "jinaai/jina-embeddings-v5-text-nano",
        "2026-02-18",
        238_897_920,
        "Multilingual and small, with an adapter for each of four tasks.",
        aliases=("jina-embeddings-v5-nano",),  # as Jina's command line calls it
        family="eurobert",
        context=8192,
        dim=768,
        **_V5,
    ),
    _hub(
        "jinaai/jina-embeddings-v5-omni-small",
        "2026-05-07",
        1_740_000_000,
        "Texts, images, documents, videos and sounds.",
        context=32768,
        dim=1024,
        **_OMNI,
    ),
    _hub(
        "jinaai/jina-embeddings-v5-omni-nano",
        "2026-05-07",
        1_040_000_000,
        "Texts, images, documents, videos and sounds; small.",
        context=8192,
        dim=768,
        **_OMNI,
    ),
)


def _of_one_task(spec: ModelSpec, adapter: str, n_parameters: int) -> ModelSpec:
    """A model as it is published once more for each task, with that adapter merged into its weights."""
    tasks = {name: Task(task.prompt) for name, task in spec.tasks.items() if task.adapter == adapter}
    return replace(
        spec,
        id=f"{spec.id}-{adapter}",
        aliases=(),
        repo=f"{spec.repo}-{adapter}",
        revision=None,
        name=f"{spec.name}-{adapter}",
        description=f"{spec.name} with its adapter for {adapter} merged in.",
        tasks=tasks,
        default_task=[*tasks][-1],  # of a search, documents
        n_parameters=n_parameters,
    )


_EMBEDDINGS_V5_MERGED = tuple(
    _of_one_task(spec, adapter, n_parameters)
    for spec, n_parameters in zip(_EMBEDDINGS_V5, (596_049_920, 211_766_016), strict=False)
    for adapter in dict.fromkeys(task.adapter for task in _V5_TASKS.values() if task.adapter)
)

_CODE: dict[str, Any] = {
    "family": "qwen",
    "context": 32768,
    "tasks": _CODE_TASKS,
    "default_task": "nl2code.query",
    **_LAST_TOKEN,
    **_MATRYOSHKA,
    **_NON_COMMERCIAL,
}
_CODE_EMBEDDINGS = (
    _hub(
        "jinaai/jina-code-embeddings-0.5b", "2025-09-01", 494_000_000, "Code, and questions about it.", dim=896, **_CODE
    ),
    _hub(
        "jinaai/jina-code-embeddings-1.5b",
        "2025-09-01",
        1_540_000_000,
        "Code, and questions about it.",
        dim=1536,
        **_CODE,
    ),
)

_COLBERTS = (
    _hub(
        "jinaai/jina-colbert-v1-en",
        "2024-02-17",
        137_000_000,
        "English, one vector per token; ranks too.",
        family="jina_bert",
        context=8192,
        dim=128,
        outputs=("multi",),
        **_APACHE,
    ),
    _hub(
        "jinaai/jina-colbert-v2",
        "2024-08-30",
        560_000_000,
        "Multilingual, one vector per token; ranks too.",
        family="xlm_roberta",
        context=8192,
        dim=128,
        shortest_dim=64,
        dims=(64, 96, 128),
        outputs=("multi",),
        **_NON_COMMERCIAL,
    ),
)

_CLIPS = (
    _hub(
        "jinaai/jina-clip-v1",
        "2024-06-05",
        222_647_041,
        "English texts and images in one space.",
        aliases=("clip",),  # what the API called it at first
        family="clip",
        context=8192,
        dim=768,
        modalities=("text", "image", "pdf"),
        **_APACHE,
    ),
    _hub(
        "jinaai/jina-clip-v2",
        "2024-11-21",
        865_278_477,
        "Texts in many languages and images in one space.",
        family="clip",
        context=8192,
        dim=1024,
        tasks={"retrieval.query": Task(_V3_TASKS["retrieval.query"].prompt)},
        task_synonyms=dict.fromkeys(task for task in _V3_TASKS if task != "retrieval.query"),  # as an older API had it
        modalities=("text", "image", "pdf"),
        **_MATRYOSHKA,
        **_NON_COMMERCIAL,
    ),
)

_ELSER = ModelSpec(
    id="elser-v2",
    family="splade",
    name="ELSER v2",
    description="English, sparse: a weight per word piece. Its weights are not on the hub: serve a directory.",
    released=date(2023, 11, 7),
    licence="Elastic's terms",
    context=512,
    dim=30522,
    tasks={"retrieval.query": Task(), "retrieval.passage": Task()},
    outputs=("sparse",),
    n_parameters=110_000_000,
    dotless=True,
    counts_output=True,
)

_QWEN3: dict[str, Any] = {
    "family": "qwen",
    "context": 32768,
    "shortest_dim": 32,
    "tasks": _QWEN3_TASKS,
    "instruct": _INSTRUCT,
    **_LAST_TOKEN,
    **_APACHE,
}
_NEIGHBOURS = (
    _hub(
        "BAAI/bge-m3",
        "2024-01-30",
        568_000_000,
        "Multilingual, for general use.",
        family="xlm_roberta",
        context=8192,
        dim=1024,
        tasks={"retrieval.query": Task(), "retrieval.passage": Task(), "text-matching": Task()},
        outputs=("dense", "sparse", "multi"),
        licence="MIT",
        refusals={
            "late_chunking": "with its architecture the embedding space collapses when parts of a text are pooled; "
            + _LATE_CHUNKERS
        },
    ),
    _hub("Qwen/Qwen3-Embedding-0.6B", "2025-06-05", 595_776_512, "Follows instructions.", dim=1024, **_QWEN3),
    _hub("Qwen/Qwen3-Embedding-4B", "2025-06-05", 4_021_774_336, "Follows instructions.", dim=2560, **_QWEN3),
    _hub("Qwen/Qwen3-Embedding-8B", "2025-06-05", 7_567_295_488, "Follows instructions.", dim=4096, **_QWEN3),
)

# Rerankers, by generation.

_RANK_V1: dict[str, Any] = {"family": "jina_bert", "context": 8192, **PAIRS, **_APACHE}
_RANK_V3: dict[str, Any] = {"family": "listwise", "context": 131072, "dim": 512, **LISTWISE, **_NON_COMMERCIAL}
_RANK_QWEN3: dict[str, Any] = {
    "family": "qwen",
    "context": 32768,
    "ranks_by": "probability",
    "takes": ("instruction", "max_doc_length", "max_query_length"),
    **_RERANKER,
    **_APACHE,
}
_RERANKERS = (
    _hub("jinaai/jina-reranker-v1-tiny-en", "2024-04-18", 33_000_000, "English, the fastest.", **_RANK_V1),
    _hub("jinaai/jina-reranker-v1-turbo-en", "2024-04-18", 37_800_000, "English, fast.", **_RANK_V1),
    _hub("jinaai/jina-reranker-v1-base-en", "2024-02-29", 137_000_000, "English.", **_RANK_V1),
    _hub(
        "jinaai/jina-reranker-v2-base-multilingual",
        "2024-06-25",
        278_000_000,
        "Multilingual.",
        family="xlm_roberta",
        context=1024,
        window_overlap=80,
        **PAIRS,
        **_NON_COMMERCIAL,
    ),
    _hub("jinaai/jina-reranker-v3", "2025-10-03", 596_836_352, "Multilingual, reads documents together.", **_RANK_V3),
    _hub("jinaai/jina-reranker-v3.5", "2026-07-27", 596_836_352, "A drop-in successor of v3.", **_RANK_V3),
    _hub(
        "jinaai/jina-reranker-m0",
        "2025-04-08",
        2_400_000_000,
        "Multilingual, texts and images.",
        family="qwen_vl",
        context=10240,
        modalities=("text", "image"),
        **PAIRS,
        **_NON_COMMERCIAL,
    ),
    _hub(
        "BAAI/bge-reranker-v2-m3",
        "2024-03-18",
        568_000_000,
        "Multilingual.",
        family="xlm_roberta",
        context=8192,
        **PAIRS,
        **_APACHE,
    ),
    _hub("Qwen/Qwen3-Reranker-0.6B", "2025-06-05", 600_000_000, "Answers yes or no.", **_RANK_QWEN3),
    _hub("Qwen/Qwen3-Reranker-4B", "2025-06-05", 4_000_000_000, "Answers yes or no.", **_RANK_QWEN3),
)

_CHAT = (
    _hub(
        "jinaai/jina-vlm",
        "2025-12-04",
        2_400_000_000,
        "Answers questions on images, in many languages.",
        family="jina_vlm",
        kind="chat",
        context=32768,
        modalities=("text", "image"),
        **_NON_COMMERCIAL,
    ),
)

CATALOG: Mapping[str, ModelSpec] = MappingProxyType(
    {
        spec.id: spec
        for spec in (
            EMBEDDED,
            *_EMBEDDINGS_V1,
            *_EMBEDDINGS_V2,
            *_EMBEDDINGS_V3,
            *_EMBEDDINGS_V4,
            *_EMBEDDINGS_V5,
            *_EMBEDDINGS_V5_MERGED,
            *_CODE_EMBEDDINGS,
            *_COLBERTS,
            *_CLIPS,
            _ELSER,
            *_NEIGHBOURS,
            *_RERANKERS,
            *_CHAT,
        )
    }
)
