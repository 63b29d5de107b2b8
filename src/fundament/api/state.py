"""What endpoints need and do not make themselves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, overload
from weakref import WeakValueDictionary

from fastapi import Request

from fundament.accounts.visits import Accounts
from fundament.aliases import Alias
from fundament.catalog import CATALOG, ModelSpec, find, short_id
from fundament.config import Settings
from fundament.core import Bill, Delta, Embed, Embedded, Generate, Priority, Ranking, Rerank
from fundament.depot import Depot
from fundament.errors import Fault, InputError, ModelNotFoundError, near
from fundament.fetching import Fetcher
from fundament.store.database import Database
from fundament.telemetry import Metrics


class Engine(Protocol):
    """What endpoints see of the engine: `run` answers a call, `generate` piece by piece."""

    @overload
    async def run(
        self, model: str, call: Embed, *, priority: Priority = ..., caller: str = ..., bill: Bill | None = ...
    ) -> Embedded: ...
    @overload
    async def run(self, model: str, call: Rerank, *, priority: Priority = ..., caller: str = ...) -> Ranking: ...
    def generate(self, model: str, call: Generate) -> AsyncGenerator[Delta, None]:
        """Answer a conversation, piece by piece."""
        ...


@dataclass(slots=True)
class State:
    """One application's parts.

    Attributes:
        store: what survives a restart.
        accounts: keys, limits, balances and usage.
        served: the models that callers may name, as they are now.
        not_ready: why the models cannot answer now, or None.
        death: why one of them never will in this process, or None.
        fetcher: reads the URLs that callers give.
        depot: where the bytes of jobs and uploads lie.
        wake: tells this process's worker that there is work.
        aliases: other names that callers may say, each with what it stands for.
        n_running: requests that are being answered.
        n_file_bytes: size of the images and other files that requests hold in memory.
        gates: of each caller whose files are being fetched, how many more may be at once.
        closing: the server is about to end.
        deadline: when what still runs is given up, by `time.monotonic()`; None while nothing ends.
    """

    settings: Settings
    engine: Engine
    store: Database
    accounts: Accounts
    metrics: Metrics
    served: Callable[[], Mapping[str, ModelSpec]]
    not_ready: Callable[[], str | None]
    death: Callable[[], str | None]
    depot: Depot
    wake: Callable[[], None] = lambda: None
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    fetcher: Fetcher = field(default_factory=Fetcher)
    n_running: int = 0
    n_file_bytes: int = 0
    gates: WeakValueDictionary[str, asyncio.Semaphore] = field(default_factory=WeakValueDictionary)
    closing: bool = False
    deadline: float | None = None
    _known: Mapping[str, ModelSpec] = field(default_factory=dict, init=False)  # so that not every request asks the disk

    def find(self, model: str) -> ModelSpec:
        """The served model of that name, long or short, or of that alias.

        Raises:
            ModelNotFoundError: with what is served, or how to get the weights.
        """
        answering = self.answering(model)
        if not find(answering, self._known):
            self._known = self.served()
        if found := find(answering, self._known):
            return found
        listed = self.listed()
        if known := find(model, CATALOG):
            raise ModelNotFoundError(
                f"Model '{model}' is known, but its weights are not on this machine. "
                f"{known.way_in}. Available models: {listed}."
            )
        meant = near(model, {*self.served(), *self.aliases, *CATALOG})
        raise ModelNotFoundError(f"Model '{model}' not found.{meant} Available models: {listed}.")

    def find_embedder(self, model: str) -> ModelSpec:
        """The served model of that name, which turns inputs into vectors.

        Raises:
            ModelNotFoundError: there is none.
            InputError: it does something else.
        """
        spec = self.find(model)
        if spec.kind != "embedding":
            message = f"Model '{spec.id}' is a {spec.kind} model, not an embedding model."
            raise InputError(Fault("body -> model", message))
        return spec

    def cuts(self, asked: bool | None) -> bool:
        """Whether inputs longer than the context are cut: as the request asks, or else as the operator says."""
        return self.settings.truncate if asked is None else asked

    def able(self, test: Callable[[ModelSpec], object]) -> str:
        """The served models that pass a test, for a sentence."""
        return ", ".join(sorted(name for name, spec in self.served().items() if test(spec))) or "none"

    def alias(self, model: str) -> str | None:
        """The alias that a caller's name means; None where it means a model's own."""
        return next((name for name in (model, short_id(model)) if name in self.aliases), None)

    def task_of_alias(self, model: str) -> str | None:
        """The task that a caller's name brings; None where it is no alias, or one without a task."""
        alias = self.alias(model)
        return self.aliases[alias].task if alias else None

    def answering(self, model: str) -> str:
        """What an answer calls its model: the caller's own word, or what really answers to an alias."""
        alias = self.alias(model)
        return self.aliases[alias].model if alias else model

    def listed(self) -> str:
        """Every name that callers may say, for a sentence."""
        return ", ".join(sorted({*self.served(), *self.aliases}))


def state_of(request: Request) -> State:
    """The application's state, from a request."""
    return cast("State", request.app.state.parts)
