"""Queries, keys and values that a checkpoint has apart, the keys without a bias: Whisper's and EVA02's."""

import torch
from torch import Tensor

from fundament.backbone.checkpoint import Weights
from fundament.backbone.transformer import Shape, parameters


def apart(shape: Shape) -> dict[str, tuple[int, ...]]:
    """What `parameters` names, as the checkpoint has it: `layers.0.q.weight` to `layers.0.v.bias`."""
    names = parameters(shape)
    for i in range(shape.n_layers):
        layer = f"layers.{i}"
        del names[f"{layer}.qkv.weight"], names[f"{layer}.qkv.bias"]
        for part, width in zip("qkv", shape.qkv_widths, strict=True):
            names[f"{layer}.{part}.weight"] = (width, shape.hidden)
        names[f"{layer}.q.bias"] = names[f"{layer}.v.bias"] = (shape.qkv_widths[0],)
    return names


def together(shape: Shape, read: Weights, order: Tensor | slice = slice(None)) -> Weights:
    """What was read of a checkpoint, with what `parameters` names.

    Args:
        shape: of the transformer.
        read: what `apart` names, and others.
        order: in which queries and keys are laid.
    """

    def one(name: str) -> Tensor:
        layer, qkv, kind = name.partition(".qkv.")
        if not qkv:
            return read[name]
        if kind == "weight":
            q, k, v = (read[f"{layer}.{part}.weight"] for part in "qkv")
        else:
            q, v = read[f"{layer}.q.bias"], read[f"{layer}.v.bias"]
            k = torch.zeros_like(q)
        return torch.cat((q[order], k[order], v))

    return Weights({*read, *parameters(shape)}, one)
