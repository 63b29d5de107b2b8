"""An embedder on a language model that reads pictures: one vector per input, or one per token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament import media
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import Linear
from fundament.backbone.mixed import count_all, rows_in_order
from fundament.backbone.packed import BASE, Packed, Span
from fundament.backbone.picture_prompt import Prompt
from fundament.backbone.pooling import pool_parts
from fundament.backbone.rows import unsort
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.vision_language import VisionLanguage
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Embeddings, Item, Media, MultiVectors
from fundament.errors import Fault, InputError

BEFORE, AFTER = "<|im_start|>user\n", "Describe the image.<|im_end|>\n"
"""What stands around a picture, whatever the task (jina-embeddings-v4)."""


class VisionEmbedder:
    """Texts and images to dense vectors, or to one vector per token.

    A text's vector is the mean over all its tokens, a picture's over its own and the two marks around them.

    Args:
        tokenizer: the checkpoint's own.
        model: the checkpoint's own.
        projector: from a token's state to its vector.
        prompt: how rows with pictures are put together.
        spec: what each task means.
        adapters: the place in the model and in the projector of each adapter that the spec's tasks name.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        model: VisionLanguage,
        projector: Linear,
        prompt: Prompt,
        spec: ModelSpec,
        adapters: Mapping[str, int],
    ) -> None:
        self.text = TextEmbedder(tokenizer, model.transformer, "mean", spec, adapters)
        self.model, self.projector, self.prompt, self.spec = model, projector, prompt, spec
        self.n_bytes = model.n_bytes + projector.n_bytes

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text, image and page: the task's prompt before a text, the task's adapter beside either.

        Raises:
            InputError: an input that this model cannot read.
            TooLongError: a text longer than the context, without `truncate`.
            TooLongTogetherError: the same of texts that are read as one.
        """
        if call.late_chunking:
            for value in call.inputs:
                if isinstance(value, Media):
                    message = "Late chunking reads all inputs as one text; leave it out to embed images."
                    raise InputError(Fault("body -> late_chunking", message))
            return self.text.prepare(call)
        rows = rows_in_order(
            call, lambda texts: count_all(self.text.rows(call, texts)), lambda file: self._read(call, file)
        )
        return rows if call.output == "dense" else _mated(rows, call.output)

    def _read(self, call: Embed, file: Media) -> list[Item]:
        adapter = np.array(self.text.adapter_of(call.task))
        rows = []
        for picture in media.pictures(file):
            features, slots = self.prompt.read([BEFORE, self.prompt.sizes.patches(picture, file.origin), AFTER])
            [slot] = slots
            n = len(features["ids"])
            if n > self.spec.context:
                message = f"This image has {n} tokens and exceeds the model's maximum of {self.spec.context} tokens."
                raise InputError(Fault(file.origin, message, "image"))
            features |= {"adapter": adapter, "pooled": np.array([slot.start - 1, slot.stop + 1])}
            if call.output == "dense":  # no token that is pooled sees those after the picture
                features["ids"] = features["ids"][: slot.stop + 1]
            cost = len(features["ids"]) + self.prompt.sizes.n_patches(slots)
            rows.append(Item(features=features, n_tokens=cost, n_counted=n, n_media={"image": slot.stop - slot.start}))
        return rows

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """Per row: a vector `[dim]`; of a row of parts one each; or of unit length one per token, `[tokens, dim]`."""
        with torch.inference_mode():
            packed, order, hidden = self.model(items)
            bounds = [*pairwise(packed.bounds)]
            if items[0].mate == "multi":
                vectors = self._project(hidden, packed).cpu().numpy()
                found = [vectors[start:stop] for start, stop in bounds]
            else:
                rows = [items[place].features for place in order]
                borders = [_borders(row, *bound) for row, bound in zip(rows, bounds, strict=True)]
                means = pool_parts(hidden, borders)
                found = [mean if "borders" in row else mean[0] for row, mean in zip(rows, means, strict=True)]
        return unsort(found, order)

    def _project(self, hidden: Tensor, packed: Packed) -> Tensor:
        """Each token's vector, float32 `[tokens, dim]`."""
        parts, done = [], 0
        for span in (*packed.spans, Span(BASE, len(hidden), len(hidden), (0, 0))):
            if done < span.start:
                parts.append(self.projector(hidden[done : span.start]))
            if span.start < span.stop:
                n = span.stop - span.start
                parts.append(self.projector(hidden[span.start : span.stop], spans=[Span(span.adapter, 0, n, (0, n))]))
            done = span.stop
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> Embeddings | MultiVectors:
        """The vectors of one call, in its order; with late chunking one per part."""
        if call.output == "dense":
            return self.text.finish(call, items, arrays)
        names = [self.text.tokenizer.tokens_of(item.features["ids"]) for item in items] if call.name_tokens else None
        return MultiVectors(vectors=arrays, tokens=names)


def _borders(features: dict[str, Array], start: int, stop: int) -> Array:
    """Where in its batch each part of a row begins that becomes a vector, and the end; it lies in `start:stop`."""
    parts = features.get("borders", features.get("pooled"))
    return np.array([start, stop]) if parts is None else parts + start


def _mated(rows: Sequence[Item], output: str) -> list[Item]:
    """Rows that share a batch with their like only; what was one object stays one."""
    mated = {id(row): replace(row, mate=output) for row in rows}
    return [mated[id(row)] for row in rows]
