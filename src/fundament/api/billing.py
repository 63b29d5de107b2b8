"""The engine as endpoints have it: what runs is billed to the request that asks, whichever endpoint that is."""

from typing import Any, Protocol

from fundament.accounts.visits import current_visit
from fundament.core import Bill, Priority


class Payable(Protocol):
    """An engine that takes a bill."""

    async def run(
        self, model: str, call: Any, *, priority: Priority = ..., caller: str = ..., bill: Bill | None = ...
    ) -> Any:
        """Answer a call that `bill` pays."""
        ...


class BilledEngine:
    """An engine that knows its caller.

    Args:
        engine: what runs the calls.
    """

    def __init__(self, engine: Payable) -> None:
        self._engine = engine

    async def run(self, model: str, call: Any, *, priority: Priority = Priority.INTERACTIVE, caller: str = "") -> Any:
        """Answer a call for the request that runs; outside of one, for `caller`, and nobody pays."""
        visit = current_visit.get()
        if visit is None:
            return await self._engine.run(model, call, priority=priority, caller=caller)
        return await self._engine.run(
            model, call, priority=priority, caller=caller or visit.caller.id, bill=visit.bill(model)
        )
