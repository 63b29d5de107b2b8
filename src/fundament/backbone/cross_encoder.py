"""Cross-encoders: a query and a document read as one text, whose states say how well they go together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.classifier_head import Head, HeadKind, load_head
from fundament.backbone.device import Placement
from fundament.backbone.linear import LowRank
from fundament.backbone.packed import Packed, Span
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.tokenizing import TextTokenizer, check_vocabulary
from fundament.backbone.transformer import Adapter, Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Item, Ranking, Rerank
from fundament.errors import Fault, InputError, TooLongError

_SECOND = 0  # place of the adapter that makes a token's type 1


class CrossEncoder:
    """A query and documents to the probability that each document answers the query.

    Equal documents are read once. A document longer than the room beside its query is cut, or read in windows whose
    best score counts, as the catalogue says of the model.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the checkpoint's own; it has `second_type` as its adapter where its tokens have types.
        head: from a pair's states to its logit.
        spec: how long a pair may be, and how windows overlap.
        padding: a token that is not read at a pair's end: transformers' causal classifiers score the last other one.

    Raises:
        CheckpointError: the tokenizer frames pairs in a way that is not served, or has more tokens than the weights.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        transformer: Transformer,
        head: Head,
        spec: ModelSpec,
        padding: int | None,
    ) -> None:
        check_vocabulary(tokenizer, spec, transformer.shape.vocab)
        self.tokenizer, self.transformer, self.head, self.spec = tokenizer, transformer, head, spec
        self.padding = padding
        self.frame = tokenizer.pair_frame(led=head.kind.pooling == "first")
        self.typed = transformer.shape.n_types > 1
        self.n_bytes = transformer.n_bytes + head.n_bytes

    def prepare(self, call: Rerank) -> list[Item]:
        """One row per different document, or per window of one.

        Raises:
            InputError: neither the query nor a document has a token.
            TooLongError: a query or a document longer than what is read, without `truncate`.
        """
        frame, context = self.frame, self.spec.context
        asked_query, documents = call.texts
        query = self._query(call, asked_query, (context - frame.n_special) // 2)
        room = context - frame.n_special - len(query)
        items = []
        different = list(dict.fromkeys(documents))
        most, in_windows = call.max_document_tokens, self.spec.window_overlap is not None
        if most is None and in_windows:  # however long they are
            read = [(ids, True) for ids in self.tokenizer.pieces(different)]
        else:
            read = self.tokenizer.first_pieces(different, room if most is None else most)
        for place, (ids, is_whole) in enumerate(read):
            if len(asked := ids[:most]) > room and not in_windows and not call.truncate:
                name = f"Document {documents.index(different[place])}"
                raise TooLongError(name, n_tokens=len(asked), limit=room, more=most is None and not is_whole)
            starts = self._starts(len(asked), room)
            n_read = min(len(asked), starts[-1] + room)
            for start in starts:
                row, second = frame.join(query, asked[start : start + room])
                if not len(row):
                    field = f"body -> documents -> {documents.index(different[place])}"
                    raise InputError(Fault(field, "Neither it nor the query has a token for this model."))
                row = self._unpadded(row)
                features = {"ids": row, "second": np.array(second), "document": np.array(place)}
                first = start == 0  # what windows share is counted once
                items.append(
                    Item(
                        features=features,
                        n_tokens=len(row),
                        n_counted=frame.n_special + len(query) + n_read if first else 0,
                        n_truncated=first and n_read < len(ids),
                    )
                )
        return items

    def _unpadded(self, row: Array) -> Array:
        """The row without what is not read at its end; of nothing else the first token stays."""
        if self.padding is None:
            return row
        read = np.flatnonzero(row != self.padding)
        return row[: int(read[-1]) + 1 if len(read) else 1]

    def _query(self, call: Rerank, text: str, limit: int) -> Array:
        """The query's ids; half the context at most, so that documents keep the other half."""
        most = call.max_query_tokens
        [(ids, is_whole)] = self.tokenizer.first_pieces([text], limit if most is None else most)
        if len(asked := ids[:most]) > limit and not call.truncate:
            raise TooLongError("The query", n_tokens=len(asked), limit=limit, more=most is None and not is_whole)
        return asked[:limit]

    def _starts(self, n_tokens: int, room: int) -> list[int]:
        """Where the windows begin that a document of so many tokens is read in."""
        if n_tokens <= room or (overlap := self.spec.window_overlap) is None:
            return [0]
        return [*range(0, n_tokens - room, room - min(overlap, room // 2)), n_tokens - room]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The logit of each row, float32 `[1]`."""
        packed, order = pack_items(items, self.transformer.device)
        if self.typed:
            packed = self._typed(packed, [int(items[place].features["second"]) for place in order])
        with torch.inference_mode():
            logits = self.head(self.transformer, packed).cpu().numpy()
        return unsort(logits, order)

    def _typed(self, packed: Packed, seconds: Sequence[int]) -> Packed:
        """The batch with the tokens of each row from its `second`-th on of type 1."""
        bounds = [
            (start + second, stop) for (start, stop), second in zip(pairwise(packed.bounds), seconds, strict=True)
        ]
        return replace(
            packed, spans=tuple(Span(_SECOND, *bound, window=bound) for bound in bounds if bound[0] < bound[1])
        )

    def finish(self, call: Rerank, items: Sequence[Item], arrays: Sequence[Array]) -> Ranking:
        """The best score of each document's windows; equal documents have equal scores."""
        place_of = {text: place for place, text in enumerate(dict.fromkeys(call.documents))}
        rows = np.array([int(item.features["document"]) for item in items])
        best = np.full(len(place_of), -np.inf)
        np.maximum.at(best, rows, np.concatenate(arrays).astype(np.float64))
        places = [place_of[text] for text in call.documents]
        scores = 0.5 + 0.5 * np.tanh(0.5 * best[places])  # sigmoid, which overflows nowhere so
        return Ranking(scores=scores)


def load(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    kind: HeadKind,
    *,
    prefixes: Sequence[str],
    unused: str,
    padding: int | None = None,
) -> CrossEncoder:
    """Read the weights and put the cross-encoder together.

    Args:
        checkpoint: where the files are.
        spec: what the catalogue says of the model.
        placement: where the weights go.
        shape: of the encoder.
        layout: where each of its modules' tensors are.
        kind: what the head is.
        prefixes: what the encoder's tensor names may begin with.
        unused: a pattern of tensor names that are known and not needed.
        padding: see `CrossEncoder`.

    Raises:
        CheckpointError: the checkpoint does not fit, is no sequence classifier, or tells several labels apart.
    """
    head = load_head(checkpoint, shape, placement, kind)
    weights = checkpoint.read(
        parameters(shape),
        layout,
        placement,
        prefixes=prefixes,
        ignored="|".join([unused, *map(re.escape, kind.tensors.values())]),
    )
    adapters = [second_type(weights["types.weight"])] if shape.n_types > 1 else []
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    return CrossEncoder(tokenizer, Transformer(shape, weights, adapters), head, spec, padding)


def second_type(types: Tensor) -> Adapter:
    """What makes tokens of type 0 tokens of type 1, where a model's rows are pairs.

    Args:
        types: the embeddings of the types, `[types, hidden]`.
    """
    change = (types[1].float() - types[0].float()).to(types.dtype)
    return {"types": LowRank(change[None], (types.new_ones(len(types), 1),))}
