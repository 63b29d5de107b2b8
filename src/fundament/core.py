"""The nouns that every layer shares: calls, items, results. Plain data; no torch, no HTTP."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Priority(IntEnum):
    """Which lane a call waits in. A lower number goes first."""

    INTERACTIVE = 0
    BACKGROUND = 1


MediaKind = Literal["image", "pdf", "video", "audio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """The most that a file may be. The sizes are checked before it is decoded.

    Attributes:
        image_bytes: of an image or a PDF.
        recording_bytes: of a video or a sound.
        image_pixels: of an image, or of a frame.
        pdf_pages: of a PDF.
        seconds: of a video or a sound.
        video_frames: of a video.
        video_pixels: of a video, all its frames together.
        call_bytes: of what a model is given of all files of a call together.
    """

    image_bytes: int = 8_000_000
    recording_bytes: int = 32_000_000
    image_pixels: int = 64_000_000
    pdf_pages: int = 100
    seconds: float = 300
    video_frames: int = 10_000
    video_pixels: int = 10_000_000_000
    call_bytes: int = 2_000_000_000

    def max_bytes(self, kind: MediaKind) -> int:
        """Most bytes of a file of that kind."""
        return self.image_bytes if kind in ("image", "pdf") else self.recording_bytes


@dataclass(slots=True, eq=False)
class Interest:
    """Whether anybody waits for what is made of a file: decoding asks now and then, and what cannot ask is ended.

    Attributes:
        lost: nobody does any more.
        endings: what is called when it is lost.
    """

    lost: bool = False
    endings: set[Callable[[], None]] = field(default_factory=set)

    def lose(self) -> None:
        """Nobody waits any more; from any thread."""
        self.lost = True
        for end in tuple(self.endings):
            end()

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Call `end`, too, if the interest is lost before the block ends, or was before it began."""
        self.endings.add(end)
        try:
            if self.lost:
                end()
            yield
        finally:
            self.endings.discard(end)


@dataclass(frozen=True, slots=True)
class Media:
    """A file that a caller sent, not decoded yet. Two are equal where their kinds and bytes are.

    Attributes:
        kind: what the caller says it is; what its bytes say is found out when it is decoded.
        content: the file's bytes.
        origin: its place in the request (`body -> input -> 3 -> image`), for errors.
        limits: what is refused when it is decoded.
        interest: whether it is still worth decoding.
    """

    kind: MediaKind
    content: bytes = field(repr=False)
    origin: str = field(default="body -> input", compare=False)
    limits: MediaLimits = field(default=MediaLimits(), compare=False, repr=False)
    interest: Interest = field(default_factory=Interest, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Group:
    """Several parts, in order, that become one vector."""

    parts: Sequence[str | Media]


Input = str | Media | Group

Output = Literal["dense", "multi", "sparse"]
"""What an input becomes: one vector, one vector per token, or a weight per word piece."""
Role = Literal["query", "document"]
"""Which side of a search an input is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """Turn each input into one vector, one per token, or weights.

    Attributes:
        inputs: what to read, each of a modality that the model's spec names. A PDF is the only input, and each of its
            pages counts as one.
        task: what the vectors are for; None where the model has no tasks or the caller names none.
        instruction: what the vectors are for in the caller's own words, in place of the task's; None where the model
            follows none or the caller gives none.
        truncate: read as much of a text as fits, in place of refusing it.
        late_chunking: read all texts as one, then give a vector to each of them, or to each sentence of the only one.
        late_chunking_window: tokens of a window, special tokens included: what does not fit one is read in
            several that overlap. None: one window as long as the context.
        output: what each text becomes; one of the model's `outputs`.
        role: the side of the search, where a model reads queries and documents in two ways; None means document.
        name_tokens: name the token of each vector (`multi` only).
        n_recurring: how many of the last inputs come again with calls to come, as labels do: an engine may keep what
            they became. Each input is one row then.
    """

    inputs: Sequence[Input]
    task: str | None = None
    instruction: str | None = None
    truncate: bool = False
    late_chunking: Literal["inputs", "sentences"] | None = None
    late_chunking_window: int | None = None
    output: Output = "dense"
    role: Role | None = None
    name_tokens: bool = False
    n_recurring: int = 0

    @property
    def has_media(self) -> bool:
        """Whether files have to be decoded."""
        return not all(isinstance(value, str) for value in self.inputs)

    @property
    def texts(self) -> Sequence[str]:
        """The inputs of a model that reads nothing but texts.

        Raises:
            TypeError: something else is among them, which `ModelSpec.modalities` should have kept out.
        """
        return _texts(self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerank:
    """Say how relevant each document is to a query.

    Attributes:
        query: what is searched for; each side is of a modality that the model's spec names.
        documents: what was found.
        truncate: read as much of a query and a document as fits, in place of refusing them.
        instruction: what relevance means, in words; None where the model takes none or the caller names none.
        max_query_tokens: read this much of the query at most; None means what the model card says.
        max_document_tokens: read this much of each document at most; None means what the model card says.
        embeddings: give the vectors too that the scores are made of.
    """

    query: str | Media
    documents: Sequence[str | Media]
    truncate: bool = True
    instruction: str | None = None
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    embeddings: bool = False

    @property
    def has_media(self) -> bool:
        """Whether files have to be decoded."""
        return not all(isinstance(value, str) for value in (self.query, *self.documents))

    @property
    def texts(self) -> tuple[str, Sequence[str]]:
        """The query and the documents of a model that reads nothing but texts.

        Raises:
            TypeError: something else is among them, which `ModelSpec.modalities` should have kept out.
        """
        query, *documents = _texts((self.query, *self.documents))
        return query, documents


def _texts(values: Sequence[Input]) -> Sequence[str]:
    if others := {type(value).__name__ for value in values if not isinstance(value, str)}:
        raise TypeError(f"a text model was given {', '.join(sorted(others))}")
    return cast("Sequence[str]", values)


ChatRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a conversation said: texts and files, in order."""

    role: ChatRole
    parts: Sequence[str | Media]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Write what comes next in a conversation.

    Attributes:
        messages: what was said so far.
        max_tokens: most tokens to write; None means `DEFAULT_MAX_TOKENS`, or less where the context ends before.
        temperature: 0 takes the likeliest token; the higher, the more others are drawn.
        top_p: tokens are drawn from the likeliest, which together have this probability.
        stop: texts before the first of which the answer ends.
        seed: draws the same tokens again; None draws others each time.
    """

    messages: Sequence[Message]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None

    @property
    def has_media(self) -> bool:
        """Whether files have to be decoded."""
        return not all(isinstance(part, str) for message in self.messages for part in message.parts)


DEFAULT_MAX_TOKENS = 256

Call = Embed | Rerank | Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One row of a forward pass. The same object twice in a call's list runs once and counts twice.

    Attributes:
        features: NumPy inputs of the row, by name, as its model's `forward` reads them.
        n_tokens: tokens that the row costs in a batch.
        mate: rows share a batch only where this is equal.
        n_counted: tokens that `usage` counts: what was read of the caller's own input, special tokens included.
        n_truncated: how many inputs were longer than what was read of them: 0 or 1, or of the documents of a block.
        n_media: how many of `n_counted` stand for media, by their kind; pages of a PDF are images.
    """

    features: dict[str, Array]
    n_tokens: int
    mate: Hashable = None
    n_counted: int = 0
    n_truncated: int = 0
    n_media: Mapping[MediaKind, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much was read for a result; the engine counts it, from the call's items.

    Attributes:
        n_tokens: tokens read, summed over the inputs.
        n_truncated: how many inputs, or documents, were longer than what the model reads.
        n_media: how many of `n_tokens` stand for media, by their kind.
        n_tokens_each: tokens of each input; empty where inputs and rows are not one to one.
        n_media_each: the same of those that stand for media.
    """

    n_tokens: int = 0
    n_truncated: int = 0
    n_media: Mapping[MediaKind, int] = field(default_factory=dict)
    n_tokens_each: Sequence[int] = ()
    n_media_each: Sequence[Mapping[MediaKind, int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings(Counts):
    """What `Embed` answers: one vector per input, in the caller's order.

    A PDF has one per page, and a single text with late chunking one per sentence.

    Attributes:
        vectors: float32 `[vectors, dim]`, not normalised.
    """

    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiVectors(Counts):
    """What `Embed` answers with one vector per token, in the caller's order.

    Attributes:
        vectors: of each input, float32 `[tokens, dim]`, not normalised.
        tokens: of each input, the token that each vector stands for; None where nobody asked.
    """

    vectors: Sequence[NDArray[np.float32]]
    tokens: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVectors(Counts):
    """What `Embed` answers with weights of word pieces, in the caller's order.

    Attributes:
        weights: of each input, token → weight above zero, the heaviest first.
    """

    weights: Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(Counts):
    """What `Rerank` answers, in the order of the caller's documents.

    Attributes:
        scores: `[documents]`; the higher, the more relevant. Their range is the model's own. Probabilities are float64:
            in float32, as all other scores are, those near one would be equal.
        embeddings: float32 `[documents, dim]` of unit length; None where nobody asked.
    """

    scores: NDArray[np.floating[Any]]
    embeddings: NDArray[np.float32] | None = None


Embedded = Embeddings | MultiVectors | SparseVectors
Result = Embedded | Ranking


def sum_media(each: Iterable[Mapping[MediaKind, int]]) -> dict[MediaKind, int]:
    """Tokens of each kind of media over several rows or inputs, given those of each."""
    sums: Counter[MediaKind] = Counter()
    for n_media in each:
        sums.update(n_media)
    return dict(sums)


Finish = Literal["stop", "length"]
"""Why an answer ends: it is complete, or as long as it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What `Generate` answers, piece by piece; the texts of all pieces are the answer.

    Attributes:
        text: what was written since the last piece, maybe nothing yet.
        n_prompt: tokens of the conversation as it was read.
        n_written: tokens written so far, the one that ended the answer included.
        finish: why the answer ends here; None where it goes on.
    """

    text: str
    n_prompt: int
    n_written: int
    finish: Finish | None = None


class Bill(Protocol):
    """Who pays for a call. Its methods are called on the caller's event loop."""

    async def admit(self, n_tokens: int) -> None:
        """Take what the call costs, once it is read and before it runs.

        Raises:
            FundamentError: the caller may not spend that now; the call does not run.
        """
        ...

    def refund(self, n_tokens: int) -> None:
        """Give back what was taken for rows that nobody got anything for."""
        ...


C_contra = TypeVar("C_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Model(Protocol[C_contra, R_co]):
    """A loaded checkpoint of a family, which answers one kind of call.

    `prepare` and `finish` run per request, the first on a worker thread; `forward` runs per batch, on the threads that
    own the model.
    """

    n_bytes: int

    def prepare(self, call: C_contra) -> list[Item]:
        """Read a call into rows.

        Raises:
            InputError: an input that this model cannot read; the message names it.
        """
        ...

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """Run rows of any callers together; one array per row, in the given order."""
        ...

    def finish(self, call: C_contra, items: Sequence[Item], arrays: Sequence[Array]) -> R_co:
        """Put one call's arrays together; how much was read of its items the engine adds."""
        ...


class Answer(Protocol):
    """One conversation that a `Writer` reads and continues, with its keys and values."""

    @property
    def n_ahead(self) -> int:
        """Tokens to read before the next one is written: 1 once the conversation is read."""
        ...


class Writer(Protocol):
    """A loaded checkpoint that answers `Generate`, all on the one thread that owns it but `prepare`.

    Attributes:
        n_bytes: of its weights.
        token_bytes: of the keys and values of one token.
    """

    n_bytes: int
    token_bytes: int

    def prepare(self, call: Generate) -> list[Item]:
        """Read a conversation into one item, whose `n_tokens` are those read and those it may have written.

        Raises:
            InputError: something that this model cannot read; the message names it.
            ConversationTooLongError: it does not fit the context.
        """
        ...

    def begin(self, call: Generate, item: Item) -> Answer:
        """Make room for the keys and values of a conversation, and look at its pictures."""
        ...

    def step(self, answers: Sequence[Any], sizes: Sequence[int]) -> list[Delta | None]:
        """Read the next tokens of each answer, in one forward pass.

        Where it fails nothing has changed, and the step may be taken again with fewer answers.

        Args:
            answers: made by `begin`.
            sizes: how many tokens of each; at most its `n_ahead`.

        Returns:
            What each wrote; None where there is still something to read.
        """
        ...
