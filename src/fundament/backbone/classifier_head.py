"""The heads of transformers' sequence classifiers with one label: from a pair's states to its logit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.linear import Activation, activate
from fundament.backbone.packed import Packed
from fundament.backbone.pooling import Pooling, pool, pooled
from fundament.backbone.transformer import Shape, Transformer
from fundament.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadKind:
    """What transformers' sequence classifiers of one architecture have behind their last states.

    Attributes:
        out: tensor name of the layer that gives a logit per label.
        out_bias: whether it has a bias.
        dense: tensor name of the layer before it; None where there is none.
        activation: of that layer.
        pooling: which states become the pair's.
        late: pool what the dense layer makes of every state, in place of the states.
    """

    out: str
    out_bias: bool = True
    dense: str | None = None
    activation: Activation = "tanh"
    pooling: Pooling = "first"
    late: bool = False

    @property
    def tensors(self) -> dict[str, str]:
        """Names of the head's parameters as they are here, each with its name in the checkpoint."""
        found = {"out.weight": f"{self.out}.weight"}
        if self.out_bias:
            found["out.bias"] = f"{self.out}.bias"
        if self.dense:
            found |= {"dense.weight": f"{self.dense}.weight", "dense.bias": f"{self.dense}.bias"}
        return found


ROBERTA_HEAD = HeadKind(out="classifier.out_proj", dense="classifier.dense")
DISTILBERT_HEAD = HeadKind(out="classifier", dense="pre_classifier", activation="relu")
CAUSAL_HEAD = HeadKind(out="score", out_bias=False, pooling="last")


@dataclass(frozen=True, slots=True)
class Head:
    """From a pair's states to its logit, in float32 whatever the encoder's format is.

    Attributes:
        kind: what it computes.
        out: `[1, hidden]`, and `[1]` or no bias.
        dense: `[hidden, hidden]` and `[hidden]`; None where the kind has no such layer.
    """

    kind: HeadKind
    out: tuple[Tensor, Tensor | None]
    dense: tuple[Tensor, Tensor] | None

    def __call__(self, transformer: Transformer, packed: Packed) -> Tensor:
        """Run a batch of pairs; their logits, float32 `[rows, 1]`."""
        if self.kind.late:  # a mean of logits is the logit of a mean
            return F.linear(pool(self._inner(transformer(packed).float()), packed, self.kind.pooling), *self.out)
        return F.linear(self._inner(pooled(transformer, packed, self.kind.pooling)), *self.out)

    def _inner(self, states: Tensor) -> Tensor:
        return states if self.dense is None else activate(F.linear(states, *self.dense), self.kind.activation)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (*self.out, *(self.dense or ())) if tensor is not None)


def load_head(checkpoint: Checkpoint, shape: Shape, placement: Placement, kind: HeadKind) -> Head:
    """Read the head of a sequence classifier.

    Args:
        checkpoint: where the files are.
        shape: of the encoder.
        placement: where the weights go.
        kind: what it is.

    Raises:
        CheckpointError: no head, or one that tells several labels apart.
    """
    name = kind.tensors["out.weight"]
    n_labels = checkpoint.shape(name)[0] if name in checkpoint.names else 1
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
    wanted = {parameter: sizes[parameter] for parameter in kind.tensors}
    # The encoder's tensors are ignored here, and the head's where the encoder is read.
    found = checkpoint.read(wanted, kind.tensors, replace(placement, dtype=torch.float32), ignored=".*")
    return Head(
        kind,
        (found["out.weight"], found["out.bias"] if kind.out_bias else None),
        (found["dense.weight"], found["dense.bias"]) if kind.dense else None,
    )


def bert_head(checkpoint: Checkpoint, prefixes: Sequence[str]) -> HeadKind:
    """The head of one of BERT's descendants: of BERT's own the layer that pools lies in the encoder, of RoBERTa's not.

    The encoder's names have the longest of the prefixes that fits.
    """
    if f"{ROBERTA_HEAD.out}.weight" in checkpoint.names:
        return ROBERTA_HEAD
    found = [prefix for prefix in prefixes if f"{prefix}pooler.dense.weight" in checkpoint.names]
    return HeadKind(out="classifier", dense=f"{max(found, key=len, default=prefixes[-1])}pooler.dense")


def is_classifier(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the head of a sequence classifier."""
    heads = ("classifier", ROBERTA_HEAD.out, CAUSAL_HEAD.out)
    return any(f"{name}.weight" in checkpoint.names for name in heads)
