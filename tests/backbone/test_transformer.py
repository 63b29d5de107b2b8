"""Adapters of the transformer's every module, embeddings included, against merged weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fundament.backbone.linear import LowRank
from fundament.backbone.packed import BASE, edge_of, pack
from fundament.backbone.transformer import Adapter, Shape, Transformer, adaptable, parameters
from fundament.errors import CheckpointError

# As jina-embeddings-v3 is made: rotary positions, one token type, a norm after the embeddings, plain MLP.
SHAPE = Shape(
    vocab=20,
    hidden=16,
    intermediate=24,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    positions="rotary",
    n_types=2,
    embedding_norm=True,
)
CPU = torch.device("cpu")
ROWS = [np.array(ids) for ids in ([1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12, 13])]
ASKED = [0, BASE, 1, BASE, 0]


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.3 for name, shape in parameters(SHAPE).items()}


def random_adapter(seed: int) -> Adapter:
    """A change of every module, of rank 3."""
    draw = torch.Generator().manual_seed(seed)
    return {
        module: LowRank(torch.randn(3, n_in, generator=draw) * 0.3, (torch.randn(n_out, 3, generator=draw) * 0.3,))
        for module, (n_out, n_in) in adaptable(SHAPE).items()
    }


def merged(weights: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    return weights | {
        f"{module}.weight": weights[f"{module}.weight"] + term.ups[0] @ term.down for module, term in adapter.items()
    }


def test_adapters_change_all_modules_but_norms() -> None:
    assert set(adaptable(SHAPE)) == {"tokens", "types"} | {
        f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "out", "up", "down")
    }


def test_rows_of_several_adapters_equal_merged_weights() -> None:
    weights, adapters = random_weights(), [random_adapter(1), random_adapter(2)]
    model = Transformer(SHAPE, weights, adapters)
    states = model(pack(ROWS, CPU, ASKED)).split([len(row) for row in ROWS])
    for row, asked, found in zip(ROWS, ASKED, states, strict=True):
        alone = Transformer(SHAPE, weights if asked == BASE else merged(weights, adapters[asked]))
        torch.testing.assert_close(found, alone(pack([row], CPU)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pre_norm": True, "norm": "rms", "causal": True, "n_kv_heads": 1, "qk_norm": "head", "gated": True},
        {"pre_norm": True, "positions": "rotary", "inner_norms": True, "gated": True},
        {"positions": "alibi", "inner_residual": True, "qk_norm": "all"},
        {"positions": None, "n_buckets": 8, "max_distance": 20, "pre_norm": True, "norm": "rms"},
        {"positions": "absolute", "n_positions": 40, "position_offset": 2, "n_buckets": 8, "max_distance": 20},
        {"causal": True, "window": (None, 3)},
    ],
    ids=["v3", "qwen3", "eva02", "jina-bert", "t5", "mpnet", "window"],
)
def test_an_edge_is_what_all_tokens_become_there(change: dict[str, Any]) -> None:
    shape = replace(SHAPE, **change)
    torch.manual_seed(0)
    weights = {name: torch.randn(size) * 0.3 for name, size in parameters(shape).items()}
    adapters = [
        {
            module: LowRank(torch.randn(3, n_in) * 0.3, (torch.randn(n_out, 3) * 0.3,))
            for module, (n_out, n_in) in adaptable(shape).items()
        }
        for _ in range(2)
    ]
    packed = pack([*ROWS, np.arange(20), np.arange(30) % 20], CPU, [*ASKED, 1, 1])
    model = Transformer(shape, weights, adapters)
    states = model(packed)
    for edge in (edge_of(packed, "first"), edge_of(packed, "last")):
        found = model(packed, edge)
        torch.testing.assert_close(found, states[edge.tokens[: len(found)]], atol=1e-5, rtol=1e-5)
        assert len(found) == len(ROWS) + 2


@pytest.mark.parametrize("module", ["tokens", "types", "layers.1.down"])
def test_an_adapter_may_change_one_module_alone(module: str) -> None:
    weights, adapter = random_weights(), {module: random_adapter(1)[module]}
    found, base, expected = (
        model(pack(ROWS, CPU, [place] * len(ROWS)))
        for model, place in (
            (Transformer(SHAPE, weights, [adapter]), 0),
            (Transformer(SHAPE, weights, [adapter]), BASE),
            (Transformer(SHAPE, merged(weights, adapter)), BASE),
        )
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - base).abs().max() > 1e-2


def test_an_adapter_of_an_unknown_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not have: layers\.7\.up"):
        Transformer(SHAPE, random_weights(), [{"layers.7.up": random_adapter(1)["layers.0.up"]}])
