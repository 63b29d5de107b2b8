"""From scores of tokens to the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_LEAST_TEMPERATURE = 1e-6  # below, the likeliest token has all the probability that float32 can tell


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a row's next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: the share of probability from which tokens are drawn (nucleus sampling, Holtzman et al. 2020).
        random: the row's own, so that its company does not change what is drawn.
    """

    temperature: float
    top_p: float
    random: Random

    def draw(self, scores: Tensor) -> int:
        """A token's id; `scores` is float32 `[vocabulary]`."""
        scores = (scores - scores.max()) / max(self.temperature, _LEAST_TEMPERATURE)
        probabilities, ids = torch.softmax(scores, dim=-1).sort(descending=True, stable=True)
        sums = probabilities.double().cumsum(dim=-1)
        n = min(int((sums < self.top_p).sum()) + 1, len(ids))
        place = int(torch.searchsorted(sums[:n], self.random.random() * float(sums[n - 1]), right=True))
        return int(ids[min(place, n - 1)])


def choose(scores: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row; `scores` is float32 `[rows, vocabulary]`."""
    likeliest = scores.argmax(dim=-1).tolist()
    return [
        sampler.draw(row) if sampler.temperature > 0 else first
        for sampler, row, first in zip(samplers, scores, likeliest, strict=True)
    ]
