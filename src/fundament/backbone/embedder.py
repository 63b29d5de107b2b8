"""A text encoder with a pooling: the model that most families are."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone import chunking
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.dense import Dense, read_dense
from fundament.backbone.device import Placement
from fundament.backbone.joint_rows import joint_items
from fundament.backbone.packed import BASE, Packed
from fundament.backbone.pooling import Pooling, pool, pool_parts, pooled
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.tokenizing import TextTokenizer, check_vocabulary
from fundament.backbone.transformer import Adapter, Shape, Transformer, parameters
from fundament.catalog import ModelSpec, Task
from fundament.core import Array, Embed, Embeddings, Item
from fundament.errors import CheckpointError, Fault, InputError


class TextEmbedder:
    """Texts to dense vectors.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the checkpoint's own.
        pooling: how a row's hidden states become one vector.
        spec: what each task means, and how long a vector is.
        adapters: the place in the transformer of each adapter that the spec's tasks name; `BASE` where its terms are
            merged into the weights. A task whose adapter is not among them is refused.
        dense: layers behind the pooling, in their order.

    Raises:
        CheckpointError: its vectors have another length, its tokenizer more tokens, or parts of a text have vectors,
            and these are not their means.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        transformer: Transformer,
        pooling: Pooling,
        spec: ModelSpec,
        adapters: Mapping[str, int] | None = None,
        dense: Sequence[Dense] = (),
    ) -> None:
        if (dim := len(dense[-1].weight) if dense else transformer.shape.hidden) != spec.dim:
            raise CheckpointError(
                f"a vector of '{spec.id}' has {spec.dim} numbers, one of this checkpoint {dim}; is it another model?"
            )
        if spec.late_chunking and (dense or pooling != "mean"):
            raise CheckpointError(
                f"'{spec.id}' takes the mean, of parts of a text too, and this checkpoint pools '{pooling}'"
                f"{' before a dense layer' if dense else ''}; serve it under a name of its own"
            )
        check_vocabulary(tokenizer, spec, transformer.shape.vocab)
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.pooling: Pooling = pooling
        self.dense = dense
        self.n_bytes = transformer.n_bytes + sum(layer.n_bytes for layer in dense)
        self.spec = spec
        self.adapters: dict[str | None, int] = {None: BASE}
        self.adapters.update(adapters or {})
        self.tasks = {name: task for name, task in spec.tasks.items() if task.adapter in self.adapters}

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text: the task's prompt before it, the task's adapter beside it.

        Raises:
            InputError: a task or an output that this checkpoint does not have.
            TooLongError: a text longer than the context, without `truncate`.
            TooLongTogetherError: the same of texts that are read as one.
        """
        if call.output != "dense":
            message = f"This checkpoint of '{self.spec.id}' has no head for {call.output} vectors: one vector per text."
            raise InputError(Fault("body -> model", message))
        if call.late_chunking:
            return joint_items(self.tokenizer, call, self.prompt_of(call), self.adapter_of(call.task))
        return self.rows(call, dict(enumerate(call.texts)))

    def rows(self, call: Embed, texts: Mapping[int, str]) -> list[Item]:
        """One row per text, each read alone.

        Args:
            call: what is asked of them.
            texts: some of the call's inputs, by their places.

        Raises:
            InputError: a task that this checkpoint does not have, or a text without tokens.
            TooLongError: a text longer than the context, without `truncate`.
        """
        adapter = np.array(self.adapter_of(call.task))
        items = []
        for tokens in self.tokenizer.read(texts, self.prompt_of(call), truncate=call.truncate):
            features, n = {"ids": tokens.ids, "adapter": adapter}, len(tokens.ids)
            items.append(Item(features=features, n_tokens=n, n_counted=tokens.n_own, n_truncated=tokens.truncated))
        return items

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """One float32 vector `[dim]` per row; of a row of parts, one per part, `[parts, dim]`."""
        if self.pooling == "mean":
            return self.pool(items, *self.run(items))
        packed, order = pack_items(items, self.transformer.device)
        with torch.inference_mode():
            vectors = self._condense(pooled(self.transformer, packed, self.pooling)).cpu().numpy()
        return unsort(vectors, order)

    def run(self, items: Sequence[Item]) -> tuple[Packed, list[int], Tensor]:
        """The batch, the place of each of its rows in `items`, and its states `[tokens, hidden]`."""
        packed, order = pack_items(items, self.transformer.device)
        return packed, order, self.transformer(packed)

    def pool(self, items: Sequence[Item], packed: Packed, order: Sequence[int], hidden: Tensor) -> list[Array]:
        """What `forward` gives, of what `run` gave."""
        with torch.inference_mode():
            vectors = self._condense(pool(hidden, packed, self.pooling)).cpu().numpy()
            arrays: list[Array] = unsort(vectors, order)
            borders: dict[int, Array] = {}
            for row, place in enumerate(order):
                if (parts := items[place].features.get("borders")) is not None:
                    borders[place] = parts + packed.bounds[row]
            for place, means in zip(borders, pool_parts(hidden, [*borders.values()]), strict=True):
                arrays[place] = means
        return arrays

    def _condense(self, vectors: Tensor) -> Tensor:
        for layer in self.dense:
            vectors = layer(vectors)
        return vectors

    def adapter_of(self, task: str | None) -> int:
        """The place of a task's adapter in the transformer, or `BASE`.

        Raises:
            InputError: a task that this checkpoint does not have.
        """
        return self.adapters[self._task(task).adapter]

    def prompt_of(self, call: Embed) -> str:
        """What goes before each text: the caller's instruction as the model is given one, else the task's prompt.

        Raises:
            InputError: a task that this checkpoint does not have.
        """
        task = self._task(call.task)
        return task.prompt if call.instruction is None else self.spec.instruct.format(call.instruction)

    def _task(self, name: str | None) -> Task:
        if name is None or not self.spec.tasks:
            return Task()
        if name not in self.tasks:
            listed = ", ".join(f"'{task}'" for task in self.tasks)
            known = self.spec.tasks.get(name)
            why = f": this checkpoint lacks its adapter '{known.adapter}'" if known else ""
            message = f"Model '{self.spec.id}' takes {listed or 'no task'} here, not '{name}'{why}."
            raise InputError(Fault("body -> task", message, "enum", name))
        return self.tasks[name]

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> Embeddings:
        """The vectors of one call, in its order; with late chunking one per part."""
        if not call.late_chunking:
            return Embeddings(vectors=np.stack(arrays))
        rows = [(item.features["parts"], item.features["borders"]) for item in items]
        n_parts = 1 + max(int(parts[-1]) for parts, _ in rows)
        return Embeddings(
            vectors=chunking.merge(n_parts, [(*row, array) for row, array in zip(rows, arrays, strict=True)])
        )


def load(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    pooling: Pooling,
    *,
    unused: str,
    prefixes: Sequence[str] = ("",),
    adapters: tuple[Sequence[Adapter], Mapping[str, int]] = ((), {}),
) -> TextEmbedder:
    """Read the weights and put the text encoder together, with the dense layers that `modules.json` names.

    Args:
        checkpoint: where the files are.
        spec: what the catalogue says of the model.
        placement: where the weights go.
        shape: what to build.
        layout: where each module's tensors are.
        pooling: how a row's hidden states become one vector.
        unused: a pattern of tensor names that are known and not needed.
        prefixes: what the tensor names may begin with.
        adapters: what rows may ask for, and the place of each by its name.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    weights = checkpoint.read(parameters(shape), layout, placement, prefixes=prefixes, ignored=unused)
    terms, places = adapters
    return TextEmbedder(
        TextTokenizer(checkpoint.directory, spec.context),
        Transformer(shape, weights, terms),
        pooling,
        spec,
        places,
        read_dense(checkpoint, shape.hidden, placement),
    )
