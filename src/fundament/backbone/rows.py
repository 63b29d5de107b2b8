"""Running rows for what each token becomes, where an embedder wants what a row becomes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.packed import hide, pack
from fundament.backbone.transformer import Transformer
from fundament.core import Array


def states_of_rows(
    transformer: Transformer,
    rows: Sequence[Array],
    *,
    visible: Sequence[int] = (),
    head: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """What the hidden states of each row become, `[tokens, …]`, in the given order.

    Args:
        transformer: what runs.
        rows: token ids of each row.
        visible: how many of each row's tokens, from the first, are attended to; left out, all are.
        head: what hidden states go through, all rows' together.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    packed = pack([rows[place] for place in order], transformer.tokens.device)
    if any(n < len(row) for n, row in zip(visible, rows, strict=False)):
        packed = hide(packed, [visible[place] for place in order])
    with torch.inference_mode():
        parts = head(transformer(packed)).split([len(rows[place]) for place in order])
    return [parts[row] for row in np.argsort(order)]
