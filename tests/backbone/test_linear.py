"""The linear layer, with and without adapters, against the plain product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone import linear
from fundament.backbone.linear import Activation, Linear, LowRank
from fundament.backbone.packed import Span

# Tokens 0, 1 and 9 use the base weights; windows reach into neighbours before, after, both and neither.
SPANS = (Span(1, 2, 4, (1, 7)), Span(1, 4, 5, (4, 10)), Span(0, 5, 6, (5, 6)), Span(2, 6, 9, (0, 9)))
BLOCKS = (6, 4, 2)


@pytest.fixture(params=[True, False], ids=["prepacked", "plain"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Linear, Tensor, Tensor]:
    """A layer of three adapters (one block, three blocks, none), ten tokens, and each token's whole weight."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: request.param)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(10, 8)
    one = LowRank(torch.randn(2, 8), (torch.randn(12, 2),))
    three = LowRank(torch.randn(6, 8), tuple(torch.randn(n, 2) for n in BLOCKS))
    whole = weight.repeat(10, 1, 1)
    whole[2:5] += torch.cat([up @ down for up, down in zip(three.ups, three.down.split(2), strict=True)])
    whole[5:6] += one.ups[0] @ one.down
    layer = Linear(weight, bias, [one, three, None])
    assert layer.prepacked is request.param
    return layer, x, torch.einsum("toi,ti->to", whole, x) + bias


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu", "tanh"])
def test_each_token_has_its_adapters_weight(
    parts: tuple[Linear, Tensor, Tensor], activation: Activation | None
) -> None:
    layer, x, expected = parts
    references = {"gelu": F.gelu, "gelu_tanh": tanh_gelu, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh}
    expected = references[activation](expected) if activation else expected
    torch.testing.assert_close(layer(x, activation, SPANS), expected, atol=1e-5, rtol=1e-5)


def test_a_neighbour_that_is_no_number_stays_alone(parts: tuple[Linear, Tensor, Tensor]) -> None:
    layer, x, expected = parts
    x[5] = torch.nan
    others = [row for row in range(10) if row != 5]
    torch.testing.assert_close(layer(x, None, SPANS)[others], expected[others], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused_bytes", [linear._FUSED_BYTES, 0], ids=["fused", "apart"])
def test_sums_and_products_with_adapters(
    parts: tuple[Linear, Tensor, Tensor], fused_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_FUSED_BYTES", fused_bytes)
    layer, x, expected = parts
    other = torch.randn(10, 12)
    kept = other.clone()
    torch.testing.assert_close(layer.add(x, other, SPANS), expected + kept, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.multiply(x, other, SPANS), expected * kept, atol=1e-5, rtol=1e-5)
    assert torch.equal(other, kept)


def test_an_adapter_that_leaves_the_layer_alone_changes_nothing(parts: tuple[Linear, Tensor, Tensor]) -> None:
    layer, x, _ = parts
    other, spans = torch.randn(10, 12), (Span(2, 0, 10, (0, 10)),)
    assert torch.equal(layer(x, "silu", spans), layer(x, "silu"))
    assert torch.equal(layer.add(x, other, spans), layer.add(x, other))
    assert torch.equal(layer.multiply(x, other, spans), layer.multiply(x, other))


def test_bfloat16_runs_where_onednn_has_no_products_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    weight, x = torch.eye(4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    layer = Linear(weight)
    assert not layer.prepacked
    torch.testing.assert_close(layer(x, "relu"), x)
