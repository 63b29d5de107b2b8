"""Drawing tokens: shares as the scores say, none from beyond the nucleus."""

from collections import Counter
from random import Random

import torch

from fundament.backbone.sampling import Sampler, choose

SCORES = torch.tensor([0.0, 3.0, 1.0, 2.0])


def drawn(temperature: float, top_p: float, n: int = 4000) -> Counter[int]:
    sampler = Sampler(temperature, top_p, Random(3))
    return Counter(int(sampler.draw(SCORES)) for _ in range(n))


def test_no_temperature_takes_the_likeliest() -> None:
    assert choose(torch.stack((SCORES, -SCORES)), [Sampler(0, 1, Random(0))] * 2) == [1, 0]


def test_tokens_come_as_often_as_they_are_probable() -> None:
    found = drawn(0.7, 1.0)
    for token, share in enumerate(torch.softmax(SCORES / 0.7, dim=-1).tolist()):
        assert abs(found[token] / 4000 - share) < 0.03


def test_the_nucleus_is_what_is_drawn_from() -> None:
    shares = torch.softmax(SCORES, dim=-1)
    assert set(drawn(1.0, float(shares[1]) + 0.01)) == {1, 3}
    assert set(drawn(1.0, 0.01)) == {1}
    assert set(drawn(1e-300, 1.0)) == {1}
