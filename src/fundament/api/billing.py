"""The engine as endpoints have it: what runs is billed to the request that asks, whichever endpoint that is."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fundament.accounts.visits import current_visit
from fundament.core import Bill, Delta, Generate, Priority


class Payable(Protocol):
    """An engine that takes a bill."""

    async def run(
        self, model: str, call: Any, *, priority: Priority = ..., caller: str = ..., bill: Bill | None = ...
    ) -> Any:
        """Answer a call that `bill` pays."""
        ...

    def generate(
        self, model: str, call: Generate, *, caller: str = ..., bill: Bill | None = ...
    ) -> AsyncGenerator[Delta, None]:
        """Answer a conversation that `bill` pays."""
        ...


class BilledEngine:
    """An engine that knows its caller.

    Args:
        engine: what runs the calls.
    """

    def __init__(self, engine: Payable) -> None:
        self._engine = engine

    async def run(
        self,
        model: str,
        call: Any,
        *,
        priority: Priority = Priority.INTERACTIVE,
        caller: str = "",
        bill: Bill | None = None,
    ) -> Any:
        """Answer a call for the request that runs; outside of one for `caller`, and `bill` pays."""
        if visit := current_visit.get():
            caller, bill = caller or visit.caller.id, visit.bill(model)
        return await self._engine.run(model, call, priority=priority, caller=caller, bill=bill)

    def generate(self, model: str, call: Generate) -> AsyncGenerator[Delta, None]:
        """The same of a conversation, piece by piece. Who pays is decided here, not where the pieces are read."""
        if visit := current_visit.get():
            return self._engine.generate(model, call, caller=visit.caller.id, bill=visit.bill(model))
        return self._engine.generate(model, call)
