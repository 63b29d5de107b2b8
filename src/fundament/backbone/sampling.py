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

    def draw(self, scores: Tensor) -> Tensor:
        """A token's id, int64 `[]`, which stays on the device; `scores` is float32 `[vocabulary]`."""
        scores = (scores - scores.max()) / max(self.temperature, _LEAST_TEMPERATURE)
        probabilities, ids = torch.softmax(scores, dim=-1).sort(descending=True, stable=True)
        sums = probabilities.double().cumsum(dim=-1)
        last = (sums < self.top_p).sum().clamp(max=len(ids) - 1)[None]  # of the nucleus
        place = torch.searchsorted(sums, self.random.random() * sums.gather(0, last), right=True)
        return ids.gather(0, place.minimum(last))[0]


def choose(scores: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row; `scores` is float32 `[rows, vocabulary]`. The host waits for all of them once."""
    chosen = [
        sampler.draw(row) if sampler.temperature > 0 else first
        for sampler, row, first in zip(samplers, scores, scores.argmax(dim=-1), strict=True)
    ]
    tokens: list[int] = torch.stack(chosen).tolist()
    return tokens
