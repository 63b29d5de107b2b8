"""What is known of one public model, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from types import MappingProxyType
from typing import Literal

from fundament.core import Output

Kind = Literal["embedding", "reranker", "chat"]
Score = Literal["probability", "cosine", "maxsim", "dot"]
"""What a relevance score is: 0 to 1; -1 to 1; the best cosine of each query token, summed; a product of weights, or of
vectors as they are."""
RerankField = Literal["instruction", "max_doc_length", "max_query_length", "return_embeddings"]

_VECTOR_SCORES: Mapping[Output, Score] = {"dense": "cosine", "multi": "maxsim", "sparse": "dot"}


@dataclass(frozen=True, slots=True)
class Task:
    """What a value of the API's `task` field means to a model: a prefix of the text, and an adapter's name."""

    prompt: str = ""
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One public model.

    Attributes:
        id: the name that callers say.
        aliases: other names that older callers say.
        family: the module of `fundament.models` that loads it.
        repo: owner and name on the model hub; the empty string for a directory of the operator's own.
        revision: the commit that is pulled; None where no commit is known to us: the first pull then records it.
        name: for people.
        released: the day of the public release.
        licence: SPDX identifier where there is one.
        context: most tokens of an input, special tokens included.
        dim: numbers of a vector, or of each token's vector in a late-interaction model; 0 where it gives none.
        shortest_dim: the least `dimensions` a caller may ask for; None where vectors cannot be cut.
        dims: the only values of `dimensions`, where the model has such a list.
        tasks: values of the `task` field; empty where the model has none and ignores it.
        instruct: the prompt of an instruction in the caller's own words, which take the place of `{}`; empty where the
            model follows none.
        default_task: the task where the caller names none; None runs it with no prefix and no adapter.
        outputs: what an input can become; the first is what callers get who do not ask.
        modalities: what it reads: text, image, pdf, video, audio.
        groups: whether several parts of any of these can become one vector together.
        bare_tasks: older names of tasks, each of which `prompt_name` completes to `.query` or `.passage`.
        task_synonyms: names of other models' tasks that callers say to this one, each with its own; None is no task.
        n_parameters: of the published checkpoint, adapters included.
        late_chunking: whether the parts of one long text can be pooled each on its own.
        refusals: fields that other models take and this one refuses, each with the reason.
        ranks_by: what a reranker's scores are, or those of an embedding model whose vectors are compared otherwise than
            others of their kind; None elsewhere, see `score`.
        takes: fields of a rerank request that not every model takes.
        window_overlap: tokens that the windows share in which a reranker reads a document longer than its context;
            None cuts such a document.
        wraps_documents: whether a ranking names each document as `{"text": …}`, whatever form the caller sent.
        dotless: whether tokens that weigh are named with `__` for a dot: Elasticsearch keeps a field for each, and a
            dot would part the field's name.
        counts_output: whether `usage` tells input and output tokens apart.
    """

    id: str
    aliases: tuple[str, ...] = ()
    family: str
    repo: str = ""
    revision: str | None = None
    name: str
    description: str = ""
    released: date
    licence: str
    kind: Kind = "embedding"
    context: int
    dim: int = 0
    shortest_dim: int | None = None
    dims: tuple[int, ...] = ()
    tasks: Mapping[str, Task] = field(default_factory=lambda: MappingProxyType({}))
    instruct: str = ""
    default_task: str | None = None
    outputs: tuple[Output, ...] = ("dense",)
    modalities: tuple[str, ...] = ("text",)
    groups: bool = False
    bare_tasks: tuple[str, ...] = ()
    task_synonyms: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    n_parameters: int = 0
    late_chunking: bool = False
    refusals: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ranks_by: Score | None = None
    takes: tuple[RerankField, ...] = ()
    window_overlap: int | None = None
    wraps_documents: bool = False
    dotless: bool = False
    counts_output: bool = False

    @property
    def score(self) -> Score | None:
        """What `/v1/rerank` answers in `relevance_score`; None where the model cannot rank."""
        return self.ranks_by or (_VECTOR_SCORES[self.outputs[0]] if self.kind == "embedding" else None)

    @property
    def search_tasks(self) -> tuple[str | None, str | None]:
        """The tasks of a search's query and of its documents; None where the model has no such task."""
        stem = "retrieval" if "retrieval.query" in self.tasks else (self.default_task or "").partition(".")[0]
        names = (f"{stem}.query", "query"), (f"{stem}.passage", "document", "passage")
        query, document = (next((name for name in side if name in self.tasks), None) for side in names)
        return query, document

    @property
    def owner(self) -> str:
        """Who published it: the hub's account."""
        return self.repo.split("/")[0] or "local"

    @property
    def created(self) -> int:
        """The release day as a Unix timestamp, in seconds."""
        return int(datetime(self.released.year, self.released.month, self.released.day, tzinfo=UTC).timestamp())

    @property
    def non_commercial(self) -> bool:
        """Whether the licence forbids commercial use."""
        return "-NC" in self.licence or "Research" in self.licence

    @property
    def way_in(self) -> str:
        """How its weights come onto a machine, in a sentence."""
        if not self.repo:
            return f"None are public: serve a directory of yours, --model {self.id}=DIR"
        return f"Get them: fundament pull {self.id}{' --accept-licence' if self.non_commercial else ''}"
