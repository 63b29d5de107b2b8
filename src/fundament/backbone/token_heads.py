"""The heads of bge-m3 (Chen et al., 2024, section 3.2), which make of each token's state a weight and a vector.

They lie beside the backbone's file as `sparse_linear.pt` and `colbert_linear.pt`, each a `weight` and a `bias`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.sparse import heaviest, sparse_vectors
from fundament.core import Array, Embed, Embeddings, Item, MultiVectors, Output, SparseVectors
from fundament.errors import CheckpointError

SPARSE_FILE, MULTI_FILE = "sparse_linear.pt", "colbert_linear.pt"
_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "multi")  # by the number that a row carries
WEIGHTLESS = ("<s>", "</s>", "<pad>", "<unk>")  # tokens that are no words


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer: `weight` `[out, hidden]`, `bias` `[out]`."""

    weight: Tensor
    bias: Tensor

    @torch.inference_mode()
    def of_rows(self, states: Sequence[Tensor]) -> list[Array]:
        """The states of rows, `[tokens, hidden]` each, to float32 `[tokens, out]`."""
        if not states:
            return []
        made = F.linear(torch.cat(list(states)), self.weight, self.bias).float().cpu()
        return [part.numpy() for part in made.split([len(row) for row in states])]


@dataclass(frozen=True, slots=True)
class Heads:
    """One number per token, and one vector."""

    sparse: Head
    multi: Head


class HeadedEmbedder:
    """Texts to dense vectors, to a weight per distinct token, or to one vector per token.

    Args:
        dense: the same checkpoint as an embedder.
        heads: what it has beside the pooling.
    """

    def __init__(self, dense: TextEmbedder, heads: Heads) -> None:
        self.dense, self.heads = dense, heads
        tensors = (heads.sparse.weight, heads.sparse.bias, heads.multi.weight, heads.multi.bias)
        self.n_bytes = dense.n_bytes + sum(tensor.nbytes for tensor in tensors)
        found = (dense.tokenizer.id_of(token) for token in WEIGHTLESS)
        self.weightless = np.array([number for number in found if number is not None])

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text, with what it is to become: rows of all outputs share a batch.

        Raises:
            TooLongError: a text longer than the context, without `truncate`.
        """
        output = np.array(_OUTPUTS.index(call.output))
        items = self.dense.prepare(replace(call, output="dense"))
        return [replace(item, features={**item.features, "output": output}) for item in items]

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """Per row: a vector; or ids over weights, `[2, n]`; or vectors of all tokens but the first, `[tokens, dim]`."""
        outputs = [_OUTPUTS[int(item.features["output"])] for item in items]
        if set(outputs) == {"dense"}:
            return self.dense.forward(items)
        packed, order, hidden = self.dense.run(items)
        arrays = self.dense.pool(items, packed, order, hidden)
        lengths = [stop - start for start, stop in pairwise(packed.bounds)]
        states = dict(zip(order, hidden.split(lengths), strict=True))
        sparse = [place for place, output in enumerate(outputs) if output == "sparse"]
        for place, numbers in zip(sparse, self.heads.sparse.of_rows([states[place] for place in sparse]), strict=True):
            arrays[place] = self._weigh(items[place].features["ids"], numbers[:, 0])
        multi = [place for place, output in enumerate(outputs) if output == "multi"]
        for place, vectors in zip(multi, self.heads.multi.of_rows([states[place] for place in multi]), strict=True):
            arrays[place] = vectors[1:]
        return arrays

    def _weigh(self, ids: Array, weights: Array) -> Array:
        words = ~np.isin(ids, self.weightless)
        return heaviest(ids[words], weights[words])

    def finish(
        self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]
    ) -> Embeddings | MultiVectors | SparseVectors:
        """What one call asked for, in its order."""
        tokenizer = self.dense.tokenizer
        match call.output:
            case "sparse":
                return sparse_vectors(arrays, self.dense.spec, tokenizer)
            case "multi":
                tokens = [tokenizer.tokens_of(item.features["ids"][1:]) for item in items] if call.name_tokens else None
                return MultiVectors(vectors=arrays, tokens=tokens)
            case "dense":
                return self.dense.finish(call, items, arrays)


def has_heads(checkpoint: Checkpoint) -> bool:
    """Whether both heads lie beside the backbone.

    Raises:
        CheckpointError: one does, and the other does not.
    """
    missing = [name for name in (SPARSE_FILE, MULTI_FILE) if not (checkpoint.directory / name).exists()]
    if len(missing) == 1:
        raise CheckpointError(f"{checkpoint.directory} has no {missing[0]}; put it there, or take the other head away")
    return not missing


def read_heads(checkpoint: Checkpoint, hidden: int, placement: Placement) -> Heads | None:
    """Both heads; None where there are none.

    Raises:
        CheckpointError: a file that holds anything else than a linear layer over the hidden states.
    """
    if not has_heads(checkpoint):
        return None
    heads = Heads(*(_read(checkpoint, name, hidden, placement) for name in (SPARSE_FILE, MULTI_FILE)))
    if len(heads.sparse.weight) != 1:
        raise CheckpointError(f"{checkpoint.directory / SPARSE_FILE} should give one number per token")
    return heads


def _read(checkpoint: Checkpoint, name: str, hidden: int, placement: Placement) -> Head:
    path = checkpoint.directory / name
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole file of PyTorch tensors: {error}") from error
    tensors = found if isinstance(found, dict) and found.keys() == {"weight", "bias"} else {}
    shapes = [list(tensor.shape) for tensor in tensors.values() if isinstance(tensor, Tensor)]
    if len(shapes) != len(tensors) or not tensors or list(tensors["weight"].shape) != [len(tensors["bias"]), hidden]:
        raise CheckpointError(f"{path} should hold a weight of the shape [out, {hidden}] and a bias of the shape [out]")
    return Head(*(tensors[key].to(placement.device, placement.states) for key in ("weight", "bias")))
