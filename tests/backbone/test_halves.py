"""float16 on a CPU: the layers' weights take two bytes a number, and are multiplied in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear, multiplies_halves
from fundament.core import Embed, Generate, Message
from fundament.errors import CheckpointError
from tests.backbone.test_cuda_traced import KINDS, PICTURES, of
from tests.checkpoints.jina_vlm import jina_vlm
from tests.conftest import FLOAT32

HALVES = Placement(torch.device("cpu"), torch.float16)

pytestmark = pytest.mark.skipif(not multiplies_halves(), reason="this CPU has no products of float16 weights")


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_as_in_float32_but_for_the_rounding_of_its_weights(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    directory = kind.write(tmp_path)
    exact, halved = kind.load(directory, FLOAT32), kind.load(directory, HALVES)
    assert halved.n_bytes < exact.n_bytes
    errors, sizes = 0.0, 0.0
    for call in kind.calls:
        items = exact.prepare(call)
        for mate in dict.fromkeys(item.mate for item in items):
            rows = [item for item in items if item.mate == mate]
            for one, other in zip(halved.forward(rows), exact.forward(rows), strict=True):
                assert one.dtype == other.dtype
                if isinstance(call, Embed) and call.output == "sparse":  # rounding decides how many weights there are
                    one, other = (np.bincount(part[0].astype(int), part[1], minlength=1000) for part in (one, other))
                errors, sizes = errors + float(np.square(one - other).sum()), sizes + float(np.square(other).sum())
    assert 0 < errors <= (4e-3) ** 2 * sizes


def test_a_model_that_writes_runs_in_halves(tmp_path: Path) -> None:
    load = of("jina_vlm", context=2048, kind="chat", modalities=("text", "image"))
    directory = jina_vlm(tmp_path)
    talk = Generate(messages=[Message("user", [*PICTURES, "what"])], temperature=0.0)
    model = load(directory, HALVES)
    [row] = model.prepare(talk)
    answer = model.begin(talk, row)  # type: ignore[attr-defined]
    for _ in range(4):
        [chunk] = model.step([answer], [answer.n_ahead])  # type: ignore[attr-defined]
    assert chunk.n_written == 4


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="larger than float16 can hold"):
        Linear(torch.tensor([[70_000.0]]).half())


def test_products_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    weight, bias, x, other = torch.randn(24, 40), torch.randn(24), torch.randn(7, 40), torch.randn(7, 24)
    layer, expected = Linear(weight.half(), bias), x @ weight.half().float().T + bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, "gelu"), torch.nn.functional.gelu(expected))
    torch.testing.assert_close(layer.add(x, other), expected + other)
    torch.testing.assert_close(layer.multiply(x, other), expected * other)
    assert layer.n_bytes == 2 * weight.numel() + 4 * bias.numel()
