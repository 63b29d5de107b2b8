"""Cross-encoders: a query and a document read as one text, whose first token says how well they go together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import LowRank
from fundament.backbone.packed import Packed, Span, pack
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.transformer import Adapter, Shape, Transformer
from fundament.catalog import ModelSpec
from fundament.core import Array, Item, Ranking, Rerank
from fundament.errors import CheckpointError, TooLongError

# Tensor names of the head: of BERT's sequence classifiers the layer that pools lies in the encoder, of RoBERTa's not.
BERT_HEAD: dict[str, Source] = {"dense": "pooler.dense", "out": "classifier"}
ROBERTA_HEAD: dict[str, Source] = {"dense": "classifier.dense", "out": "classifier.out_proj"}
HEADS = r"classifier\.(dense\.|out_proj\.)?(weight|bias)"
"""A pattern of the names that no encoder has."""

_SECOND = 0  # place of the adapter that makes a token's type 1


@dataclass(frozen=True, slots=True)
class Head:
    """`out(tanh(dense(first token)))`, in float32 whatever the encoder's format is.

    Attributes:
        dense: `[hidden, hidden]` and `[hidden]`.
        out: `[1, hidden]` and `[1]`.
    """

    dense: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    def __call__(self, first: Tensor) -> Tensor:
        """`[rows, hidden]` to logits, float32 `[rows, 1]`."""
        return F.linear(F.linear(first.float(), *self.dense).tanh_(), *self.out)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (*self.dense, *self.out))


class CrossEncoder:
    """A query and documents to the probability that each document answers the query.

    Equal documents are read once. A document longer than the room beside its query is cut, or read in windows whose
    best score counts, as the catalogue says of the model.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the checkpoint's own; it has `second_type` as its adapter where its tokens have types.
        head: from a pair's first token to its logit.
        spec: how long a pair may be, and how windows overlap.
    """

    def __init__(self, tokenizer: TextTokenizer, transformer: Transformer, head: Head, spec: ModelSpec) -> None:
        self.tokenizer, self.transformer, self.head, self.spec = tokenizer, transformer, head, spec
        self.frame = tokenizer.pair_frame()
        self.typed = transformer.shape.n_types > 1
        self.n_bytes = transformer.n_bytes + head.n_bytes

    def prepare(self, call: Rerank) -> list[Item]:
        """One row per different document, or per window of one.

        Raises:
            TooLongError: a query or a document longer than what is read, without `truncate`.
        """
        frame, context = self.frame, self.spec.context
        asked_query, documents = call.texts
        query = self._query(call, asked_query, (context - frame.n_special) // 2)
        room = context - frame.n_special - len(query)
        items = []
        different = list(dict.fromkeys(documents))
        for place, ids in enumerate(self.tokenizer.pieces(different)):
            most = len(ids) if call.max_document_tokens is None else call.max_document_tokens
            if len(asked := ids[:most]) > room and self.spec.window_overlap is None and not call.truncate:
                name = f"Document {documents.index(different[place])}"
                raise TooLongError(name, n_tokens=len(asked), limit=room)
            starts = self._starts(len(asked), room)
            n_read = min(len(asked), starts[-1] + room)
            for start in starts:
                row, second = frame.join(query, asked[start : start + room])
                features = {"ids": row, "second": np.array(second), "document": np.array(place)}
                first = start == 0  # what windows share is counted once
                items.append(
                    Item(
                        features=features,
                        n_tokens=len(row),
                        n_counted=frame.n_special + len(query) + n_read if first else 0,
                        truncated=first and n_read < len(ids),
                    )
                )
        return items

    def _query(self, call: Rerank, text: str, limit: int) -> Array:
        """The query's ids; half the context at most, so that documents keep the other half."""
        [ids] = self.tokenizer.pieces([text])
        asked = ids if call.max_query_tokens is None else ids[: call.max_query_tokens]
        if len(asked) > limit and not call.truncate:
            raise TooLongError("The query", n_tokens=len(asked), limit=limit)
        return asked[:limit]

    def _starts(self, n_tokens: int, room: int) -> list[int]:
        """Where the windows begin that a document of so many tokens is read in."""
        if n_tokens <= room or (overlap := self.spec.window_overlap) is None:
            return [0]
        return [*range(0, n_tokens - room, room - min(overlap, room // 2)), n_tokens - room]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The logit of each row, float32 `[1]`."""
        rows = [item.features["ids"] for item in items]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        packed = pack([rows[place] for place in order], self.transformer.tokens.device)
        if self.typed:
            packed = self._typed(packed, [int(items[place].features["second"]) for place in order])
        with torch.inference_mode():
            hidden = self.transformer(packed)
            logits = self.head(hidden[packed.offsets[:-1]]).cpu().numpy()
        arrays: list[Array] = [logits[0]] * len(rows)
        for row, place in enumerate(order):
            arrays[place] = logits[row]
        return arrays

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
        return Ranking(
            scores=(0.5 + 0.5 * np.tanh(0.5 * best[places])).astype(np.float32),  # sigmoid, which overflows nowhere so
            n_tokens=sum(item.n_counted for item in items),
            n_truncated=sum(item.truncated for item in items),
        )


def load_head(checkpoint: Checkpoint, shape: Shape, placement: Placement, prefixes: Sequence[str]) -> Head:
    """Read the head of a sequence classifier.

    Args:
        checkpoint: where the files are.
        shape: of the encoder.
        placement: where the weights go.
        prefixes: what the encoder's tensor names may begin with.

    Raises:
        CheckpointError: no head, or one that tells several labels apart.
    """
    layout = head_layout(checkpoint, prefixes)
    n_labels = checkpoint.shape(f"{layout['out']}.weight")[0] if f"{layout['out']}.weight" in checkpoint.names else 1
    if n_labels != 1:
        raise CheckpointError(
            f"{checkpoint.directory} tells {n_labels} labels apart; what ranks has one, whose probability is the score"
        )
    sizes = {
        "dense.weight": (shape.hidden, shape.hidden),
        "dense.bias": (shape.hidden,),
        "out.weight": (1, shape.hidden),
        "out.bias": (1,),
    }
    # The encoder's tensors are ignored here, and the head's where the encoder is read.
    found = checkpoint.read(sizes, layout, device=placement.device, dtype=torch.float32, ignored=".*")
    return Head(*((found[f"{name}.weight"], found[f"{name}.bias"]) for name in layout))


def head_layout(checkpoint: Checkpoint, prefixes: Sequence[str]) -> dict[str, Source]:
    """Where the head's two layers are; the encoder's names have the longest of the prefixes that fits."""
    if "classifier.out_proj.weight" in checkpoint.names:
        return ROBERTA_HEAD
    found = [prefix for prefix in prefixes if f"{prefix}pooler.dense.weight" in checkpoint.names]
    return BERT_HEAD | {"dense": f"{max(found, key=len, default=prefixes[-1])}pooler.dense"}


def is_classifier(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the head of a sequence classifier."""
    return any(name in checkpoint.names for name in ("classifier.weight", "classifier.out_proj.weight"))


def second_type(types: Tensor) -> Adapter:
    """What makes tokens of type 0 tokens of type 1, where a model's rows are pairs.

    Args:
        types: the embeddings of the types, `[types, hidden]`.
    """
    change = (types[1].float() - types[0].float()).to(types.dtype)
    return {"types": LowRank(change[None], (types.new_ones(len(types), 1),))}
