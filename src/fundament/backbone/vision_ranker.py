"""A reranker on a language model that reads pictures: texts and images on either side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament import media
from fundament.backbone.mixed import Room
from fundament.backbone.picture_prompt import Prompt
from fundament.backbone.rows import unsort
from fundament.backbone.towers.images import Patches
from fundament.backbone.vision_language import VisionLanguage
from fundament.catalog import ModelSpec
from fundament.core import Array, Item, Media, Ranking, Rerank
from fundament.errors import Fault, InputError, TooLongError

BEFORE_DOCUMENT, BEFORE_QUERY = "**Document**:\n", "\n**Query**:\n"
SCORE_TOKEN = 100
"""The id after the prompt, whose state is scored: a word of the vocabulary like any other."""
LOGIT_BIAS = 2.65
"""Taken from every logit before the sigmoid, as the publisher's code does; it moves scores and no document's place."""
MOST_QUERY_TOKENS = 512
_MARGIN_TOKENS = 32  # of a pair's own words and marks, and by how many a text that was cut may grow as it is read again


@dataclass(frozen=True, slots=True)
class Score:
    """Two layers from a state to a logit, float32: `[hidden, hidden]` and `[1, hidden]`, each with its bias."""

    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]

    def __call__(self, states: Tensor) -> Tensor:
        """`[rows, hidden]` to probabilities, float64 `[rows, 1]`, on the CPU."""
        logits = F.linear(F.linear(states.float(), *self.inner).relu_(), *self.outer)
        return torch.sigmoid((logits - LOGIT_BIAS).cpu().double())

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (*self.inner, *self.outer))


@dataclass(frozen=True, slots=True)
class _Side:
    """A query or a document as the prompt takes it."""

    part: str | Patches
    truncated: bool = False


class VisionRanker:
    """A query and documents to a score between zero and one for each document.

    A pair is one row, the document first. Equal documents are read once, and so is a query that is a picture: its first
    row costs what the tower does, the others share the states.

    Args:
        model: the checkpoint's own.
        score: its head.
        prompt: how rows with pictures are put together.
        spec: how long a pair may be.
    """

    def __init__(self, model: VisionLanguage, score: Score, prompt: Prompt, spec: ModelSpec) -> None:
        self.model, self.score, self.prompt, self.spec = model, score, prompt, spec
        self.n_bytes = model.n_bytes + score.n_bytes

    def prepare(self, call: Rerank) -> list[Item]:
        """One row per document; equal ones share it.

        Raises:
            InputError: an image that cannot be read.
            TooLongError: a query or a document longer than what is read, without `truncate`.
        """
        limit = self.spec.context - MOST_QUERY_TOKENS
        query = self._side(call, call.query, "The query", call.max_query_tokens, MOST_QUERY_TOKENS)
        if isinstance(query.part, Patches):  # which may have more tokens than a text, and cannot be cut
            n_picture = math.prod(self.prompt.sizes.grid(query.part))
            limit = max(0, min(limit, self.spec.context - n_picture - _MARGIN_TOKENS))
        room = Room()
        rows: dict[str | Media, Item] = {}
        for place, document in enumerate(call.documents):
            if document not in rows:
                if document == call.query and isinstance(document, Media):
                    side = query
                else:
                    side = self._side(call, document, f"Document {place}", call.max_document_tokens, limit)
                [rows[document]] = room.taken(document, [self._row(side, query, first=not rows)])
        return [rows[document] for document in call.documents]

    def _side(self, call: Rerank, value: str | Media, name: str, asked: int | None, limit: int) -> _Side:
        """One side of a pair: so many tokens of a text as are `asked` for, and no more than the `limit`.

        Cut text is read as text again, since it meets the prompt's words in one string.
        """
        if isinstance(value, Media):
            if value.kind != "image":
                raise InputError(Fault(value.origin, "This is no image. Send a PDF's pages as images."))
            [picture] = media.pictures(value)
            return _Side(self.prompt.sizes.patches(picture, value.origin))
        [(ids, is_whole)] = self.prompt.tokenizer.first_pieces([value], limit if asked is None else asked)
        wanted = ids[:asked]
        if len(wanted) > limit and not call.truncate:
            raise TooLongError(name, n_tokens=len(wanted), limit=limit, more=asked is None and not is_whole)
        if (n := min(len(wanted), limit)) == len(ids):
            return _Side(value)
        return _Side(self.prompt.tokenizer.text_of(ids[:n]), truncated=True)

    def _row(self, document: _Side, query: _Side, *, first: bool) -> Item:
        parts: list[str | Patches] = [BEFORE_DOCUMENT, document.part, BEFORE_QUERY, query.part]
        features, slots = self.prompt.read(_joined(parts))
        ids, most = features["ids"], self.spec.context - 1
        n = min(len(ids), most)
        if slots and slots[-1].stop >= n:
            raise TooLongError("A pair with images", n_tokens=len(ids), limit=most)
        features["ids"] = np.append(ids[:most], SCORE_TOKEN)
        new = slots if first or isinstance(query.part, str) else slots[:-1]
        return Item(
            features=features,
            n_tokens=n + 1 + self.prompt.sizes.n_patches(new),
            n_counted=n,
            n_truncated=document.truncated or n < len(ids),
            n_media={"image": sum(slot.stop - slot.start for slot in slots)} if slots else {},
        )

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """The score of each row, float64 `[1]`."""
        with torch.inference_mode():
            packed, order, hidden = self.model(items)
            scores = self.score(hidden[packed.offsets[1:] - 1]).numpy()
        return unsort(scores, order)

    def finish(self, call: Rerank, items: Sequence[Item], arrays: Sequence[Array]) -> Ranking:  # noqa: ARG002
        """The scores of one call's documents, in their order."""
        return Ranking(scores=np.concatenate(arrays))


def _joined(parts: Sequence[str | Patches]) -> list[str | Patches]:
    """Parts with neighbouring texts made one: tokens may reach from one into the next."""
    found: list[str | Patches] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found
