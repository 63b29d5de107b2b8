"""What a batch job takes from its key's minute: as much as there is room for, and never twice for the same lines."""

import math
from dataclasses import dataclass

from fundament.config import Tier
from fundament.errors import LimitError
from fundament.limits import Limits


@dataclass(slots=True)
class Toll:
    """The bill of one chunk of lines, which may be tried several times; see `Bill`.

    Attributes:
        limits: what counts the last minute.
        key_id: whose minute it is.
        tier: the key's limits.
        n_admitted: tokens that the minute has given for the chunk, over all tries.
        n_asked: tokens that this try has asked for.
    """

    limits: Limits
    key_id: str
    tier: Tier
    n_admitted: int = 0
    n_asked: int = 0

    async def admit(self, n_tokens: int) -> None:
        """Take what the minute has not given before; where it has not enough, all that it has.

        So a chunk of more tokens than a minute may have is paid over several, and callers who leave a little room at a
        time do not keep it waiting for ever.

        Raises:
            LimitError: something is missing; says when to try again.
        """
        self.n_asked += n_tokens
        limit = self.tier.tokens_per_minute
        while limit and (n_missing := self.n_asked - self.n_admitted) > 0:
            part = min(n_missing, limit)
            standing = await self.limits.spend(self.key_id, self.tier, part)
            if standing.refused and (part := limit - standing.n_tokens) > 0:
                standing = await self.limits.spend(self.key_id, self.tier, part)
            if standing.refused:
                raise LimitError(
                    "RATE_TOKEN_LIMIT_EXCEEDED",
                    f"The key's minute has no room for {n_missing:,} tokens more.",
                    retry_after_seconds=max(1, math.ceil(standing.wait_seconds)),
                )
            self.n_admitted += part

    def refund(self, n_tokens: int) -> None:
        """Rows that failed are asked for again, one by one; the minute's tokens stay taken."""
        self.n_asked -= n_tokens
