"""sentence-transformers' dense layers behind the pooling: from a pooled state to a vector of another make and length.

`modules.json` names a folder of each, with a `config.json` and the weights. LaBSE, distiluse and sentence-t5 have one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config
from fundament.backbone.device import Placement
from fundament.backbone.sentence import list_modules
from fundament.errors import CheckpointError

_IDENTITY, _TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
_SIZES = ("in_features", "out_features", "bias")
_SERVED = {  # key → the values that are served; of one that is left out, the first holds
    "activation_function": (_TANH, _IDENTITY),
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
    "use_residual": (False,),
}


@dataclass(frozen=True, slots=True)
class Dense:
    """One layer, in float32 whatever the encoder's format is.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]`; None where it has none.
        bounded: whether tanh follows.
    """

    weight: Tensor
    bias: Tensor | None
    bounded: bool

    def __call__(self, vectors: Tensor) -> Tensor:
        """From `[rows, in]` to `[rows, out]`, both float32."""
        made = F.linear(vectors, self.weight, self.bias)
        return made.tanh() if self.bounded else made

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def read_dim(checkpoint: Checkpoint, hidden: int | None) -> int | None:
    """The length of vectors: what the last dense layer gives, or `hidden` where there is none.

    Raises:
        CheckpointError: see `read_dense`.
    """
    folders = _folders(checkpoint)
    return _read_sizes(checkpoint, folders[-1])[0] if folders else hidden


def read_dense(checkpoint: Checkpoint, hidden: int, placement: Placement) -> Sequence[Dense]:
    """The layers, in their order; none where `modules.json` names none.

    Args:
        checkpoint: where the files are.
        hidden: numbers of a pooled state.
        placement: where the weights go.

    Raises:
        CheckpointError: a layer that does something else, that does not fit, or that stands elsewhere.
    """
    layers: list[Dense] = []
    for name in _folders(checkpoint):
        out, has_bias = _read_sizes(checkpoint, name)
        wanted: dict[str, tuple[int, ...]] = {"linear.weight": (out, hidden)}
        if has_bias:
            wanted["linear.bias"] = (out,)
        folder = Checkpoint(checkpoint.directory / name)
        weights = folder.read(wanted, {"linear": "linear"}, replace(placement, dtype=torch.float32))
        bounded = folder.config.get("activation_function", _TANH) == _TANH
        layers.append(Dense(weights["linear.weight"], weights.get("linear.bias"), bounded))
        hidden = out
    return layers


def _folders(checkpoint: Checkpoint) -> list[str]:
    """The folders of the dense layers, in their order.

    Raises:
        CheckpointError: they stand elsewhere than between the pooling and a normalisation.
    """
    modules = list_modules(checkpoint)
    layers = [module for module in modules if module.kind == "Dense"]
    if not layers:
        return []
    path = checkpoint.directory / "modules.json"
    order = " ".join(module.kind for module in modules if module.kind != "Dropout")
    folders = [layer.folder for layer in layers]
    if not re.fullmatch("Transformer Pooling( Dense)+( Normalize)?", order) or not all(folders):
        raise CheckpointError(
            f"{path}: Dense is served in a folder of its own, behind Pooling and before Normalize; it says {order}"
        )
    if other := [layer.type for layer in layers if not layer.type.startswith("sentence_transformers.")]:
        raise CheckpointError(
            f"{path}: {', '.join(other)} is not sentence-transformers' own Dense, so it is not served"
        )
    return folders


def _read_sizes(checkpoint: Checkpoint, name: str) -> tuple[int, bool]:
    """How many numbers a layer gives, and whether it has a bias.

    Raises:
        CheckpointError: sizes that are none, or a key that would change vectors in a way that is not served.
    """
    where = f"{name}/config.json"
    told = Config(checkpoint.json(where), str(checkpoint.directory / where))
    for key in told.keys() - set(_SIZES):
        if key not in _SERVED or told[key] not in _SERVED[key]:
            raise CheckpointError(f"{told.where}: {key} {told[key]!r} is not served; known are {_SERVED.get(key, ())}")
    out, has_bias = told["out_features"], told.get("bias", True)
    if not isinstance(out, int) or out < 1 or not isinstance(has_bias, bool):
        raise CheckpointError(f"{told.where}: out_features should be a number above 0, and bias true or false")
    return out, has_bias
