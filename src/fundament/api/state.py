"""What endpoints need and do not make themselves."""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, overload

from fastapi import Request

from fundament.accounts.visits import Accounts
from fundament.catalog import CATALOG, ModelSpec, names, short_id
from fundament.config import Settings
from fundament.core import Bill, Chunk, Embed, Embedded, Generate, Priority, Ranking, Rerank
from fundament.depot import Depot
from fundament.errors import FundamentError, ModelNotFoundError
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
    def generate(self, model: str, call: Generate, *, caller: str = ...) -> AsyncGenerator[Chunk, None]:
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
        fetcher: reads the URLs that callers give.
        depot: where the bytes of jobs and uploads lie.
        wake: tells this process's worker that there is work.
        aliases: other names that callers may say, each with the id of the model that answers.
        n_running: requests that are being answered.
        n_file_bytes: size of the images and other files that requests hold in memory.
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
    depot: Depot
    wake: Callable[[], None] = lambda: None
    aliases: Mapping[str, str] = field(default_factory=dict)
    fetcher: Fetcher = field(default_factory=Fetcher)
    n_running: int = 0
    n_file_bytes: int = 0
    closing: bool = False
    deadline: float | None = None
    _known: Mapping[str, ModelSpec] = field(default_factory=dict, init=False)  # so that not every request asks the disk

    def find(self, model: str) -> ModelSpec:
        """The served model of that name, long or short, or of that alias.

        Raises:
            ModelNotFoundError: with what is served, or how to get the weights.
        """
        answering = self.answering(model)
        if not pick(self._known, answering):
            self._known = self.served()
        if found := pick(self._known, answering):
            return found
        listed = self.listed()
        if (name := short_id(model)) in CATALOG and names(model, CATALOG[name]):
            raise ModelNotFoundError(
                f"Model '{model}' is known, but its weights are not on this machine. "
                f"{CATALOG[name].way_in}. Available models: {listed}."
            )
        raise ModelNotFoundError(f"Model '{model}' not found. Available models: {listed}.")

    def alias(self, model: str) -> str | None:
        """The alias that a caller's name means; None where it means a model's own."""
        return next((name for name in (model, short_id(model)) if name in self.aliases), None)

    def answering(self, model: str) -> str:
        """What an answer calls its model: the caller's own word, or what really answers to an alias."""
        alias = self.alias(model)
        return self.aliases[alias] if alias else model

    def listed(self) -> str:
        """Every name that callers may say, for a sentence."""
        return ", ".join(sorted({*self.served(), *self.aliases}))


def pick(served: Mapping[str, ModelSpec], model: str) -> ModelSpec | None:
    """The served model of that name, as it stands or by the short form of it.

    Another owner's model of the same short name is another model than the catalogue's.
    """
    found = served.get(model) or served.get(short_id(model))
    if found is None or model in served or found.id not in CATALOG or names(model, found):
        return found
    return None


def read_aliases(arguments: Iterable[str], served: Mapping[str, ModelSpec]) -> dict[str, str]:
    """Read `--alias NAME=MODEL`: NAME to the id of the served model that it stands for.

    Raises:
        FundamentError: an alias of no served model, or with the name of one, or given twice.
    """
    aliases: dict[str, str] = {}
    for argument in arguments:
        name, _, target = (part.strip() for part in argument.partition("="))
        if not name or not target:
            raise FundamentError(f"--alias {argument}: write NAME=MODEL, as in --alias my-model={min(served)}")
        name = short_id(name) if short_id(name) in CATALOG else name
        if pick(served, name) is not None:
            raise FundamentError(f"--alias {argument}: '{name}' is itself a served model; choose another name")
        if name in aliases:
            raise FundamentError(f"--alias {argument}: '{name}' is already an alias of '{aliases[name]}'; keep one")
        spec = pick(served, target)
        if spec is None:
            raise FundamentError(
                f"--alias {argument}: '{target}' is not served, so nothing could answer; "
                f"served are {', '.join(sorted(served))}. Add it: --model {target}"
            )
        aliases[name] = spec.id
    return aliases


def state_of(request: Request) -> State:
    """The application's state, from a request."""
    return cast("State", request.app.state.parts)
