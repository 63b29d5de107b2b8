"""Listwise rerankers on Qwen3: jina-reranker-v3 and v3.5. All documents of a block are read in one prompt.

Behind each document and behind the query stands a token of its own; a projection of its state is the vector of what
stands before it, and a score the cosine of the two. The prompt is that of the publishers' model card.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.decoder import PREFIX_BYTES, Decoder
from fundament.backbone.device import Placement
from fundament.backbone.excerpts import Excerpt, count_instruction, read_documents, read_query
from fundament.backbone.llama import IGNORED, LAYOUT, PREFIXES, read_qwen_shape
from fundament.backbone.passes import Row, costs, share_alike
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.transformer import Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Item, Ranking, Rerank
from fundament.errors import CheckpointError

ARCHITECTURE = "JinaForRanking"

MARKS = DOCUMENT_MARK, QUERY_MARK = "<|embed_token|>", "<|rerank_token|>"
"""Tokens behind a document and behind the query; a caller's text must not say them."""
_LONGEST_MARK = max(map(len, MARKS))

BLOCK_DOCUMENTS = 125
QUERY_TOKENS, DOCUMENT_TOKENS = 512, 2048
"""Most tokens of a query and of a document where the caller does not say."""

_HEAD = (
    "<|im_start|>system\n"
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking.<|im_end|>\n"
    "<|im_start|>user\n"
    "I will provide you with {n} passages, each indicated by a numerical identifier. Rank the passages based on their "
    "relevance to query: {query}\n"
)
_INSTRUCTION = "<instruct>\n{instruction}\n</instruct>\n"
_PASSAGE = f'<passage id="{{number}}">\n{{text}}{DOCUMENT_MARK}\n</passage>\n'
_TAIL = f"<query>\n{{query}}{QUERY_MARK}\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

_LEAST_NORM = 1e-8  # a shorter vector counts as this long, so that a cosine is always a number


def recognises(config: dict[str, Any]) -> bool:
    """Qwen3 with the class of its publishers' own for rankings."""
    return config.get("model_type") == "qwen3" and ARCHITECTURE in (config.get("architectures") or ())


def kept_bytes(spec: ModelSpec) -> int:
    """Keys and values of the beginnings of prompts."""
    del spec  # all share them
    return PREFIX_BYTES


class ListwiseReranker:
    """A query and documents to cosines.

    Args:
        tokenizer: the checkpoint's own.
        decoder: the checkpoint's own.
        projection: two matrices with a rectifier between them, `[inner, hidden]` and `[dim, inner]`.
        spec: how long a prompt may be.

    Raises:
        CheckpointError: the tokenizer lacks a mark, or the context is too short for the prompt.
    """

    def __init__(
        self, tokenizer: TextTokenizer, decoder: Decoder, projection: tuple[Tensor, Tensor], spec: ModelSpec
    ) -> None:
        self.tokenizer, self.decoder, self.projection, self.spec = tokenizer, decoder, projection, spec
        self.n_bytes = decoder.n_bytes + sum(matrix.nbytes for matrix in projection)
        found = {mark: tokenizer.id_of(mark) for mark in MARKS}
        if missing := [mark for mark, number in found.items() if number is None]:
            raise CheckpointError(f"the tokenizer of '{spec.id}' lacks {' and '.join(missing)}")
        self.marks = np.array(list(found.values()), dtype=np.int64)
        frame = "".join([_HEAD, _INSTRUCTION, _TAIL]).format(n=BLOCK_DOCUMENTS, query="", instruction="")
        passage = _PASSAGE.format(number=BLOCK_DOCUMENTS - 1, text="")
        n_frame, self.n_passage = map(len, tokenizer.pieces([frame, passage]))
        self.room = spec.context - n_frame  # for the caller's texts, and for what is around each document
        if self.room < 8 * self.n_passage:
            raise CheckpointError(f"'{spec.id}' reads {spec.context} tokens, too few for its prompt of {n_frame}")

    def prepare(self, call: Rerank) -> list[Item]:
        """One row per block of different documents; what blocks' prompts begin with alike is their prefix.

        Raises:
            InputError: an instruction that leaves no room for the rest.
            TooLongError: a query or a document longer than is read, without `truncate`.
        """
        text, texts = call.texts
        instruction = unmarked(call.instruction or "")
        asked = replace(call, query=unmarked(text), documents=[*map(unmarked, texts)], instruction=instruction)
        n_told = count_instruction(self.tokenizer, asked, self.room // 2)
        room = self.room - n_told
        # The prompt says the query twice; documents have at least half of what is left.
        query = read_query(self.tokenizer, asked, min(call.max_query_tokens or QUERY_TOKENS, room // 4))
        room -= 2 * query.n_tokens
        longest = min(call.max_document_tokens or DOCUMENT_TOKENS, room - self.n_passage)
        documents = read_documents(self.tokenizer, asked, longest)
        blocks = list(divide(documents, room, longest, self.n_passage))
        ids = self.tokenizer.pieces([prompt(query.text, [d.text for d in block], instruction) for block in blocks])
        kept = [np.flatnonzero(np.isin(row, self.marks)) for row in ids]
        # A prompt begins with the number of its documents, so blocks of one size have more in common.
        rows = share_alike(ids, kept, self.decoder.most_shared, [len(block) for block in blocks])
        return [
            Item(
                features=row.features,
                n_tokens=cost,
                n_counted=sum(document.n_tokens for document in block) + (0 if place else query.n_tokens + n_told),
                n_truncated=sum(document.truncated for document in block),
            )
            for place, (row, cost, block) in enumerate(zip(rows, costs(rows), blocks, strict=True))
        ]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The vectors of each block's documents, and of its query as the last, float32 `[documents + 1, dim]`."""
        states = self.decoder.states([Row.of(item) for item in items])
        inner, outer = self.projection
        with torch.inference_mode():
            vectors = F.linear(F.linear(torch.cat(states), inner).relu_(), outer).float().cpu().numpy()
        return np.split(vectors, np.cumsum([len(state) for state in states])[:-1])

    def finish(self, call: Rerank, items: Sequence[Item], arrays: Sequence[Array]) -> Ranking:  # noqa: ARG002
        """The cosines of one call, in the order of its documents; equal documents have equal ones."""
        scores, vectors = merge(arrays)
        texts = [*map(unmarked, call.texts[1])]
        place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        places = [place_of[text] for text in texts]
        return Ranking(
            scores=scores[places],
            embeddings=vectors[places] if call.embeddings else None,
        )


def unmarked(text: str) -> str:
    """The text without the marks, and without those that taking one away would leave behind.

    In one pass: what is kept never holds a mark, so that a character makes one at most, as its last.
    """
    if not any(mark in text for mark in MARKS):
        return text
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character == ">":
            last = "".join(kept[-_LONGEST_MARK:])
            for mark in MARKS:
                if last.endswith(mark):
                    del kept[-len(mark) :]
    return "".join(kept)


def divide(documents: Sequence[Excerpt], room: int, longest: int, n_around: int = 0) -> Iterator[list[Excerpt]]:
    """Blocks of documents, in their order: a block ends where another document might not fit.

    Args:
        documents: one at least.
        room: tokens of all documents of a block.
        longest: most tokens of a document.
        n_around: tokens that the prompt has around each.
    """
    block: list[Excerpt] = []
    left = room
    for document in documents:
        block.append(document)
        left -= document.n_tokens + n_around
        if len(block) == BLOCK_DOCUMENTS or left <= longest + n_around:
            yield block
            block, left = [], room
    if block:
        yield block


def prompt(query: str, documents: Sequence[str], instruction: str = "") -> str:
    """The text that is read of a block."""
    # Once more: what is left of a cut text is read from its tokens, and a normalizer may make a mark of other letters.
    query = unmarked(query)
    told = _INSTRUCTION.format(instruction=instruction) if instruction else ""
    passages = (_PASSAGE.format(number=number, text=unmarked(text)) for number, text in enumerate(documents))
    return "".join([_HEAD.format(n=len(documents), query=query), told, *passages, _TAIL.format(query=query)])


def merge(blocks: Sequence[Array]) -> tuple[Array, Array]:
    """One ranking from the vectors of several blocks.

    The query's vector is the blocks' mean, each weighted by its best document: `(1 + score) / 2`.

    Args:
        blocks: float32 `[documents + 1, dim]` of each, the query's vector last.

    Returns:
        Scores `[documents]`, and the documents' vectors at unit length, `[documents, dim]`; float32.
    """
    documents = [_unit(block[:-1]) for block in blocks]
    queries = np.stack([block[-1] for block in blocks])
    weights = np.array([(1 + float((its @ own).max())) / 2 for its, own in zip(documents, _unit(queries), strict=True)])
    if len(blocks) > 1 and weights.sum() > 0:
        query = np.average(queries, axis=0, weights=weights)
    else:
        query = queries.mean(axis=0)
    vectors = np.concatenate(documents)
    scores = np.clip(vectors @ _unit(query), -1, 1)  # unit lengths are rounded
    return scores.astype(np.float32), vectors.astype(np.float32)


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _LEAST_NORM)
    return unit


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> ListwiseReranker:
    """A listwise reranker from a Qwen3 checkpoint with a projector.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    shape = read_qwen_shape(checkpoint.config)
    weights = checkpoint.read(
        parameters(shape),
        LAYOUT,
        placement,
        prefixes=PREFIXES,
        ignored=rf"{IGNORED}|projector\.[02]\.weight",
    )
    inner = _width(checkpoint, "projector.0.weight")
    projector = checkpoint.read(
        {"inner.weight": (inner, shape.hidden), "outer.weight": (spec.dim, inner)},
        {"inner": "projector.0", "outer": "projector.2"},
        placement,
        ignored=".*",  # the backbone's, which are read above
    )
    return ListwiseReranker(
        TextTokenizer(checkpoint.directory, spec.context),
        Decoder(Transformer(shape, weights)),
        (projector["inner.weight"], projector["outer.weight"]),
        spec,
    )


def read_dim(checkpoint: Checkpoint) -> int:
    """Numbers of a document's vector.

    Raises:
        CheckpointError: no projector.
    """
    return _width(checkpoint, "projector.2.weight")


def _width(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.names:
        raise CheckpointError(f"{checkpoint.directory} has no {name}, which {ARCHITECTURE} projects with")
    return checkpoint.shape(name)[0]
