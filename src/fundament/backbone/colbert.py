"""ColBERT (Khattab and Zaharia, 2020): one vector per token, for queries and documents in two ways.

A query is filled up with mask tokens to `query_maxlen`, and each of them gives a vector too. A document gives none for
punctuation. Both have a marker behind the first special token.
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.bert import UNUSED, check_positions
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.device import Placement
from fundament.backbone.packed import hide
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.tokenizing import TextTokenizer, check_vocabulary
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Item, MultiVectors
from fundament.errors import CheckpointError, Fault, InputError, TooLongError

ARCHITECTURE = "HF_ColBERT"
METADATA = "artifact.metadata"
QUERY_TOKENS = 32  # where `artifact.metadata` names no `query_maxlen`


def is_colbert(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a late-interaction model of any backbone."""
    return ARCHITECTURE in (config.get("architectures") or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How queries and documents are read.

    Attributes:
        query_marker: id of the token behind a query's first.
        document_marker: the same of a document.
        mask: id of the token that fills a query up.
        query_tokens: tokens of a query, marker and mask tokens included.
        attends_to_masks: whether other tokens attend to the mask tokens that fill a query up.
        skipped: ids of tokens that give a document no vector.
    """

    query_marker: int
    document_marker: int
    mask: int
    query_tokens: int
    attends_to_masks: bool
    skipped: Array


class ColBERT:
    """Texts to one vector per token.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the checkpoint's own.
        projection: from hidden states to vectors, `[dim, hidden]`.
        reading: how queries and documents are read.
        spec: how long a document may be.

    Raises:
        CheckpointError: the tokenizer has more tokens than the weights, or puts none in front, behind which the marker
            belongs.
    """

    def __init__(
        self, tokenizer: TextTokenizer, transformer: Transformer, projection: Tensor, reading: Reading, spec: ModelSpec
    ) -> None:
        check_vocabulary(tokenizer, spec, transformer.shape.vocab)
        if not tokenizer.n_before:
            raise CheckpointError("tokenizer.json puts no special token before a text, so its marker has no place")
        self.tokenizer, self.transformer, self.projection, self.reading = tokenizer, transformer, projection, reading
        self.spec = spec
        self.n_bytes = transformer.n_bytes + projection.nbytes

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text. A query longer than the model reads is cut, as its publishers do it, and counted as cut.

        Raises:
            InputError: another output than vectors per token.
            TooLongError: a text longer than the context, without `truncate`.
        """
        if call.output != "multi":
            raise InputError(Fault("body -> model", f"Model '{self.spec.id}' gives one vector per token."))
        query = call.role == "query"
        limit = self.spec.context - 1  # the marker takes one
        items = []
        for index, tokens in enumerate(
            self.tokenizer.encode(call.texts, most=self.reading.query_tokens - 1 if query else limit)
        ):
            if tokens.n_whole > limit and not call.truncate:
                raise TooLongError(index=index, n_tokens=tokens.n_whole, limit=limit, more=not tokens.is_whole)
            features = self._query(tokens.ids) if query else self._document(tokens.ids)
            n = len(features["ids"])
            items.append(Item(features=features, n_tokens=n, n_counted=tokens.n_own, n_truncated=tokens.truncated))
        return items

    def _query(self, ids: Array) -> dict[str, Array]:
        reading = self.reading
        read = np.insert(ids, 1, reading.query_marker)
        filled = np.pad(read, (0, reading.query_tokens - len(read)), constant_values=reading.mask)
        visible = len(filled) if reading.attends_to_masks else len(read)
        return {"ids": filled, "visible": np.array(visible), "kept": np.arange(len(filled))}

    def _document(self, ids: Array) -> dict[str, Array]:
        read = np.insert(ids, 1, self.reading.document_marker)
        kept = np.flatnonzero(~np.isin(read, self.reading.skipped))
        return {"ids": read, "visible": np.array(len(read)), "kept": kept}

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The kept tokens' vectors of each row, float32 `[kept tokens, dim]`."""
        packed, order = pack_items(items, self.transformer.device)
        packed = hide(packed, [int(items[place].features["visible"]) for place in order])
        with torch.inference_mode():
            vectors = F.linear(self.transformer(packed), self.projection).float().cpu().numpy()
        found = unsort(np.split(vectors, packed.bounds[1:-1]), order)
        return [vectors[item.features["kept"]] for vectors, item in zip(found, items, strict=True)]

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> MultiVectors:
        """The vectors of one call, in its order."""
        named = (self.tokenizer.tokens_of(item.features["ids"][item.features["kept"]]) for item in items)
        return MultiVectors(vectors=arrays, tokens=list(named) if call.name_tokens else None)


def load_colbert(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    *,
    prefixes: tuple[str, ...],
    markers: tuple[str, str],
    attends_to_masks: bool | None = None,
) -> ColBERT:
    """Read the weights and how the checkpoint reads texts.

    Args:
        checkpoint: where the files are.
        spec: what the catalogue says of the model.
        placement: where the weights go.
        shape: what to build.
        layout: where each module's tensors are.
        prefixes: what the backbone's tensor names may begin with.
        markers: the tokens before queries and documents, where `artifact.metadata` names none that the tokenizer has.
        attends_to_masks: whether other tokens attend to a query's mask tokens; None leaves it to `artifact.metadata`.

    Raises:
        CheckpointError: the checkpoint does not fit, or its tokenizer lacks a marker or a mask.
    """
    check_positions(checkpoint, spec, shape)
    weights = checkpoint.read(
        parameters(shape),
        layout,
        placement,
        prefixes=prefixes,
        ignored=rf"{UNUSED}|linear\.weight",
    )
    projection = checkpoint.read(
        {"linear.weight": (spec.dim, shape.hidden)},
        {"linear": "linear"},
        placement,
        ignored=".*",  # the backbone's, which are read above
    )
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    reading = read_reading(checkpoint, spec, tokenizer, markers, attends_to_masks)
    return ColBERT(tokenizer, Transformer(shape, weights), projection["linear.weight"], reading, spec)


def read_reading(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    markers: tuple[str, str],
    attends_to_masks: bool | None,
) -> Reading:
    """How `artifact.metadata` says that texts are read, with ColBERT's own defaults where it says nothing.

    The keys `query_token_id` and `doc_token_id` hold tokens, not numbers.

    Raises:
        CheckpointError: a token that the tokenizer lacks, a query of no length, or no such file where it was published.
    """
    if spec.repo and not (checkpoint.directory / METADATA).exists():
        raise CheckpointError(
            f"{checkpoint.directory} has no {METADATA}, which says how '{spec.id}' reads queries and documents. "
            f"Put it there from {spec.repo}, or get the model anew: fundament pull {spec.id}"
        )
    told = checkpoint.json(METADATA, default={})

    def number(what: str, *tokens: Any) -> int:
        found = tokenizer.first_id_of(*(token for token in tokens if isinstance(token, str)))
        if found is None:
            raise CheckpointError(f"{checkpoint.directory}: the tokenizer has no {what}; it should have {tokens[-1]}")
        return found

    length = told.get("query_maxlen", QUERY_TOKENS)
    if not isinstance(length, int) or length < 3:  # first, marker, last
        raise CheckpointError(f"{checkpoint.directory}: query_maxlen of {METADATA} should be 3 or more: {length}")
    if told.get("similarity", "cosine") != "cosine":
        raise CheckpointError(f"{checkpoint.directory}: similarity of {METADATA} should be 'cosine'")
    if not isinstance(told.get("attend_to_mask_tokens", False), bool):
        raise CheckpointError(f"{checkpoint.directory}: attend_to_mask_tokens of {METADATA} should be true or false")
    return Reading(
        query_marker=number("query marker", told.get("query_token_id"), markers[0]),
        document_marker=number("document marker", told.get("doc_token_id"), markers[1]),
        mask=number("mask", "<mask>", "[MASK]"),
        query_tokens=length,
        attends_to_masks=bool(told.get("attend_to_mask_tokens")) if attends_to_masks is None else attends_to_masks,
        skipped=punctuation(tokenizer) if told.get("mask_punctuation", True) else np.array([], dtype=np.int64),
    )


def punctuation(tokenizer: TextTokenizer) -> Array:
    """Ids of the tokens that are one ASCII punctuation mark, as the vocabulary writes it, int64.

    A mark that the vocabulary lacks is not there rather than unknown: else unknown words would give no vector.
    """
    unknown = tokenizer.first_id_of("<unk>", "[UNK]")
    marks: Iterable[int | None] = map(tokenizer.id_of, string.punctuation)
    return np.array([mark for mark in marks if mark not in (None, unknown)], dtype=np.int64)


def read_dim(checkpoint: Checkpoint) -> int:
    """Numbers of a token's vector.

    Raises:
        CheckpointError: no projection.
    """
    if "linear.weight" not in checkpoint.names:
        raise CheckpointError(f"{checkpoint.directory} has no linear.weight, which {ARCHITECTURE} projects with")
    return checkpoint.shape("linear.weight")[0]
